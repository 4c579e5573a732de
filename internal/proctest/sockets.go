package proctest

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// This file has both ends of a connection, for tests in one process.

// AcceptSeqpacket returns both ends of a connection of packets. The first is the end
// that Ours has accepted. The second is the client's end, which is bound to local if
// that is not empty. It skips the test on systems without such sockets.
func AcceptSeqpacket(t testing.TB, local string) (*ecdysis.SeqpacketConn, *net.UnixConn) {
	t.Helper()
	SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
	ln, err := Ours(t).ListenSeqpacket(filepath.Join(ShortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var laddr *net.UnixAddr
	if local != "" {
		laddr = &net.UnixAddr{Name: local, Net: "unixpacket"}
	}
	far, err := net.DialUnix("unixpacket", laddr, ln.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	c, err := ln.AcceptSeqpacket()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, far
}

// SeqpacketPair is AcceptSeqpacket, but the client's end is also a SeqpacketConn of
// package ecdysis. It is added by AddConn and returned by Conn.
func SeqpacketPair(t testing.TB) (near, far *ecdysis.SeqpacketConn) {
	t.Helper()
	u := Ours(t)
	near, c := AcceptSeqpacket(t, "")
	name := fmt.Sprintf("%s %p", t.Name(), c)
	if err := u.AddConn(name, c); err != nil {
		t.Fatal(err)
	}
	c.Close()
	nc, err := u.Conn(name)
	if err != nil {
		t.Fatal(err)
	}
	far, ok := nc.(*ecdysis.SeqpacketConn)
	if !ok {
		t.Fatalf("Conn returns a %T; want a *SeqpacketConn", nc)
	}
	t.Cleanup(func() { far.Close() })
	return near, far
}

// SocketPair returns a pair of Unix sockets of this type, as connections of package
// net. They are closed at the end of the test.
func SocketPair(t testing.TB, typ int) (a, b *net.UnixConn) {
	t.Helper()
	a, b, err := NewSocketPair(typ)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// NewSocketPair is SocketPair outside of a test.
func NewSocketPair(typ int) (a, b *net.UnixConn, err error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1], nil
}
