//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// exampleDirVar names the directory in which an example has its files.
const exampleDirVar = "ECDYSIS_TEST_EXAMPLE_DIR"

var examples = make(map[string]proctest.Role)

func init() {
	for name, example := range map[string]func(){
		"smallest":     Example,
		"wait":         ExampleUpgrader_Wait,
		"packet":       ExampleUpgrader_ListenPacket,
		"seqpacket":    ExampleUpgrader_ListenSeqpacket,
		"conn":         ExampleUpgrader_AddConn,
		"file":         ExampleUpgrader_AddFile,
		"listener":     ExampleUpgrader_Listener,
		"pair":         ExampleUpgrader_DatagramPair,
		"state":        ExampleUpgrader_State,
		"unregistered": ExampleUpgrader_Unregistered,
		"request":      ExampleRequest,
	} {
		examples[name] = proctest.DefineRole("example "+name, func() {
			address, exampleDir = "127.0.0.1:0", os.Getenv(exampleDirVar)
			socketDir = exampleDir
			example()
		})
	}
}

// An exampleRun is the example and its successors.
type exampleRun struct {
	*proctest.Program
	t    *testing.T
	path string // a link to the program
	dir  string // for its files
}

func runExample(t *testing.T, name string) *exampleRun {
	t.Helper()
	e := newExample(t)
	e.Program = proctest.Run(t, e.command(name))
	return e
}

func newExample(t *testing.T) *exampleRun {
	t.Helper()
	e := &exampleRun{t: t, path: filepath.Join(t.TempDir(), "daemon"), dir: proctest.ShortDir(t)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, e.path); err != nil {
		t.Fatal(err)
	}
	return e
}

// command starts an example by the link, with e's files.
func (e *exampleRun) command(name string) *exec.Cmd {
	cmd := examples[name].Command()
	cmd.Path, cmd.Args[0] = e.path, e.path
	cmd.Env = append(cmd.Env, exampleDirVar+"="+e.dir)
	return cmd
}

func (e *exampleRun) signal(p *os.Process, s os.Signal) {
	e.t.Helper()
	if err := p.Signal(s); err != nil {
		e.t.Fatal(err)
	}
}

// dial connects and asserts that the connection is served.
func (e *exampleRun) dial(addr string) net.Conn {
	e.t.Helper()
	c, err := net.DialTimeout("tcp", addr, proctest.Patience)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	e.echo(c, "hello\n")
	return c
}

func (e *exampleRun) echo(c net.Conn, text string) {
	e.t.Helper()
	if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		e.t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		e.t.Fatal(err)
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != text {
		e.t.Fatalf("sent %q, got %q back: %v", text, back, err)
	}
}

// stop ends p by SIGTERM, which it finishes its client before.
func (e *exampleRun) stop(p *os.Process, client net.Conn) {
	e.t.Helper()
	// A signal to stop is caught once Wait runs. That an upgrade fails for
	// want of a program shows that it does.
	if err := os.Remove(e.path); err != nil {
		e.t.Fatal(err)
	}
	e.signal(p, syscall.SIGHUP)
	e.Await(`(upgrade failed) by signal hangup: .* failed at start`)
	e.signal(p, syscall.SIGTERM)
	e.Await(`(stopping) by signal terminated`)
	e.echo(client, "finished to the end\n")
	client.Close()
	e.End()
}

// The package example, run as it stands: SIGHUP replaces it, SIGTERM stops it.
func TestExample(t *testing.T) {
	t.Parallel()
	e := runExample(t, "smallest")
	addr := e.Await(`listening on (\S+)`)[1]
	first := e.Ready(0)
	held := e.dial(addr)

	e.signal(first, syscall.SIGHUP)
	second := e.Ready(1)
	if second.Pid == first.Pid {
		t.Fatalf("the successor is process %d again", first.Pid)
	}
	late := e.dial(addr)
	e.echo(held, "the old process finishes\n")
	held.Close()
	if end := e.Wait(); !end.Success() {
		t.Fatalf("the predecessor: %v", end)
	}
	e.echo(late, "the old process has gone\n")
	e.dial(addr).Close()

	e.stop(second, late)
	e.Refused("tcp", addr)
}

// Stopped by SIGTERM, the package example exits with status 0.
func TestExampleStop(t *testing.T) {
	t.Parallel()
	e := runExample(t, "smallest")
	addr := e.Await(`listening on (\S+)`)[1]
	e.stop(e.Ready(0), e.dial(addr))
	if end := e.End(); !end.Success() {
		t.Fatalf("after SIGTERM: %v", end)
	}
}

// The README's program is the package example.
func TestReadme(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, program, _ := strings.Cut(string(readme), "```go\n")
	program, _, _ = strings.Cut(program, "```")
	want := strings.NewReplacer("//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd\n\n", "", "package ecdysis_test", "package main", "func Example()", "func main()",
		"// As a program of its own, Example is main.\n", "").Replace(string(example))
	if program != want {
		t.Errorf("the README's first Go program is not example_test.go with main for Example; it is:\n%s\nwant:\n%s", program, want)
	}
}

// upgrade replaces p and returns its successor. It waits until p says so: a
// successor that is stopped before has not taken over.
func (e *exampleRun) upgrade(p *os.Process, generation int) *os.Process {
	e.t.Helper()
	e.signal(p, syscall.SIGHUP)
	s := e.Ready(generation)
	e.Await(`(upgraded) by signal`)
	return s
}

