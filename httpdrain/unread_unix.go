//go:build unix

package httpdrain

import (
	"net"
	"syscall"
)

// hasUnread reports whether bytes have arrived on nc that were not read yet, as
// far as the system shows it (MSG_PEEK, see recv(2)).
func hasUnread(nc net.Conn) bool {
	for {
		inner, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		nc = inner.NetConn()
	}
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	_ = raw.Control(func(fd uintptr) {
		n, _, _ = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK)
	})
	return n > 0
}
