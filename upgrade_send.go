package ecdysis

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// start makes the stream, fills it as far as it goes, and starts the
// successor: who ends this process from then on finds it all in the system.
func (a *attempt) start(cmd *Command) error {
	u := a.u
	u.mu.Lock()
	if u.pending != "" {
		u.mu.Unlock()
		return ErrStopped
	}
	u.phase = upgrading
	a.handed = slices.Clone(u.reg.entries)
	for _, e := range a.handed {
		e.handed = true
	}
	u.mu.Unlock()
	if a.state != nil { // first: it is there if this process ends early
		a.rest = append(a.rest, a.state)
	}
	a.rest = append(a.rest, a.handed...)

	if a.taker != nil {
		return a.admit()
	}
	fds, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer unix.Close(fds[1])
	if a.s, err = newStream(fds[0]); err != nil {
		return err
	}
	if err := a.fill(); err != nil {
		return err
	}
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
	if a.s.atEnd() { // from here on the process is the one that was found, or has ended
		return io.ErrUnexpectedEOF
	}
	return gone(a.fill())
}

// fill begins the conversation, as far as the system's buffer goes.
func (a *attempt) fill() error {
	u := a.u
	_ = a.s.raw.Control(func(fd uintptr) { keepReserve(int(fd)); wantSender(int(fd)) })
	hello := record{"version=" + protocolVersion, "generation=" + strconv.Itoa(u.generation), "pid=" + strconv.Itoa(os.Getpid())}
	if err := a.s.send(frameHello, []record{hello}, nil); err != nil {
		return err
	}
	for !a.endSent {
		if err := a.sendMore(); err == errAgain {
			break
		} else if err != nil {
			return err
		}
		if oneBatchUnread && len(a.rest) > 0 {
			break
		}
	}
	return nil
}

// sendMore sends the next batch, or the end of them.
func (a *attempt) sendMore() error {
	if len(a.rest) > 0 {
		n, err := a.sendBatch(a.rest)
		if err == nil {
			a.rest = a.rest[n:]
		}
		return err
	}
	err := a.s.send(frameEnd, nil, nil)
	a.endSent = err == nil
	return err
}

// sendBatch sends the next entries, at most maxBatchFDs, and returns how many
// of the list they were. The descriptors are taken and sent within calls of
// Control, so that none can be closed, and its number used again, meanwhile.
func (a *attempt) sendBatch(list []*entry) (n int, err error) {
	var records []record
	var fds []int
	var step func(size int) error
	step = func(size int) error {
		if n == len(list) || len(fds) == maxBatchFDs || size >= maxBatch {
			if len(fds) == 0 {
				return nil
			}
			err := a.s.send(frameSockets, records, fds)
			if err == nil {
				a.sent++
			}
			return err
		}
		e := list[n]
		n++
		r := e.record()
		for _, f := range r {
			size += len(f) + 2
		}
		var serr error
		cerr := e.control(func(fd uintptr) {
			records = append(records, r)
			fds = append(fds, int(fd))
			serr = step(size)
		})
		if cerr != nil { // closed by the caller
			return step(size)
		}
		return serr
	}
	err = step(0)
	return n, err
}

// handOn sends what start could not, batch by batch: the next goes when the
// successor has taken all before it.
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
		err := a.sendMore()
		if err != nil && err != errAgain {
			return gone(err)
		}
		if err == errAgain {
			// Not the buffer, which is empty, but the system's limit of
			// descriptors in flight, whose end is no event.
			if a.child.exited(5 * time.Millisecond) {
				return io.ErrUnexpectedEOF
			}
			if a.u.mustStop() {
				return ErrStopped
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%w: too many descriptors are in flight between processes of this user (see RLIMIT_NOFILE)", os.ErrDeadlineExceeded)
			}
		}
	}
	return nil
}

// closeState frees what SendState has written.
func (a *attempt) closeState() {
	if a.stateFile != nil {
		a.stateFile.Close()
		a.stateFile, a.state.fd = nil, -1
	}
}
