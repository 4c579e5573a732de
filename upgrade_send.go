//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

// What the predecessor hands on: starting the process that gets it, and sending
// it batch by batch.

// startChild runs cmd as the successor.
func (a *attempt) startChild(cmd *Command) error {
	fds, err := socketpair(syscall.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer syscall.Close(fds[1])
	if a.s, err = newStream(fds[0]); err != nil {
		return err
	}
	if err := a.fill(networkOfSocket(fds[1])); err != nil {
		return err
	}
	u := a.u
	u.mu.Lock()
	err = u.life.beginStart(a.s)
	u.mu.Unlock()
	if err != nil {
		return err
	}
	a.program, a.dir = cmd.Path, cmd.Dir
	env := "pid=" + strconv.Itoa(os.Getpid()) + " uid=" + strconv.Itoa(os.Geteuid())
	a.child, err = startChild(cmd, fds[1], env)
	return err
}

// admit makes the process that takes over the successor.
func (a *attempt) admit() error {
	cred, err := PeerCred(a.taker.conn)
	if err != nil {
		return err
	}
	a.s, a.child = a.taker, foundChild(cred.PID)
	if a.s.atEnd() { // if not, the process that was found is the one at the other end
		return io.ErrUnexpectedEOF
	}
	var own spare // the connection is of the network namespace of the process that has made it
	defer own.close()
	return a.gone(a.fill(own.open()))
}

// fill begins the conversation, as far as the system's buffer goes. It tells the
// successor the number of this process's network namespace.
func (a *attempt) fill(network uint64) error {
	u := a.u
	_ = a.s.raw.Control(func(fd uintptr) { keepReserve(int(fd)); wantSender(int(fd)) })
	hello := record{"version=" + protocolVersion, "generation=" + strconv.Itoa(u.generation), "pid=" + strconv.Itoa(os.Getpid()),
		"network=" + strconv.FormatUint(network, 10), "unit=" + u.opts.Unit}
	for _, unit := range u.retired {
		hello = append(hello, "retired="+unit)
	}
	if err := a.s.send(frameHello, hello...); err != nil {
		return err
	}
	for !a.endSent {
		if err := a.sendBatch(); err == errAgain {
			break
		} else if err != nil {
			return err
		}
		if dropsDescriptors && len(a.rest) > 0 {
			break
		}
	}
	return nil
}

// sendBatch sends the next entries, at most maxBatchFDs, and END with the last
// ones. None of the descriptors can be closed meanwhile, and its number used
// again: Close of a listener withdraws it first, which waits for Upgrader.mu, and
// a socket for packets, which its embedded connection can close, is sent within a
// call of its Control.
func (a *attempt) sendBatch() error {
	a.u.mu.Lock()
	defer a.u.mu.Unlock()
	most := min(len(a.rest), maxBatchFDs)
	b := beginFrame(make([]byte, 0, usualFrame*max(most, 1)), frameSockets)
	fds := make([]int, 0, most)
	var n int // entries that were looked at
	var e *entry
	add := func(fd uintptr) { b, fds = e.appendTo(b), append(fds, int(fd)) }
	var step func() error
	step = func() error {
		for n < len(a.rest) && len(fds) < maxBatchFDs && len(b) < maxBatch {
			e = a.rest[n]
			n++
			if e.state == closedInTransit {
				continue
			}
			if _, isListener := e.sock.(*listener); isListener || e.sock == nil {
				_ = e.control(add) // fails only if it was closed
				continue
			}
			var rest error
			if e.control(func(fd uintptr) { add(fd); rest = step() }) == nil {
				return rest
			}
		}
		if len(fds) > 0 {
			b = endFrame(b)
		} else {
			b = nil
		}
		last := n == len(a.rest)
		if last {
			b = append(b, makeFrame(frameEnd, nil)...)
		}
		if err := a.s.sendFrames(b, fds); err != nil {
			return err
		}
		if len(fds) > 0 {
			a.sent++
		}
		a.rest, a.endSent = a.rest[n:], last
		return nil
	}
	return step()
}

// handOn sends what start could not send, batch by batch. The next batch goes
// when the successor has taken all before it.
func (a *attempt) handOn(deadline time.Time) error {
	for acked := 0; !a.endSent; {
		if acked < a.sent {
			f, err := a.await(deadline)
			if err != nil {
				return err
			}
			if f.kind != frameAck {
				return a.unexpected(f)
			}
			acked++
			continue
		}
		err := a.sendBatch()
		if err != nil && err != errAgain {
			return a.gone(err)
		}
		if err == errAgain {
			// The buffer is empty, so this is the system's limit of
			// descriptors in flight, whose end is no event.
			if a.child.exited(5 * time.Millisecond) {
				return io.ErrUnexpectedEOF
			}
			if a.mustAbort() {
				return ErrStopped
			}
			if time.Now().After(deadline) {
				return errorf("%w: too many descriptors are in flight between processes of this user (see RLIMIT_NOFILE)", os.ErrDeadlineExceeded)
			}
		}
	}
	return nil
}

// closeState frees what SendState has written.
func (a *attempt) closeState() {
	if a.stateFile != nil {
		a.stateFile.Close()
		a.stateFile, a.state.raw = nil, nil
	}
}
