package ecdysis

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// fail ends the successor, if there is one, takes everything back, and
// returns err with all that is known.
func (a *attempt) fail(err error) error {
	u := a.u
	ue := &UpgradeError{Step: a.step, PID: a.pid(), Err: err}
	if a.child != nil {
		ue.State = a.end(err)
	}
	a.releaseOther()
	a.closeState()
	if a.s != nil {
		a.s.close()
	}
	if path := u.opts.PIDFile; path != "" && a.child != nil {
		// It had no time to remove what it had written beside the file.
		pidFile{temp: tempPIDFile(path, cmp.Or(a.ownPID, a.pid())), path: path}.discard()
		if perr := u.restorePIDFile(); perr != nil {
			ue.Err = fmt.Errorf("%w (then this process's own %w)", ue.Err, perr)
		}
	}
	defer a.resume() // even if the hook panics
	if a.told {
		e := a.event(EventResumed)
		e.PID, e.Generation = os.Getpid(), u.generation
		u.notify(e)
	}
	return ue
}

// resume lets this process serve as before.
func (a *attempt) resume() {
	u := a.u
	u.mu.Lock()
	var closed []*entry
	for _, e := range a.handed {
		if e.closed {
			closed = append(closed, e)
		}
		e.handed = false
		if a.quiet {
			e.resume()
		}
	}
	u.phase = serving
	u.mu.Unlock()
	for _, e := range closed {
		e.removeFile()
	}
}

// end tells the successor that it was given up, ends it, and returns how it
// ended; nil: unknown.
func (a *attempt) end(cause error) *os.ProcessState {
	err := a.s.abort()
	if a.taker != nil && !a.committed && err != errAgain {
		a.child.release()
		return nil // it knows, and is not this process's to end
	}
	if hasSaid(cause) || errors.Is(cause, io.ErrUnexpectedEOF) {
		// It is about to exit by itself, with a status that tells more.
		grace := time.Second
		if a.committed {
			grace = slice
		}
		a.child.exited(grace)
	}
	err = a.kill()
	if a.committed {
		// It has the word and may serve at any moment: only its end, and no
		// guess, lets this process resume.
		for !a.ended() {
			if _, err := a.s.read(time.Now().Add(slice)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				a.child.exited(slice)
			}
		}
	} else if err != nil || !a.child.exited(handoverTimeout) {
		// It has no word and will not serve.
		a.u.mu.Lock()
		a.u.zombies = append(a.u.zombies, a.child)
		a.u.mu.Unlock()
		return nil
	}
	return a.child.wait()
}

// kill ends the successor, and the process that it really is if it was not
// that one which was started. It returns nil if there is nothing left to end.
func (a *attempt) kill() error {
	err := a.child.kill()
	if a.other != nil {
		if kerr := a.other.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
			err = kerr
		}
	}
	return err
}

func (a *attempt) releaseOther() {
	if a.other != nil {
		_ = a.other.Release()
	}
}

// reap removes from the system what is left of successors that could not be
// ended when they were given up.
func (u *Upgrader) reap() {
	u.mu.Lock()
	list := u.zombies
	u.zombies = nil
	u.mu.Unlock()
	for _, c := range list {
		if c.exited(0) {
			c.wait()
			continue
		}
		u.mu.Lock()
		u.zombies = append(u.zombies, c)
		u.mu.Unlock()
	}
}

// A successorError is the reason that a successor gave.
type successorError struct {
	reason           string
	inUse            bool   // it is that an address is in use
	network, address string // this one; "": it did not say
}

func (e successorError) Error() string { return "it says: " + e.reason }

func failReason(f frame) error {
	return successorError{f.first("reason"), f.first("inuse") == "1", f.first("network"), f.first("address")}
}

// hasSaid reports whether err is the reason that a successor gave.
func hasSaid(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if _, ok := err.(successorError); ok {
			return true
		}
	}
	return false
}

// blame adds to err, the reason of a failed start, which sockets of this
// process have been in the successor's way.
func (a *attempt) blame(err error) error {
	said, ok := err.(successorError)
	if ok && !said.inUse || !ok && err != io.ErrUnexpectedEOF {
		return err
	}
	list, lerr := a.u.unregistered()
	if lerr != nil {
		return err
	}
	cause := "perhaps because of"
	list = slices.DeleteFunc(list, (*entry).autobound)
	if said.address != "" {
		cause = "the cause is"
		list = slices.DeleteFunc(list, func(e *entry) bool { return !said.meets(e) })
	}
	if len(list) == 0 {
		return err
	}
	var names []string
	for _, e := range list {
		names = append(names, e.where())
	}
	return fmt.Errorf("%w; %s what this process has bound and does not hand on: %s", err, cause, strings.Join(names, ", "))
}

// meets reports whether a socket can have been in the way of the address that
// a successor has found in use.
func (s successorError) meets(e *entry) bool {
	_, isUnix := socketType(e.network)
	if isUnix {
		return strings.HasPrefix(s.network, "unix") && e.address == s.address
	}
	host1, port1, err1 := net.SplitHostPort(e.address)
	host2, port2, err2 := net.SplitHostPort(s.address)
	return e.network[:3] == s.network[:min(3, len(s.network))] && err1 == nil && err2 == nil &&
		port1 == port2 && (host1 == host2 || isWildcard(host1) || isWildcard(host2))
}

func isWildcard(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}
