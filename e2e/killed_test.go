package e2e

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// One of two generations is killed, at each step of their conversation.

func TestPredecessorKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name                   string
		predecessor, successor proctest.Point // at which it holds
		probation              time.Duration
	}{
		{name: "start", successor: proctest.AtStart},
		{name: "new", successor: proctest.AtNew},
		{name: "listened", successor: proctest.AtListened},
		{name: "listened, to have stood by", successor: proctest.AtListened, probation: time.Minute},
		{name: "handover", predecessor: proctest.On(ecdysis.EventHandover)},
		{name: "committed", successor: proctest.On(ecdysis.EventReady)},
		{name: "committed, to have stood by", successor: proctest.On(ecdysis.EventReady), probation: time.Minute},
		{name: "probation", probation: time.Minute},
		{name: "final"},
	} {
		for _, then := range []string{"upgrade", "close", "stop"} {
			t.Run(c.name+"/"+then, func(t *testing.T) {
				t.Parallel()
				p := proctest.Start(t, proctest.Both.Probation(c.probation).At(c.predecessor, proctest.Once(proctest.Hold)), proctest.Both.At(c.successor, proctest.Hold), proctest.Both)
				l := proctest.StartLoad(t, proctest.Clients{Killed: 1}, p.Addrs()...)
				l.More(10)
				a := p.BeginUpgrade()
				s := a.Successor()
				switch {
				case c.predecessor != "":
					p.At(c.predecessor)
				case c.successor != "":
					s.At(c.successor)
				case c.probation != 0:
					s.At(proctest.AtServing)
				default:
					a.OK()
				}
				p.Kill()
				if c.successor != "" {
					s.Resume()
				}
				s.At(proctest.AtServing)
				s.Inherits(p)
				s.Serves()
				s.HasPIDFile()
				l.More(10)
				if err := s.WaitForPredecessor(); err != nil {
					t.Fatalf("WaitForParent: %v", err)
				}
				switch then {
				case "upgrade":
					n := s.Upgrade()
					n.Inherits(p)
					n.Serves()
					l.More(10)
					l.Check()
					p.Chain.HasFiles("pid", "sock")
				case "close": // it owns the file
					l.Check()
					if err := s.Close(1); err != nil {
						t.Fatalf("Close: %v", err)
					}
					p.Chain.HasFiles("pid")
					s.Upgrade().Serves() // makes it anew
				case "stop":
					l.Check()
					s.Stop()
					p.Chain.HasFiles()
					s.Refuses()
				}
			})
		}
	}
}

func TestSuccessorKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		step      ecdysis.Step
		point     proctest.Point // at which it kills itself
		probation time.Duration
	}{
		{name: "start", point: proctest.AtStart, step: ecdysis.StepInit},
		{name: "new", point: proctest.AtNew, step: ecdysis.StepInit},
		{name: "listened", point: proctest.AtListened, step: ecdysis.StepInit},
		{name: "handover", step: ecdysis.StepHandover},
		{name: "committed", point: proctest.On(ecdysis.EventReady), step: ecdysis.StepHandover},
		{name: "committed, to be stood by", point: proctest.On(ecdysis.EventReady), step: ecdysis.StepHandover, probation: time.Minute},
		{name: "probation", point: proctest.AtServing, step: ecdysis.StepProbation, probation: time.Minute},
		{name: "probation, from outside", step: ecdysis.StepProbation, probation: time.Minute},
	} {
		for name, end := range map[string]proctest.Action{c.name: proctest.Kill, c.name + " with a helper left": proctest.Seq(proctest.LeaveHelper, proctest.Kill)} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				predecessor, successor := proctest.Both.Probation(c.probation), proctest.Both.At(c.point, end)
				if c.point == "" && len(end) > 1 {
					successor = proctest.Both.At(proctest.AtListened, proctest.LeaveHelper)
				}
				if c.name == "handover" {
					predecessor = predecessor.At(proctest.On(ecdysis.EventHandover), proctest.Once(proctest.Hold))
				}
				p := proctest.Start(t, predecessor, successor, proctest.Both)
				l := proctest.StartLoad(t, proctest.Clients{Killed: 1}, p.Addrs()...)
				l.More(10)
				begun := time.Now()
				a := p.BeginUpgrade()
				s := a.Successor()
				if c.name == "handover" {
					p.At(proctest.On(ecdysis.EventHandover))
					_ = s.Process.Kill()
					p.Resume()
				} else if c.point == "" {
					s.At(proctest.AtServing)
					_ = s.Process.Kill()
				}
				f := a.Fails(c.step, io.ErrUnexpectedEOF)
				// Far less than UpgradeTimeout and Probation, a minute each.
				if d := time.Since(begun); d > proctest.Patience {
					t.Errorf("Upgrade returned after %v", d)
				}
				if f.PID != s.PID || f.How != "signal: killed" {
					t.Errorf("error %v; want process %d and how it ended", f, s.PID)
				}
				s.Reaped()
				if c.step == ecdysis.StepInit {
					p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
				} else {
					p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed, ecdysis.EventUpgradeFailed)
				}
				p.Serves()
				p.HasPIDFile()
				l.More(10)

				a = p.BeginUpgrade()
				n := a.Successor()
				n.At(proctest.AtServing)
				n.Inherits(p)
				n.Serves()
				n.HasPIDFile()
				l.More(10)
				l.Check()
				p.Chain.HasFiles("pid", "sock")
				if c.probation != 0 {
					n.Stop() // else Upgrade returns after a minute
				}
				a.OK()
			})
		}
	}
}

func TestWaitForParent(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtNew, proctest.Hold), proctest.TCP)
	if err := p.WaitForPredecessor(); err != nil {
		t.Fatalf("in the first process: %v", err)
	}
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	proctest.Want(t, s.WaitForPredecessor(), ecdysis.ErrNotReady)
	s.Resume()
	s.At(proctest.AtServing)
	a.OK()
	proctest.Want(t, s.WaitForPredecessor(time.Millisecond), context.DeadlineExceeded)
	waits := []*proctest.Pending[proctest.None]{proctest.CallWaitForPredecessor.Begin(s, proctest.Patience), proctest.CallWaitForPredecessor.Begin(s, proctest.Patience)}
	proctest.Want(t, s.WaitForPredecessor(20*time.Millisecond), context.DeadlineExceeded)
	p.Exit(0)
	for _, w := range waits {
		if err := w.Err(); err != nil {
			t.Fatalf("after the exit: %v", err)
		}
	}
	if err := s.WaitForPredecessor(time.Hour); err != nil {
		t.Fatalf("once more: %v", err)
	}
	s.Serves()
	s.Upgrade().Serves()
}
