package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
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

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// build returns the path of the real program.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "echod")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// A daemon is an echod and its successors.
type daemon struct {
	*proctest.Program
	unix    string
	pidFile string
	control string
	tcp     string
}

func start(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := launch(t, args...)
	d.CloseStderr()
	return d
}

// launch is start for a test that lets another process log to Stderr. The test has
// to call CloseStderr.
func launch(t *testing.T, args ...string) *daemon {
	t.Helper()
	dir := proctest.ShortDir(t)
	d := &daemon{unix: filepath.Join(dir, "sock"), pidFile: filepath.Join(dir, "pid"), control: filepath.Join(dir, "control")}
	if err := os.Mkdir(d.control, 0o700); err != nil {
		t.Fatal(err)
	}
	args = append([]string{"-tcp", "127.0.0.1:0", "-unix", d.unix, "-pidfile", d.pidFile, "-control", d.control}, args...)
	d.Program = proctest.Open(t, exec.Command(build(t), args...))
	d.tcp = d.Await(`listening on tcp (\S+)`)[1]
	return d
}

// ready returns the process ID of the generation that becomes ready next.
func (d *daemon) ready(generation int) int {
	d.T.Helper()
	return d.Ready(generation).Pid
}

func (d *daemon) signal(pid int, s syscall.Signal) {
	d.T.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		d.T.Fatal(err)
	}
}

// stop tells pid to end.
func (d *daemon) stop(pid int) {
	d.T.Helper()
	d.waits(pid)
	d.signal(pid, syscall.SIGTERM)
	d.Await(`stopping by signal terminated: pid=` + strconv.Itoa(pid))
}

// waits returns when Upgrader.Wait runs, so that signals to stop are caught. It
// sees this by an upgrade that fails because there is no program.
func (d *daemon) waits(pid int) {
	d.T.Helper()
	if err := os.Remove(d.Cmd.Path); err != nil {
		d.T.Fatal(err)
	}
	d.signal(pid, syscall.SIGHUP)
	d.Await(`upgrade failed by signal hangup: .*failed at start: .*no such file`)
	d.serves()
	if named := d.pidFileNames(); named != pid {
		d.T.Fatalf("after a failed upgrade the PID file names %d; want %d", named, pid)
	}
}

// pidFileNames returns the process ID in the PID file.
func (d *daemon) pidFileNames() int {
	d.T.Helper()
	b, err := os.ReadFile(d.pidFile)
	if err != nil {
		d.T.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		d.T.Fatal(err)
	}
	return pid
}

func (d *daemon) dial(network, address string) net.Conn {
	d.T.Helper()
	c, err := net.DialTimeout(network, address, proctest.Patience)
	if err != nil {
		d.T.Fatal(err)
	}
	d.T.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		d.T.Fatal(err)
	}
	return c
}

// echo sends text, and requires it to come back.
func (d *daemon) echo(c net.Conn, text string) {
	d.T.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		d.T.Fatal(err)
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != text {
		d.T.Fatalf("sent %q, got %q back: %v", text, back, err)
	}
}

// serves asserts that both addresses answer, byte by byte and in bulk.
func (d *daemon) serves() {
	d.T.Helper()
	for _, a := range [][2]string{{"tcp", d.tcp}, {"unix", d.unix}} {
		c := d.dial(a[0], a[1])
		d.echo(c, "no newline")
		d.echo(c, strings.Repeat("bulk ", 20_000))
		c.Close()
	}
}

