package e2e

import (
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Calls that meet: upgrades, and a stop at any moment of one.

func TestUpgradeTwice(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtStart, proctest.Exit(3)), proctest.TCP.Hold(proctest.AtNew), proctest.TCP)
	f := p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
	if f.How != "exit status 3" {
		t.Errorf("error %v; want how the successor ended", f)
	}
	f.Successor.Ended()
	p.Serves()
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	for range 3 {
		p.RefusesUpgrade(ecdysis.ErrInProgress)
	}
	s.Resume()
	a.OK()
	s.At(proctest.AtServing)
	for range 3 {
		p.RefusesUpgrade(ecdysis.ErrUpgraded)
	}
	p.Chain.None()
	s.Serves()
	s.Upgrade().Serves()
}

// Of many calls at once one upgrades.
func TestUpgradeConcurrently(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	var attempts []*proctest.Attempt
	for range 20 {
		attempts = append(attempts, p.BeginUpgrade())
	}
	n := 0
	for _, a := range attempts {
		switch err := a.Err(); {
		case err == nil:
			n++
		case !errors.Is(err, ecdysis.ErrInProgress) && !errors.Is(err, ecdysis.ErrUpgraded):
			t.Errorf("error %v", err)
		}
	}
	if n != 1 {
		t.Errorf("%d of 20 calls have upgraded; want 1", n)
	}
	s := p.Chain.Next()
	s.At(proctest.AtServing)
	p.Chain.None()
	s.Serves()
	s.Upgrade().Serves()
}

// After a stop at any moment of an upgrade either the service has ended, or a
// successor serves to which the stop came too late. A client of the stop socket
// is told which process it was.
func TestStopAtRandomMoments(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	plain := proctest.Both
	plain.Options.StopSocket = "$DIR/stop"
	for i, m := range []struct {
		of string // the process that comes to the point
		at proctest.Point
	}{
		{"predecessor", proctest.On(ecdysis.EventUpgrading)},
		{"successor", proctest.AtStart},
		{"successor", proctest.AtNew},
		{"successor", proctest.AtListened},
		{"predecessor", proctest.On(ecdysis.EventHandover)},
		{"successor", proctest.On(ecdysis.EventReady)},
		{"successor", proctest.AtServing},
	} {
		for j, c := range []struct {
			name  string
			wait  bool
			stops func(t *testing.T, p *proctest.Proc, a *proctest.Attempt) (outcome string)
		}{
			{"call", false, stopsByCall},
			{"socket", true, stopsBySocket},
		} {
			t.Run(c.name+" after "+string(m.at)+" of the "+m.of, func(t *testing.T) {
				t.Parallel()
				rnd := rand.New(rand.NewPCG(seed, uint64(2*i+j)))
				for _, probation := range []time.Duration{0, time.Minute} {
					spec := plain.Probation(probation)
					spec.Wait = c.wait
					p := proctest.Start(t, spec)
					if c.wait {
						p.InWait()
					}
					a := p.BeginUpgrade()
					if m.of == "predecessor" {
						p.At(m.at)
					} else {
						a.Successor().At(m.at)
					}
					<-time.After(time.Duration(rnd.Int64N(int64(3 * time.Millisecond)))) // the random moment
					t.Logf("probation %v: %s", probation, c.stops(t, p, a))
					p.Chain.HasFiles()
				}
			})
		}
	}
}

// stopsByCall calls Stop and returns what that has ended.
func stopsByCall(t *testing.T, p *proctest.Proc, a *proctest.Attempt) string {
	t.Helper()
	p.Stop()
	err := a.Err()
	p.AwaitExit()
	kinds := p.Kinds()
	last := kinds[len(kinds)-1]
	if err != nil {
		if !errors.Is(err, ecdysis.ErrStopped) || last != ecdysis.EventStopping {
			t.Fatalf("error %v, events %q; want that it was stopped", err, kinds)
		}
		p.Refuses()
		if got := p.Children(); len(got) != 0 {
			t.Fatalf("processes %v are left", got)
		}
		return "the predecessor has stopped"
	}
	if last != ecdysis.EventUpgraded {
		t.Fatalf("events %q; want an end with upgraded", kinds)
	}
	s := a.Successor()
	s.At(proctest.AtServing)
	// The next call of Upgrade carries out a stop that was passed on.
	err = s.BeginUpgrade(proctest.Successor{Veto: "it serves"}).Err()
	if errors.Is(err, ecdysis.ErrStopped) {
		if e := s.Event(ecdysis.EventStopping, 0); !e.PassedOn {
			t.Errorf("event %v; want one that was passed on", e)
		}
		s.Refuses()
		return "the successor has stopped"
	}
	proctest.WantFailure(t, err, ecdysis.StepPrepare, nil)
	s.Serves()
	s.HasPIDFile()
	p.Chain.HasFiles("pid", "sock", "stop")
	s.Stop()
	s.Refuses()
	return "the stop came too late"
}

// stopsBySocket requests a stop and returns what that has ended.
func stopsBySocket(t *testing.T, p *proctest.Proc, a *proctest.Attempt) string {
	t.Helper()
	line := readAll(proctest.Connect(t, p.Chain.Path("stop")))
	if err := a.Err(); err != nil {
		if want := "ok " + p.Reply(0).String() + "\n"; line != want || !errors.Is(err, ecdysis.ErrStopped) {
			t.Fatalf("error %v, and the answer is %q; want that the process was stopped, and %q", err, line, want)
		}
		p.Ended()
		p.Refuses()
		return "the predecessor has stopped"
	}
	s := a.Successor()
	switch reply := s.Reply(1).String(); line {
	case "ok " + reply + "\n":
		p.Ended()
		s.Ended()
		if slices.Contains(p.Kinds(), ecdysis.EventStopping) {
			t.Errorf("events of the predecessor: %v; want no stop, because it was replaced", p.Kinds())
		}
		if e := s.Event(ecdysis.EventStopping, 0); e.PassedOn {
			return "the stop was passed on to the successor"
		}
		return "the successor has stopped"
	case "error: " + ecdysis.ErrUpgraded.Error() + ": " + reply + " serves\n":
		p.Ended()
		s.At(proctest.AtServing)
		s.Serves()
		s.HasPIDFile()
		s.Stop()
		s.Ended()
		return "the stop came too late"
	default:
		t.Fatalf("the answer is %q; want one about process %d or %d", line, p.PID, s.PID)
		return ""
	}
}
