//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

// The promises of docs/design.md, a test for each. The processes are real
// ones; what can happen to them in detail is in e2e.

func TestPromise1AClientNeverSeesAnUpgrade(t *testing.T) {
	t.Parallel()
	works, fails := proctest.Both.And("udp", "127.0.0.1:0"), proctest.Both.At(proctest.AtListened, proctest.Exit(3))
	p := proctest.Start(t, works)
	clients := p.Load(2)
	for range 3 {
		p.Chain.Specs(fails, works)
		p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
		clients.More(20)
		p = p.Upgrade()
		clients.More(20)
	}
	clients.Check()
}

func TestPromise2TwoGenerationsNeverAcceptAtOnce(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both, proctest.Both.Hold(proctest.AtListened, proctest.On(ecdysis.EventReady)))
	clients := p.Load(2)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtListened)
	s.Resume() // and its accept loops start
	s.At(proctest.On(ecdysis.EventReady))
	if clients.Newest() != 0 {
		t.Error("the successor accepts before it is ready")
	}
	early, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	s.Resume()
	a.OK()
	s.Answers(early)
	clients.More(100) // and none of them is answered by the predecessor
	clients.Check()
}

func TestPromise3ABadSuccessorHurtsNobody(t *testing.T) {
	t.Parallel()
	for name, bad := range map[string]struct {
		start proctest.Successor
		spec  proctest.Spec
		step  ecdysis.Step
	}{
		"exits":                 {spec: proctest.TCP.At(proctest.AtListened, proctest.Exit(0)), step: ecdysis.StepInit},
		"panics":                {spec: proctest.TCP.At(proctest.AtListened, proctest.Panic), step: ecdysis.StepInit},
		"refuses":               {spec: proctest.TCP.At(proctest.AtListened, proctest.Fail("the disk is full")), step: ecdysis.StepInit},
		"talks garbage":         {proctest.Successor{Role: proctest.Raw}, proctest.TCP.At(proctest.AtStart, proctest.CallWrite.Do([]byte("GET /"))), ecdysis.StepInit},
		"is the wrong program":  {proctest.Successor{Path: "true"}, proctest.TCP, ecdysis.StepInit},
		"is missing":            {proctest.Successor{Path: "/nonexistent"}, proctest.TCP, ecdysis.StepStart},
		"dies at the last step": {spec: proctest.TCP.At(proctest.On(ecdysis.EventReady), proctest.Kill), step: ecdysis.StepHandover},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.TCP, bad.spec)
			clients := p.Load(1)
			reason := p.FailUpgrade(bad.step, nil, bad.start)
			if name == "refuses" && !strings.Contains(reason.Error(), "the disk is full") {
				t.Errorf("%v; want the successor's reason", reason)
			}
			if s := reason.Successor; s != nil { // it was no other program
				s.Reaped()
			}
			p.Serves()
			p.Chain.Specs(proctest.TCP)
			s := p.Upgrade()
			s.Serves()
			clients.Check()
		})
	}
	t.Run("hangs", func(t *testing.T) {
		t.Parallel()
		p := proctest.Start(t, proctest.TCP.UpgradeTimeout(time.Second/2), proctest.TCP.At(proctest.AtListened, proctest.Hang))
		clients := p.Load(1)
		p.FailUpgrade(ecdysis.StepInit, os.ErrDeadlineExceeded)
		p.FailUpgrade(ecdysis.StepPrepare, nil, proctest.Successor{Veto: "to see that the next attempt begins"})
		p.Serves()
		clients.Check()
	})
}

func TestPromise4OneUpgradeAtATime(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.Hold(proctest.AtNew))
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	p.RefusesUpgrade(ecdysis.ErrInProgress)
	s.Resume()
	a.OK()
	p.RefusesUpgrade(ecdysis.ErrUpgraded)
	p.Chain.None()
}

func TestPromise5TheSuccessorServesIfThePredecessorDies(t *testing.T) {
	t.Parallel()
	for _, when := range []proctest.Point{proctest.AtStart, proctest.AtNew, proctest.AtListened, proctest.On(ecdysis.EventReady)} {
		t.Run(string(when), func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.TCP, proctest.TCP.Hold(when), proctest.TCP)
			s := p.BeginUpgrade().Successor()
			s.At(when)
			p.Kill()
			s.Resume()
			s.At(proctest.AtServing)
			s.Inherits(p)
			s.Serves()
			s.Upgrade().Serves()
		})
	}
}

func TestPromise6WithinProbationThePredecessorResumes(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP.Probation(time.Minute), proctest.TCP)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	s.Serves()
	s.Kill()
	a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
	p.Serves()
}

func TestPromise7NothingIsLeftBehind(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtListened, proctest.Exit(3)), proctest.TCP)
	hasWhatItHad := p.Keeps() // descriptors, goroutines, children
	p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
	hasWhatItHad()

	// So many successors later there is no more than after the first one.
	var descriptors [5][]string
	var programs [5]string
	for i := range descriptors {
		s := p.Upgrade()
		p.Exit(0)
		descriptors[i] = s.FDs()
		programs[i], _ = s.Run("sh", "-c", "env; ls /dev/fd")
		p = s
	}
	if len(descriptors[4]) != len(descriptors[0]) {
		t.Errorf("descriptors %q; after the first upgrade: %q", descriptors[4], descriptors[0])
	}
	if programs[4] != programs[0] || strings.Contains(programs[4], "ECDYSIS_PARENT") {
		t.Errorf("a program that it runs has %s, and after the first upgrade %s", programs[4], programs[0])
	}
}

func TestPromise8ItNeverExitsPanicsOrLogs(t *testing.T) {
	t.Parallel()
	p, predecessor := proctest.New(t, proctest.TCP.At(proctest.AtNewFailed, proctest.Hang), proctest.TCP).LaunchUnder()
	predecessor.Send([]byte("GET / HTTP/1.1\r\n\r\n"))
	if err := p.ErrAt(proctest.AtNewFailed); err == nil {
		t.Error("New has succeeded")
	}
	p = p.Chain.Start()
	p.FailUpgrade(ecdysis.StepStart, os.ErrNotExist, proctest.Successor{Path: "/nonexistent"})
	s := p.Upgrade()
	s.Stop()
	p.AwaitExit()
	if said := p.Chain.Stderr(); said != "" {
		t.Errorf("on standard error: %s", said)
	}
}
