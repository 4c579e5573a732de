//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package ecdysis

import (
	"errors"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Variables, so that a test can take another system's part.
var (
	// OpenBSD and DragonFly have no socket for both versions of IP.
	dualStack   = runtime.GOOS != "openbsd" && runtime.GOOS != "dragonfly"
	maxBatchFDs = batchFDs()
	// macOS has no flag for descriptors that are close-on-exec when they are
	// received, and FreeBSD 11 and 12 ignore it.
	marksLate = runtime.GOOS == "darwin" || runtime.GOOS == "freebsd"
	// NetBSD (packets, descriptors) and macOS (descriptors) lower the size of
	// a buffer by what the peer has not read, so that what has no room yet
	// seems to be too long.
	shrinkingBuffers = runtime.GOOS == "netbsd" || runtime.GOOS == "darwin"
	// FreeBSD up to 14 gives ENOTCONN while the peer is just closing.
	lateNotConnected = runtime.GOOS == "freebsd"
	// NetBSD and DragonFly drop descriptors that their receiver has no room
	// for, and the data that they came with.
	dropsDescriptors = true
)

// batchFDs is how many descriptors go in one message: DragonFly takes 42,
// OpenBSD 127, the others 254 or more.
func batchFDs() int {
	if runtime.GOOS == "dragonfly" {
		return 40
	}
	return 100
}

const maxUnixPath = 103

// dup3 makes the descriptor to refer to what from refers to, close-on-exec.
// Not every one of these systems has dup3(2). So the fork lock keeps the
// processes that Go starts meanwhile from getting it.
func dup3(from, to int) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	err := unix.Dup2(from, to)
	if err == nil {
		syscall.CloseOnExec(to)
	}
	return err
}

// findDoubtful sets Revents of all descriptors, because poll(2) does not tell a
// socket that listens from others on each of these systems.
func findDoubtful(list []unix.PollFd) {
	for i := range list {
		list[i].Revents = unix.POLLOUT
	}
}

// keepReserve makes a stream's buffer large enough for the first batch, and
// leaves room for useReserve to let an ABORT through.
func keepReserve(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 64<<10)
}

func useReserve(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 128<<10)
}

// A watch tells when a process exits, by kqueue(2), or by wait4(2) where the
// system refuses that and the process is a child.
type watch struct {
	kq   int
	own  int  // the child that wait4 is asked for; 0: none
	gone bool // it has exited

	refused bool // the system refuses, and the process is no child
}

func (w *watch) prepare(attr *syscall.ProcAttr, sibling bool) error {
	w.kq = -1
	if sibling {
		return errorf("Command.Sibling: %w", errors.ErrUnsupported)
	}
	return nil
}

// standsForOthers reports false: these systems have no user namespaces.
func standsForOthers(int) bool { return false }

// networkOfSocket returns 0: it is not known, or there is one network alone.
func networkOfSocket(int) uint64 { return 0 }

// without reports whether there was anything in attr that a sandbox may refuse.
func (w *watch) without(*syscall.ProcAttr) bool { return false }

// statExecutable tells which file this process runs.
func statExecutable(exe string, st *syscall.Stat_t) error { return stat(exe, st) }

// begin begins to watch a child.
func (w *watch) begin(pid int) {
	if !w.register(pid) {
		w.own = pid
	}
}

// find begins to watch a process that is not a child.
func (w *watch) find(pid int) { w.refused = !w.register(pid) }

func (w *watch) register(pid int) bool {
	w.kq = -1
	kq, err := unix.Kqueue()
	if err != nil {
		return false
	}
	syscall.CloseOnExec(kq)
	var ev unix.Kevent_t
	unix.SetKevent(&ev, pid, unix.EVFILT_PROC, unix.EV_ADD|unix.EV_ONESHOT)
	ev.Fflags = unix.NOTE_EXIT
	if _, err = systemKevent(kq, []unix.Kevent_t{ev}, nil, nil); err == nil {
		w.kq = kq
		return true
	}
	syscall.Close(kq)
	w.gone = err == syscall.ESRCH
	return w.gone
}

// systemKevent is kevent(2). A test puts another answer in its place.
var systemKevent = unix.Kevent

// exited waits at most d for the process to exit, and reports whether it has.
func (w *watch) exited(d time.Duration) bool {
	for end := time.Now().Add(d); !w.gone; d = max(0, time.Until(end)) {
		switch {
		case w.kq >= 0:
			ts := unix.NsecToTimespec(int64(d))
			n, err := unix.Kevent(w.kq, nil, make([]unix.Kevent_t, 1), &ts)
			if err == syscall.EINTR {
				continue
			}
			w.gone = n > 0
			return w.gone
		case w.own != 0:
			// It is reaped by this: its status is lost, because not all of
			// these systems can look at a child and leave it. ECHILD: another
			// part of the program has reaped it.
			pid, err := unix.Wait4(w.own, nil, unix.WNOHANG, nil)
			if w.gone = pid == w.own || err == syscall.ECHILD; w.gone {
				continue
			}
			time.Sleep(min(d, 5*time.Millisecond))
		default:
			time.Sleep(d)
		}
		if d == 0 {
			break
		}
	}
	return w.gone
}

// kill does nothing if the process was reaped, so that its number may be
// another's. Otherwise it leaves it to the caller, whose own child the process
// is.
func (w *watch) kill() (done bool, err error) { return w.gone && w.own != 0, nil }

func (w *watch) close() {
	if w.kq >= 0 {
		syscall.Close(w.kq)
		w.kq = -1
	}
}

// memfd says that there is no memory that could be handed on like a file.
func memfd() (*os.File, error) { return nil, errors.ErrUnsupported }
