package ecdysis

import (
	"errors"
	"os"
	"strconv"
)

// The errors that calls return, for errors.Is and errors.As. This file and
// options.go and event.go use no system calls: every system can share them.

// Errors that the package's calls return, wrapped or not: compare with
// errors.Is.
var (
	// ErrNotReady is returned by Upgrade and WaitForParent before Ready has
	// succeeded.
	ErrNotReady = errors.New("ecdysis: this process is not ready yet")
	// ErrInProgress means that an upgrade is running, or that this process is
	// still within the probation that its predecessor gives it.
	ErrInProgress = errors.New("ecdysis: an upgrade is in progress")
	// ErrUpgraded means that this process has been replaced.
	ErrUpgraded = errors.New("ecdysis: this process has been replaced")
	// ErrDraining means that more older generations still serve their clients
	// than Options.MaxDraining allows.
	ErrDraining = errors.New("ecdysis: too many older generations are still draining")
	// ErrStopped means that this process was stopped.
	ErrStopped = errors.New("ecdysis: this process has been stopped")
	// ErrInit means that the process is PID 1, which cannot be replaced by a
	// process of its own PID namespace: its exit ends the container or the
	// system.
	ErrInit = errors.New("ecdysis: PID 1 cannot be replaced by a process of its own PID namespace")
	// ErrRetired means that another process has taken over from Options.Unit,
	// so that this process must not serve. See WaitRetired.
	ErrRetired = errors.New("ecdysis: this unit has been replaced by another one")
	// ErrAborted means that the predecessor has given this successor up, or that
	// Fail was called. The listeners stay paused for good. The error's text has
	// the predecessor's reason.
	ErrAborted = errors.New("ecdysis: this upgrade has been given up")
)

// errZero is returned by the calls that would otherwise wait for ever.
var errZero = errors.New("ecdysis: this Upgrader was not made by New")

// A Step says how far an attempt to upgrade came.
type Step string

const (
	StepPrepare   Step = "prepare"   // nothing was started
	StepStart     Step = "start"     // the program could not be run
	StepInit      Step = "init"      // the successor did not become ready
	StepHandover  Step = "handover"  // the successor was ready and did not take over
	StepProbation Step = "probation" // the successor served, and ended within Options.Probation
)

// An UpgradeError says why an attempt to upgrade failed. The process that
// returned it goes on serving and can upgrade again at once, unless Err is
// ErrStopped.
type UpgradeError struct {
	// Step is how far the attempt came.
	Step Step
	// PID is the successor's process ID. It is 0 if none was started.
	PID int
	// State is how the successor ended. It is nil if that cannot be known:
	// none was started, it is not a child of this process (Command.Sibling),
	// or it could not be ended.
	State *os.ProcessState
	// Err is the reason. It wraps one of:
	//   - the error of a hook in Options or of the system
	//   - os.ErrDeadlineExceeded if the successor was not ready within
	//     UpgradeTimeout, or at StepHandover did not serve within 5 s
	//   - io.ErrUnexpectedEOF if the successor ended without calling Ready
	//     or Fail
	//   - ErrStopped
	// The reason that a successor has given to Fail is part of the text.
	Err error
}

// Error names the step, the successor's process ID and the reason.
func (e *UpgradeError) Error() string {
	s := "ecdysis: upgrade failed at " + string(e.Step)
	if e.PID != 0 {
		s += ": successor " + strconv.Itoa(e.PID)
		if e.State != nil {
			s += " (" + e.State.String() + ")"
		}
	}
	return s + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *UpgradeError) Unwrap() error { return e.Err }
