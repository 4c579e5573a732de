//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// ListenSeqpacket returns a listener for connections of packets at a Unix
// socket's path, as Listen("unixpacket", path) does: the inherited one or a
// new one. On macOS, which has no such sockets, the error is
// errors.ErrUnsupported. The others are those of ListenWith.
func (u *Upgrader) ListenSeqpacket(path string) (*SeqpacketListener, error) {
	s, err := u.listenOrInherit(ListenConfig{}, kindListener, newListener, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	return &SeqpacketListener{s.(*listener)}, nil
}

// A SeqpacketListener is a listener for Unix connections of packets
// (SOCK_SEQPACKET, see unix(7)). It waits, is handed on and is closed like
// every listener of ListenWith.
type SeqpacketListener struct{ l *listener }

// Accept is AcceptSeqpacket for net.Listener.
func (l *SeqpacketListener) Accept() (net.Conn, error) {
	c, err := l.AcceptSeqpacket()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptSeqpacket returns the next connection. It fails as Accept of ListenWith
// does.
func (l *SeqpacketListener) AcceptSeqpacket() (*SeqpacketConn, error) {
	c, err := l.l.Accept()
	if err != nil {
		return nil, err
	}
	sc, err := newSeqpacketConn(c.(*net.UnixConn))
	if err != nil {
		return nil, l.l.opError("accept", err)
	}
	return sc, nil
}

// Addr returns the address, a *net.UnixAddr.
func (l *SeqpacketListener) Addr() net.Addr { return l.l.Addr() }

// Close withdraws the listener from what is handed on, as Close of ListenWith's
// does.
func (l *SeqpacketListener) Close() error { return l.l.Close() }

// SetDeadline sets the time at which Accept fails with
// os.ErrDeadlineExceeded; the zero time is none.
func (l *SeqpacketListener) SetDeadline(t time.Time) error { return l.l.SetDeadline(t) }

// SyscallConn returns a raw connection, for its Control.
func (l *SeqpacketListener) SyscallConn() (syscall.RawConn, error) { return l.l.SyscallConn() }

// A SeqpacketConn is a Unix connection of packets: each Send at one end is one
// Recv at the other. It is a net.Conn whose Read and Write are Recv and Send.
//
// Its methods may be called from several goroutines at once. Deadlines and
// Close end a call that blocks. Errors are a *net.OpError, save for io.EOF.
type SeqpacketConn struct {
	c   *net.UnixConn
	raw syscall.RawConn

	// A call of Recv holds rmu, one of Send wmu, also while it blocks: what
	// wakes it is the end of the call into raw, by Close or a deadline. The
	// fields and functions are here, and not made for each call, so that a
	// packet costs no memory.
	rmu  sync.Mutex
	in   packetIn
	recv func(fd uintptr) bool

	wmu  sync.Mutex
	out  packetOut
	send func(fd uintptr) bool
}

// A packetOut is a packet on its way out, or what is left of it.
type packetOut struct {
	b   []byte
	n   int // bytes of it that were sent
	err error
}

// newSeqpacketConn takes c over.
func newSeqpacketConn(c *net.UnixConn) (*SeqpacketConn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		c.Close()
		return nil, err
	}
	sc := &SeqpacketConn{c: c, raw: raw}
	sc.recv = func(fd uintptr) bool { return sc.in.receive(int(fd)) }
	sc.send = func(fd uintptr) bool { return sc.out.transmit(int(fd)) }
	return sc, nil
}

// Recv receives one packet into b and returns its length. A packet longer than
// b fills b, what does not fit is lost, and the error is EMSGSIZE and says so.
// At the end, when the peer has closed its side and every packet was received,
// Recv returns io.EOF, whether or not the peer has received all that was sent
// to it. If b is empty, Recv returns at once and takes nothing. Descriptors that
// come with a packet are closed; NetBSD does that when some Unix socket is
// closed. See [ReadFiles].
//
// A packet without a byte is received as such. On Linux it is the end if the
// peer has closed its side and no packet follows. On the other systems it is
// the end if its sender has not marked it as a packet (MSG_EOR), and NetBSD and
// DragonFly deliver it when the next one comes.
func (c *SeqpacketConn) Recv(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.rmu.Lock()
	defer c.rmu.Unlock()
	c.in.begin(b)
	err = c.raw.Read(c.recv)
	n, perr := c.in.end()
	if err == nil {
		err = perr
	}
	if err != nil && err != io.EOF {
		err = c.opError("read", err)
	}
	return n, err
}

// Send sends b as one packet, whole or, with an error, not at all: EMSGSIZE if
// it is longer than the system takes, EPIPE if the peer has closed or, once,
// ECONNRESET if it has closed with packets unread (Linux alone). It blocks
// while the peer's queue is full. An empty b is an error, for the peer could
// not tell it from the end.
//
// On FreeBSD a packet longer than the socket's buffer goes in pieces, and an
// error may come after the first.
func (c *SeqpacketConn) Send(b []byte) error {
	_, err := c.Write(b)
	return err
}

// Read is Recv.
func (c *SeqpacketConn) Read(b []byte) (int, error) { return c.Recv(b) }

// Write is Send. It returns len(b) if the packet was sent.
func (c *SeqpacketConn) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, c.opError("write", errEmptyPacket)
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.out = packetOut{b: b}
	err := c.raw.Write(c.send)
	n := c.out.n
	if err == nil {
		err = c.out.err
	}
	c.out = packetOut{}
	if err != nil {
		return n, c.opError("write", err)
	}
	return n, nil
}

