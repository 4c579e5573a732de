//go:build dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
	"syscall"
)

// These systems make descriptors close-on-exec from birth; macOS does not.

var receiveFlags = syscall.MSG_CMSG_CLOEXEC // a variable so that a test can take another system's part

func newSocket(family, typ int) (int, error) {
	fd, err := syscall.Socket(family, typ|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	return fd, os.NewSyscallError("socket", err)
}

func socketpair(typ int) ([2]int, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	return fds, os.NewSyscallError("socketpair", err)
}
