package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A process that starts reads the variable and the frames of its predecessor,
// which is the test.

// A variable that an upgrade has not set is an error that names it. A process
// that started over it would bind what is bound, or lose what was handed on.
func TestBadInheritance(t *testing.T) {
	t.Parallel()
	me := fmt.Sprintf("pid=%d uid=%d", os.Getpid(), os.Geteuid())
	regular := func(t *testing.T) *os.File {
		path := proctest.ShortDir(t) + "/file"
		if err := os.WriteFile(path, []byte("hello"), 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, tt := range []struct {
		name, value string
		file        func(t *testing.T) *os.File // descriptor 3
	}{
		{"empty", "", nil},
		{"words", "hello world", nil},
		{"not open", "fd=99 pid=1 uid=0", nil},
		{"no descriptor", me, socketEnd(syscall.SOCK_STREAM)},
		{"negative descriptor", "fd=-1 " + me, nil},
		{"standard descriptor", "fd=0 " + me, nil},
		{"no process", "fd=3 uid=0", socketEnd(syscall.SOCK_STREAM)},
		{"no user", fmt.Sprintf("fd=3 pid=%d", os.Getpid()), socketEnd(syscall.SOCK_STREAM)},
		{"wrong process", fmt.Sprintf("fd=3 pid=1 uid=%d", os.Geteuid()), socketEnd(syscall.SOCK_STREAM)},
		{"wrong user", fmt.Sprintf("fd=3 pid=%d uid=4711", os.Getpid()), socketEnd(syscall.SOCK_STREAM)},
		{"regular file", "fd=3 " + me, regular},
		{"datagram socket", "fd=3 " + me, socketEnd(syscall.SOCK_DGRAM)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := proctest.New(t, proctest.TCP).Launch(func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, "ECDYSIS_PARENT="+tt.value)
				if tt.file != nil {
					f := tt.file(t)
					t.Cleanup(func() { f.Close() })
					cmd.ExtraFiles = []*os.File{f}
				}
			})
			proctest.Want(t, p.ErrAt(proctest.AtNewFailed), nil, "ECDYSIS_PARENT", strconv.Quote(tt.value))
			p.Ended()
		})
	}
}

// socketEnd makes one end of a socket pair. The other one stays open for the
// time of the test.
func socketEnd(typ int) func(t *testing.T) *os.File {
	return func(t *testing.T) *os.File {
		t.Helper()
		fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
		if err != nil {
			t.Fatal(err)
		}
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
		t.Cleanup(func() { syscall.Close(fds[0]) })
		return os.NewFile(uintptr(fds[1]), "socket")
	}
}

func TestVersionIsRefused(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"2", "10", "", "1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			p, peer := proctest.New(t, proctest.TCP).LaunchUnder()
			peer.Send(slices.Concat(
				proctest.Frame('H', proctest.Record{"version=" + version, "generation=3", fmt.Sprint("pid=", os.Getpid())}),
				proctest.Frame('E')))
			says := fmt.Sprintf("version %q", version)
			proctest.Want(t, p.ErrAt(proctest.AtNewFailed), nil, says)
			peer.Refused(says)
			p.Ended()
		})
	}
}

// listenerFile returns a listener of net, and a file of its descriptor.
func listenerFile(t *testing.T) (net.Listener, *os.File) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return ln, f
}

// An earlier version ignores what a later one adds.
func TestUnknownIsIgnored(t *testing.T) {
	t.Parallel()
	ln, f := listenerFile(t)
	address := proctest.Addr{Network: "tcp", Address: ln.Addr().String()}

	p, peer := proctest.New(t, proctest.TCP).LaunchUnder()
	unknown := slices.Concat(proctest.Frame('z', proctest.Record{"color=blue"}, proctest.Record{"x"}), proctest.Frame('y'))
	peer.Send(proctest.Frame('H',
		proctest.Record{"colour=blue", "version=1", "generation=6", "pid=1", "nonsense", "="}, proctest.Record{"another=record"}))
	peer.Send(unknown)
	peer.Send(proctest.Frame('S',
		proctest.Record{"shape=round", "kind=listener", "network=tcp", "address=127.0.0.1:0", "at=" + address.String(), "more"}), int(f.Fd()))
	peer.Send(slices.Concat(unknown, proctest.Frame('E', proctest.Record{"of=it"}), unknown))
	peer.Expect('K')
	if r := peer.Expect('R'); len(r) == 0 || !slices.Contains(r[0], fmt.Sprint("pid=", p.PID)) {
		t.Errorf("READY %q; want pid %d", r, p.PID)
	}
	peer.Send(unknown)
	peer.Send(proctest.Frame('C', proctest.Record{"future=1", "probation=60000000000"}, proctest.Record{"more"}))
	peer.Expect('D')
	peer.Send(unknown)
	ln.Close()
	p.At(proctest.AtServing)
	p.RefusesUpgrade(ecdysis.ErrInProgress) // none of it ends the probation
	peer.Send(slices.Concat(unknown, proctest.Frame('L', proctest.Record{"and=more"}), unknown))
	if a := p.Addr(0); a != address {
		t.Errorf("it listens at %v; want %v", a, address)
	}
	p.Serves()
	isGeneration(p, 7)
	s := p.Upgrade()
	s.Serves()
	isGeneration(s, 8)
	// The test's end is still open, so that p waits for its predecessor.
	proctest.Want(t, p.WaitForPredecessor(50*time.Millisecond), context.DeadlineExceeded)
	peer.Conn.Close()
	if err := p.WaitForPredecessor(); err != nil {
		t.Errorf("WaitForParent: %v", err)
	}
}

// An inherited socket whose record has no address is found by no call.
func TestInheritedWithoutAnAddress(t *testing.T) {
	t.Parallel()
	_, f := listenerFile(t)
	p, peer := proctest.New(t, proctest.Spec{}.And("unix", "$DIR/sock").And("tcp", "127.0.0.1:")).LaunchUnder()
	peer.Send(proctest.Frame('H', proctest.Record{"version=1", "generation=6"}))
	peer.Send(proctest.Frame('S', proctest.Record{"kind=listener", "network=tcp", "address=127.0.0.1:0", "at=nowhere"}), int(f.Fd()))
	peer.Send(proctest.Frame('E'))
	peer.ReadUntil('R')
	peer.Send(proctest.Frame('C', proctest.Record{"probation=0"}))
	peer.ReadUntil('D')
	peer.Send(proctest.Frame('L'))
	p.At(proctest.AtServing)
	p.HasUnclaimed("tcp 127.0.0.1:0")
	p.Serves()
}
