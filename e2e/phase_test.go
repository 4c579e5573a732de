package e2e

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Which calls succeed in which part of a process's life, and the error of those
// that fail.

// listenAndClose makes a listener and closes it.
var listenAndClose = proctest.Define("listen and close", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	ln, err := d.U.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return proctest.None{}, err
	}
	return proctest.None{}, ln.Close()
})

// failsAsTold reports whether Fail returns the very error that it was given.
var failsAsTold = proctest.Define("Fail as told", func(d *proctest.Daemon, _ proctest.None) (bool, error) {
	err := errors.New("a reason")
	return d.U.Fail(err) == err, nil
})

// A phase is the error of each call. Nil is a call that succeeds.
type phase struct{ upgrade, ready, wait, listen error }

// is fails the test unless each call in p returns now what f has.
func (f phase) is(p *proctest.Proc) {
	p.T.Helper()
	f.equals(p.T, phase{
		upgrade: proctest.CallUpgrade.Err(p),
		ready:   p.Ready(),
		wait:    p.WaitForPredecessor(time.Millisecond),
		listen:  listenAndClose.Err(p),
	})
	if !failsAsTold.On(p) {
		p.T.Error("Fail returns another error than it was given")
	}
}

func (f phase) equals(t testing.TB, got phase) {
	t.Helper()
	hasGot(t, "Upgrade", got.upgrade, f.upgrade)
	hasGot(t, "Ready", got.ready, f.ready)
	hasGot(t, "WaitForParent", got.wait, f.wait)
	hasGot(t, "Listen", got.listen, f.listen)
}

// hasGot fails the test unless the call has returned the error that is wanted,
// or nil if none is.
func hasGot(t testing.TB, call string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s returned %v; want %v", call, err, want)
	}
}

func TestPhases(t *testing.T) {
	t.Parallel()
	holds := proctest.Both.Hold(proctest.AtNew)
	c := proctest.New(t, holds.Probation(time.Minute), holds, proctest.Both)
	p := c.Launch()
	p.At(proctest.AtNew)
	p.RefusesUpgrade(ecdysis.ErrNotReady)
	if err := p.WaitForPredecessor(); err != nil {
		t.Fatalf("WaitForParent in the first process: %v", err)
	}
	proctest.Want(t, p.Fail("nobody hears it"), nil, "nobody hears it")
	p.Resume()
	p.At(proctest.AtServing)
	p.Serves()

	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	s.RefusesUpgrade(ecdysis.ErrNotReady)
	proctest.Want(t, s.WaitForPredecessor(), ecdysis.ErrNotReady)
	phase{upgrade: ecdysis.ErrInProgress, listen: ecdysis.ErrInProgress}.is(p)
	p.Serves()
	s.Resume()
	s.At(proctest.AtServing)
	phase{upgrade: ecdysis.ErrInProgress, listen: ecdysis.ErrInProgress}.is(p)
	phase{upgrade: ecdysis.ErrInProgress, wait: context.DeadlineExceeded}.is(s)
	if p.Exited() {
		t.Error("Exit is closed within the probation")
	}
	p.Stop()
	a.OK()
	phase{upgrade: ecdysis.ErrUpgraded, ready: ecdysis.ErrUpgraded, listen: ecdysis.ErrUpgraded}.is(p)
	p.Stop()
	p.Stop()
	p.AwaitExit()
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	s.RefusesUpgrade(ecdysis.ErrStopped) // the stop was passed on
	s.Stop()
	phase{upgrade: ecdysis.ErrStopped, ready: ecdysis.ErrStopped, wait: context.DeadlineExceeded, listen: ecdysis.ErrStopped}.is(s)
	s.HasEvents(ecdysis.EventStopping)
	s.Refuses()
	c.HasFiles()
}

// socketAddr is the address of the i-th socket, also before the daemon has told
// its addresses.
var socketAddr = proctest.Define("address", func(d *proctest.Daemon, i int) (proctest.Addr, error) {
	var a net.Addr
	if c, ok := d.Socket(i).(net.PacketConn); ok {
		a = c.LocalAddr()
	} else {
		a = d.Listener(i).Addr()
	}
	return proctest.Addr{Network: a.Network(), Address: a.String()}, nil
})

