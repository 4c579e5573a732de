package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// start runs the real program, and returns it when its first generation serves.
func start(t *testing.T, args ...string) (p *proctest.Program, addr string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kept")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	p = proctest.Run(t, exec.Command(path, append([]string{"-tcp", "127.0.0.1:0", "-pidfile", path + ".pid"}, args...)...))
	addr = p.Await(`listening on (\S+)`)[1]
	if first := p.Ready(0); first.Pid == p.Cmd.Process.Pid {
		t.Fatal("the keeper itself serves")
	}
	return p, addr
}

func send(t *testing.T, p *proctest.Program, s os.Signal) {
	t.Helper()
	if err := p.Cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// stop tells the keeper to stop, once the generation that serves catches the
// signal. stop sees this by the report that the generation cannot be upgraded.
func stop(t *testing.T, p *proctest.Program) {
	t.Helper()
	if err := os.Rename(p.Cmd.Path, p.Cmd.Path+".away"); err != nil {
		t.Fatal(err)
	}
	send(t, p, syscall.SIGHUP)
	p.Await(`upgrade failed by signal hangup: .* failed at start`)
	send(t, p, syscall.SIGTERM)
	p.Await(`stopping by signal terminated`)
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, proctest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	echo(t, c, "hello")
	return c
}

// echo sends text, and requires it to come back.
func echo(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != text {
		t.Fatalf("sent %q, got %q back: %v", text, back, err)
	}
}

// Slow clients are served to their end by the generation that has them.
func TestClientsAreServed(t *testing.T) {
	t.Parallel()
	p, addr := start(t)
	held := dial(t, addr)
	send(t, p, syscall.SIGHUP)
	second := p.Ready(1)
	p.Await(fmt.Sprintf(`upgraded by signal hangup: pid=%d `, second.Pid))
	echo(t, held, "after the upgrade")
	late := dial(t, addr)
	stop(t, p)
	echo(t, held, "after the stop")
	echo(t, late, "after the stop")
	held.Close()
	late.Close()
	if state := p.End(); !state.Success() {
		t.Errorf("the keeper: %v", state)
	}
}

// A client that stays keeps neither an old generation nor, after a stop, the
// keeper for longer than -drain.
func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	const bound = 300 * time.Millisecond
	p, addr := start(t, "-drain", bound.String())
	held := dial(t, addr)
	began := time.Now()
	send(t, p, syscall.SIGHUP)
	second := p.Ready(1)
	p.Await(fmt.Sprintf(`upgraded by signal hangup: pid=%d `, second.Pid))
	if _, err := held.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a client that stays, after the bound: %v; want EOF", err)
	}
	if passed := time.Since(began); passed < bound {
		t.Errorf("it was cut off after %v; want %v or more", passed, bound)
	}
	p.Await(`drain: context deadline exceeded; open connections: 1,`)

	held = dial(t, addr)
	began = time.Now()
	stop(t, p)
	if _, err := held.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a client that stays, after the stop: %v; want EOF", err)
	}
	if passed := time.Since(began); passed < bound {
		t.Errorf("it was cut off after %v; want %v or more", passed, bound)
	}
	if state := p.End(); !state.Success() {
		t.Errorf("the keeper: %v", state)
	}
}
