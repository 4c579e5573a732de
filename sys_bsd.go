//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package ecdysis

import (
	"errors"
	"fmt"
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
	oneBatchUnread = true
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

// keepReserve makes a stream's buffer large enough for the first batch, and
// leaves room for useReserve to let an ABORT through.
func keepReserve(fd int) {
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10)
}

func useReserve(fd int) {
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 128<<10)
}

// The process ID of a message's sender is not to be had.
const senderSpace = 0

func wantSender(int) {}

func senderOf(*unix.SocketControlMessage) int { return 0 }

// A watch tells when a process exits, by kqueue(2).
type watch struct {
	kq   int
	gone bool
}

func (w *watch) prepare(attr *syscall.ProcAttr, sibling bool) error {
	w.kq = -1
	if sibling {
		return fmt.Errorf("Command.Sibling: %w", errors.ErrUnsupported)
	}
	return nil
}

func (w *watch) begin(pid int) {
	kq, err := unix.Kqueue()
	if err != nil {
		return // exited then never reports true: the stream and the time limit remain
	}
	unix.CloseOnExec(kq)
	w.kq = kq
	var ev unix.Kevent_t
	unix.SetKevent(&ev, pid, unix.EVFILT_PROC, unix.EV_ADD|unix.EV_ONESHOT)
	ev.Fflags = unix.NOTE_EXIT
	if _, err := unix.Kevent(kq, []unix.Kevent_t{ev}, nil, nil); err == unix.ESRCH {
		w.gone = true
	}
}

// find begins to watch a process that is not a child.
func (w *watch) find(pid int) {
	w.kq = -1
	w.begin(pid)
}

// exited waits at most d for the process to exit, and reports whether it has.
func (w *watch) exited(d time.Duration) bool {
	if w.gone || w.kq < 0 {
		if !w.gone {
			time.Sleep(d)
		}
		return w.gone
	}
	for end := time.Now().Add(d); ; d = max(0, time.Until(end)) {
		ts := unix.NsecToTimespec(int64(d))
		n, err := unix.Kevent(w.kq, nil, make([]unix.Kevent_t, 1), &ts)
		if err != unix.EINTR {
			w.gone = n > 0
			return w.gone
		}
	}
}

// kill leaves it to the caller, whose own child the process is.
func (w *watch) kill() (done bool, err error) { return false, nil }

func (w *watch) close() {
	if w.kq >= 0 {
		unix.Close(w.kq)
		w.kq = -1
	}
}

// memfd says that there is no memory that could be handed on like a file.
func memfd() (*os.File, error) { return nil, errors.ErrUnsupported }
