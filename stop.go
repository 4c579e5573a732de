//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
)

// Stop, the partial stop, and what a process gives up at its end.

// Stop ends this process's service. After EventStopping it closes the
// listeners in the system, except those with KeepOnStop, and closes what AddConn,
// AddFile and DatagramPair keep. It ends the reading of packets, removes the files of Unix
// sockets and the PID file as far as they are this process's own, and closes
// the channel that Exit returns. The connections are the caller's to finish.
// Just after Ready it may wait some seconds for the predecessor to step aside.
//
// A Stop during an upgrade is an order for the service, and not only for this
// process. Before the successor is committed to, Stop tells it not to serve, and
// the upgrade fails. After that, the order is passed on to the successor, which
// carries it out. Stop does not wait for either: the call of Upgrade or Ready
// that runs does the rest before it returns. A process that takes over is not
// given the order; see EventStopDeferred.
//
// During the probation that the predecessor gives this process, Stop tells the
// predecessor not to come back. A second Stop, and one after a successful
// Upgrade, does nothing.
func (u *Upgrader) Stop() { u.stop(EventStopping, trigger{}) }

// stop carries out a stop, or leaves it to the call that runs. The kind is
// EventStopping or EventPartialStop.
func (u *Upgrader) stop(kind EventKind, t trigger) {
	if !u.life.made() {
		return
	}
	u.mu.Lock()
	do, was := u.life.stop(kind, t)
	abort, deferred := u.life.abortable, do == "" && u.life.defersStop()
	u.mu.Unlock()
	switch {
	case do == "" && abort != nil:
		_ = abort.abort(ErrStopped.Error()) // here, because the caller may exit when this returns
	case deferred:
		u.notify(u.ownEvent(t, EventStopDeferred))
	}
	switch do {
	case EventStopping:
		u.stopWholly(t, was)
	case EventPartialStop:
		u.stopAccepting(t)
	}
}

func (u *Upgrader) stopWholly(t trigger, was phase) {
	e := u.ownEvent(t, EventStopping)
	u.notify(e)
	u.giveUp(u.takeOwnership(was))
	if u.ownsPIDFile() {
		_ = os.Remove(u.opts.PIDFile)
	}
	u.reap()
	u.end(e)
	close(u.life.exit)
}

// stopAccepting ends accepting and leaves all else to the caller.
func (u *Upgrader) stopAccepting(t trigger) {
	e := u.ownEvent(t, EventPartialStop)
	u.notify(e)
	u.giveUp(u.awaitIndependence())
	u.end(e)
}

// takeOwnership tells the predecessor, if it could still come back, that this
// process ends by order. It reports whether the socket files are this
// process's to remove.
func (u *Upgrader) takeOwnership(was phase) bool {
	switch {
	case u.first():
		return true
	case was == starting:
		u.pred.s.sendFail(ErrStopped)
		return false
	case was == refused:
		return false
	case u.awaitIndependence():
		return true
	}
	// The predecessor reads what was sent before it looks whether this process
	// lives: once BYE is sent, it does not come back.
	owner := u.pred.s.send(frameBye) == nil || u.awaitIndependence()
	if owner {
		u.removeDropped()
	}
	return owner
}

// giveUp ends accepting, except on the listeners that are kept on a stop, and
// removes what files are this process's own.
func (u *Upgrader) giveUp(owner bool) {
	u.mu.Lock()
	dropped := u.reg.endClaiming()
	taken := u.reg.takeForStop()
	u.mu.Unlock()
	_ = pauseAll(taken) // whether or not a read goes on, the process ends
	for _, e := range taken {
		if owner || !e.inherited {
			e.removeFile()
		} else {
			dropped = append(dropped, e)
		}
	}
	u.drop(dropped)
	u.state.close()
	for _, e := range taken {
		e.detach()
	}
}

// ownEvent returns an event about this process.
func (u *Upgrader) ownEvent(t trigger, kind EventKind) *Event {
	e := t.event(kind)
	e.PID, e.Generation = os.Getpid(), u.generation
	return e
}

// mustStop reports whether a stop waits for the running Ready or Upgrade.
func (u *Upgrader) mustStop() bool {
	u.takeSignals()
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.life.pending != ""
}

// stopPending carries out a stop that was left to the call that was running,
// and reports whether there was one.
func (u *Upgrader) stopPending() bool {
	u.mu.Lock()
	kind, t := u.life.takePending()
	u.mu.Unlock()
	if kind != "" {
		u.stop(kind, t)
	}
	return kind != ""
}

// end closes the control sockets, answers the clients that have asked for this
// process's end, and makes Wait return e unless something else has ended it.
func (u *Upgrader) end(e *Event) {
	for _, c := range u.controls {
		c.finish()
	}
	if !e.Takeover { // else the next stop is for another call of Wait
		u.releaseStops()
	}
	u.mu.Lock()
	clients, first := u.life.end(e)
	u.mu.Unlock()
	for _, c := range clients {
		u.answerStop(c, e)
	}
	if first {
		close(u.life.ended)
	}
}
