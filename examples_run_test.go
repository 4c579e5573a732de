package ecdysis_test

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() {
	roles["example"] = func() {
		address = "127.0.0.1:0"
		Example()
	}
}

// An exampleRun is the example and its successors, which share one standard
// error.
type exampleRun struct {
	t     *testing.T
	cmd   *exec.Cmd
	path  string      // a link to the program
	lines chan string // of the log; closed when all of them have ended
}

func runExample(t *testing.T) *exampleRun {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	e := &exampleRun{t: t, path: filepath.Join(t.TempDir(), "daemon"), lines: make(chan string, 1000)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, e.path); err != nil {
		t.Fatal(err)
	}
	e.cmd = exec.Command(e.path, "-test.run=^$")
	e.cmd.Env = append(os.Environ(), roleVar+"=example")
	e.cmd.Stderr = w
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	go func() {
		defer r.Close()
		defer close(e.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			e.lines <- s.Text()
		}
	}()
	t.Cleanup(func() { _ = e.cmd.Process.Kill() })
	return e
}

// await returns what the next line that matches has in its parentheses.
func (e *exampleRun) await(pattern string) string {
	e.t.Helper()
	re := regexp.MustCompile(pattern)
	limit := time.After(patience)
	for {
		select {
		case line, ok := <-e.lines:
			if m := re.FindStringSubmatch(line); m != nil {
				return m[1]
			}
			if !ok {
				e.t.Fatalf("the example has ended without a line %q", pattern)
			}
		case <-limit:
			e.t.Fatalf("no line %q", pattern)
		}
	}
}

// ready returns the process that serves as this generation.
func (e *exampleRun) ready(generation int) *os.Process {
	e.t.Helper()
	pid, err := strconv.Atoi(e.await(`ready: pid=(\d+) generation=` + strconv.Itoa(generation) + `$`))
	if err != nil {
		e.t.Fatal(err)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = p.Kill() })
	return p
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
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	e.echo(c, "hello\n")
	return c
}

func (e *exampleRun) echo(c net.Conn, text string) {
	e.t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
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
	e.await(`(upgrade failed) by signal hangup: .* failed at start`)
	e.signal(p, syscall.SIGTERM)
	e.await(`(stopping) by signal terminated`)
	e.echo(client, "finished to the end\n")
	client.Close()
	for range e.lines { // until it has ended
	}
}

// The package example, run as it stands: SIGHUP replaces it, SIGTERM stops it.
func TestExample(t *testing.T) {
	t.Parallel()
	e := runExample(t)
	addr := e.await(`listening on (\S+)`)
	first := e.ready(0)
	held := e.dial(addr)

	e.signal(first, syscall.SIGHUP)
	second := e.ready(1)
	if second.Pid == first.Pid {
		t.Fatalf("the successor is process %d again", first.Pid)
	}
	late := e.dial(addr)
	e.echo(held, "the old process finishes\n")
	held.Close()
	if err := e.cmd.Wait(); err != nil {
		t.Fatalf("the old process: %v", err)
	}
	e.echo(late, "the old process has gone\n")
	e.dial(addr).Close()

	e.stop(second, late)
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("somebody still listens")
	}
}

// Stopped by SIGTERM, the package example exits with status 0.
func TestExampleStop(t *testing.T) {
	t.Parallel()
	e := runExample(t)
	addr := e.await(`listening on (\S+)`)
	e.stop(e.ready(0), e.dial(addr))
	if err := e.cmd.Wait(); err != nil {
		t.Fatalf("exit after SIGTERM: %v", err)
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
	want := strings.NewReplacer("package ecdysis_test", "package main", "func Example()", "func main()",
		"// As a program of its own, Example is main.\n", "").Replace(string(example))
	if program != want {
		t.Errorf("the README's first Go program is not example_test.go with main for Example; it is:\n%s\nwant:\n%s", program, want)
	}
}