func TestUpgradeAndStop(t *testing.T) {
	t.Parallel()
	d := start(t)
	first := d.ready(0)
	if first != d.Cmd.Process.Pid {
		t.Fatalf("process %d is ready; %d was started", first, d.Cmd.Process.Pid)
	}
	d.serves()
	held := []net.Conn{d.dial("tcp", d.tcp), d.dial("unix", d.unix)}
	for _, c := range held {
		d.echo(c, "before\n")
	}

	d.signal(first, syscall.SIGHUP)
	second := d.ready(1)
	d.Await(`upgraded by signal hangup: pid=` + strconv.Itoa(second))
	if second == first {
		t.Fatal("the successor has the same process ID")
	}
	if pid := d.pidFileNames(); pid != second {
		t.Fatalf("the PID file names %d; want %d", pid, second)
	}
	d.serves()

	// The old process has clients, and exits when they have gone.
	for _, c := range held {
		d.echo(c, "after\n")
		c.Close()
	}
	d.Await(`echod\[` + strconv.Itoa(first) + `\] all clients are served`)
	if state := d.Wait(); !state.Success() {
		t.Fatalf("the old process: %v", state)
	}
	d.serves()

	last := d.dial("tcp", d.tcp)
	d.echo(last, "before the stop\n")
	d.stop(second)
	d.echo(last, "after the stop\n")
	last.Close()
	d.Await(`echod\[` + strconv.Itoa(second) + `\] all clients are served`)
	d.End()
	d.leavesNothing()
}

// leavesNothing asserts that no process listens any more, and that all files are
// gone.
func (d *daemon) leavesNothing() {
	d.T.Helper()
	d.refuses()
	for _, path := range []string{d.pidFile, d.unix} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			d.T.Errorf("%s is left: %v", path, err)
		}
	}
	if left, err := os.ReadDir(d.control); err != nil || len(left) > 0 {
		d.T.Errorf("control sockets are left: %v, %v", left, err)
	}
}

// refuses asserts that no process accepts.
func (d *daemon) refuses() {
	d.T.Helper()
	d.Refused("tcp", d.tcp)
	d.Refused("unix", d.unix)
}

// ask runs echod as a client of the control sockets. It asserts the exit status,
// and returns what the client prints.
func (d *daemon) ask(flag string, status int) string {
	d.T.Helper()
	cmd := exec.Command(d.Cmd.Path, "-control", d.control, flag)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
		d.T.Fatalf("echod %s: %v; want status %d; it prints\n%s", flag, err, status, out)
	}
	return string(out)
}

func line(pid, generation int) string {
	return fmt.Sprintf("ok pid=%d generation=%d\n", pid, generation)
}

// This is TestUpgradeAndStop by the control sockets.
func TestUpgradeAndStopBySocket(t *testing.T) {
	t.Parallel()
	d := start(t)
	first := d.ready(0)
	held := d.dial("tcp", d.tcp)
	d.echo(held, "before\n")
	got := d.ask("-upgrade", 0)
	second := d.ready(1)
	if got != line(second, 1) {
		t.Fatalf("echod -upgrade prints %q; want %q", got, line(second, 1))
	}
	d.Await(`upgraded by socket ` + d.control + `/upgrade: pid=` + strconv.Itoa(second))
	d.serves()
	d.echo(held, "after\n")
	held.Close()
	d.Await(`echod\[` + strconv.Itoa(first) + `\] all clients are served`)

	held = d.dial("unix", d.unix)
	d.echo(held, "before the stop\n")
	done := make(chan struct{})
	go func() { // the request waits until the last client is served
		defer close(done)
		if got := d.ask("-stop", 0); got != line(second, 1) {
			t.Errorf("echod -stop prints %q; want %q", got, line(second, 1))
		}
	}()
	d.Await(`stopping by socket ` + d.control + `/stop: pid=` + strconv.Itoa(second))
	d.echo(held, "after the stop\n")
	select {
	case <-done:
		t.Error("echod -stop has not waited for the last client")
	default:
	}
	held.Close()
	<-done
	d.refuses()
	d.End()
	d.leavesNothing()
	if out := d.ask("-stop", 1); !strings.Contains(out, "no such file") {
		t.Errorf("echod -stop without a running process prints %q", out)
	}
}

