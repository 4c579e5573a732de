package ecdysis

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	reusePort    = unix.SO_REUSEPORT
	receiveFlags = 0
)

// macOS marks descriptors close-on-exec only after they are made. The fork
// lock keeps the processes that Go starts meanwhile from getting them.

func newSocket(family, typ int) (int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := syscall.Socket(family, typ, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	syscall.CloseOnExec(fd)
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return -1, os.NewSyscallError("setnonblock", err)
	}
	return fd, nil
}

func socketpair(typ int) ([2]int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
	if err != nil {
		return fds, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range fds {
		syscall.CloseOnExec(fd)
		if err := syscall.SetNonblock(fd, true); err != nil {
			closeAll(fds[:])
			return fds, os.NewSyscallError("setnonblock", err)
		}
	}
	return fds, nil
}

func peerCred(fd int) (Cred, error) {
	x, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return Cred{}, err
	}
	pid, err := syscall.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID)
	if err != nil { // ENOTCONN when the peer has closed, and the user is known still
		pid = 0
	}
	return Cred{PID: pid, UID: int(x.Uid)}, nil
}

// The process ID of a message's sender is not to be had.
const senderSpace = 0

func wantSender(int) {}

func nameSender() []byte { return nil }

func senderOf(*unix.SocketControlMessage) int { return 0 }
