package e2e

import (
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What Options.Prepare and Options.Notify may do: call every method, stop the
// process, and panic.

// chainOf returns the specs of a chain. If kill is set, the first successor is
// killed at its EventReady, after COMMIT, so that the attempt fails.
func chainOf(first proctest.Spec, kill bool, next proctest.Spec) []proctest.Spec {
	if kill {
		return []proctest.Spec{first, proctest.Both.At(proctest.On(ecdysis.EventReady), proctest.Kill), next}
	}
	return []proctest.Spec{first, next}
}

// Every hook may call every method. It gets what any caller gets at that moment,
// and nothing waits for itself.
func TestHooksCall(t *testing.T) {
	t.Parallel()
	listen := proctest.Listen{Network: "tcp", Address: "127.0.0.1:0"}
	for _, c := range []struct {
		at                     proctest.Point
		ready, listen, upgrade error
		kill                   bool // the first successor, at its EventReady
	}{
		{at: proctest.On(ecdysis.EventReady), ready: ecdysis.ErrInProgress, listen: ecdysis.ErrInProgress, upgrade: ecdysis.ErrNotReady},
		{at: proctest.AtPrepare, upgrade: ecdysis.ErrInProgress},
		{at: proctest.On(ecdysis.EventUpgrading), upgrade: ecdysis.ErrInProgress},
		{at: proctest.On(ecdysis.EventHandover), listen: ecdysis.ErrInProgress, upgrade: ecdysis.ErrInProgress},
		{at: proctest.On(ecdysis.EventResumed), listen: ecdysis.ErrInProgress, upgrade: ecdysis.ErrInProgress, kill: true},
		{at: proctest.On(ecdysis.EventUpgradeFailed), kill: true},
		{at: proctest.On(ecdysis.EventUpgraded), ready: ecdysis.ErrUpgraded, listen: ecdysis.ErrUpgraded, upgrade: ecdysis.ErrUpgraded},
		{at: proctest.On(ecdysis.EventStopping), ready: ecdysis.ErrStopped, listen: ecdysis.ErrStopped, upgrade: ecdysis.ErrStopped},
	} {
		t.Run(string(c.at), func(t *testing.T) {
			t.Parallel()
			next := proctest.Both
			if c.listen == nil {
				next = next.And(listen.Network, listen.Address)
			}
			p := proctest.Start(t, chainOf(proctest.Both.At(c.at, proctest.CallReady.Do(), proctest.CallListen.Do(listen),
				proctest.CallClose.Do(1), proctest.CallUpgrade.Do()), c.kill, next)...)
			var made string // by the hook's Listen
			check := func() {
				t.Helper()
				var err error
				made, err = proctest.CallListen.At(p, c.at)
				hasGot(t, "Listen", err, c.listen)
				hasGot(t, "Ready", proctest.CallReady.ErrAt(p, c.at), c.ready)
				hasGot(t, "Close", proctest.CallClose.ErrAt(p, c.at), nil)
				hasGot(t, "Upgrade", proctest.CallUpgrade.ErrAt(p, c.at), c.upgrade)
			}
			if c.at == proctest.On(ecdysis.EventStopping) {
				p.Stop()
				check()
				p.Refuses()
				p.Chain.HasFiles()
				return
			}
			a := p.BeginUpgrade()
			s := a.Successor()
			if c.kill {
				a.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
				check()
				s.Reaped()
				if c.upgrade != nil {
					p.ServesAt(p.Addr(0))
					p.Chain.HasFiles("pid")
					return
				}
				s = p.Chain.Next()
			} else {
				a.OK()
				check()
			}
			s.At(proctest.AtServing)
			s.Serves()
			s.HasPIDFile()
			p.Chain.HasFiles("pid", "sock")
			if c.listen == nil && s.Addr(2).Address != made {
				t.Errorf("the successor listens at %v; want what the hook has made, %s", s.Addr(2), made)
			}
			if s.Addr(0) != p.Addr(0) {
				t.Errorf("the successor listens at %v, the predecessor at %v", s.Addr(0), p.Addr(0))
			}
			s.Upgrade().Serves()
		})
	}
}

// A stop in a hook ends what is running, once, and by its own error and event.
func TestHooksStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		at   proctest.Point
		step ecdysis.Step
		is   error
		kill bool
	}{
		{at: proctest.On(ecdysis.EventReady)},
		{at: proctest.AtPrepare, step: ecdysis.StepStart, is: ecdysis.ErrStopped},
		{at: proctest.On(ecdysis.EventUpgrading), step: ecdysis.StepStart, is: ecdysis.ErrStopped},
		{at: proctest.On(ecdysis.EventHandover), step: ecdysis.StepHandover, is: ecdysis.ErrStopped},
		{at: proctest.On(ecdysis.EventResumed), step: ecdysis.StepHandover, is: io.ErrUnexpectedEOF, kill: true},
		{at: proctest.On(ecdysis.EventUpgradeFailed), step: ecdysis.StepHandover, is: io.ErrUnexpectedEOF, kill: true},
		{at: proctest.On(ecdysis.EventUpgraded)},
		{at: proctest.On(ecdysis.EventStopping)},
	} {
		t.Run(string(c.at), func(t *testing.T) {
			t.Parallel()
			chain := proctest.New(t, chainOf(proctest.Both.At(c.at, proctest.CallStop.Do(), proctest.CallStop.Do()), c.kill, proctest.Both)...)
			p := chain.Launch()
			switch c.at {
			case proctest.On(ecdysis.EventReady):
				proctest.Want(t, p.ErrAt(proctest.AtReadyFailed), ecdysis.ErrStopped)
				p.HasEvents(ecdysis.EventStopping)
				p.Refuses()
				chain.HasFiles()
				return
			case proctest.On(ecdysis.EventStopping):
				p.At(proctest.AtServing)
				p.Stop()
				p.HasEvents(ecdysis.EventStopping)
				p.Refuses()
				chain.HasFiles()
				return
			case proctest.On(ecdysis.EventUpgraded):
				p.At(proctest.AtServing)
				s := p.Upgrade()
				p.AwaitExit()
				s.Serves()
				s.HasPIDFile()
				chain.HasFiles("pid", "sock")
				s.Upgrade().Serves()
				return
			}
			p.At(proctest.AtServing)
			f := p.FailUpgrade(c.step, c.is)
			p.AwaitExit()
			p.Refuses()
			chain.HasFiles()
			want := []ecdysis.EventKind{ecdysis.EventUpgrading}
			if c.step == ecdysis.StepHandover {
				want = append(want, ecdysis.EventHandover, ecdysis.EventResumed)
				f.Successor.Reaped()
			}
			p.HasEvents(append(want, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)...)
			chain.None()
			p.RefusesUpgrade(ecdysis.ErrStopped)
		})
	}
}

