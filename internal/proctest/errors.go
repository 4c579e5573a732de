package proctest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// known has the errors that keep their identity on the way from a daemon to its
// test. An index identifies an error, because both are the same program.
var known = []error{
	ecdysis.ErrNotReady, ecdysis.ErrInProgress, ecdysis.ErrUpgraded, ecdysis.ErrStopped,
	ecdysis.ErrDraining, ecdysis.ErrRetired, ecdysis.ErrInit, ecdysis.ErrAborted,
	os.ErrDeadlineExceeded, os.ErrNotExist, os.ErrPermission, os.ErrClosed, os.ErrExist,
	net.ErrClosed, io.EOF, io.ErrUnexpectedEOF, errors.ErrUnsupported,
	context.DeadlineExceeded, context.Canceled,
}

// KnownError makes errors.Is find err in the errors that daemons return. Call it in
// init functions or for package variables.
func KnownError(err error) error {
	known = append(known, err)
	return err
}

// A wireError is an error in the form in which it is sent.
type wireError struct {
	Text    string
	Known   []int
	Errno   []syscall.Errno
	Upgrade *wireUpgrade // of an UpgradeError
}

type wireUpgrade struct {
	Step ecdysis.Step
	PID  int
	How  string
	Err  *wireError
}

func toWire(err error) *wireError {
	if err == nil {
		return nil
	}
	w := &wireError{Text: err.Error()}
	for i, k := range known {
		if errors.Is(err, k) {
			w.Known = append(w.Known, i)
		}
	}
	walk(err, func(e error) {
		if n, ok := e.(syscall.Errno); ok {
			w.Errno = append(w.Errno, n)
		}
	})
	var ue *ecdysis.UpgradeError
	if errors.As(err, &ue) {
		w.Upgrade = &wireUpgrade{Step: ue.Step, PID: ue.PID, Err: toWire(ue.Err)}
		if ue.State != nil {
			w.Upgrade.How = ue.State.String()
		}
	}
	return w
}

// walk calls f with each error of the tree.
func walk(err error, f func(error)) {
	f(err)
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		if u := e.Unwrap(); u != nil {
			walk(u, f)
		}
	case interface{ Unwrap() []error }:
		for _, u := range e.Unwrap() {
			walk(u, f)
		}
	}
}

func (w *wireError) error() error {
	if w == nil {
		return nil
	}
	e := &remoteError{text: w.Text}
	for _, i := range w.Known {
		e.is = append(e.is, known[i])
	}
	for _, n := range w.Errno {
		e.is = append(e.is, n)
	}
	if u := w.Upgrade; u != nil {
		e.how = u.How
		e.is = append(e.is, &ecdysis.UpgradeError{Step: u.Step, PID: u.PID, Err: u.Err.error()})
	}
	return e
}

// A remoteError is an error that a daemon has returned.
type remoteError struct {
	text string
	how  string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

// How returns how the successor of a failed upgrade ended, as
// os.ProcessState.String says it, or "" if the UpgradeError had no State.
func How(err error) string {
	var e *remoteError
	if errors.As(err, &e) {
		return e.how
	}
	return ""
}

// A Failure is the error of a failed upgrade. Its text is that of the daemon's own
// error.
type Failure struct {
	Step ecdysis.Step
	PID  int
	How  string // see How
	Err  error  // wraps an *ecdysis.UpgradeError, if Step is not empty

	// Successor is the process with that PID, if it has connected. Only the
	// methods of Proc and Attempt set it.
	Successor *Proc
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

// WantFailure fails the test unless err is the error of an upgrade that failed at
// this step, and errors.Is finds target in it. The step is empty for an upgrade that
// was refused, because there is no UpgradeError then. A nil target is ignored.
func WantFailure(t testing.TB, err error, step ecdysis.Step, target error) *Failure {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one at step %q that is %v", step, target)
	}
	f := &Failure{Err: err, How: How(err)}
	var ue *ecdysis.UpgradeError
	if errors.As(err, &ue) {
		f.Step, f.PID = ue.Step, ue.PID
	}
	if f.Step != step || target != nil && !errors.Is(err, target) {
		t.Fatalf("error at step %q: %v; want one at step %q that is %v", f.Step, err, step, target)
	}
	return f
}

// Want fails the test unless errors.Is finds target in err, and err's text contains
// each of says. A nil target is ignored.
func Want(t testing.TB, err, target error, says ...string) {
	t.Helper()
	if err == nil || target != nil && !errors.Is(err, target) {
		t.Errorf("error %v; want one that is %v and says %q", err, target, says)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("error %.300q; want that it says %.300q", err, s)
		}
	}
}
