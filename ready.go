//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"os"
)

// From the start of a process to the moment at which it serves.

// Ready tells the predecessor that this process can serve. It returns nil when
// this process does: the predecessor accepts no more, and the listeners here
// do. In the first process that is at once. Ready also returns nil if the
// predecessor has died meanwhile, and if this process serves already.
//
// It returns ErrAborted if the predecessor has given this process up, or Fail
// was called: the listeners stay paused for good. It returns ErrStopped if Stop
// was called, ErrUpgraded if this process has been replaced, and ErrInProgress
// while another call of Ready runs. Any other error means that the PID file
// could not be written, or that the predecessor does not follow the protocol.
// The predecessor is told and serves on. A first process may call Ready again.
func (u *Upgrader) Ready() error {
	if !u.life.made() {
		return errZero
	}
	u.mu.Lock()
	run, err := u.life.beginReady()
	u.mu.Unlock()
	if !run {
		return err
	}
	returned := false
	defer func() {
		if !returned { // a hook has panicked or ended the goroutine
			_ = u.notReady(errors.New("a hook did not return"))
		}
	}()
	err = u.becomeServing()
	returned = true
	if err != nil {
		return u.notReady(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return nil
}

// becomeServing brings this process from readying to serving.
func (u *Upgrader) becomeServing() error {
	u.catchStops() // before the PID file can name this process
	pidFile, err := writePIDFile(u.opts.PIDFile)
	if err != nil {
		return errorf("ecdysis: ready: %w", err)
	}
	orphan := false
	if !u.first() {
		if orphan, err = u.pred.awaitCommit(u.unclaimedRecord(), u.mustStop); err != nil {
			pidFile.discard()
			return err
		}
	}
	u.mu.Lock()
	u.pidFile = pidFile
	u.mu.Unlock()
	return u.serve(pidFile, orphan)
}

// serve makes this process the one that serves, which nobody else does any more.
func (u *Upgrader) serve(pidFile pidFile, orphan bool) error {
	event := &Event{Kind: EventReady, PID: os.Getpid(), Generation: u.generation}
	event.Unclaimed, _ = u.unclaimed()
	if err := pidFile.commit(); err != nil {
		if u.first() {
			return errorf("ecdysis: ready: %w", err)
		}
		event.Err = err // it is too late to fail, because nobody else serves
	}
	event.Rebound, event.Lost = u.placeFiles()
	u.notify(event)
	if u.first() && u.mustStop() {
		return ErrStopped
	}
	// A successor that was committed to is the service. A stop that has come
	// since ends it when Ready has done its work: if this process failed now,
	// the predecessor would resume, and the stop would be lost.
	if orphan {
		u.handle(nil, io.EOF)
	}

	u.mu.Lock()
	u.life.serve() // before a control socket accepts: its clients may rely on Ready
	dropped := u.reg.endClaiming()
	for _, e := range u.reg.entries {
		e.unpause()
	}
	if !u.first() && !orphan {
		// Clients come first. With the lock, because a stop sends BYE, which
		// must not come before DONE. It fails only if the predecessor is gone.
		_ = u.pred.s.send(frameDone)
	}
	u.mu.Unlock()
	u.drop(dropped)
	u.state.close()
	return nil
}

// notReady ends a call of Ready that has failed.
func (u *Upgrader) notReady(err error) error {
	u.takeSignals()
	u.mu.Lock()
	u.life.readyFailed(u.first())
	u.mu.Unlock()
	u.releaseStops()
	u.removeBeside()
	if !u.first() {
		u.pred.s.sendFail(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return err
}

// Fail tells the predecessor that this process cannot become ready, and why:
// the text of reason is in the error of its Upgrade. The listeners here stay
// paused for good, and the caller should exit. Fail does nothing in the first
// process, and after Ready. It returns reason.
func (u *Upgrader) Fail(reason error) error {
	if u.pred == nil || u.first() {
		return reason
	}
	u.mu.Lock()
	failed := u.life.fail()
	u.mu.Unlock()
	if failed {
		u.pred.s.sendFail(reason)
	}
	return reason
}