// A successor that is stopped by its own hook, after COMMIT, is the service: it
// ends, and the predecessor does not come back.
func TestSuccessorStopsInHook(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both, proctest.Both.At(proctest.On(ecdysis.EventReady), proctest.CallStop.Do()), proctest.Both)
	a := p.BeginUpgrade()
	s := a.Successor()
	a.OK()
	s.Ended()
	p.Refuses()
	p.Chain.HasFiles()
}

func TestPrepareVeto(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	f := p.FailUpgrade(ecdysis.StepPrepare, nil, proctest.Successor{Veto: "vetoed"})
	proctest.Want(t, f, nil, ": vetoed")
	if f.PID != 0 || f.How != "" {
		t.Errorf("error %v has PID %d and State %q; want none, because nothing was started", f, f.PID, f.How)
	}
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	p.Chain.None()
	p.Serves()
	p.Upgrade().Serves()
}

// upgradeRecovers calls Upgrade and returns what that panics with.
var upgradeRecovers = proctest.Define("recover from Upgrade", func(d *proctest.Daemon, _ proctest.None) (recovered string, err error) {
	defer func() { recovered = fmt.Sprint(recover()) }()
	return "", d.U.Upgrade()
})

// panicsInUpgrade fails the test unless Upgrade panics in p as planned.
func panicsInUpgrade(p *proctest.Proc) {
	p.T.Helper()
	if got, err := upgradeRecovers.Try(p); got != "planned" || err != nil {
		p.T.Fatalf("Upgrade panicked with %q and returned %v; want the hook's panic", got, err)
	}
}