func TestExampleListenPacket(t *testing.T) {
	t.Parallel()
	e := runExample(t, "packet")
	addr := e.Await(`listening on (\S+)`)[1]
	p := e.Ready(0)
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for g := 1; g < 4; g++ {
		e.echo(c, "over UDP")
		p = e.upgrade(p, g)
	}
	e.echo(c, "over UDP, at last")
}

func TestExampleListenSeqpacket(t *testing.T) {
	t.Parallel()
	e := runExample(t, "seqpacket")
	e.Await(`listening on (\S+)`)
	p := e.Ready(0)
	dial := func() net.Conn {
		c, err := net.Dial("unixpacket", filepath.Join(e.dir, "packets.sock"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	held := dial()
	defer held.Close()
	e.echo(held, "first")
	e.upgrade(p, 1)
	late := dial()
	defer late.Close()
	e.echo(held, "the old process finishes")
	e.echo(late, "the new process begins")
}

// A subscriber stays connected over three upgrades and one that fails.
func TestExampleAddConn(t *testing.T) {
	t.Parallel()
	e := runExample(t, "conn")
	addr := e.Await(`listening on (\S+)`)[1]
	p := e.Ready(0)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	line := func(want string) {
		t.Helper()
		got, err := r.ReadString('\n')
		if err != nil || got != want+"\n" {
			t.Fatalf("%q, %v; want %q", got, err, want)
		}
	}
	line("welcome")
	p = e.upgrade(p, 1)
	line("generation 1")
	self, err := os.Readlink(e.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(e.path); err != nil {
		t.Fatal(err)
	}
	e.signal(p, syscall.SIGHUP)
	e.Await(`(upgrade failed) by signal`)
	if err := os.Symlink(self, e.path); err != nil {
		t.Fatal(err)
	}
	p = e.upgrade(p, 2)
	line("generation 2")
	p = e.upgrade(p, 3)
	line("generation 3")
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if got, err := r.ReadString('\n'); err == nil {
		t.Fatalf("%q from nobody", got)
	}
}

// The lock is held at every moment, also between two processes.
func TestExampleAddFile(t *testing.T) {
	t.Parallel()
	e := runExample(t, "file")
	p := e.Ready(0)
	f, err := os.Open(filepath.Join(e.dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	locked := func() bool { return syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) != nil }
	for g := 1; g < 4; g++ {
		old := p
		p = e.upgrade(p, g)
		for range 100 {
			if !locked() {
				t.Fatalf("not locked after upgrade %d", g)
			}
		}
		e.t.Logf("process %d gave the lock to %d", old.Pid, p.Pid)
	}
	e.signal(p, syscall.SIGTERM)
	e.End()
	if locked() {
		t.Fatal("still locked after the end")
	}
}

func TestExampleListener(t *testing.T) {
	t.Parallel()
	e := runExample(t, "listener")
	addr := e.Await(`listening on (\S+)`)[1]
	p := e.Ready(0)
	held := e.dial(addr)
	p = e.upgrade(p, 1)
	e.echo(held, "the old process finishes\n")
	e.upgrade(p, 2)
	e.dial(addr)
}

func TestExampleDatagramPair(t *testing.T) {
	t.Parallel()
	e := runExample(t, "pair")
	p := e.Ready(0)
	for g := range 3 {
		e.signal(p, syscall.SIGHUP)
		e.Await(`(generation ` + strconv.Itoa(g) + `) was asked "who are you\?"`)
		p = e.Ready(g + 1)
		e.Await(`(upgraded) by signal`)
	}
}

func TestExampleState(t *testing.T) {
	t.Parallel()
	e := runExample(t, "state")
	e.Await(`(upgrades so far: 0)`)
	p := e.Ready(0)
	for g := range 3 {
		e.signal(p, syscall.SIGHUP)
		e.Await(`(upgrades so far: ` + strconv.Itoa(g+1) + `)$`)
		p = e.Ready(g + 1)
		e.Await(`(upgraded) by signal`)
	}
}

func TestExampleUnregistered(t *testing.T) {
	t.Parallel()
	e := runExample(t, "unregistered")
	e.Await(`not handed on: (tcp 127\.0\.0\.1:\d+ \(descriptor \d+\))`)
	e.Ready(0)
}

// The daemon of the example is told by its sockets, and taken over.
func TestExampleWait(t *testing.T) {
	t.Parallel()
	e := newExample(t)
	e.Program = proctest.Open(t, e.command("wait"))
	e.Ready(0)
	out, err := e.command("request").CombinedOutput()
	second := e.Ready(1)
	if want := fmt.Sprintf("replaced by pid=%d generation=1\n", second.Pid); err != nil || string(out) != want {
		t.Fatalf("the client prints %q, %v; want %q", out, err, want)
	}
	e.Await(`process ` + strconv.Itoa(second.Pid) + ` serves`)
	taker := e.command("wait")
	taker.Stderr = e.Stderr()
	if err := taker.Start(); err != nil {
		t.Fatal(err)
	}
	e.CloseStderr()
	e.Await(`process ` + strconv.Itoa(taker.Process.Pid) + ` serves`)
	want := ecdysis.Reply{PID: taker.Process.Pid, Generation: 2}
	if got, err := ecdysis.Request(t.Context(), filepath.Join(e.dir, "partial-stop")); err != nil || got != want {
		t.Errorf("the partial stop is answered by %v, %v; want %v", got, err, want)
	}
	e.Await("stopping: " + want.String())
	if err := taker.Wait(); err != nil {
		t.Errorf("the one that takes over ends with %v", err)
	}
}
