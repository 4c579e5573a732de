package e2e

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Sandboxes that deny system calls by which the package does its work better.

// denied is what a sandbox answers to pidfd_open, pidfd_send_signal and
// memfd_create. With NoPidfd, clone(2) refuses CLONE_PIDFD, as an emulator does.
type denied struct {
	Errno   syscall.Errno
	NoPidfd bool
}

var sandbox = proctest.Define("sandbox", func(_ *proctest.Daemon, d denied) (proctest.None, error) {
	const allow, number = unix.SECCOMP_RET_ALLOW, 0
	flags := uint32(16) // where struct seccomp_data has the first argument of clone(2)
	if runtime.GOARCH == "s390x" {
		flags = 28 // the flags are the second argument, and its lower half comes last
	}
	deny := func(errno syscall.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(errno) }
	var filter []unix.SockFilter
	add := func(code uint16, jt, jf uint8, k uint32) {
		filter = append(filter, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	}
	add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, number)
	for _, nr := range []uint32{unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_MEMFD_CREATE} {
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 1, nr)
		add(unix.BPF_RET|unix.BPF_K, 0, 0, deny(d.Errno))
	}
	if d.NoPidfd {
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 3, unix.SYS_CLONE)
		add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, flags)
		add(unix.BPF_JMP|unix.BPF_JSET|unix.BPF_K, 0, 1, unix.CLONE_PIDFD)
		add(unix.BPF_RET|unix.BPF_K, 0, 0, deny(unix.EINVAL))
	}
	add(unix.BPF_RET|unix.BPF_K, 0, 0, allow)
	p := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return proctest.None{}, err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(p)))
	if errno != 0 {
		return proctest.None{}, errno
	}
	if _, err := unix.PidfdOpen(os.Getpid(), 0); err != d.Errno {
		return proctest.None{}, err
	}
	return proctest.None{}, nil
})

// A successor that hangs, before it is ready or after COMMIT, is killed and
// reaped where the system gives no handle for it.
func TestHungSuccessorInASandbox(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]denied{
		"EPERM":             {Errno: unix.EPERM},
		"ENOSYS":            {Errno: unix.ENOSYS},
		"without a pidfd":   {Errno: unix.ENOSYS, NoPidfd: true},
		"EPERM and no fork": {Errno: unix.EPERM, NoPidfd: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := proctest.Both.At(proctest.AtStart, sandbox.Do(d), sends.Do(sending{Size: 1000}))
			p := proctest.Start(t, spec.UpgradeTimeout(shortTimeout),
				spec.At(proctest.AtListened, proctest.Hang),
				spec.At(proctest.On(ecdysis.EventReady), proctest.Kill),
				spec.At(proctest.AtNew, readPattern.Do(stateRead{-1, 100})))
			if _, err := sandbox.At(p, proctest.AtStart); err != nil {
				t.Fatal("the sandbox: ", err)
			}
			l := p.Load(1)
			l.More(5)
			f := p.FailUpgrade(ecdysis.StepInit, os.ErrDeadlineExceeded)
			if !strings.Contains(f.How, "killed") {
				t.Errorf("the hung successor ended by %q; want that it was killed", f.How)
			}
			f.Successor.Reaped()
			p.FailUpgrade(ecdysis.StepHandover, io.ErrUnexpectedEOF).Successor.Reaped()
			p.Serves()
			s := p.Upgrade()
			if got, err := readPattern.At(s, proctest.AtNew); got != (stateGot{1000, true}) || err != nil {
				t.Errorf("the state is %+v, %v", got, err)
			}
			s.Serves()
			l.More(5)
			l.Check()
		})
	}
}

// One that hangs after COMMIT is killed, too, and the predecessor serves again.
func TestHungAfterCommitInASandbox(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP.At(proctest.AtStart, sandbox.Do(denied{Errno: unix.EPERM, NoPidfd: true}))
	p := proctest.Start(t, spec, spec.At(proctest.On(ecdysis.EventReady), proctest.Hang))
	f := p.FailUpgrade(ecdysis.StepHandover, os.ErrDeadlineExceeded)
	f.Successor.Reaped()
	p.Serves()
}

// A taker is no child of its predecessor, so that without a handle nothing but
// the stream tells of it. It is not killed, and while it may serve, the
// predecessor does not.
func TestTakerInASandbox(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking().At(proctest.AtStart, sandbox.Do(denied{Errno: unix.EPERM})),
		taking().Hold(proctest.On(ecdysis.EventReady)), taking())
	if _, err := sandbox.At(p, proctest.AtStart); err != nil {
		t.Fatal("the sandbox: ", err)
	}
	taker := p.Chain.Launch()
	taker.At(proctest.On(ecdysis.EventReady))
	c, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The time that a taker has for this is 5 s.
	if err := c.SetDeadline(time.Now().Add(6 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("who\n")); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 64)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes, %v; want that nobody answers", n, err)
	}
	if !taker.Living() {
		t.Fatal("the taker has ended")
	}
	taker.Kill()
	takeoverFailed(p, 0, ecdysis.StepHandover)
	p.Answers(c)
	c.Close()
	s := p.Chain.Start()
	s.Serves()
	takenOver(p, s, 1)
}