func TestPhaseStoppedEarly(t *testing.T) {
	t.Parallel()
	t.Run("first process", func(t *testing.T) {
		t.Parallel()
		c := proctest.New(t, proctest.Both.Hold(proctest.AtListened))
		p := c.Launch()
		p.At(proctest.AtListened)
		p.Stop()
		phase{upgrade: ecdysis.ErrStopped, ready: ecdysis.ErrStopped, listen: ecdysis.ErrStopped}.is(p)
		if _, err := socketAddr.On(p, 0).Dial(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("after the stop: %v; want that connections are refused", err)
		}
		c.HasFiles()
		p.Resume()
		proctest.Want(t, p.ErrAt(proctest.AtReadyFailed), ecdysis.ErrStopped)
	})
	// A successor tells its predecessor at once.
	for _, point := range []proctest.Point{proctest.AtNew, proctest.AtListened} {
		t.Run("successor/"+string(point), func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Both, proctest.Both.Hold(point), proctest.Both)
			a := p.BeginUpgrade()
			s := a.Successor()
			s.At(point)
			s.Stop()
			f := a.Fails(ecdysis.StepInit, nil)
			proctest.Want(t, f, nil, ecdysis.ErrStopped.Error())
			p.Serves()
			p.HasPIDFile()
			p.Chain.HasFiles("pid", "sock")
			p.Upgrade().Serves()
		})
	}
}

func TestPhaseRefused(t *testing.T) {
	t.Parallel()
	aborted := phase{upgrade: ecdysis.ErrAborted, ready: ecdysis.ErrAborted, wait: ecdysis.ErrNotReady, listen: ecdysis.ErrAborted}
	t.Run("by itself", func(t *testing.T) {
		t.Parallel()
		// The predecessor would end the process soon after its Fail. So all calls
		// are planned, and the predecessor stands still meanwhile.
		p := proctest.Start(t, proctest.Both, proctest.Both.At(proctest.AtListened, proctest.Hold, proctest.CallFail.Do("planned"),
			proctest.CallUpgrade.Do(), proctest.CallReady.Do(), proctest.CallWaitForPredecessor.Do(time.Millisecond),
			listenAndClose.Do(), failsAsTold.Do(), proctest.CallStop.Do(), proctest.Hold), proctest.Both)
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtListened)
		p.Halt()
		s.Resume()
		aborted.equals(t, phase{
			upgrade: proctest.CallUpgrade.ErrAt(s, proctest.AtListened),
			ready:   proctest.CallReady.ErrAt(s, proctest.AtListened),
			wait:    proctest.CallWaitForPredecessor.ErrAt(s, proctest.AtListened),
			listen:  listenAndClose.ErrAt(s, proctest.AtListened),
		})
		if same, err := failsAsTold.At(s, proctest.AtListened); !same || err != nil {
			t.Errorf("Fail returns another error than it was given: %v", err)
		}
		p.Signal(syscall.SIGCONT)
		f := a.Fails(ecdysis.StepInit, nil)
		proctest.Want(t, f, nil, ": it says: planned")
		s.Reaped()
		p.Serves()
		p.HasPIDFile()
		p.Chain.HasFiles("pid", "sock")
		p.Upgrade().Serves()
	})
	t.Run("by the predecessor", func(t *testing.T) {
		t.Parallel()
		p, root := proctest.Unkillable(t, proctest.TCP.UpgradeTimeout(lateTimeout), proctest.TCP.Hold(proctest.AtListened), proctest.TCP)
		a := p.BeginUpgrade(root)
		late := a.Successor()
		late.At(proctest.AtListened)
		a.Fails(ecdysis.StepInit, os.ErrDeadlineExceeded)
		proctest.Want(t, late.Ready(), ecdysis.ErrAborted)
		aborted.is(late)
		late.Stop()
		proctest.Want(t, late.Ready(), ecdysis.ErrStopped)
		p.Serves()
		p.Upgrade().Serves()
	})
}

func TestPhasePartial(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, signalled)
	client := p.Dial(0)
	p.InWait()
	p.Signal(syscall.SIGUSR1)
	hasReturned(p, ecdysis.EventPartialStop, signaled(syscall.SIGUSR1))
	p.Refuses()
	phase{upgrade: ecdysis.ErrStopped, ready: ecdysis.ErrStopped, listen: ecdysis.ErrStopped}.is(p)
	p.Chain.HasFiles("pid")
	p.Answers(client)
	if p.Exited() {
		t.Error("Exit is closed after a partial stop")
	}
	p.Stop()
	p.AwaitExit()
	p.HasEvents(ecdysis.EventPartialStop, ecdysis.EventStopping)
	if e := wait.On(p); e.Kind != ecdysis.EventPartialStop { // which has ended it first
		t.Errorf("Wait after Stop returned %v; want the partial stop", e)
	}
	p.Chain.HasFiles()
	client.Close()
	p.Ended()
}
