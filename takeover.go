package ecdysis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxSilent is how many clients of the takeover socket may be silent; a
// further one takes the place of the first.
const maxSilent = 32

// silence is how long one may be.
const silence = 10 * time.Second

// hearTake waits for the word of a process that takes over.
func (s *stream) hearTake() error {
	f, err := s.read(time.Now().Add(silence))
	if err != nil {
		return err
	}
	if f.kind != frameTake {
		return fmt.Errorf("it began with a frame %q; want %q", f.kind, frameTake)
	}
	return checkVersion(f)
}

// handOver lets a client of the takeover socket say what it wants, and then
// lets it take over.
func (c *control) handOver(t trigger, running *sync.WaitGroup) {
	conn := t.taker.conn
	c.mu.Lock()
	if len(c.silent) == maxSilent {
		c.silent[0].Close()
		c.silent = c.silent[1:]
	}
	c.silent = append(c.silent, conn)
	c.mu.Unlock()
	running.Go(func() {
		err := t.taker.hearTake()
		c.mu.Lock()
		c.silent = slices.DeleteFunc(c.silent, func(s *net.UnixConn) bool { return s == conn })
		c.mu.Unlock()
		if err == nil && t.taker.atEnd() {
			err = io.EOF // it has come while this process did not look, and has gone
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

// errLate: in a takeover, nothing came from the older process for too long.
var errLate = fmt.Errorf("the process that listens there has not answered in time (Options.UpgradeTimeout): %w", os.ErrDeadlineExceeded)

// takeOverAt asks the process that serves at path for all that it has, and
// returns the stream to it and its first frame; nil: there is nobody.
func takeOverAt(path string, deadline time.Time) (*stream, frame, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	for tries := 1; ; tries++ {
		c, err := dialControl(ctx, path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
			return nil, frame{}, nil
		}
		if err == context.DeadlineExceeded { // so many wait there already
			return nil, frame{}, errLate
		}
		if err != nil {
			return nil, frame{}, err
		}
		s, f, err := askFor(c, deadline)
		if err == nil {
			return s, f, nil
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, frame{}, errLate
		case err != io.EOF:
			return nil, frame{}, err
		case tries == 100:
			return nil, frame{}, fmt.Errorf("a process listens there and hangs up: %w", io.ErrUnexpectedEOF)
		}
		// It has ended, or was just being replaced.
		time.Sleep(10 * time.Millisecond)
	}
}

// askFor says TAKE and returns what is said in return, if that is HELLO. It
// takes c over, or closes it.
func askFor(c *net.UnixConn, deadline time.Time) (*stream, frame, error) {
	s, err := streamOn(c)
	if err != nil {
		return nil, frame{}, err
	}
	if err := trusted(c); err != nil {
		s.close()
		return nil, frame{}, err
	}
	s.inherits = true
	// Who hangs up at once may have said why.
	err = s.send(frameTake, []record{{"version=" + protocolVersion}}, nil)
	var f frame
	if err == nil || err == io.EOF {
		f, err = s.read(deadline)
	}
	if err == nil && f.kind == frameFail {
		err = fmt.Errorf("the process that serves there refuses: %s", f.first("reason"))
	} else if err == nil {
		if err = checkHello(f); err != nil {
			s.sendFail(err)
		}
	}
	if err != nil {
		s.close()
		return nil, f, err
	}
	return s, f, nil
}
