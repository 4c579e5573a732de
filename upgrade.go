package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// handoverTimeout bounds what a successor does between the old process's word
// and its own: a rename and the caller's hook for EventReady.
const handoverTimeout = 5 * time.Second

// slice is the longest that Upgrade and Ready wait for the other process
// without a look at everything else.
const slice = 100 * time.Millisecond

// Upgrade starts the next generation and returns nil when it has taken over,
// after Options.Probation: this process then accepts no more, and should
// finish what is in flight and exit.
//
// Otherwise this process goes on serving, and may upgrade again at once, unless
// the reason is that it was stopped. The error is an *UpgradeError if an
// attempt was made and failed; ErrNotReady, ErrInProgress (another call runs,
// or the older process still stands by), ErrUpgraded, ErrStopped or ErrInit if
// none was made. Just after Ready the call may wait some seconds for the older
// process to step aside.
//
// A successor that has failed has ended and been reaped, unless the system did
// not let this process end it; then it has been told not to serve. What it has
// made itself, files and processes, is not cleared away.
func (u *Upgrader) Upgrade() error {
	if err := u.beginUpgrade(trigger{}); err != nil {
		return err
	}
	return u.attempt(trigger{})
}

func (u *Upgrader) beginUpgrade(t trigger) error {
	if os.Getpid() == 1 && t.taker == nil {
		return ErrInit
	}
	select {
	case <-u.ready:
	default:
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.phase == readying || u.phase == serving {
			return ErrNotReady
		}
		return u.phase.refusal()
	}
	settled := u.settle()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.phase != serving {
		return u.phase.refusal()
	}
	if !settled {
		return ErrInProgress
	}
	u.reg.forgetGone()
	if n, limit := u.reg.draining(), u.opts.MaxDraining; limit > 0 && n > limit {
		return fmt.Errorf("%w: %d are alive, and Options.MaxDraining is %d", ErrDraining, n, limit)
	}
	u.phase = preparing
	return nil
}

// An attempt is one call of Upgrade. Only the goroutine of that call touches
// it.
type attempt struct {
	u *Upgrader
	trigger
	step      string
	s         *stream
	child     *child   // the successor; one that takes over is not a child
	stateFile *os.File // what SendState has written; nil: nothing
	state     *entry   // of that
	handed    []*entry // all else that the successor gets
	rest      []*entry // of these, not sent yet
	sent      int      // frames that want to be acknowledged
	endSent   bool
	readyPID  int         // of the process that said READY; 0: none yet
	ownPID    int         // what that one takes its process ID for: another number in another namespace
	wrapped   bool        // that is not the process that was started
	other     *os.Process // that process, if the system names it
	quiet     bool        // the listeners are
	told      bool        // EventHandover was
	committed bool
	bye       bool     // the successor was stopped
	unclaimed []string // paths that the successor does not want
}

// event returns an event about the successor.
func (a *attempt) event(kind EventKind) Event {
	e := a.trigger.event(kind)
	e.PID, e.Generation = a.pid(), a.u.generation+1
	return e
}

func (a *attempt) pid() int {
	if a.readyPID == 0 && a.child != nil {
		return a.child.pid
	}
	return a.readyPID
}

// attempt is an upgrade from where beginUpgrade has succeeded to its end.
func (u *Upgrader) attempt(t trigger) error {
	a := &attempt{u: u, trigger: t, step: "prepare"}
	over := false
	defer u.stopPending()
	defer func() {
		if !over { // a hook has panicked or ended the goroutine
			t.refuse(a.fail(errors.New("a hook did not return")))
		}
	}()
	u.notify(a.event(EventUpgrading))
	err := a.run()
	over = true
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
		answer(t.conn, okLine(e))
		u.end(e)
		close(u.exit)
		// Last of all: a program may exit as soon as its accept loop ends.
		for _, e := range a.handed {
			e.shut()
		}
	}()
	u.notify(e)
	return nil
}

// run takes the attempt from its preparation to its end. After an error the
// caller calls fail.
func (a *attempt) run() error {
	u := a.u
	u.reap()
	cmd := &Command{}
	if a.taker == nil {
		cmd = defaultCommand()
	}
	if u.opts.Prepare != nil {
		if err := u.opts.Prepare(cmd); err != nil {
			return err
		}
	}
	var err error
	if a.stateFile, a.state, err = writeState(u.opts.SendState); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	a.step = "start"
	deadline := time.Now().Add(u.opts.UpgradeTimeout)
	if err := a.start(cmd); err != nil {
		return err
	}
	a.step = "init"
	err = a.handOn(deadline)
	if err == nil {
		err = a.awaitReady(deadline)
	}
	cause := err
	if err != nil {
		err = a.blame(err)
	}
	switch cause {
	case nil:
	case os.ErrDeadlineExceeded:
		return fmt.Errorf("not ready within %v (Options.UpgradeTimeout): %w", u.opts.UpgradeTimeout, err)
	case io.ErrUnexpectedEOF:
		return fmt.Errorf("it ended without a call of Ready or Fail: %w", err)
	default:
		return err
	}
	a.closeState()
	a.step = "handover"
	if err := a.handOver(); err != nil {
		return err
	}
	a.step = "probation"
	if err := a.standBy(); err != nil {
		return err
	}
	return a.finish()
}

