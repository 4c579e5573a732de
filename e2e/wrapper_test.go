package e2e

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A wrapper is a script that is started in the place of the program. It becomes
// the program by exec, or stays as its parent.

// quoted is s as a word of the shell.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// becomeSelf is the line of a script that becomes the test's own program.
func becomeSelf(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return "exec " + quoted(self) + ` "$@"` + "\n"
}

// wrapper is started as this script.
func wrapper(t *testing.T, body string) proctest.Successor {
	t.Helper()
	return proctest.Successor{Path: putFile(t, realDir(t)+"/wrapper", "#!/bin/sh\n"+body, 0o755)}
}

// staying is started as a shell that runs the program as its child.
func staying(t *testing.T) proctest.Successor {
	t.Helper()
	return wrapper(t, strings.TrimPrefix(becomeSelf(t), "exec ")+"exit $?\n")
}

func TestWrapperThatExecs(t *testing.T) {
	t.Parallel()
	v := survive(proctest.New(t, proctest.TCP))
	s := v.Upgrade(wrapper(t, becomeSelf(t)))
	if parent := s.Parent(); parent != v.PID {
		t.Errorf("the successor's parent is %d; want %d", parent, v.PID)
	}
	s.Serves()
	s = s.Upgrade()
	v.load.More(10)
	s.Serves()
	v.load.Check()
}

func TestWrapperIsTheParent(t *testing.T) {
	t.Parallel()
	v := survive(proctest.New(t, proctest.TCP))
	p, how := v.Proc, staying(t)
	for range 2 { // the second one by a successor that is not its predecessor's child
		sameFiles := p.KeepsFiles()
		s := p.Upgrade(how)
		if parent := s.Parent(); parent == p.PID {
			t.Error("the successor is its predecessor's child, so that this test shows nothing")
		}
		sameFiles()
		if e := p.Event(ecdysis.EventUpgraded, 0); e.PID != s.PID {
			t.Errorf("event %v; want process ID %d", e, s.PID)
		}
		s.Serves()
		p = s
	}
	p = p.Upgrade()
	v.load.More(10)
	p.Serves()
	v.load.Check()
}

func TestWrapperIsTheParentAndFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		point proctest.Point
		end   proctest.Action
		want  failure
	}{
		// Up to READY the predecessor knows the wrapper alone.
		{"exits at new", proctest.AtNew, proctest.Exit(3),
			failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF, how: "exit status 3", noSuccessor: true}},
		{"fails at listened", proctest.AtListened, proctest.Fail("told so"),
			failure{step: ecdysis.StepInit, how: "exit status 1", says: "told so", noSuccessor: true}},
		{"exits at ready", proctest.On(ecdysis.EventReady), proctest.Exit(3),
			failure{step: ecdysis.StepHandover, is: io.ErrUnexpectedEOF, how: "exit status 3"}},
		{"hangs at ready", proctest.On(ecdysis.EventReady), proctest.Hang,
			failure{step: ecdysis.StepHandover, is: os.ErrDeadlineExceeded, how: "signal: killed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if tt.want.is == os.ErrDeadlineExceeded {
				proctest.OnlyOn(t, "only a child can be ended", "linux")
			}
			v := survive(proctest.New(t, proctest.TCP, proctest.TCP.At(tt.point, tt.end)))
			a := v.BeginUpgrade(staying(t))
			s := a.Successor()
			v.fails(a, tt.want)
			s.Ended()
			v.survived(proctest.TCP)
		})
	}
	// The wrapper alone is killed. The successor is told not to serve.
	t.Run("holds at listened", func(t *testing.T) {
		t.Parallel()
		v := survive(proctest.New(t, proctest.TCP.UpgradeTimeout(shortTimeout), proctest.TCP.Hold(proctest.AtListened)))
		a := v.BeginUpgrade(staying(t))
		s := a.Successor()
		s.At(proctest.AtListened)
		v.fails(a, failure{step: ecdysis.StepInit, is: os.ErrDeadlineExceeded, how: "signal: killed", noSuccessor: true})
		s.Resume()
		proctest.Want(t, s.ErrAt(proctest.AtReadyFailed), ecdysis.ErrAborted)
		v.survived(proctest.TCP)
	})
}
