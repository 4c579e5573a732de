//go:build linux

package systemd_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	for name, example := range map[string]func(){
		"example": Example, "example-adopt": ExampleAdopt, "example-store": ExampleNotifier_Store,
		"example-watchdog": ExampleNotifier_Watchdog, "example-status": ExampleNotifier_Status,
	} {
		mains[name] = func() { address = os.Getenv("ADDRESS"); example() }
	}
}

// runExample runs an example under m, or without systemd.
func runExample(t *testing.T, name string, m *manager, change func(*exec.Cmd)) *process {
	t.Helper()
	return program(t, name, func(c *exec.Cmd) {
		c.Env = append(c.Env, "ADDRESS=127.0.0.1:0")
		if m != nil {
			c.Env = append(c.Env, "NOTIFY_SOCKET="+m.address)
		}
		if change != nil {
			change(c)
		}
	})
}

func TestExample(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	p := runExample(t, "example", m, nil)
	m.gets("READY=1")
	main := p.cmd.Process.Pid
	t.Cleanup(func() {
		if main != p.cmd.Process.Pid { // the successor is a child of this process, which reaps it
			_ = unix.Kill(main, unix.SIGKILL)
			_, _ = unix.Wait4(main, nil, 0, nil)
		}
	})
	from := monotonicUsec()
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	m.reloads(from, from+patience.Microseconds())
	if _, err := fmt.Sscanf(m.next().text, "MAINPID=%d\nREADY=1", &main); err != nil || main == p.cmd.Process.Pid {
		t.Fatalf("main process %d, %v", main, err)
	}
	m.barrier()()
	if err := p.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(p.cmd.Path); err != nil {
		t.Fatal(err)
	}
	from = monotonicUsec()
	if err := unix.Kill(main, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	m.reloads(from, from+patience.Microseconds())
	if got := m.next().text; !strings.HasPrefix(got, "READY=1\nSTATUS=upgrade failed") {
		t.Fatalf("systemd got %q; want a failed upgrade", got)
	}
	if err := unix.Kill(main, unix.SIGTERM); err != nil { // Wait, which runs, acts on it
		t.Fatal(err)
	}
	m.gets("STOPPING=1")
	var status unix.WaitStatus
	if _, err := unix.Wait4(main, &status, 0, nil); err != nil || status != 0 {
		t.Fatalf("the successor has ended with %v, %v", status, err)
	}
	main = p.cmd.Process.Pid
	p.wait()

	// Without systemd the log shows when the example is ready.
	p = runExample(t, "example", nil, nil)
	if l := p.line(); !strings.Contains(l, "ready: ") {
		t.Fatalf("the example says %q", l)
	}
}

func TestExampleAdopt(t *testing.T) {
	t.Parallel()
	f := kinds(t)
	p := runExample(t, "example-adopt", nil, func(c *exec.Cmd) {
		c.Args = []string{"sh", "-c", passing, c.Path}
		c.Path = "/bin/sh"
		c.Env = append(c.Env, "LISTEN_FDS=2", "LISTEN_FDNAMES=web:web")
		c.ExtraFiles = []*os.File{f["tcp"], f["tcp2"]}
	})
	if l := p.line(); !strings.HasSuffix(l, "serving on 2 sockets") {
		t.Fatalf("the example says %q", l)
	}
}

func TestExampleStore(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	runExample(t, "example-store", m, nil)
	got := m.next()
	if got.text != "FDSTORE=1\nFDNAME=web\nFDPOLL=0" || len(got.files) != 1 {
		t.Fatalf("systemd got %q with %d descriptors", got.text, len(got.files))
	}
	l, err := net.FileListener(got.files[0])
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	m.barrier()()
	m.gets("READY=1")
}

func TestExampleWatchdog(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	runExample(t, "example-watchdog", m, func(c *exec.Cmd) { c.Env = append(c.Env, "WATCHDOG_USEC=10000") })
	m.gets("READY=1")
	m.gets("WATCHDOG=1")
	m.gets("WATCHDOG=1")
}

func TestExampleStatus(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	runExample(t, "example-status", m, nil)
	for i := range 3 {
		m.gets(fmt.Sprintf("STATUS=reading part %d of 3", i+1))
		m.gets("EXTEND_TIMEOUT_USEC=60000000")
	}
	m.gets("READY=1")
	m.gets("STATUS=")
}
