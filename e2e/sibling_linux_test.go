package e2e

import (
	"io"
	"os"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A sibling is a successor whose parent is that of its predecessor: the test.

// reap returns how a child of the test ended.
func reap(p *proctest.Proc) string {
	p.T.Helper()
	p.Ended()
	state, err := p.Process.Wait()
	if err != nil {
		p.T.Fatalf("process %d is no child of the test: %v", p.PID, err)
	}
	return state.String()
}

func TestSibling(t *testing.T) {
	t.Parallel()
	v := survive(proctest.New(t, proctest.TCP))
	p := v.Proc
	for range 2 {
		s := p.Upgrade(proctest.Successor{Sibling: true})
		t.Cleanup(func() { _ = s.Process.Kill(); reap(s) })
		if parent := s.Parent(); parent != os.Getpid() {
			t.Errorf("the successor's parent is %d; want %d", parent, os.Getpid())
		}
		if e := p.Event(ecdysis.EventUpgraded, 0); e.PID != s.PID {
			t.Errorf("event %v; want process ID %d", e, s.PID)
		}
		if list := p.Children(); len(list) > 0 {
			t.Errorf("the predecessor has children: %q", list)
		}
		s.Serves()
		p = s
	}
	v.load.More(10)
	v.load.Check()
}

// The parent learns how a sibling ended. The predecessor does not.
func TestSiblingFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		point proctest.Point
		end   proctest.Action
		want  failure
		how   string
	}{
		{"exits at new", proctest.AtNew, proctest.Exit(3), failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF}, "exit status 3"},
		{"fails at listened", proctest.AtListened, proctest.Fail("told so"), failure{step: ecdysis.StepInit, says: "told so"}, "exit status 1"},
		{"hangs at listened", proctest.AtListened, proctest.Hang, failure{step: ecdysis.StepInit, is: os.ErrDeadlineExceeded}, "signal: killed"},
		{"is killed at ready", proctest.On(ecdysis.EventReady), proctest.Kill, failure{step: ecdysis.StepHandover, is: io.ErrUnexpectedEOF}, "signal: killed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first := proctest.TCP
			if tt.want.is == os.ErrDeadlineExceeded {
				first = first.UpgradeTimeout(shortTimeout)
			}
			v := survive(proctest.New(t, first, proctest.TCP.At(tt.point, tt.end)))
			f := v.fails(v.BeginUpgrade(proctest.Successor{Sibling: true}), tt.want)
			if how := reap(f.Successor); how != tt.how {
				t.Errorf("it ended by %s; want %s", how, tt.how)
			}
			v.survived(proctest.TCP)
		})
	}
}
