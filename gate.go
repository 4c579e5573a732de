//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

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
// caller's deadline. A gate is paused in three steps: the epoch is set, then a
// deadline in the past, which ends the calls that wait in the system, and then
// barrier makes a call of its own, which gets its lock after every call in
// flight.
//
// Only the caller ends the calls. A detached gate, whose socket the package has
// ended, stays paused: its calls wait until the caller closes the socket or the
// caller's deadline passes.
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
	past     bool          // the socket has the deadline of pause
	closed   bool          // by the caller
	detached bool          // by the package
	changed  chan struct{} // closed on the next change of any of these; nil if nobody waits for one
}

// A side is what a gate pauses: a *listener or a *packetConn.
type side interface {
	setSocketDeadline(time.Time) error // sets the deadline of the calls that the gate pauses
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
		if err := f(); !g.interrupted(epoch, err) {
			return err
		}
	}
}

// interrupted reports whether a call that began in this epoch has failed because
// of the package.
func (g *gate) interrupted(epoch uint64, err error) bool {
	return err != nil && g.epoch.Load() != epoch && isInterruption(err)
}

// isInterruption reports whether a call that the package has interrupted fails
// with err. It stands apart so that interrupted can be inlined.
func isInterruption(err error) bool {
	// errors.Is would look for a method of the *net.OpError. For that the runtime
	// makes a table when it is asked first, which is while nobody accepts.
	if oe, ok := err.(*net.OpError); ok {
		err = oe.Err
	}
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)
}

// sleep waits until the epoch or the limit is over; a limit of 0 is none. It
// returns an error if the socket was closed or the caller's deadline has passed.
// A change of the gate's state wakes it.
func (g *gate) sleep(epoch uint64, limit time.Duration) error {
	const forever = 1<<63 - 1
	var timer *time.Timer
	for start := time.Now(); ; {
		g.mu.Lock()
		if g.closed {
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
		wait := time.Duration(forever)
		if limit > 0 {
			if wait = limit - now.Sub(start); wait <= 0 {
				return nil
			}
		}
		if !deadline.IsZero() {
			wait = min(wait, deadline.Sub(now))
		}
		var over <-chan time.Time
		if wait < forever { // a timer wakes the poller, and a handover should not have to wait for that
			if timer == nil {
				timer = time.NewTimer(wait)
				defer timer.Stop()
			} else {
				timer.Reset(wait)
			}
			over = timer.C
		}
		select {
		case <-changed:
		case <-over:
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
	if g.closed {
		return net.ErrClosed
	}
	g.deadline = t
	g.wake()
	if g.epoch.Load()%2 != 0 {
		return nil // unpause sets it
	}
	return g.side.setSocketDeadline(t)
}

// pause lets no call begin, and ends those that wait in the system. See pauseAll
// for those that go on.
func (g *gate) pause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 == 0 {
		g.epoch.Add(1)
	}
	_ = g.side.setSocketDeadline(past) // fails only if the socket is closed, and then no call waits
	g.past = true
	g.wake()
}

// pauseAgain repeats the past deadline, in the place of which the caller has set
// another one on the socket itself.
func (g *gate) pauseAgain() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 != 0 {
		_ = g.side.setSocketDeadline(past)
	}
}

// unpause opens a paused gate. The deadline comes first, because a call that
// sees the new epoch must not find the old deadline.
func (g *gate) unpause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 == 0 || g.detached {
		return
	}
	if g.past || !g.deadline.IsZero() { // a new one was never shut
		_ = g.side.setSocketDeadline(g.deadline)
		g.past = false
	}
	g.epoch.Add(1)
	g.wake()
}

// detachGate keeps a gate paused for good. The caller's Close, which comes later,
// is not an error.
func (g *gate) detachGate() {
	if g.epoch.Load()%2 == 0 {
		g.pause()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.detached = true
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

// pauseTimeout is how long a packet read may go on when its socket is paused.
const pauseTimeout = time.Second

// pauseAll returns when no call of these is in flight and none can begin. The
// error names a socket on which a read goes on: only the program can cause that,
// by a deadline of its own on an embedded connection, or by a function for a
// raw connection that does not return.
func pauseAll(list []*entry) error {
	// All are paused before the first barrier, so that their calls end side by side.
	for _, e := range list {
		e.pause()
	}
	var readers []*packetConn
	for _, e := range list {
		switch s := e.sock.(type) {
		case *listener:
			s.barrier()
		case *packetConn:
			readers = append(readers, s)
		}
	}
	if len(readers) == 0 {
		return nil
	}
	var current atomic.Pointer[packetConn]
	done := make(chan struct{})
	// A barrier cannot be interrupted. If a read goes on after pauseTimeout,
	// this goroutine ends when the read does.
	go func() {
		defer close(done)
		for _, p := range readers {
			current.Store(p)
			p.barrier()
		}
	}()
	limit := time.NewTimer(pauseTimeout)
	defer limit.Stop()
	again := time.NewTicker(pauseTimeout / 100)
	defer again.Stop()
	for {
		select {
		case <-done:
			return nil
		case <-again.C:
			if p := current.Load(); p != nil {
				p.pauseAgain()
			}
		case <-limit.C:
			return errorf("%s: a read has not ended within %v of the handover: %w", current.Load().e.label(), pauseTimeout, os.ErrDeadlineExceeded)
		}
	}
}
