package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A successor that the system does not let its predecessor kill.

// lateTimeout is what a busy machine needs to bring a successor to the point
// at which it holds.
var lateTimeout = proctest.Patience / 6

func TestUnkillableSuccessorLate(t *testing.T) {
	t.Parallel()
	for _, point := range []proctest.Point{proctest.AtStart, proctest.AtNew, proctest.AtListened} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			p, root := proctest.Unkillable(t, proctest.TCP.UpgradeTimeout(lateTimeout), proctest.TCP.Hold(point),
				proctest.TCP.At(proctest.AtStart, proctest.Exit(3)), proctest.TCP)
			begun := time.Now()
			a := p.BeginUpgrade(root)
			late := a.Successor()
			late.At(point)
			f := a.Fails(ecdysis.StepInit, os.ErrDeadlineExceeded)
			if d := time.Since(begun); d < lateTimeout || d > proctest.Patience {
				t.Errorf("Upgrade returned after %v; the time-out is %v", d, lateTimeout)
			}
			if f.PID != late.PID || f.How != "" || !late.Living() {
				t.Errorf("error %v; want the living process %d", f, late.PID)
			}
			p.Serves()
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)

			late.Resume()
			failed := late.AtAny(proctest.AtNewFailed, proctest.AtReadyFailed)
			proctest.Want(t, late.ErrAt(failed), ecdysis.ErrAborted)
			late.Zombie()
			p.Serves()

			p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
			late.Reaped()
			p.Serves()
			s := p.Upgrade()
			s.Inherits(p)
			s.Serves()
		})
	}
}

// An unkillable successor that has the word may serve at any moment: until it
// does, or ends, nobody serves.
func TestUnkillableSuccessorCommitted(t *testing.T) {
	t.Parallel()
	const wrapped = "serves, behind a wrapper that can be killed"
	const helped = "is killed, and a process that it has started holds the stream"
	for _, end := range []string{"serves", wrapped, "is killed", helped} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			var helper proctest.Action
			if end == helped {
				helper = proctest.LeaveHelper
			}
			p, root := proctest.Unkillable(t, proctest.TCP, proctest.TCP.At(proctest.On(ecdysis.EventReady), helper, proctest.Hold), proctest.TCP)
			if end == wrapped {
				script := p.Chain.Path("wrapper")
				if err := os.WriteFile(script, []byte("#!/bin/sh\n\"$PROGRAM\"\nexit $?\n"), 0o755); err != nil {
					t.Fatal(err)
				}
				root.SetEnv = append(root.SetEnv, "PROGRAM="+root.Path)
				root.Path = script
			}
			a := p.BeginUpgrade(root)
			s := a.Successor()
			s.At(proctest.On(ecdysis.EventReady))
			c, err := p.Addr(0).Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			// The time that a successor has for this is 5 s.
			if err := c.SetDeadline(time.Now().Add(6 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("who\n")); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(make([]byte, 64)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("%d bytes, %v; want that nobody answers", n, err)
			}
			if !s.Living() {
				t.Fatal("the successor has ended")
			}
			answers := s
			if end == "serves" || end == wrapped {
				s.Resume()
				a.OK()
			} else {
				s.Signal(os.Kill)
				a.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
				s.Reaped()
				answers = p
			}
			if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
				t.Fatal(err)
			}
			var pid, generation int
			if _, err := fmt.Fscan(c, &pid, &generation); err != nil || pid != answers.PID {
				t.Fatalf("process %d answers, %v; want %d", pid, err, answers.PID)
			}
			answers.Serves()
			answers.Upgrade().Serves()
		})
	}
}
