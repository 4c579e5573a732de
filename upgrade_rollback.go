//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"cmp"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
)

// Giving an attempt up: ending the successor, taking the sockets back, and
// finding out whose fault it was.

// fail ends the successor if there is one, takes everything back, and returns
// err with all that is known.
func (a *attempt) fail(err error) error {
	u := a.u
	ue := &UpgradeError{Step: a.stage.step(), PID: a.pid(), Err: err}
	if a.child != nil {
		ue.State = a.end(err)
		if perr := a.restorePIDFile(); perr != nil {
			ue.Err = errorf("%w (then this process's own %w)", ue.Err, perr)
		}
	}
	a.removeBeside()
	a.releaseReadyProcess()
	a.closeState()
	if a.s != nil {
		a.s.close()
	}
	defer a.resume() // even if the hook panics
	if a.stage >= stageHandover {
		e := a.event(EventResumed)
		e.PID, e.Generation = os.Getpid(), u.generation
		_ = u.notifyWithin(e, u.mustStop) // resuming goes on without it
	}
	return ue
}

// restorePIDFile makes the PID file name this process, and removes what the
// successor had no time to remove beside it.
func (a *attempt) restorePIDFile() error {
	path := a.u.opts.PIDFile
	if path == "" {
		return nil
	}
	pidFile{temp: tempPIDFile(path, cmp.Or(a.ownPID, a.pid())), path: path}.discard()
	return a.u.restorePIDFile()
}

// removeBeside removes what a killed successor has left beside the files of
// Unix sockets.
func (a *attempt) removeBeside() {
	if a.child == nil {
		return
	}
	pid := cmp.Or(a.ownPID, a.pid())
	for _, e := range a.handed {
		var st syscall.Stat_t
		if e.path == "" || e.foreign {
			continue
		}
		if beside := besidePath(e.path, pid); lstat(beside, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFSOCK {
			_ = os.Remove(beside)
		}
	}
}

// resume lets this process serve as before.
func (a *attempt) resume() {
	u := a.u
	u.mu.Lock()
	var closed []*entry
	for _, e := range a.handed {
		if e.state == closedInTransit {
			closed = append(closed, e)
		}
		e.state = held
		if a.stage >= stagePaused {
			e.unpause()
		}
	}
	u.life.resume()
	u.mu.Unlock()
	for _, e := range closed {
		e.removeFile()
	}
}

// end tells the successor that it was given up, and ends it. It returns how it
// ended, or nil if that is not known.
func (a *attempt) end(cause error) *os.ProcessState {
	committed := a.stage >= stageCommitted
	err := a.s.abort(cause.Error())
	if a.taker != nil && !committed && err != errAgain {
		a.child.release()
		return nil // it is told, and is not this process's to end
	}
	if hasSaid(cause) || errors.Is(cause, io.ErrUnexpectedEOF) {
		// It is about to exit by itself, with a status that tells more.
		grace := time.Second
		if committed {
			grace = pollInterval
		}
		a.child.exited(grace)
	}
	err = a.kill()
	switch {
	case committed:
		// It may serve at any moment. Only its end lets this process resume.
		a.awaitEnd()
	case err != nil || !a.child.exited(handoverTimeout):
		// It has no COMMIT and will not serve.
		a.u.mu.Lock()
		a.u.zombies = append(a.u.zombies, a.child)
		a.u.mu.Unlock()
		return nil
	}
	return a.child.wait()
}

// awaitEnd returns when the successor has ended.
func (a *attempt) awaitEnd() {
	for !a.ended() {
		if _, err := a.s.read(time.Now().Add(pollInterval)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			a.child.exited(pollInterval)
		}
	}
}

// kill kills the successor: the process that was started and, if it is another
// one, the process that has sent READY. It returns nil if nothing is left to
// kill.
func (a *attempt) kill() error {
	err := a.child.kill()
	switch {
	case a.readyProcess != nil:
		if kerr := a.readyProcess.kill(); kerr != nil {
			err = kerr
		}
	case a.wrapped:
		err = errors.New("the system does not name the process that has sent READY")
	}
	return err
}

func (a *attempt) releaseReadyProcess() {
	if a.readyProcess != nil {
		a.readyProcess.release()
	}
}

// reap reaps the successors that could not be ended when they were given up, as
// far as they have ended since.
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

// A successorError is the reason that a successor has given.
type successorError struct {
	reason           string
	inUse            bool   // the reason is that an address is in use
	network, address string // the address; empty if the successor did not say
}

func (e *successorError) Error() string { return "it says: " + e.reason }

func failReason(f *frame) error {
	return &successorError{f.first("reason"), f.first("inuse") == "1", f.first("network"), f.first("address")}
}

// hasSaid reports whether err is the reason that a successor has given.
func hasSaid(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if _, ok := err.(*successorError); ok {
			return true
		}
	}
	return false
}

// blame adds to the reason of a failed start which sockets of this process were
// in the successor's way.
func (a *attempt) blame(err error) error {
	said, ok := err.(*successorError)
	if ok && !said.inUse || !ok && err != io.ErrUnexpectedEOF {
		return err
	}
	if !ok {
		said = &successorError{}
	}
	list, lerr := a.u.unregistered()
	if lerr != nil {
		return err
	}
	cause := "perhaps because of"
	if said.address != "" {
		cause = "the cause is"
	}
	names, comma := "", ""
	for _, s := range list {
		if !s.autobound() && (said.address == "" || said.meets(&s.wire)) {
			names += comma + s.String()
			comma = ", "
		}
	}
	if names == "" {
		return err
	}
	return errorf("%w; %s what this process has bound and does not hand on: %s", err, cause, names)
}

// meets reports whether a socket can have been in the way of the address that
// a successor has found in use.
func (s *successorError) meets(w *wire) bool {
	_, isUnix := socketType(w.network)
	if isUnix {
		return strings.HasPrefix(s.network, "unix") && w.address == s.address
	}
	host1, port1, err1 := net.SplitHostPort(w.address)
	host2, port2, err2 := net.SplitHostPort(s.address)
	return w.network[:3] == s.network[:min(3, len(s.network))] && err1 == nil && err2 == nil &&
		port1 == port2 && (host1 == host2 || isWildcard(host1) || isWildcard(host2))
}

func isWildcard(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}
