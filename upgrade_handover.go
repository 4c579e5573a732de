//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"os"
	"slices"
	"strconv"
	"time"
)

// The moment at which the successor takes the place of this process: pausing,
// COMMIT, probation and FINAL.

// handOver pauses the listeners, commits, and returns when the successor
// serves.
func (a *attempt) handOver() error {
	u := a.u
	a.stage = stagePaused
	var list, last []*entry
	for _, e := range a.handed {
		if e.acceptsUntilDone {
			last = append(last, e)
		} else {
			list = append(list, e)
		}
	}
	if err := pauseAll(list); err != nil {
		return err
	}
	a.stage = stageHandover
	if err := u.notifyWithin(a.event(EventHandover), a.mustAbort); err != nil {
		return err
	}
	if err := a.commit(); err != nil {
		return err
	}
	probation := strconv.FormatInt(int64(u.opts.Probation), 10)
	if err := a.s.send(frameCommit, "probation="+probation); err != nil {
		return a.gone(err)
	}
	a.s.waitShortly()
	f, err := a.await(time.Now().Add(handoverTimeout))
	if err == os.ErrDeadlineExceeded && a.kill() != nil {
		// This process may not kill it, and it may serve at any moment. So
		// what it does next decides.
		f, err = a.await(time.Time{})
	}
	if err != nil {
		return err
	}
	if f.kind != frameDone {
		return a.unexpected(f)
	}
	_ = pauseAll(last) // its only error is a packet read that goes on, and control sockets have none
	return nil
}

// commit passes the point after which only the successor's end lets this
// process serve again.
func (a *attempt) commit() error {
	a.u.mu.Lock()
	defer a.u.mu.Unlock()
	if err := a.u.life.commit(); err != nil {
		return err
	}
	a.stage = stageCommitted
	return nil
}

// mustAbort reports whether a stop ends the attempt.
func (a *attempt) mustAbort() bool {
	a.u.takeSignals()
	a.u.mu.Lock()
	defer a.u.mu.Unlock()
	return a.stage < stageCommitted && a.u.life.mustAbort()
}

// standBy watches the successor for the time of its probation. A stop ends it.
func (a *attempt) standBy() error {
	u := a.u
	for end := time.Now().Add(u.opts.Probation); ; {
		if u.opts.Probation == 0 || u.mustStop() {
			return nil
		}
		until := time.Now().Add(pollInterval)
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
			// The successor serves. A frame of a later version is no reason
			// to end it.
		}
	}
}

// finish makes the upgrade final, unless the successor has died since. The
// stream stays open: its end tells the successor that this process has exited.
func (a *attempt) finish() error {
	if a.ended() && !a.saidBye() {
		return io.ErrUnexpectedEOF
	}
	a.u.takeSignals()
	if err := a.conclude(); err != nil {
		return err
	}
	for _, e := range a.handed {
		if slices.Contains(a.unclaimed, e.path) {
			e.removeFile()
		}
		e.detach()
	}
	a.child.release()
	a.releaseReadyProcess()
	return nil
}

// conclude sends FINAL, and before it a stop that has come since COMMIT. From
// then on a stop is for the successor, and this process is replaced.
func (a *attempt) conclude() error {
	u := a.u
	u.mu.Lock()
	defer u.mu.Unlock()
	passOn := u.life.pending != "" && a.taker == nil
	if passOn {
		_ = a.s.send(frameStop, stopRecord(u.life.pending, u.life.cause)...)
	}
	if err := a.s.send(frameFinal); err != nil && !a.saidBye() {
		return a.gone(err)
	}
	u.life.phase, u.life.passedOn = upgraded, passOn
	u.successor = a.s
	u.reg.entries, u.reg.ancestors, u.reg.adopted = nil, nil, nil
	return nil
}
