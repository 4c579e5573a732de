//go:build !unix

package httpdrain

import "net"

// hasUnread returns false, because package syscall cannot peek at a connection
// on these systems. A request that arrives just before its connection's grace is
// over may be lost.
func hasUnread(net.Conn) bool { return false }
