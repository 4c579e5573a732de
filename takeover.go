//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// A takeover: a process that nobody here has started becomes the successor.

// maxRetired is how many retired units are handed on.
const maxRetired = 64

// isRetired reports whether a unit was replaced.
func (u *Upgrader) isRetired(unit string) bool { return unit != "" && slices.Contains(u.retired, unit) }

// inheritRetired notes the units that were replaced, as a predecessor's HELLO
// tells them. The predecessor's own is one of them if this process is another
// unit's.
func (u *Upgrader) inheritRetired(hello *frame) {
	r := hello.records[0]
	last := r.get("unit")
	if last == u.opts.Unit {
		last = ""
	}
	var list []string
	for _, unit := range r.all("retired") {
		if unit != last {
			list = append(list, unit)
		}
	}
	if last != "" {
		list = append(list, last)
	}
	u.retired = list[max(0, len(list)-maxRetired):]
}

// maxPendingTakers is how many clients of the takeover socket may have sent
// nothing yet. A further one takes the place of the first.
const maxPendingTakers = 32

// takeTimeout is how long such a client has for its first frame.
const takeTimeout = 10 * time.Second

// awaitTake receives the first frame of a process that takes over, and returns
// that process's unit.
func (s *stream) awaitTake() (unit string, err error) {
	f, err := s.read(time.Now().Add(takeTimeout))
	if err != nil {
		return "", err
	}
	if f.kind != frameTake {
		return "", errorf("it began with a frame %q; want %q", f.kind, frameTake)
	}
	return f.first("unit"), checkVersion(f)
}

// serveTakeover waits for the first frame of a client of the takeover socket,
// and then lets it take over.
func (c *control) serveTakeover(t trigger, running *sync.WaitGroup) {
	conn := t.taker.conn
	c.mu.Lock()
	if len(c.takers) == maxPendingTakers {
		c.takers[0].Close()
		c.takers = c.takers[1:]
	}
	c.takers = append(c.takers, conn)
	c.mu.Unlock()
	running.Go(func() {
		unit, err := t.taker.awaitTake()
		c.mu.Lock()
		if i := slices.Index(c.takers, conn); i >= 0 {
			c.takers = slices.Delete(c.takers, i, i+1)
		}
		c.mu.Unlock()
		if err == nil && t.taker.atEnd() {
			err = io.EOF // it came while this process did not look, and has gone
		}
		if err == nil && c.u.isRetired(unit) {
			_ = t.taker.send(frameFail, "reason="+ErrRetired.Error(), "retired=1") // fails only if it is gone
			t.taker.close()
			return
		}
		if err == nil {
			if err = c.u.beginUpgrade(t); err == nil {
				_ = c.u.attempt(t)
				return
			}
			c.u.notifyRefused(t, err)
		}
		t.refuse(err)
	})
}

// takeOver makes the process that serves at path this process's predecessor,
// and receives all that it has. If no process serves there, it does nothing.
func (u *Upgrader) takeOver(path string) error {
	deadline := time.Now().Add(u.opts.UpgradeTimeout)
	s, hello, err := dialPredecessor(path, u.opts.Unit, deadline)
	if err == nil && s != nil {
		u.pred = newPredecessor(s)
		err = u.receiveInheritance(hello, deadline)
	}
	if err == os.ErrDeadlineExceeded {
		err = errorf("the process that listens there has not answered in time (Options.UpgradeTimeout): %w", err)
	}
	return err
}

// dialPredecessor connects to the process that serves at path and requests a
// takeover. It returns the stream to that process and its first frame, or nil if
// no process serves there. After the deadline it returns os.ErrDeadlineExceeded.
func dialPredecessor(path, unit string, deadline time.Time) (*stream, *frame, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	for tries := 1; ; tries++ {
		fd, err := dialControl(ctx, path)
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, nil, nil
		}
		if err == context.DeadlineExceeded { // the queue there is full
			return nil, nil, os.ErrDeadlineExceeded
		}
		if err != nil {
			return nil, nil, err
		}
		s, f, err := requestTakeover(fd, unit, deadline)
		if err == nil {
			return s, f, nil
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil, os.ErrDeadlineExceeded
		case err != io.EOF:
			return nil, nil, err
		case tries == 100:
			return nil, nil, errorf("a process listens there and closes the connection: %w", io.ErrUnexpectedEOF)
		}
		// It has ended, or was just being replaced.
		time.Sleep(10 * time.Millisecond)
	}
}

// requestTakeover sends TAKE and returns the answer if it is HELLO. With an
// error fd is closed.
func requestTakeover(fd int, unit string, deadline time.Time) (*stream, *frame, error) {
	s, err := newStream(fd)
	if err != nil {
		return nil, nil, err
	}
	f, err := s.exchangeTake(unit, deadline)
	if err != nil {
		s.close()
		return nil, f, err
	}
	return s, f, nil
}

func (s *stream) exchangeTake(unit string, deadline time.Time) (f *frame, err error) {
	// NetBSD and OpenBSD do not tell this end reliably (see PeerCred). There
	// the check of the other end, which has accepted, has to do.
	if err := trusted(s.conn, true); err != nil {
		return f, err
	}
	s.inherits = true
	// A process that closes the connection at once may have sent the reason.
	err = s.send(frameTake, "version="+protocolVersion, "unit="+unit)
	if err == nil || err == io.EOF {
		f, err = s.read(deadline)
	}
	if err == errTruncated { // HELLO and what follows can come at once
		s.sendFail(err)
	}
	if err != nil {
		return f, err
	}
	if f.kind == frameFail && f.first("retired") != "" {
		return f, ErrRetired
	}
	if f.kind == frameFail {
		return f, errorf("the process that serves there refuses: %s", f.first("reason"))
	}
	if err := checkHello(f); err != nil {
		s.sendFail(err)
		return f, err
	}
	return f, nil
}
