//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"
)

// Upgrade and the steps of an attempt, in order. What is handed on is in
// upgrade_send.go, the handover itself in upgrade_handover.go, and how an attempt
// is given up in upgrade_rollback.go.

// Upgrade starts the successor and returns nil when it has taken over, after
// Options.Probation. This process then accepts no more, and should finish what
// is in flight and exit.
//
// Otherwise this process goes on serving, and may upgrade again at once, unless
// the reason is that it was stopped. The error is an *UpgradeError if an
// attempt was made and failed. If none was made, it is ErrNotReady, ErrInProgress
// (another call runs, or the predecessor still stands by), ErrDraining,
// ErrUpgraded, ErrStopped or ErrInit. Just after Ready the call may wait some
// seconds for the predecessor to step aside.
//
// A failed successor has exited and been reaped. If the system did not let
// this process kill it, it has been told not to serve. What it has made
// itself, files and processes, is not removed.
func (u *Upgrader) Upgrade() error {
	if err := u.beginUpgrade(trigger{}); err != nil {
		return err
	}
	return u.attempt(trigger{})
}

// beginUpgrade lets one upgrade run. After it, attempt must be called.
func (u *Upgrader) beginUpgrade(t trigger) error {
	if os.Getpid() == 1 && !t.isFromOutside() {
		return ErrInit
	}
	if !u.life.isReady() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.life.phase == readying || u.life.phase == serving {
			return ErrNotReady
		}
		return u.life.phase.refusal()
	}
	independent := u.awaitIndependence()
	u.obey()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.life.phase != serving {
		return u.life.phase.refusal()
	}
	if !independent {
		return ErrInProgress
	}
	if n, limit := u.reg.forgetGone(), u.opts.MaxDraining; limit != 0 && n > max(limit, 0) {
		return errorf("%w: %d are alive, and Options.MaxDraining is %d", ErrDraining, n, limit)
	}
	return u.life.beginUpgrade(t.taker != nil)
}

// A stage is how far an attempt has come. What has to be undone depends on it.
type stage int

const (
	stagePrepare   stage = iota // nothing was started
	stageStart                  // sockets cannot be added any more
	stageInit                   // the successor runs
	stageReady                  // it has sent READY
	stagePaused                 // the listeners are paused
	stageHandover               // EventHandover was told
	stageCommitted              // COMMIT may have been sent: the successor may serve at any moment
	stageProbation              // the successor serves
)

// step is the stage as an UpgradeError tells it.
func (s stage) step() Step {
	switch s {
	case stagePrepare:
		return StepPrepare
	case stageStart:
		return StepStart
	case stageInit:
		return StepInit
	case stageProbation:
		return StepProbation
	}
	return StepHandover
}

// An attempt is one upgrade. Only the goroutine of its call touches it.
type attempt struct {
	u *Upgrader
	trigger
	stage stage
	began time.Time

	program, dir string // what was started

	s     *stream
	child *child // the successor; one that takes over is not a child of this process

	stateFile *os.File // what SendState has written; nil if nothing
	state     *entry   // of that
	handed    []*entry // all else that the successor gets
	rest      []*entry // of these, not sent yet
	sent      int      // frames that want to be acknowledged
	endSent   bool

	// From READY.
	readyPID     int      // the process that sent it; 0 before
	ownPID       int      // what that process takes its ID for: another number in another PID namespace
	wrapped      bool     // it is not the process that was started
	readyProcess *child   // it, if it is another one and the system names it
	unclaimed    []string // paths that the successor does not want
	labels       []string // all that it does not want

	bye bool // the successor was stopped, and did not fail
}

// event returns an event about the successor.
func (a *attempt) event(kind EventKind) *Event {
	e := a.trigger.event(kind)
	e.Takeover = a.taker != nil
	e.PID, e.Generation = a.pid(), a.u.generation+1
	e.Program, e.Dir, e.Elapsed = a.program, a.dir, time.Since(a.began)
	return e
}

