package ecdysis

type phase int

const (
	starting  phase = iota // Listen may be called, listeners are quiet
	readying               // Ready runs
	serving                // this process serves, as far as it knows
	preparing              // Upgrade runs, nothing is started: Listen may be called
	upgrading              // Upgrade runs, the successor has or gets its copies
	upgraded               // replaced, for good
	partial                // accepting has ended by a signal
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

// mustStop reports whether a stop waits for the running Ready or Upgrade.
func (u *Upgrader) mustStop() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.pending != ""
}

// stopPending does what a stop has left to the call that was running, and
// reports whether there was one.
func (u *Upgrader) stopPending() bool {
	u.mu.Lock()
	kind, t := u.pending, u.cause
	u.pending, u.cause = "", trigger{}
	u.mu.Unlock()
	switch kind {
	case EventStopping:
		u.stop(t)
	case EventPartialStop:
		u.partialStop(t)
	}
	return kind != ""
}

// end closes the control sockets, answers who has asked for this process's end
// by them, and makes Wait return e, unless something else has ended it.
func (u *Upgrader) end(e Event) {
	for _, c := range u.controls {
		c.finish()
	}
	u.mu.Lock()
	asked, first := u.asked, u.last.Kind == ""
	u.asked = nil
	if first {
		u.last = e
	}
	u.mu.Unlock()
	for _, c := range asked {
		answer(c, outcome(e))
	}
	if first {
		close(u.over)
	}
}
