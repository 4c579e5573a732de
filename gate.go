package ecdysis

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Pausing and unpausing the calls that take what clients send.

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// A gate pauses and unpauses the calls that receive from clients: Accept and
// packet reads.
//
// The epoch is odd while the gate is paused. A call that began in another
// epoch than it ended in was interrupted by the package, and not by the
// caller's deadline. How a gate is paused: the epoch is set, then a deadline in
// the past, which ends the calls that wait in the system; then barrier makes a
// call of its own, whose lock lies behind every call in flight.
type gate struct {
	// These do not change.
	u    *Upgrader
	e    *entry
	side side
	raw  syscall.RawConn

	epoch atomic.Uint64 // read by every call, without the lock

	// mu guards what follows, every change of epoch and the socket's deadline.
	// It is held over no call that blocks.
	mu       sync.Mutex
	deadline time.Time     // the caller's
	closed   bool          // by the caller
	detached bool          // by the package
	changed  chan struct{} // closed on the next change of any of these; nil if nobody waits for one
}

// A side is what a gate pauses: a *listener or a *packetConn.
type side interface {
	setSocketDeadline(time.Time) error // sets the deadline of the calls that the gate pauses
	barrier()                          // returns when no call is in flight that began before a past deadline was set
}

// pass makes a call when the gate is open, and makes it again each time the
// package has interrupted it.
func (g *gate) pass(f func() error) error {
	for {
		epoch := g.epoch.Load()
		if epoch%2 != 0 {
			if err := g.sleep(epoch, 0); err != nil {
				return err
			}
			continue
		}
		err := f()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || g.epoch.Load() == epoch {
			return err
		}
	}
}

// sleep waits until the epoch or the limit is over; a limit of 0 is none. It
// returns an error if the socket was closed or the caller's deadline has passed.
// A change of the gate's state wakes it.
func (g *gate) sleep(epoch uint64, limit time.Duration) error {
	var timer *time.Timer
	for start := time.Now(); ; {
		g.mu.Lock()
		if g.closed || g.detached {
			g.mu.Unlock()
			return net.ErrClosed
		}
		if g.epoch.Load() != epoch {
			g.mu.Unlock()
			return nil
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed, deadline := g.changed, g.deadline
		g.mu.Unlock()

		now := time.Now()
		if !deadline.IsZero() && !now.Before(deadline) {
			return os.ErrDeadlineExceeded
		}
		wait := time.Duration(1<<63 - 1)
		if limit > 0 {
			if wait = limit - now.Sub(start); wait <= 0 {
				return nil
			}
		}
		if !deadline.IsZero() {
			wait = min(wait, deadline.Sub(now))
		}
		if timer == nil {
			timer = time.NewTimer(wait)
			defer timer.Stop()
		} else {
			timer.Reset(wait)
		}
		select {
		case <-changed:
		case <-timer.C:
		}
	}
}

// wake makes the calls in sleep look again. g.mu is held.
func (g *gate) wake() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// setDeadline sets the caller's deadline.
func (g *gate) setDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.detached {
		return net.ErrClosed
	}
	g.deadline = t
	g.wake()
	if g.epoch.Load()%2 != 0 {
		return nil // unpause sets it
	}
	return g.side.setSocketDeadline(t)
}

// pause returns when no call is in flight and none can begin.
func (g *gate) pause() {
	g.mu.Lock()
	if g.epoch.Load()%2 == 0 {
		g.epoch.Add(1)
	}
	_ = g.side.setSocketDeadline(past) // fails only when closed, which is as quiet
	g.wake()
	g.mu.Unlock()
	g.side.barrier()
}

// unpause opens a paused gate. The deadline comes first, because a call that
// sees the new epoch must not find the old deadline.
func (g *gate) unpause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 == 0 {
		return
	}
	_ = g.side.setSocketDeadline(g.deadline)
	g.epoch.Add(1)
	g.wake()
}

// detachGate makes the calls fail on the package's account. The caller's Close,
// which comes later, is not an error.
func (g *gate) detachGate() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.detached = true
	g.wake()
}

// close is the caller's Close, except for closing the socket itself: it makes
// the calls fail, withdraws the socket from what is handed on, and removes its
// file if it has one and this process owns it. It does not wait for the
// predecessor.
func (g *gate) close() (detached bool, err error) {
	g.mu.Lock()
	closed, detached := g.closed, g.detached
	g.closed = true
	g.wake()
	g.mu.Unlock()
	if closed {
		return detached, net.ErrClosed
	}
	if g.u.withdraw(g.e) && !detached {
		// A detached socket's file has been seen to. A file with that name and
		// even that inode may be another process's by now.
		g.e.removeFile()
	}
	return detached, nil
}
