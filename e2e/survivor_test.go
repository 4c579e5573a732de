package e2e

import (
	"os/exec"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A survivor is a process that serves clients while its upgrades fail.
type survivor struct {
	*proctest.Proc
	load      *proctest.Load
	unchanged func() // its descriptors, children and goroutines, without clients
	sameFiles func() // its descriptors, sockets aside
	failures  int
}

// survive starts the chain's first process, and clients.
func survive(c *proctest.Chain, edit ...func(*exec.Cmd)) *survivor {
	c.T.Helper()
	p := c.Start(edit...)
	v := &survivor{Proc: p, unchanged: p.KeepsWithClients(), sameFiles: p.KeepsFiles(), load: p.Load(1)}
	v.load.More(10)
	return v
}

// shortTimeout is the Options.UpgradeTimeout of tests that let it pass. Their
// next upgrade must be quicker.
var shortTimeout = proctest.Patience / 10

// A failure is how an upgrade fails.
type failure struct {
	step ecdysis.Step
	is   error  // nil is not looked at
	how  string // the child ended; empty if the error has no State
	says string

	// noSuccessor says that the child whose process ID the error has is not
	// the process that has connected to the test.
	noSuccessor bool
}

// fails fails the test unless the upgrade has failed as want says, with an
// event, and v has no descriptor more or less than before.
func (v *survivor) fails(a *proctest.Attempt, want failure) *proctest.Failure {
	v.T.Helper()
	f := a.Fails(want.step, want.is)
	v.sameFiles()
	if f.How != want.how {
		v.T.Errorf("error %.300q: the successor ended by %q; want %q", f, f.How, want.how)
	}
	switch s := f.Successor; {
	case want.step == ecdysis.StepStart:
		if f.PID != 0 || s != nil {
			v.T.Errorf("error %v has process ID %d; want that nothing was started", f, f.PID)
		}
	case want.noSuccessor:
		if f.PID <= 0 || s != nil && s.PID == f.PID {
			v.T.Errorf("error %v has process ID %d; want that of a child which has not connected", f, f.PID)
		}
	case s == nil || s.PID != f.PID:
		v.T.Errorf("error %.300q has process ID %d; want the successor's", f, f.PID)
	}
	proctest.Want(v.T, f, nil, want.says)
	if e := v.Event(ecdysis.EventUpgradeFailed, v.failures); e.Err == nil || e.Err.Error() != f.Error() || e.PID != f.PID {
		v.T.Errorf("event %.300q; want the error %.300q", e, f)
	}
	v.failures++
	return f
}

// survived fails the test unless v serves, no request has failed, and nothing
// is left of the attempts. It upgrades v and returns the successor, whose spec
// is this one.
func (v *survivor) survived(next proctest.Spec) *proctest.Proc {
	v.T.Helper()
	v.load.More(10)
	v.Serves()
	v.load.Check()
	v.unchanged()
	v.Chain.Specs(next)
	v.load = v.Load(1)
	v.load.More(10)
	s := v.Upgrade()
	v.load.More(10)
	s.Serves()
	v.load.Check()
	return s
}