func (a *attempt) pid() int {
	if a.readyPID == 0 && a.child != nil {
		return a.child.pid
	}
	return a.readyPID
}

// attempt makes the upgrade that beginUpgrade has let begin, and tells how it
// went.
func (u *Upgrader) attempt(t trigger) error {
	a := &attempt{u: u, trigger: t, began: time.Now()}
	returned := false
	defer u.stopPending()
	defer func() {
		if returned { // a hook has neither panicked nor ended the goroutine
			return
		}
		if t.byWait() {
			// No caller can recover: this process ends, and the successor is to
			// take that for what it is.
			if r := recover(); r != nil {
				panic(r)
			}
		}
		t.refuse(a.fail(errors.New("a hook did not return")))
	}()
	u.notify(a.event(EventUpgrading))
	err := a.run()
	if err != nil && a.mustAbort() {
		err = ErrStopped // the successor may have obeyed ABORT before this process has looked
	}
	returned = true
	if err != nil {
		err = a.fail(err)
		e := a.event(EventUpgradeFailed)
		e.Err = err
		u.notify(e)
		t.refuse(err)
		return err
	}
	e := a.event(EventUpgraded)
	defer func() { // even if the hook panics
		if t.conn != nil {
			answer(t.conn, okLine(e))
		}
		u.end(e)
		close(u.life.exit)
	}()
	u.notify(e)
	return nil
}

// run makes the steps in order. After an error the caller calls fail.
func (a *attempt) run() error {
	cmd, err := a.prepare()
	if err != nil {
		return err
	}
	a.stage = stageStart
	deadline := time.Now().Add(a.u.opts.UpgradeTimeout)
	if err := a.start(cmd); err != nil {
		return err
	}
	a.stage = stageInit
	if err := a.initialize(deadline); err != nil {
		return err
	}
	a.closeState()
	a.stage = stageReady
	if hook := a.u.opts.Unclaimed; hook != nil && len(a.labels) > 0 {
		if err := hook(a.labels); err != nil {
			return errorf("Options.Unclaimed: %w", err)
		}
	}
	if err := a.handOver(); err != nil {
		return err
	}
	a.stage = stageProbation
	if err := a.standBy(); err != nil {
		return err
	}
	return a.finish()
}

// prepare calls the hooks that say what is started and what its state is.
func (a *attempt) prepare() (cmd *Command, err error) {
	u := a.u
	u.reap()
	cmd = &Command{}
	if a.taker == nil {
		cmd = defaultCommand()
	}
	if u.opts.Prepare != nil {
		if err := u.opts.Prepare(cmd); err != nil {
			return nil, err
		}
	}
	if a.stateFile, a.state, err = writeState(u.opts.SendState); err != nil {
		return nil, errorf("state: %w", err)
	}
	return cmd, nil
}

// start makes the stream, fills it as far as it goes, and starts the
// successor. If this process is killed after that, the successor finds in the
// system what the stream holds.
func (a *attempt) start(cmd *Command) error {
	u := a.u
	u.mu.Lock()
	if err := u.life.beginHandingOn(); err != nil {
		u.mu.Unlock()
		return err
	}
	a.handed = u.reg.takeForUpgrade()
	u.mu.Unlock()
	for _, e := range a.handed {
		e.gone = e.path != "" && !e.foreign && !e.hasFile(e.path)
	}
	if a.state != nil { // first, so that it is there if this process dies early
		a.rest = append(a.rest, a.state)
	}
	a.rest = append(a.rest, a.handed...)
	if a.taker != nil {
		return a.admit()
	}
	return a.startChild(cmd)
}

// initialize hands the rest on and waits until the successor is ready.
func (a *attempt) initialize(deadline time.Time) error {
	err := a.handOn(deadline)
	if err == nil {
		err = a.awaitReady(deadline)
	}
	if err == nil {
		return nil
	}
	blamed := a.blame(err)
	switch err {
	case os.ErrDeadlineExceeded:
		return errorf("not ready within %v (Options.UpgradeTimeout): %w", a.u.opts.UpgradeTimeout, blamed)
	case io.ErrUnexpectedEOF:
		return errorf("it ended without a call of Ready or Fail: %w", blamed)
	}
	return blamed
}

