package e2e

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Upgrades and stops by signals.

// signalled is a daemon as the README has it.
var signalled = func() proctest.Spec {
	s := proctest.Both
	s.Wait = true
	s.Options.UpgradeSignals = []os.Signal{syscall.SIGHUP}
	s.Options.StopSignals = []os.Signal{syscall.SIGTERM}
	s.Options.PartialStopSignals = []os.Signal{syscall.SIGUSR1}
	return s
}()

// succeeds fails the test unless p, which Launch has started, exits with status
// 0.
func succeeds(p *proctest.Proc) {
	p.T.Helper()
	if s := p.ExitStatus(); s != "exit status 0" {
		p.T.Errorf("process %d ended by %s; want exit status 0", p.PID, s)
	}
}

func TestSignalUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, signalled, signalled.Hold(proctest.AtNew), signalled)
	c := p.Chain
	l := p.Load(1)
	l.More(10)
	p.Signal(syscall.SIGHUP)
	s := c.Next()
	s.At(proctest.AtNew)
	p.Signal(syscall.SIGHUP) // a second one meanwhile
	hasRefused(p, 0, signaled(syscall.SIGHUP), ecdysis.ErrInProgress.Error())
	if e := p.Event(ecdysis.EventUpgradeFailed, 0); e.PID != 0 {
		t.Errorf("event %v; want no process", e)
	}
	p.Serves()
	s.Resume()
	s.At(proctest.AtServing)
	s.Serves()
	hasReturned(p, ecdysis.EventUpgraded, signaled(syscall.SIGHUP))
	l.More(10)
	succeeds(p)
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventHandover, ecdysis.EventUpgraded)
	c.None()

	// Many at once are one or several upgrades, one after the other: each
	// process has at most one successor.
	for range 3 {
		s.Signal(syscall.SIGHUP)
		s.Signal(syscall.SIGHUP)
		next := c.Next()
		next.At(proctest.AtServing)
		s.Ended()
		c.None()
		next.Serves()
		s = next
	}
	l.More(10)
	l.Check()
}

// A signal that comes too late kills no process.
func TestSignalAfterUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, signalled)
	client := p.Dial(0) // keeps p busy
	p.Signal(syscall.SIGHUP)
	s := p.Chain.Next()
	s.At(proctest.AtServing)
	hasReturned(p, ecdysis.EventUpgraded, signaled(syscall.SIGHUP))
	p.Signal(syscall.SIGHUP)
	for range 3 {
		p.Answers(client)
	}
	p.AwaitExit()
	p.Chain.None()
	s.Serves()
	client.Close()
	p.Ended()
}

func TestSignalBeforeReady(t *testing.T) {
	t.Parallel()
	for _, point := range []proctest.Point{proctest.AtNew, proctest.AtListened, proctest.On(ecdysis.EventReady)} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, signalled.Hold(point), signalled)
			p := c.Launch()
			p.At(point)
			p.Signal(syscall.SIGHUP)
			c.None()
			p.Resume()
			s := c.Next()
			s.At(proctest.AtServing)
			s.Serves()
			p.Ended()
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
		})
	}
}

// Wait acts on signals to stop before Ready, too.
func TestSignalStopBeforeReady(t *testing.T) {
	t.Parallel()
	for _, what := range []order{stop, partial} {
		t.Run(what.name, func(t *testing.T) {
			t.Parallel()
			spec := signalled.Hold(proctest.AtNew)
			spec.Wait = false
			p := proctest.New(t, spec).Launch()
			p.At(proctest.AtNew)
			waiting := wait.Begin(p)
			p.InWait()
			p.Signal(what.signal)
			// There is nothing to drain, so a partial stop ends the process at once.
			if e, err := waiting.Wait(); e.Kind != ecdysis.EventStopping || e.Signal != what.signal {
				t.Errorf("Wait returned %v, %v; want a stop by %v", e, err, what.signal)
			}
		})
	}
}

// A signal that has made Wait return kills when it comes again.
func TestSignalAfterWait(t *testing.T) {
	t.Parallel()
	for _, what := range []order{stop, partial} {
		t.Run(what.name, func(t *testing.T) {
			t.Parallel()
			spec := signalled
			spec.Options.StopSignals, spec.Options.PartialStopSignals = []os.Signal{syscall.SIGTERM}, nil
			if what == partial {
				spec.Options.StopSignals, spec.Options.PartialStopSignals = nil, spec.Options.StopSignals
			}
			p := proctest.Start(t, spec)
			p.Dial(0) // keeps it
			p.InWait()
			p.Signal(syscall.SIGTERM)
			hasReturned(p, what.kind, signaled(syscall.SIGTERM))
			wait.On(p) // which returns at once
			p.Signal(syscall.SIGTERM)
			if s := p.ExitStatus(); s != "signal: terminated" {
				t.Errorf("process %d ended by %s; want SIGTERM", p.PID, s)
			}
		})
	}
}

func TestSignalStop(t *testing.T) {
	t.Parallel()
	for _, what := range []order{stop, partial} {
		t.Run(what.name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, signalled)
			client := p.Dial(0)
			p.InWait()
			p.Signal(what.signal)
			hasReturned(p, what.kind, signaled(what.signal))
			p.Refuses()
			if what == stop {
				p.Chain.HasFiles()
			} else {
				p.Chain.HasFiles("pid")
			}
			p.Answers(client)
			client.Close()
			succeeds(p)
			p.HasEvents(what.kind)
		})
		for _, point := range []proctest.Point{proctest.AtStart, proctest.AtNew, proctest.AtListened} {
			t.Run(what.name+" during an upgrade, at "+string(point), func(t *testing.T) {
				t.Parallel()
				p := proctest.Start(t, signalled, signalled.Hold(point), signalled)
				p.Signal(syscall.SIGHUP)
				s := p.Chain.Next()
				s.At(point)
				p.Signal(what.signal)
				s.Ended()
				hasReturned(p, what.kind, signaled(what.signal))
				succeeds(p)
				p.Refuses()
				p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, what.kind)
				proctest.Want(t, p.HasFailed(s).Err, ecdysis.ErrStopped)
				p.Chain.None()
			})
		}
	}
	// A stop of a successor within its probation ends the service: the
	// predecessor does not come back.
	t.Run("within probation", func(t *testing.T) {
		t.Parallel()
		p := proctest.Start(t, signalled.Probation(time.Minute), signalled)
		p.Signal(syscall.SIGHUP)
		s := p.Chain.Next()
		s.At(proctest.AtServing)
		s.InWait()
		s.Signal(syscall.SIGTERM)
		hasReturned(s, ecdysis.EventStopping, signaled(syscall.SIGTERM))
		hasReturned(p, ecdysis.EventUpgraded, signaled(syscall.SIGHUP))
		s.Ended()
		p.Ended()
		s.Refuses()
		p.Chain.HasFiles()
	})
}
