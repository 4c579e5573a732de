package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

// Ready tells the older process that this one can serve, and returns nil when
// it does: the older one accepts no more, and the listeners here do. In the
// first process that is at once. It also returns nil if the older process has
// died meanwhile, and if this process serves already.
//
// It returns ErrAborted if the older process has given this one up, or Fail was
// called: the listeners stay quiet for good. It returns ErrStopped if Stop was
// called, ErrUpgraded if this process has been replaced, and ErrInProgress
// while another call of Ready runs. Any other error means that the PID file
// could not be written, or that the older process talks nonsense. It has been
// told and serves on; a first process may call Ready again.
func (u *Upgrader) Ready() error {
	u.mu.Lock()
	p := u.phase
	if p == starting {
		u.phase = readying
	}
	u.mu.Unlock()
	switch p {
	case starting:
		return u.becomeReady()
	case serving, preparing, upgrading:
		return nil
	default:
		return p.refusal()
	}
}

func (u *Upgrader) becomeReady() (err error) {
	over := false
	defer func() {
		if !over { // a hook has panicked or ended the goroutine
			_ = u.notReady(errors.New("a hook did not return"))
		}
	}()
	err = u.takeOver()
	over = true
	if err != nil {
		return u.notReady(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return nil
}

// takeOver brings this process from readying to serving.
func (u *Upgrader) takeOver() error {
	pidFile, err := writePIDFile(u.opts.PIDFile)
	if err != nil {
		return fmt.Errorf("ecdysis: ready: %w", err)
	}
	orphan := false
	if u.parent != nil {
		if orphan, err = u.awaitCommit(); err != nil {
			pidFile.discard()
			return err
		}
	}
	u.mu.Lock()
	u.pidFile = pidFile
	u.mu.Unlock()
	event := Event{Kind: EventReady, PID: os.Getpid(), Generation: u.generation, Unclaimed: u.unclaimed()}
	if err := pidFile.commit(); err != nil {
		if u.parent == nil {
			return fmt.Errorf("ecdysis: ready: %w", err)
		}
		event.Err = err // too late to refuse: nobody else serves
	}
	u.notify(event)
	if u.mustStop() {
		return ErrStopped
	}
	switch {
	case orphan:
		u.hear(frame{}, io.EOF)
	case u.parent != nil:
		_ = u.parent.send(frameDone, nil, nil) // fails only if nobody waits for it
	}

	u.mu.Lock()
	u.phase = serving
	close(u.ready) // before a control socket accepts: who waits there for Ready must find it done
	dropped := u.reg.takeInherited()
	for _, e := range u.reg.entries {
		e.resume()
	}
	u.mu.Unlock()
	u.drop(dropped)
	u.state.close()
	return nil
}

// awaitCommit says READY and returns when the older process has given its
// word (false) or has died (true).
func (u *Upgrader) awaitCommit() (orphan bool, err error) {
	r := record{"pid=" + strconv.Itoa(os.Getpid())}
	size := 0
	u.mu.Lock()
	for _, e := range u.reg.unclaimed() {
		if e.path == "" {
			continue
		}
		size += len(e.path) + 16
		if size > maxFrame/2 {
			break // the files of the others stay, to be found stale
		}
		r = append(r, "unclaimed="+e.path)
	}
	u.mu.Unlock()
	if err := u.parent.send(frameReady, []record{r}, nil); err != nil && err != io.EOF {
		return false, fmt.Errorf("ecdysis: ready: %w", err)
	}
	for {
		f, err := u.parent.read(time.Now().Add(slice))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if u.mustStop() {
				return false, ErrStopped
			}
		case err == io.EOF:
			return true, nil
		case err != nil:
			return false, fmt.Errorf("ecdysis: ready: %w", err)
		case f.kind == frameAbort:
			return false, ErrAborted
		case f.kind == frameCommit:
			u.mu.Lock()
			u.standby = f.first("probation") != "0"
			u.mu.Unlock()
			return false, nil
		}
	}
}

// notReady ends a call of Ready that has failed.
func (u *Upgrader) notReady(err error) error {
	u.mu.Lock()
	u.phase = starting
	if u.parent != nil {
		u.phase = refused
	}
	u.mu.Unlock()
	if u.parent != nil {
		u.parent.sendFail(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return err
}

// Fail tells the older process that this one cannot become ready, and why: the
// text of reason is in the error of its Upgrade. The listeners here stay quiet
// for good, and the caller should exit. In the first process, and after Ready,
// it does nothing. Fail returns reason.
func (u *Upgrader) Fail(reason error) error {
	if u.parent == nil {
		return reason
	}
	u.mu.Lock()
	failed := u.phase == starting
	if failed {
		u.phase = refused
	}
	u.mu.Unlock()
	if failed {
		u.parent.sendFail(reason)
	}
	return reason
}
