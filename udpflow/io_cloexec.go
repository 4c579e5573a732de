//go:build dragonfly || freebsd || netbsd || openbsd

package udpflow

import (
	"os"

	"golang.org/x/sys/unix"
)

func datagramPair() ([2]int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	return fds, os.NewSyscallError("socketpair", err)
}
