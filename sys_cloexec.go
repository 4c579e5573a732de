//go:build dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"

	"golang.org/x/sys/unix"
)

// These systems make descriptors close-on-exec from birth; macOS does not.

var receiveFlags = unix.MSG_CMSG_CLOEXEC // a variable so that a test can take another system's part

func newSocket(family, typ int) (int, error) {
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	return fd, os.NewSyscallError("socket", err)
}

func socketpair(typ int) ([2]int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	return fds, os.NewSyscallError("socketpair", err)
}