// A hook that panics ends the attempt. A program that recovers goes on to serve.
func TestHookPanics(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		at      proctest.Point
		kill    bool
		started bool // a successor was started
	}{
		{at: proctest.AtPrepare},
		{at: proctest.On(ecdysis.EventUpgrading)},
		{at: proctest.On(ecdysis.EventHandover), started: true},
		{at: proctest.On(ecdysis.EventResumed), kill: true, started: true},
		{at: proctest.On(ecdysis.EventUpgradeFailed), kill: true, started: true},
		{at: proctest.On(ecdysis.EventUpgraded), started: true},
	} {
		t.Run(string(c.at), func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, chainOf(proctest.Both.At(c.at, proctest.Once(proctest.Panic)), c.kill, proctest.Both)...)
			panicsInUpgrade(p)
			if c.at == proctest.On(ecdysis.EventUpgraded) {
				s := p.Chain.Next()
				s.At(proctest.AtServing)
				p.AwaitExit()
				p.RefusesUpgrade(ecdysis.ErrUpgraded)
				s.Serves()
				s.Upgrade().Serves()
				return
			}
			if c.started {
				p.Chain.Next().Reaped()
			}
			p.Chain.None()
			for range 3 {
				p.Serves()
			}
			p.HasPIDFile()
			s := p.Upgrade()
			s.Inherits(p)
			s.Serves()
			s.HasPIDFile()
			p.Chain.HasFiles("pid", "sock")
		})
	}
}

// A stop by a hook is not lost when a hook panics afterwards.
func TestHookStopsAndPanics(t *testing.T) {
	t.Parallel()
	resumed, failed := proctest.On(ecdysis.EventResumed), proctest.On(ecdysis.EventUpgradeFailed)
	for _, at := range []proctest.Point{proctest.AtPrepare, proctest.On(ecdysis.EventUpgrading), proctest.On(ecdysis.EventHandover), resumed, failed} {
		t.Run(string(at), func(t *testing.T) {
			t.Parallel()
			kill := slices.Contains([]proctest.Point{resumed, failed}, at)
			p := proctest.Start(t, chainOf(proctest.Both.At(at, proctest.CallStop.Do(), proctest.Once(proctest.Panic)), kill, proctest.Both)...)
			panicsInUpgrade(p)
			if !p.Exited() {
				t.Fatal("the process has not stopped")
			}
			p.Refuses()
			p.Chain.HasFiles()
			if got := p.Children(); len(got) != 0 {
				t.Fatalf("processes %v are left", got)
			}
		})
	}
}

// readyRecovers is upgradeRecovers for Ready.
var readyRecovers = proctest.Define("recover from Ready", func(d *proctest.Daemon, _ proctest.None) (recovered string, err error) {
	defer func() { recovered = fmt.Sprint(recover()) }()
	return "", d.U.Ready()
})

func TestReadyHookPanics(t *testing.T) {
	t.Parallel()
	panics := proctest.Both.At(proctest.AtListened, readyRecovers.Do(), proctest.Hold).At(proctest.On(ecdysis.EventReady), proctest.Once(proctest.Panic))
	c := proctest.New(t, panics, panics, proctest.Both)
	p := c.Launch()
	if got, err := readyRecovers.At(p, proctest.AtListened); got != "planned" || err != nil {
		t.Fatalf("Ready panicked with %q and returned %v; want the hook's panic", got, err)
	}
	p.RefusesUpgrade(ecdysis.ErrNotReady)
	p.Resume() // calls Ready again
	p.At(proctest.AtServing)
	p.Serves()
	p.HasPIDFile()

	a := p.BeginUpgrade()
	s := a.Successor()
	f := a.Fails(ecdysis.StepHandover, nil)
	proctest.Want(t, f, nil, "it says: ")
	s.Reaped()
	p.Serves()
	p.HasPIDFile()
	c.HasFiles("pid", "sock")
	p.Upgrade().Serves()
}
