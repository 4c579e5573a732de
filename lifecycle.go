package ecdysis

import "net"

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
	stopClients []*net.UnixConn // clients of control sockets that wait for this process's end
	last        Event           // what Wait returns; the zero Event until then

	ready chan struct{} // closed when Ready has succeeded
	exit  chan struct{} // what Exit returns
	ended chan struct{} // closed when Wait is to return last
}

func newLifecycle() lifecycle {
	return lifecycle{ready: make(chan struct{}), exit: make(chan struct{}), ended: make(chan struct{})}
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
func (l *lifecycle) beginUpgrade() error {
	if l.phase != serving {
		return l.phase.refusal()
	}
	l.phase = preparing
	return nil
}

// beginHandingOn ends the time in which sockets may be added to an upgrade.
func (l *lifecycle) beginHandingOn() error {
	if l.pending != "" {
		return ErrStopped
	}
	l.phase = upgrading
	return nil
}

// stop is the transition of a stop: kind is EventStopping or EventPartialStop.
// It returns what the caller is to carry out, and the phase that this has
// ended. A partial stop becomes a whole one if there is nothing to drain. It
// returns "" if this process has ended already, or if the call that runs will
// carry the stop out.
func (l *lifecycle) stop(kind EventKind, t trigger) (do EventKind, was phase) {
	was = l.phase
	switch was {
	case upgraded, stopped:
		return "", was
	case readying, preparing, upgrading:
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

// takePending returns the stop that was left to the running call, if there is
// one.
func (l *lifecycle) takePending() (kind EventKind, t trigger) {
	kind, t = l.pending, l.cause
	l.pending, l.cause = "", trigger{}
	return kind, t
}

// end makes Wait return e, unless something else has ended it before. It
// returns the clients that wait for this process's end.
func (l *lifecycle) end(e Event) (clients []*net.UnixConn, first bool) {
	clients, first = l.stopClients, l.last.Kind == ""
	l.stopClients = nil
	if first {
		l.last = e
	}
	return clients, first
}
