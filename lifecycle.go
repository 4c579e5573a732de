//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"net"
	"sync"
)

// Where a process stands between its start and its end, and every transition.

// A phase is a part of a process's life.
type phase int

const (
	starting  phase = iota // Listen may be called, listeners are paused
	readying               // Ready runs
	serving                // this process serves, as far as it knows
	preparing              // Upgrade runs, nothing is started: Listen may be called
	upgrading              // Upgrade runs, the successor has or gets its copies
	upgraded               // replaced, for good
	partial                // accepting has ended by a partial stop
	stopped                // for good
	refused                // a successor that was given up, for good
)

// refusal is the error for a call that the phase forbids.
func (p phase) refusal() error {
	switch p {
	case starting:
		return ErrNotReady
	case readying, preparing, upgrading:
		return ErrInProgress
	case upgraded:
		return ErrUpgraded
	case partial, stopped:
		return ErrStopped
	case refused:
		return ErrAborted
	}
	return nil
}

// A lifecycle is where this process stands. Upgrader.mu guards it, except that
// its channels may be received from without the lock. Its methods are called
// with the lock held.
type lifecycle struct {
	phase       phase
	pending     EventKind       // a stop that came while Ready or Upgrade ran, which carries it out; empty if there is none
	cause       trigger         // of that stop
	takeover    bool            // the running upgrade is one
	insisted    bool            // a second stop came while the first was pending
	abortable   *stream         // to the successor of the running upgrade that this process has started and not committed to
	passedOn    bool            // the pending stop was passed on to the successor
	order       EventKind       // a stop that the predecessor has passed on, and that is to be carried out; empty if there is none
	orderCause  trigger         // of that stop
	stopClients []*net.UnixConn // clients of control sockets that wait for this process's end
	answered    []*net.UnixConn // of these, those that know of it; their connections end with this process
	last        *Event          // what Wait returns; nil until then

	ready chan struct{} // closed when Ready has succeeded
	exit  chan struct{} // what Exit returns
	ended chan struct{} // closed when Wait is to return last

	stoppedAfter chan struct{} // closed when a stop comes after an upgrade
	stopAfter    sync.Once     // closes it
}

// make makes the channels.
func (l *lifecycle) make() {
	l.ready, l.exit, l.ended, l.stoppedAfter = make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
}

// made reports whether New has made the Upgrader.
func (l *lifecycle) made() bool { return l.ready != nil }

func (l *lifecycle) isReady() bool {
	select {
	case <-l.ready:
		return true
	default:
		return false
	}
}

// mayAdd returns an error that says why nothing can be added or taken now.
func (l *lifecycle) mayAdd() error {
	switch l.phase {
	case starting, serving, preparing:
		return nil
	}
	return l.phase.refusal()
}

// beginReady lets one call of Ready run. It returns false if Ready need not
// run, with the error to return.
func (l *lifecycle) beginReady() (run bool, err error) {
	switch l.phase {
	case starting:
		l.phase = readying
		return true, nil
	case serving, preparing, upgrading:
		return false, nil
	}
	return false, l.phase.refusal()
}

// readyFailed ends a call of Ready. A first process may try again, and a
// successor that has failed may not.
func (l *lifecycle) readyFailed(first bool) {
	l.phase = refused
	if first {
		l.phase = starting
	}
}

// serve is the end of a Ready that has succeeded.
func (l *lifecycle) serve() {
	l.phase = serving
	close(l.ready)
}

// fail is the transition of Fail. It reports false if there is nothing to fail.
func (l *lifecycle) fail() bool {
	if l.phase != starting {
		return false
	}
	l.phase = refused
	return true
}

// beginUpgrade lets one call of Upgrade run.
func (l *lifecycle) beginUpgrade(takeover bool) error {
	if l.phase != serving {
		return l.phase.refusal()
	}
	l.phase, l.takeover = preparing, takeover
	return nil
}

// mustAbort reports whether a stop ends the running attempt, before COMMIT. A
// takeover is another unit's upgrade, to which the first stop is consent.
func (l *lifecycle) mustAbort() bool {
	return l.pending != "" && (!l.takeover || l.insisted)
}

// beginHandingOn ends the time in which sockets may be added to an upgrade.
func (l *lifecycle) beginHandingOn() error {
	if l.mustAbort() {
		return ErrStopped
	}
	l.phase = upgrading
	return nil
}

// beginStart lets a stop abort the successor that is about to be started.
func (l *lifecycle) beginStart(s *stream) error {
	if l.mustAbort() {
		return ErrStopped
	}
	l.abortable = s
	return nil
}

// commit is the moment after which a stop no longer ends the attempt.
func (l *lifecycle) commit() error {
	if l.mustAbort() {
		return ErrStopped
	}
	l.abortable = nil
	return nil
}

// resume is the end of an attempt that has failed.
func (l *lifecycle) resume() {
	l.phase, l.takeover, l.abortable = serving, false, nil
}

// takeOrder returns the stop that the predecessor has passed on, if there is
// one.
func (l *lifecycle) takeOrder() (kind EventKind, t trigger) {
	kind, t = l.order, l.orderCause
	l.order, l.orderCause = "", trigger{}
	return kind, t
}

// stop is the transition of a stop: kind is EventStopping or EventPartialStop.
// It returns what the caller is to carry out, and the phase that this has
// ended. A partial stop becomes a whole one if there is nothing to drain. It
// returns "" if this process has ended already, or if the call that runs will
// carry the stop out.
func (l *lifecycle) stop(kind EventKind, t trigger) (do EventKind, was phase) {
	was = l.phase
	switch was {
	case upgraded:
		l.stopAfter.Do(func() { close(l.stoppedAfter) })
		return "", was
	case stopped:
		return "", was
	case readying, preparing, upgrading:
		l.insisted = l.pending != ""
		if kind == EventStopping || l.pending == "" {
			l.pending, l.cause = kind, t
		}
		return "", was
	}
	if kind == EventPartialStop {
		switch was {
		case serving:
			l.phase = partial
			return kind, was
		case partial: // another trigger's
			return "", was
		}
	}
	l.phase = stopped
	return EventStopping, was
}

// defersStop reports whether the stop that is pending waits for a takeover.
func (l *lifecycle) defersStop() bool {
	return (l.phase == preparing || l.phase == upgrading) && l.takeover && l.pending != "" && !l.insisted
}

// takePending returns the stop that was left to the running call, if there is
// one.
func (l *lifecycle) takePending() (kind EventKind, t trigger) {
	kind, t = l.pending, l.cause
	l.pending, l.cause, l.insisted = "", trigger{}, false
	return kind, t
}

// end makes Wait return e, unless something else has ended it before. It
// returns the clients that wait for this process's end.
func (l *lifecycle) end(e *Event) (clients []*net.UnixConn, first bool) {
	clients, first = l.stopClients, l.last == nil
	l.stopClients = nil
	if first {
		l.last = e
	}
	return clients, first
}
