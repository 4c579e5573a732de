package ecdysis

import "os"

// Stop ends this process's service: EventStopping, then the listeners, and what
// AddConn, AddFile and DatagramPair keep, are closed (but for those with
// KeepOnStop), reading packets ends, the files of Unix sockets and the PID
// file are removed as far as they are this process's own, and Exit is closed.
// Connections are the caller's to finish. Just after Ready it may wait some
// seconds for the older process to step aside.
//
// A Stop during an upgrade ends the upgrade, unless the successor is about to
// serve: then this process is replaced. Stop does not wait for that: the
// call of Upgrade or Ready that runs does the rest before it returns.
// During the probation that the older process gives this one, Stop tells the
// older one not to come back. A second Stop, and one after a successful
// Upgrade, does nothing.
func (u *Upgrader) Stop() { u.stop(trigger{}) }

func (u *Upgrader) stop(t trigger) {
	u.mu.Lock()
	p := u.phase
	switch p {
	case upgraded, stopped:
		u.mu.Unlock()
		return
	case readying, preparing, upgrading:
		u.pending, u.cause = EventStopping, t
		u.mu.Unlock()
		return
	}
	u.phase = stopped
	u.mu.Unlock()

	e := u.ownEvent(t, EventStopping)
	u.notify(e)
	owner := u.parent == nil || p != refused && p != starting && u.settle()
	switch {
	case owner || p == refused:
	case p == starting:
		u.parent.sendFail(ErrStopped)
	default:
		// The old process reads what is sent before it looks whether this
		// one lives: once this is sent, it does not come back.
		owner = u.parent.send(frameBye, nil, nil) == nil || u.settle()
	}
	shut := u.takeListeners(owner)
	if owner {
		u.removeDropped()
	}
	if u.ownsPIDFile() {
		_ = os.Remove(u.opts.PIDFile)
	}
	u.reap()
	u.end(e)
	close(u.exit)
	// Last of all: a program may exit as soon as its accept loop ends.
	shut()
}

// partialStop ends accepting and leaves all else to the caller.
func (u *Upgrader) partialStop(t trigger) {
	u.mu.Lock()
	switch u.phase {
	case serving:
		u.phase = partial
		u.mu.Unlock()
		e := u.ownEvent(t, EventPartialStop)
		u.notify(e)
		shut := u.takeListeners(u.settle())
		u.end(e)
		shut()
	case readying, preparing, upgrading:
		if u.pending == "" {
			u.pending, u.cause = EventPartialStop, t
		}
		u.mu.Unlock()
	case partial: // another trigger's
		u.mu.Unlock()
	default: // there is nothing to drain
		u.mu.Unlock()
		u.stop(t)
	}
}

// ownEvent returns an event about this process.
func (u *Upgrader) ownEvent(t trigger, kind EventKind) Event {
	e := t.event(kind)
	e.PID, e.Generation = os.Getpid(), u.generation
	return e
}

// takeListeners ends accepting, but for the listeners that are to be kept on
// a stop, and removes what files are this process's own. Accept fails once
// shut is called.
func (u *Upgrader) takeListeners(owner bool) (shut func()) {
	u.mu.Lock()
	dropped := u.reg.takeInherited()
	var kept, taken []*entry
	for _, e := range u.reg.entries {
		if e.keep && e.sock != nil {
			kept = append(kept, e)
		} else {
			taken = append(taken, e)
		}
	}
	u.reg.entries, u.reg.adopted = kept, nil
	u.mu.Unlock()
	for _, e := range taken {
		e.quiet()
		if owner || !e.inherited {
			e.removeFile()
		} else {
			dropped = append(dropped, e)
		}
	}
	u.drop(dropped)
	u.state.close()
	return func() {
		for _, e := range taken {
			e.shut()
		}
	}
}
