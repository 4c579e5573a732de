package main

import (
	"bufio"
	"errors"
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

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// build returns the path of the real program.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "echod")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// A daemon is an echod and its successors, which share its standard error.
type daemon struct {
	t       *testing.T
	cmd     *exec.Cmd
	lines   chan string // of the log; closed when every generation has ended
	unix    string
	pidFile string
	tcp     string
}

func start(t *testing.T, args ...string) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "echod") // short, for the socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &daemon{t: t, lines: make(chan string, 1000), unix: filepath.Join(dir, "sock"), pidFile: filepath.Join(dir, "pid")}
	args = append([]string{"-tcp", "127.0.0.1:0", "-unix", d.unix, "-pidfile", d.pidFile}, args...)
	d.cmd = exec.Command(build(t), args...)
	// A group of its own: whatever is left of it is ended with the test.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d.cmd.Stderr = w
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	go func() {
		defer close(d.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			t.Log(s.Text())
			d.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		defer r.Close()
		if d.cmd.ProcessState == nil {
			defer d.cmd.Wait()
		}
		for {
			select {
			case _, ok := <-d.lines:
				if !ok {
					return
				}
			default: // one lives still, so the group's number is not free
				_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
				for range d.lines {
				}
				return
			}
		}
	})
	d.tcp = d.await(`listening on tcp (\S+)`)[1]
	return d
}

// await returns the next line of the log that matches.
func (d *daemon) await(pattern string) []string {
	d.t.Helper()
	re := regexp.MustCompile(pattern)
	limit := time.After(patience)
	for {
		select {
		case line, ok := <-d.lines:
			if m := re.FindStringSubmatch(line); m != nil {
				return m
			}
			if !ok {
				d.t.Fatalf("all processes have ended without a line %q", pattern)
			}
		case <-limit:
			d.t.Fatalf("no line %q", pattern)
		}
	}
}

// ready returns the process ID of the generation that becomes ready next.
func (d *daemon) ready(generation int) int {
	d.t.Helper()
	m := d.await(`ready: pid=(\d+) generation=` + strconv.Itoa(generation) + `$`)
	pid, err := strconv.Atoi(m[1])
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

func (d *daemon) signal(pid int, s syscall.Signal) {
	d.t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		d.t.Fatal(err)
	}
}

// stop tells pid to end. A signal to stop is caught once Upgrader.Wait runs;
// an upgrade that fails for want of a program shows that it does.
func (d *daemon) stop(pid int) {
	d.t.Helper()
	if err := os.Remove(d.cmd.Path); err != nil {
		d.t.Fatal(err)
	}
	d.signal(pid, syscall.SIGHUP)
	d.await(`upgrade failed by signal hangup: .*failed at start: .*no such file`)
	d.serves()
	if named := d.pidFileNames(); named != pid {
		d.t.Fatalf("after a failed upgrade the PID file names %d; want %d", named, pid)
	}
	d.signal(pid, syscall.SIGTERM)
	d.await(`stopping by signal terminated: pid=` + strconv.Itoa(pid))
}

// pidFileNames returns the process ID in the PID file.
func (d *daemon) pidFileNames() int {
	d.t.Helper()
	b, err := os.ReadFile(d.pidFile)
	if err != nil {
		d.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

func (d *daemon) dial(network, address string) net.Conn {
	d.t.Helper()
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		d.t.Fatal(err)
	}
	return c
}

// echo sends text and wants it back.
func (d *daemon) echo(c net.Conn, text string) {
	d.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		d.t.Fatal(err)
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != text {
		d.t.Fatalf("sent %q, got %q back: %v", text, back, err)
	}
}

// serves asserts that both addresses answer, byte by byte and in bulk.
func (d *daemon) serves() {
	d.t.Helper()
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
	if first != d.cmd.Process.Pid {
		t.Fatalf("process %d is ready; %d was started", first, d.cmd.Process.Pid)
	}
	d.serves()
	held := []net.Conn{d.dial("tcp", d.tcp), d.dial("unix", d.unix)}
	for _, c := range held {
		d.echo(c, "before\n")
	}

	d.signal(first, syscall.SIGHUP)
	second := d.ready(1)
	d.await(`upgraded by signal hangup: pid=` + strconv.Itoa(second))
	if second == first {
		t.Fatal("the successor has the same process ID")
	}
	if pid := d.pidFileNames(); pid != second {
		t.Fatalf("the PID file names %d; want %d", pid, second)
	}
	d.serves()

	// The old process has clients, and lives until they have gone.
	for _, c := range held {
		d.echo(c, "after\n")
		c.Close()
	}
	d.await(`echod\[` + strconv.Itoa(first) + `\] all clients are served`)
	if err := d.cmd.Wait(); err != nil {
		t.Fatalf("the old process: %v", err)
	}
	d.serves()

	last := d.dial("tcp", d.tcp)
	d.echo(last, "before the stop\n")
	d.stop(second)
	d.echo(last, "after the stop\n")
	last.Close()
	d.await(`echod\[` + strconv.Itoa(second) + `\] all clients are served`)
	for range d.lines { // until it has ended
	}
	for _, path := range []string{d.pidFile, d.unix} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if c, err := net.Dial("tcp", d.tcp); err == nil {
		c.Close()
		t.Error("somebody still listens")
	}
}

// A client that stays does not keep the old process alive for ever.
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
	if err := d.cmd.Wait(); err != nil { // although one is stuck
		t.Fatalf("the old process: %v", err)
	}
	d.serves()
	d.stop(second)
	for range d.lines {
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// Stopped by SIGTERM, echod exits with status 0.
func TestStop(t *testing.T) {
	t.Parallel()
	d := start(t)
	d.stop(d.ready(0))
	if err := d.cmd.Wait(); err != nil {
		t.Fatalf("exit after SIGTERM: %v", err)
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
		{[]string{"extra"}, "no arguments beside the flags"},
		{[]string{"-drain", "-1s"}, "not negative"},
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
