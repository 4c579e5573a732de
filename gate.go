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

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// A gate holds the calls back that take what clients send: accepting, or
// reading packets. It can be quieted and resumed.
//
// epoch is odd while the gate is quiet. A call that began in another epoch
// than it ended in was interrupted by the package, not by the caller's
// deadline. mu guards the fields below it, every change of epoch and the
// socket's deadline; it is held over no call that blocks.
type gate struct {
	u     *Upgrader
	e     *entry
	side  side
	raw   syscall.RawConn
	epoch atomic.Uint64

	mu       sync.Mutex
	deadline time.Time     // the caller's
	closed   bool          // by the caller
	gone     bool          // by the package
	changed  chan struct{} // if not nil: closed on the next change of any of these
}

// A side is what a gate is the gate of: a *listener or a *packetConn.
type side interface {
	socketDeadline(time.Time) error // sets that of the calls which are held back
	drain()                         // returns when no call is in flight that began before that deadline
}

func (g *gate) control(f func(fd uintptr)) error { return g.raw.Control(f) }

// pass makes a call when the gate is open, and again each time that it was
// interrupted by the package.
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

// sleep waits until the epoch is over, the time is (0: without a limit), or
// with an error until the socket is closed or the caller's deadline is over.
func (g *gate) sleep(epoch uint64, limit time.Duration) error {
	var timer *time.Timer
	for start := time.Now(); ; {
		g.mu.Lock()
		if g.closed || g.gone {
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

// wake makes those that sleep look again. g.mu is held.
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
	if g.closed || g.gone {
		return net.ErrClosed
	}
	g.deadline = t
	g.wake()
	if g.epoch.Load()%2 != 0 {
		return nil // resume sets it
	}
	return g.side.socketDeadline(t)
}

// quiet returns when no call is in flight and none can begin.
func (g *gate) quiet() {
	g.mu.Lock()
	if g.epoch.Load()%2 == 0 {
		g.epoch.Add(1)
	}
	_ = g.side.socketDeadline(past) // fails only when closed, which is as quiet
	g.wake()
	g.mu.Unlock()
	g.side.drain()
}

// resume opens a quiet gate. The deadline comes first: a call that sees the new
// epoch must not find the old deadline.
func (g *gate) resume() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 == 0 {
		return
	}
	_ = g.side.socketDeadline(g.deadline)
	g.epoch.Add(1)
	g.wake()
}

// leave makes the calls fail on the package's account: the caller's Close,
// which comes later, is not an error.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone = true
	g.wake()
}

// close is the caller's Close, but for the socket's own: it makes the calls
// fail, withdraws the socket from what is handed on, and removes its file if
// it has one and this process owns it.
func (g *gate) close() (gone bool, err error) {
	g.mu.Lock()
	closed, gone := g.closed, g.gone
	g.closed = true
	g.wake()
	g.mu.Unlock()
	if closed {
		return gone, net.ErrClosed
	}
	if g.u.withdraw(g.e) && !gone {
		// Whose socket is gone, its file was seen to: a file with that name
		// and even that inode may be another process's by now.
		g.e.removeFile()
	}
	return gone, nil
}