var errEmptyPacket = errors.New("an empty packet cannot be told from the end of the connection; want at least one byte")

// tooLong is the error for a packet that was longer than a buffer of n bytes.
func tooLong(n int) error {
	return errorf("%w: the packet is longer than the buffer of %d bytes, and its rest is lost", os.NewSyscallError("recvmsg", syscall.EMSGSIZE), n)
}

func (c *SeqpacketConn) opError(op string, err error) error {
	if oe, ok := err.(*net.OpError); ok { // of raw, under another name
		err = oe.Err
	}
	return &net.OpError{Op: op, Net: "unixpacket", Source: c.c.LocalAddr(), Addr: c.c.RemoteAddr(), Err: err}
}

// Close closes the connection. What was sent is still received by the peer.
func (c *SeqpacketConn) Close() error { return c.c.Close() }

// CloseRead shuts down the reading side: Recv returns what has come before, then
// io.EOF. On Linux, and on FreeBSD from 15 on, the peer's Send fails with EPIPE.
// On the other systems it succeeds, and Recv returns what it has sent.
func (c *SeqpacketConn) CloseRead() error { return c.c.CloseRead() }

// CloseWrite shuts down the writing side: the peer's Recv returns io.EOF when
// it has received every packet.
func (c *SeqpacketConn) CloseWrite() error { return c.c.CloseWrite() }

// LocalAddr returns this end's address, a *net.UnixAddr.
func (c *SeqpacketConn) LocalAddr() net.Addr { return c.c.LocalAddr() }

// RemoteAddr returns the peer's address, a *net.UnixAddr, as net has it: of a
// peer that is not bound its name is "@" on Linux, and empty elsewhere.
func (c *SeqpacketConn) RemoteAddr() net.Addr { return c.c.RemoteAddr() }

// SetDeadline sets the time at which Recv and Send fail with
// os.ErrDeadlineExceeded; the zero time is none.
func (c *SeqpacketConn) SetDeadline(t time.Time) error { return c.c.SetDeadline(t) }

// SetReadDeadline sets the time at which Recv fails.
func (c *SeqpacketConn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// SetWriteDeadline sets the time at which Send fails.
func (c *SeqpacketConn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }

// SyscallConn returns a raw connection, for [ReadFiles], [WriteFiles],
// [PeerCred] and [Upgrader.AddConn].
func (c *SeqpacketConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

var (
	_ net.Listener = (*SeqpacketListener)(nil)
	_ net.Conn     = (*SeqpacketConn)(nil)
	_ syscall.Conn = (*SeqpacketConn)(nil)
)
