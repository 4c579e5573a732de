package ecdysis

import (
	"errors"
	"os"
	"strconv"
)

// Errors that the package's calls return, wrapped or not: compare with
// errors.Is.
var (
	// ErrNotReady: Upgrade or WaitForParent was called before Ready has
	// succeeded.
	ErrNotReady = errors.New("ecdysis: this process is not ready yet")
	// ErrInProgress: an upgrade is running, or this process is still within
	// the probation that its parent gives it.
	ErrInProgress = errors.New("ecdysis: an upgrade is in progress")
	// ErrUpgraded: this process has been replaced.
	ErrUpgraded = errors.New("ecdysis: this process has been replaced")
	// ErrDraining: more older generations still serve their clients than
	// Options.MaxDraining allows.
	ErrDraining = errors.New("ecdysis: too many older generations are still draining")
	// ErrStopped: Stop was called.
	ErrStopped = errors.New("ecdysis: this process has been stopped")
	// ErrInit: this process is PID 1, whose exit ends the container or the
	// system with it; it cannot be replaced by a child.
	ErrInit = errors.New("ecdysis: PID 1 cannot be replaced by its child")
	// ErrAborted: the old process has given this successor up and goes on
	// serving, or Fail was called. The listeners stay quiet for good.
	ErrAborted = errors.New("ecdysis: this upgrade has been given up, and the old process goes on serving")
)

// An UpgradeError says why an attempt to upgrade failed. Unless Err is
// ErrStopped, the process that returned it goes on serving and can upgrade
// again at once.
type UpgradeError struct {
	// Step is how far the attempt came: "prepare" (before anything was
	// started), "start" (the program could not be run), "init" (it did not
	// become ready), "handover" (it was ready and did not take over) or
	// "probation" (it served and ended too early).
	Step string
	// PID is the successor's process ID; 0: none was started.
	PID int
	// State is how the successor ended; nil if that cannot be known, because
	// none was started, it is not a child of this process (Command.Sibling),
	// or it could not be ended.
	State *os.ProcessState
	// Err is the reason. It wraps Prepare's own error, the system's,
	// os.ErrDeadlineExceeded (not ready within UpgradeTimeout, or, at
	// "handover", 5 s for EventReady), io.ErrUnexpectedEOF (it ended without a
	// word) or ErrStopped. What a successor has said to Fail is there as text.
	Err error
}

func (e *UpgradeError) Error() string {
	s := "ecdysis: upgrade failed at " + e.Step
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
