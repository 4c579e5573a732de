package e2e

import (
	"errors"
	"io"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// For the time of Options.Probation the predecessor stands by, and resumes if
// the successor ends.

func TestProbationKilled(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.Probation(time.Minute), proctest.Both)
	l := proctest.StartLoad(t, proctest.Clients{Killed: 3}, p.Addrs()...)
	for range 3 {
		l.More(20)
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtServing)
		s.Serves()
		s.HasPIDFile()
		l.More(20)
		s.Kill()
		a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
		s.Reaped()
		p.Serves()
		p.HasPIDFile()
	}
	l.More(20)
	l.Check()
	s := p.BeginUpgrade().Successor()
	s.At(proctest.AtServing)
	s.Serves()
	p.Kill() // which makes the upgrade final
	s.Serves()
	s.HasPIDFile()
	p.Chain.HasFiles("pid", "sock")
	s.Upgrade().Serves()
}

// The successor is killed while clients connect and connect, at each trigger:
// the predecessor takes the sockets, the PID file and the control sockets back,
// nobody is refused, and the next upgrade works.
func TestProbationUnderLoad(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{10 * time.Millisecond, 500 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			spec := proctest.Triggered.And("unix", "$DIR/sock")
			spec.Options.PIDFile = "$DIR/pid"
			p := proctest.Start(t, spec.Probation(time.Minute), spec)
			c := p.Chain
			l := proctest.StartLoad(t, proctest.Clients{Killed: 3}, p.Addrs()...)
			var sameFiles []func()
			for _, name := range []string{"sock", "upgrade", "stop", "partial", "take"} {
				sameFiles = append(sameFiles, proctest.SameFile(t, c.Path(name)))
			}

			// fails kills the successor of the upgrade that has begun when it
			// has served for some time.
			fails := func(client *proctest.Client) {
				t.Helper()
				l.More(20)
				s := c.Next()
				s.At(proctest.AtServing)
				ready := time.Now()
				s.HasPIDFile()
				proctest.Connect(t, c.Path("upgrade")).WantsLine("error: " + ecdysis.ErrInProgress.Error())
				time.Sleep(time.Until(ready.Add(after))) // as the scenario wants it
				s.Kill()
				want := "ecdysis: upgrade failed at probation: successor " + strconv.Itoa(s.PID) + " (signal: killed): unexpected EOF"
				if e := p.HasFailed(s); e.Err.Error() != want {
					t.Errorf("event %v; want the error %q", e, want)
				}
				if client != nil {
					client.WantsLine("error: " + want)
				}
				s.Reaped()
				p.Serves()
				p.HasPIDFile()
				for _, same := range sameFiles {
					same()
				}
				l.More(20)
			}
			fails(proctest.Connect(t, c.Path("upgrade")))
			// The control sockets are the predecessor's again: it answers, and
			// its Wait acts.
			fails(proctest.Connect(t, c.Path("upgrade")))
			p.Signal(syscall.SIGHUP)
			fails(nil)
			l.More(20)
			l.Check()

			// Nobody disturbs this upgrade. The predecessor's end ends its
			// standing by.
			proctest.Connect(t, c.Path("upgrade"))
			s := c.Next()
			s.At(proctest.AtServing)
			s.Serves()
			p.Kill()
			s.HasPIDFile()
			for _, same := range sameFiles {
				same()
			}
			proctest.Connect(t, c.Path("stop")).Wants(s.Reply(1))
			s.Ended()
			c.HasFiles()
		})
	}
}

// A successor that is stopped in its probation has not failed.
func TestProbationStopped(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.Probation(time.Minute), proctest.Both)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	s.Stop()
	p.Chain.HasFiles()
	a.OK() // which waits for less than the probation
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	p.Refuses()
	if !p.Exited() {
		t.Error("Exit of the predecessor is not closed")
	}
	p.RefusesUpgrade(ecdysis.ErrUpgraded)
	s.RefusesUpgrade(ecdysis.ErrStopped)
	p.Chain.None()
}

// A successor that was stopped in its probation has not failed even if the
// predecessor, which is to stop as well, looks whether it lives before it reads
// that.
func TestProbationStoppedOnBothSides(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.Probation(time.Minute), proctest.Both.Hold(proctest.On(ecdysis.EventReady)))
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.On(ecdysis.EventReady)) // COMMIT has come
	p.Stop()
	p.Halt()
	s.Resume()
	s.At(proctest.AtServing)
	s.Stop()
	s.Exit(0)
	p.Signal(syscall.SIGCONT)
	a.OK()
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	p.Chain.HasFiles()
}

// A successor that does nothing has not ended.
func TestProbationPaused(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.Probation(time.Second), proctest.Both)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	s.Halt()
	err := a.Err()
	s.Signal(syscall.SIGCONT)
	if err != nil {
		t.Fatalf("upgrade: %v", err)
	}
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	s.Serves()
	s.Upgrade().Serves()
}

// In its probation the successor does not upgrade, and removes no file that
// the predecessor may need again.
func TestProbationLimits(t *testing.T) {
	t.Parallel()
	spec := proctest.Both.And("unix", "$DIR/sock2")
	p := proctest.Start(t, spec.Probation(time.Minute), spec)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	s.RefusesUpgrade(ecdysis.ErrInProgress)
	p.RefusesUpgrade(ecdysis.ErrInProgress)
	s.HasEvents()
	if err := s.Close(2); err != nil {
		t.Fatalf("Close: %v", err)
	}
	p.Chain.HasFiles("pid", "sock", "sock2")
	s.Kill()
	a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
	p.Serves() // at all three

	s = p.BeginUpgrade().Successor()
	s.At(proctest.AtServing)
	s.RefusesUpgrade(ecdysis.ErrInProgress)
	p.Kill() // which makes the upgrade final
	if err := s.Close(2); err != nil {
		t.Fatalf("Close: %v", err)
	}
	p.Chain.HasFiles("pid", "sock")
	s.Upgrade().Serves()
	p.Chain.None()
}

// After a probation that was taken back the predecessor's stop sockets are its
// own, too.
func TestProbationThenStop(t *testing.T) {
	t.Parallel()
	for what, kind := range map[string]ecdysis.EventKind{"stop": ecdysis.EventStopping, "partial": ecdysis.EventPartialStop} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Triggered.Probation(time.Minute), proctest.Triggered)
			wait := proctest.BeginRequest(t, p.Chain.Path("upgrade"))
			s := p.Chain.Next()
			s.At(proctest.AtServing)
			s.Kill()
			if _, err := wait(); err == nil {
				t.Fatal("the upgrade has not failed")
			}
			path := p.Chain.Path(what)
			proctest.Connect(t, path).Wants(p.Reply(0))
			if e := p.WaitReturned(); e.Kind != kind || e.Socket != path || e.Signal != nil {
				t.Errorf("Wait returned %v; want %q by the socket", e, kind)
			}
			p.Ended()
			if c, err := net.Dial("unix", path); err == nil {
				c.Close()
				t.Errorf("%s takes connections still", path)
			} else if !errors.Is(err, syscall.ENOENT) {
				t.Error(err)
			}
		})
	}
}
