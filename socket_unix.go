//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Calls that answer in one way on all systems, where the system's own do not.

// The system's calls, in whose place a test puts the answers of others.
var (
	systemSend    = syscall.SendmsgN
	systemReceive = syscall.Recvmsg
	systemOption  = syscall.GetsockoptInt
)

// sendmsg sends what the system takes at once. The error is EAGAIN if the
// peer's queue has no room for it, and EPIPE if the peer of a connection has
// gone.
func sendmsg(fd int, b, oob []byte, flags int) (int, error) {
	for {
		n, err := systemSend(fd, b, oob, nil, flags)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EMSGSIZE && shrinkingBuffers && fitsEmptyQueue(fd, b, oob):
			err = syscall.EAGAIN
		case err == syscall.ENOTCONN && lateNotConnected && socketTypeOf(fd) != syscall.SOCK_DGRAM:
			err = syscall.EPIPE
		}
		return n, err
	}
}

// fitsEmptyQueue reports whether a message would fit if the peer had received
// all that was sent to it: what is unread there lowers the size of the
// buffer, but not the block size of the file.
func fitsEmptyQueue(fd int, b, oob []byte) bool {
	size := len(oob)
	if socketTypeOf(fd) != syscall.SOCK_STREAM { // a packet goes as a whole
		size = max(size, len(b))
	}
	var st syscall.Stat_t
	return syscall.Fstat(fd, &st) == nil && int64(size) <= int64(st.Blksize)
}

func socketTypeOf(fd int) int {
	typ, _ := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	return typ
}

// recvmsg receives what is there. Descriptors that come with it are
// close-on-exec; where the system makes them so too late, the fork lock keeps
// the processes that Go starts meanwhile from getting them. The error is
// EMFILE if this process has no room for them.
func recvmsg(fd int, p, oob []byte) (n, oobn, flags int, err error) {
	if marksLate {
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
	}
	for {
		n, oobn, flags, _, err = systemReceive(fd, p, oob, receiveFlags)
		if err != syscall.EINTR {
			break
		}
	}
	if err == syscall.EMSGSIZE { // thus on the BSDs and macOS; Linux does not give it
		err = syscall.EMFILE
	}
	if marksLate && err == nil && oobn > 0 {
		fds, _, _ := parseControl(oob[:oobn])
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
		}
	}
	return n, oobn, flags, err
}

// streamEnded reports whether the peer of a stream has closed it. It takes
// nothing from the stream. NetBSD and DragonFly tell of the end by poll(2)
// only as they tell of input, so that unread data hides it there.
func streamEnded(fd int) bool {
	// macOS tells of a hang-up only if it was asked for.
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLHUP}}
	for {
		_, err := unix.Poll(fds, 0)
		if err != syscall.EINTR {
			break
		}
	}
	switch revents := fds[0].Revents; {
	case revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0:
		return true
	case revents&unix.POLLIN == 0:
		return false
	}
	n, err := peek(fd)
	return n == 0 && err != syscall.EAGAIN
}

// isListening reports whether a socket of connections listens. On macOS and
// DragonFly, where the option cannot be read, the error is
// errors.ErrUnsupported unless the socket is known not to listen.
func isListening(fd int) (bool, error) {
	n, err := systemOption(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err == syscall.ENOPROTOOPT {
		return maybeListening(fd)
	}
	return n != 0, err
}

// maybeListening tells a socket that may listen from a connection, which may
// have lost its peer: what was never connected cannot be read from.
func maybeListening(fd int) (bool, error) {
	if _, err := peek(fd); err != syscall.ENOTCONN && err != syscall.EINVAL { // EINVAL: a Unix socket on Linux
		return false, nil
	}
	return false, errors.ErrUnsupported
}

// peek returns how many bytes, of one, could be read from fd at once.
func peek(fd int) (n int, err error) {
	for {
		n, _, err = syscall.Recvfrom(fd, make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}

// A call on a file ends with EINTR on some file systems, FUSE's among them, when
// Go's runtime sends a signal to its own thread. So these make the call again,
// as package os does.

func rename(from, to string) (err error) {
	for err = syscall.EINTR; err == syscall.EINTR; {
		err = syscall.Rename(from, to)
	}
	return err
}

func chmod(path string, mode os.FileMode) (err error) {
	for err = syscall.EINTR; err == syscall.EINTR; {
		err = syscall.Chmod(path, uint32(mode.Perm()))
	}
	return err
}

func stat(path string, st *syscall.Stat_t) (err error) {
	for err = syscall.EINTR; err == syscall.EINTR; {
		err = syscall.Stat(path, st)
	}
	return err
}

func lstat(path string, st *syscall.Stat_t) (err error) {
	for err = syscall.EINTR; err == syscall.EINTR; {
		err = syscall.Lstat(path, st)
	}
	return err
}