func (a *attempt) awaitReady(deadline time.Time) error {
	for {
		f, err := a.await(deadline)
		if err != nil {
			return err
		}
		switch f.kind {
		case frameAck:
		case frameFail:
			return failReason(f)
		case frameReady:
			pid, err := strconv.Atoi(f.first("pid"))
			if err != nil || pid <= 0 {
				return fmt.Errorf("the successor says that its process ID is %q; want a number", f.first("pid"))
			}
			a.ownPID = pid
			// Its own word is good enough to print. What may be killed is
			// for the system to say.
			if a.s.sender != 0 {
				pid = a.s.sender
			}
			a.readyPID, a.wrapped = pid, a.child.pid != 0 && pid != a.child.pid
			if a.wrapped && a.s.sender != 0 {
				if a.other, err = os.FindProcess(pid); err != nil {
					return err
				}
			}
			for _, field := range f.records[0] {
				if path, ok := strings.CutPrefix(field, "unclaimed="); ok {
					a.unclaimed = append(a.unclaimed, path)
				}
			}
			return nil
		default:
			return a.unexpected(f)
		}
	}
}

// handOver gives the word that this process accepts no more, and returns when
// the successor serves.
func (a *attempt) handOver() error {
	u := a.u
	a.quiet = true
	for _, e := range a.handed {
		if !e.late {
			e.quiet()
		}
	}
	a.told = true
	u.notify(a.event(EventHandover))
	if u.mustStop() {
		return ErrStopped
	}
	a.committed = true
	probation := strconv.FormatInt(int64(u.opts.Probation), 10)
	if err := a.s.send(frameCommit, []record{{"probation=" + probation}}, nil); err != nil {
		return gone(err)
	}
	f, err := a.await(time.Now().Add(handoverTimeout))
	if err == os.ErrDeadlineExceeded && a.kill() != nil {
		// This process may not end it, and it may serve at any moment: what
		// it does next decides.
		f, err = a.await(time.Time{})
	}
	if err != nil {
		return err
	}
	if f.kind != frameDone {
		return a.unexpected(f)
	}
	for _, e := range a.handed {
		e.quiet()
	}
	return nil
}

// standBy watches the successor for the time of its probation.
func (a *attempt) standBy() error {
	u := a.u
	for end := time.Now().Add(u.opts.Probation); ; {
		if u.opts.Probation == 0 || u.mustStop() {
			return nil
		}
		until := time.Now().Add(slice)
		if until.After(end) {
			until = end
		}
		f, err := a.await(until)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !time.Now().Before(end) {
				return nil
			}
		case err != nil:
			return err
		case f.kind == frameBye:
			a.bye = true
			return nil
		default:
			// It serves. A frame of a later version is no reason to end it.
		}
	}
}

// finish makes the upgrade final, unless the successor has died since. The
// stream stays open: its end tells the successor that this process has exited.
func (a *attempt) finish() error {
	if a.ended() && !a.saidBye() {
		return io.ErrUnexpectedEOF
	}
	if err := a.s.send(frameFinal, nil, nil); err != nil && !a.saidBye() {
		return gone(err)
	}
	u := a.u
	u.mu.Lock()
	u.phase = upgraded
	u.successor = a.s
	u.reg.entries, u.reg.adopted = nil, nil
	u.mu.Unlock()
	for _, e := range a.handed {
		if slices.Contains(a.unclaimed, e.path) {
			e.removeFile()
		}
	}
	a.child.release()
	a.releaseOther()
	return nil
}

// await returns the successor's next frame. It gives up when the successor
// has ended (io.ErrUnexpectedEOF), at the deadline (os.ErrDeadlineExceeded;
// the zero time is none), or, before the word was given, on Stop.
func (a *attempt) await(deadline time.Time) (frame, error) {
	for {
		until := time.Now().Add(slice)
		if !deadline.IsZero() && until.After(deadline) {
			until = deadline
		}
		f, err := a.s.read(until)
		switch {
		case err == nil:
			return f, nil
		case err == io.EOF:
			return f, io.ErrUnexpectedEOF
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return f, err
		}
		if a.ended() {
			// Its last words may have come since.
			if f, err := a.s.next(); err == nil {
				return f, nil
			}
			return f, io.ErrUnexpectedEOF
		}
		if !a.committed && a.u.mustStop() {
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
	if a.child.pid == 0 { // its stream is all that there is to see of it
		return a.s.atEnd()
	}
	if !a.child.exited(0) {
		return false
	}
	return !a.wrapped || a.s.atEnd()
}

// saidBye reports whether the successor was stopped, and not killed: it may
// have ended since it said so.
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

func (a *attempt) unexpected(f frame) error {
	if f.kind == frameFail {
		return failReason(f)
	}
	return fmt.Errorf("the successor sent a frame %q at step %s: it does not speak this protocol", f.kind, a.step)
}

// gone is err from sending, as Upgrade reports it.
func gone(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