// A partial stop ends accepting. The process exits when its clients have gone.
func TestPartialStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		by  string
		act func(d *daemon, pid int)
	}{
		{"signal user defined signal 1", func(d *daemon, pid int) {
			d.waits(pid)
			d.signal(pid, syscall.SIGUSR1)
		}},
		{"socket \\S+/partial-stop", func(d *daemon, pid int) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				got, err := ecdysis.Request(context.Background(), filepath.Join(d.control, "partial-stop"))
				if want := (ecdysis.Reply{PID: pid, Generation: 1}); got != want || err != nil {
					t.Errorf("request: %q, %v; want %q", got, err, want)
				}
			}()
			t.Cleanup(func() { <-done }) // the process has exited
		}},
	} {
		t.Run(strings.Fields(c.by)[0], func(t *testing.T) {
			t.Parallel()
			d := start(t)
			d.ready(0)
			d.ask("-upgrade", 0)
			pid := d.ready(1)
			held := d.dial("tcp", d.tcp)
			d.echo(held, "before\n")
			c.act(d, pid)
			d.Await(`partial stop by ` + c.by + `: pid=` + strconv.Itoa(pid))
			d.echo(held, "after\n")
			held.Close()
			d.Await(`stopping: pid=` + strconv.Itoa(pid))
			d.End()
			d.leavesNothing()
		})
	}
}

// The line that a client prints says why an upgrade has failed.
func TestFailedUpgradeBySocket(t *testing.T) {
	t.Parallel()
	d := start(t)
	pid := d.ready(0)
	script := []byte("#!/bin/sh\necho not today >&2\nexit 7\n")
	next := d.Cmd.Path + ".new"
	client := d.Cmd.Path + ".client"
	if err := os.Link(d.Cmd.Path, client); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(next, script, 0o755), os.Rename(next, d.Cmd.Path)); err != nil {
		t.Fatal(err)
	}
	d.Cmd.Path = client
	if out := d.ask("-upgrade", 1); !regexp.MustCompile(`upgrade failed at init: successor \d+ \(exit status 7\): it ended`).MatchString(out) {
		t.Errorf("echod -upgrade prints %q", out)
	}
	d.serves()
	if got := d.ask("-stop", 0); got != line(pid, 0) {
		t.Errorf("echod -stop prints %q; want %q", got, line(pid, 0))
	}
}

// Another echod with other flags takes over from the first one. If the second ends
// within its probation, the first serves again.
func TestTakeover(t *testing.T) {
	t.Parallel()
	d := launch(t, "-probation", "1m")
	first := d.ready(0)
	second := exec.Command(d.Cmd.Path, "-tcp", d.tcp, "-unix", d.unix, "-pidfile", d.pidFile, "-control", d.control, "-drain", "1s")
	second.Stderr = d.Stderr()
	second.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: first}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	d.CloseStderr()
	if pid := d.ready(1); pid != second.Process.Pid {
		t.Fatalf("process %d is ready; want %d", pid, second.Process.Pid)
	}
	d.serves()
	if named := d.pidFileNames(); named != second.Process.Pid {
		t.Fatalf("the PID file names %d; want %d", named, second.Process.Pid)
	}
	if err := second.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = second.Wait()
	d.Await(`resumed by socket ` + d.control + `/takeover: pid=` + strconv.Itoa(first))
	d.Await(`failed at probation`)
	d.serves()
	if named := d.pidFileNames(); named != first {
		t.Fatalf("the PID file names %d; want %d", named, first)
	}
	if got := d.ask("-stop", 0); got != line(first, 0) {
		t.Errorf("echod -stop prints %q; want %q", got, line(first, 0))
	}
	d.End()
	d.leavesNothing()
}