func (a *attempt) awaitReady(deadline time.Time) error {
	for {
		f, err := a.await(deadline)
		if err != nil {
			return err
		}
		switch f.kind {
		case frameAck:
		case frameReady:
			return a.takeReady(f)
		default:
			return a.unexpected(f)
		}
	}
}

// takeReady notes which process has sent READY, and what it does not want. The
// process ID in the frame is good enough to be printed. Only the system's own
// word decides what may be killed.
func (a *attempt) takeReady(f *frame) (err error) {
	pid, ok := number(f.first("pid"))
	if !ok || pid == 0 {
		return errorf("the successor says that its process ID is %q; want a number", f.first("pid"))
	}
	a.ownPID = pid
	if a.s.sender != 0 {
		pid = a.s.sender
	}
	a.readyPID, a.wrapped = pid, a.child.pid != 0 && pid != a.child.pid
	if a.wrapped && a.s.sender != 0 {
		a.readyProcess = foundChild(pid)
		if a.s.atEnd() { // if not, the process that was found is the one that has sent READY
			return io.ErrUnexpectedEOF
		}
	}
	for _, field := range f.records[0] {
		if path, ok := strings.CutPrefix(field, "unclaimed="); ok {
			a.unclaimed = append(a.unclaimed, path)
		}
		if name, ok := strings.CutPrefix(field, "label="); ok {
			a.labels = append(a.labels, name)
		}
	}
	return nil
}

// await returns the successor's next frame. It returns io.ErrUnexpectedEOF if
// the successor has ended, os.ErrDeadlineExceeded at the deadline, and
// ErrStopped soon after a stop that comes before COMMIT. The zero deadline is
// none.
func (a *attempt) await(deadline time.Time) (*frame, error) {
	for {
		until := time.Now().Add(pollInterval)
		if !deadline.IsZero() && until.After(deadline) {
			until = deadline
		}
		f, err := a.s.read(until)
		switch {
		case err == io.EOF:
			return f, io.ErrUnexpectedEOF
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return f, err
		}
		if a.ended() {
			// Its last frame may have come since.
			if f, err := a.s.next(); err == nil {
				return f, nil
			}
			return f, io.ErrUnexpectedEOF
		}
		if a.mustAbort() {
			return f, ErrStopped
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return f, os.ErrDeadlineExceeded
		}
	}
}

// ended reports whether the successor is gone, even if a process that it left
// behind holds its end of the stream open.
func (a *attempt) ended() bool {
	switch {
	case a.readyProcess != nil && a.readyProcess.exited(0):
		return true // whatever the wrapper, or a process that it left behind, does
	case !a.child.watched(): // the stream is all that can be seen of it
		return a.s.atEnd()
	case !a.child.exited(0):
		return false
	}
	return !a.wrapped || a.s.atEnd()
}

// saidBye reports whether the successor was stopped, and not killed. It may
// have ended since it sent BYE.
func (a *attempt) saidBye() bool {
	for !a.bye {
		f, err := a.s.next()
		if err != nil {
			return false
		}
		a.bye = f.kind == frameBye
	}
	return true
}

func (a *attempt) unexpected(f *frame) error {
	if f.kind == frameFail {
		return failReason(f)
	}
	return errorf("the successor sent a frame %q at step %s: it does not use this protocol", f.kind, a.stage.step())
}

// gone is an error of sending, as Upgrade reports it. A successor that has ended
// may have said why.
func (a *attempt) gone(err error) error {
	if err != io.EOF {
		return err
	}
	for {
		f, err := a.s.next()
		if err != nil {
			return io.ErrUnexpectedEOF
		}
		if f.kind == frameFail {
			return failReason(f)
		}
	}
}