// A client that stays keeps the old process alive for no longer than -drain.
func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	const bound = 300 * time.Millisecond
	d := start(t, "-drain", bound.String())
	first := d.ready(0)
	idle := d.dial("tcp", d.tcp)
	d.echo(idle, "here to stay\n")
	stuck := d.dial("unix", d.unix) // sends and never reads
	go func() { _, _ = io.Copy(stuck, zeros{}) }()

	began := time.Now()
	d.signal(first, syscall.SIGHUP)
	second := d.ready(1)
	d.echo(idle, "still served\n")
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("an idle client after the bound: %v; want EOF", err)
	}
	if passed := time.Since(began); passed < bound {
		t.Fatalf("an idle client was closed after %v; want %v or more", passed, bound)
	}
	if state := d.Wait(); !state.Success() { // although one client is stuck
		t.Fatalf("the old process: %v", state)
	}
	d.serves()
	d.stop(second)
	d.End()
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// Echod exits with status 0 after SIGTERM.
func TestStop(t *testing.T) {
	t.Parallel()
	d := start(t)
	d.stop(d.ready(0))
	if state := d.Wait(); !state.Success() {
		t.Fatalf("exit after SIGTERM: %v", state)
	}
}

// The reader of the log goes, and the service stays.
func TestLogReaderGoes(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	control := proctest.ShortDir(t)
	cmd := exec.Command(build(t), "-unix", filepath.Join(control, "sock"), "-tcp", "", "-control", control)
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	for s := bufio.NewScanner(r); s.Scan() && !strings.Contains(s.Text(), "ready: "); {
	}
	r.Close()
	for generation, socket := range []string{1: "upgrade", 2: "upgrade", 3: "stop"} {
		if socket == "" {
			continue
		}
		reply, err := ecdysis.Request(t.Context(), filepath.Join(control, socket))
		if want := min(generation, 2); err != nil || reply.Generation != want {
			t.Errorf("%s: %v, %v; want generation %d", socket, reply, err, want)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the first process: %v", err)
	}
}

func TestBadFlags(t *testing.T) {
	t.Parallel()
	path := build(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-tcp", ""}, "neither -tcp nor -unix"},
		{[]string{"extra"}, "no arguments but flags"},
		{[]string{"-drain", "-1s"}, "not negative"},
		{[]string{"-upgrade"}, "want -control"},
		{[]string{"-upgrade", "-stop", "-control", "/tmp"}, "one of -upgrade and -stop"},
		{[]string{"-control", "/nonexistent"}, "no such file or directory"},
		{[]string{"-timeout", "-1s"}, "UpgradeTimeout"},
		{[]string{"-tcp", "127.0.0.1:none"}, "127.0.0.1:none"},
	} {
		out, err := exec.Command(path, c.args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), c.want) {
			t.Errorf("echod %q: %v, %q; want status 1 and %q", c.args, err, out, c.want)
		}
	}
}

// A root directory that has the program and a directory for its sockets is enough:
// no /proc, no /dev, no /tmp, no library.
func TestBareRoot(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "a program without cgo needs no library", "linux")
	if os.Getuid() != 0 {
		t.Skip("chroot(2) needs root")
	}
	root := proctest.ShortDir(t)
	if err := os.Mkdir(filepath.Join(root, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(root, "echod"), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd = &exec.Cmd{
		Path:        "/echod",
		Args:        []string{"/echod", "-tcp", "127.0.0.1:0", "-unix", "/run/sock", "-pidfile", "/run/pid", "-control", "/run", "-probation", "1ms"},
		Env:         []string{},
		Dir:         "/",
		SysProcAttr: &syscall.SysProcAttr{Chroot: root},
	}
	p := proctest.Run(t, cmd)
	addr := p.Await(`listening on tcp (\S+)`)[1]
	p.Ready(0)
	for g := 1; g < 4; g++ {
		reply, err := ecdysis.Request(t.Context(), filepath.Join(root, "run/upgrade"))
		if err != nil || reply.Generation != g {
			t.Fatalf("upgrade %d: %v, %v", g, reply, err)
		}
		for network, address := range map[string]string{"tcp": addr, "unix": filepath.Join(root, "run/sock")} {
			c, err := net.DialTimeout(network, address, proctest.Patience)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, "hello"); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 5)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
				t.Fatalf("%q, %v", b, err)
			}
			c.Close()
		}
	}
	if _, err := ecdysis.Request(t.Context(), filepath.Join(root, "run/stop")); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(root, "run")); err != nil || len(left) != 0 {
		t.Errorf("a stop has left %v, %v", left, err)
	}
}
