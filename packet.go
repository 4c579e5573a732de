//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

// ListenPacket is ListenPacketWith with the zero ListenConfig.
func (u *Upgrader) ListenPacket(network, address string) (net.PacketConn, error) {
	return u.ListenPacketWith(ListenConfig{}, network, address)
}

// ListenPacketWith returns a socket for packets that is bound to the address:
// the inherited one if the older process hands it on, found as ListenWith
// finds a listener, otherwise a new one. It is a *UDPConn for the networks
// "udp", "udp4" and "udp6", and a *UnixgramConn for "unixgram". Addresses are
// as for net.ListenPacket, save that one of a group is bound as it stands: to
// share its port with others is for ListenConfig.Control. A Unix socket's
// file is replaced if no process reads from it any more.
//
// Reading waits until Ready has succeeded, and while an upgrade is being
// handed over, so that each packet is read by one process. Writing never waits.
// When this process is stopped or replaced, reading waits until the caller
// closes the socket, or the caller's deadline passes. The socket stays open for
// the answers that are still to be written.
//
// A protocol that keeps sessions in memory, such as QUIC or DTLS, loses them in an
// upgrade, because the successor gets their packets. Package udpflow forwards
// these to the process that has the session.
//
// Close withdraws the socket from what is handed on, and removes its file, as
// Close of a listener does. The errors are those of ListenWith.
func (u *Upgrader) ListenPacketWith(lc ListenConfig, network, address string) (net.PacketConn, error) {
	open := newPacketConn
	if lc.Raw {
		open = newRawUDP
	}
	s, err := u.listenOrInherit(lc, kindPacket, open, network, address)
	if err != nil {
		return nil, err
	}
	if r, ok := s.(rawUDP); ok {
		return r.UDPConn, nil
	}
	return s.(*packetConn).public(), nil
}

// A rawUDP is a socket that is handed on and never paused. It is the caller's
// to close, also at the end.
type rawUDP struct{ *net.UDPConn }

func (rawUDP) pause()   {}
func (rawUDP) unpause() {}
func (rawUDP) detach()  {}

// newRawUDP makes e a socket of net's own. With an error the descriptor is
// closed.
func newRawUDP(_ *Upgrader, e *entry) error {
	c, err := fileConn(e.moveOut())
	if err != nil {
		return err
	}
	udp, ok := c.(*net.UDPConn)
	if !ok {
		err = net.UnknownNetworkError(c.LocalAddr().Network())
	} else {
		err = e.checkFound(c.LocalAddr())
	}
	if err != nil {
		c.Close()
		return err
	}
	raw, err := udp.SyscallConn()
	if err != nil {
		c.Close()
		return err
	}
	e.raw, e.sock = raw, rawUDP{udp}
	return nil
}

// netPacketConn is what *net.UDPConn and *net.UnixConn have in common.
type netPacketConn interface {
	net.Conn
	net.PacketConn
	syscall.Conn
}

// A packetConn is a socket for packets whose read side can be paused and
// unpaused.
type packetConn struct {
	gate
	c netPacketConn
}

// newPacketConn makes e a packetConn, which takes the descriptor over. With an
// error the descriptor is closed. The read side is paused.
func newPacketConn(u *Upgrader, e *entry) error {
	var c net.PacketConn
	err := u.lend(e, func(f *os.File) (err error) {
		c, err = net.FilePacketConn(f) // makes a copy of its own
		return err
	})
	if err != nil {
		return err
	}
	pc, ok := c.(netPacketConn)
	if !ok {
		err = net.UnknownNetworkError(c.LocalAddr().Network())
	} else {
		err = e.checkFound(c.LocalAddr())
	}
	if err != nil {
		c.Close()
		return err
	}
	raw, err := pc.SyscallConn()
	if err != nil {
		c.Close()
		return err
	}
	p := &packetConn{gate: gate{u: u, e: e, raw: raw}, c: pc}
	p.side = p
	p.epoch.Store(1)
	e.raw, e.sock = raw, p
	return nil
}

// public returns p as its callers know it.
func (p *packetConn) public() net.PacketConn {
	if c, ok := p.c.(*net.UDPConn); ok {
		return &UDPConn{c, p}
	}
	return &UnixgramConn{p.c.(*net.UnixConn), p}
}

func (p *packetConn) setSocketDeadline(t time.Time) error { return p.c.SetReadDeadline(t) }

// barrier reads, and takes nothing because the deadline has passed. The call
// gets the read lock after every read in flight.
func (p *packetConn) barrier() { _ = p.raw.Read(func(uintptr) bool { return true }) }

// detach ends reading. The socket stays open for the caller's answers.
func (p *packetConn) detach() { p.detachGate() }

// read makes a call that reads.
func (p *packetConn) read(f func() error) error {
	err := p.pass(f)
	if err == net.ErrClosed || err == os.ErrDeadlineExceeded { // the gate's own
		err = p.opError("read", err)
	}
	return err
}

func (p *packetConn) opError(op string, err error) error {
	a := p.c.LocalAddr()
	return &net.OpError{Op: op, Net: a.Network(), Source: a, Err: err}
}

func (p *packetConn) setReadDeadline(t time.Time) error {
	err := p.setDeadline(t)
	if err == net.ErrClosed {
		return p.opError("set", err)
	}
	return err
}

func (p *packetConn) setBothDeadlines(t time.Time) error {
	if err := p.c.SetWriteDeadline(t); err != nil {
		return err
	}
	return p.setReadDeadline(t)
}

func (p *packetConn) closeAll() error {
	if _, err := p.close(); err != nil {
		return p.opError("close", err)
	}
	return p.c.Close()
}

func (p *packetConn) readOnly(b []byte) (n int, err error) {
	err = p.read(func() (err error) { n, err = p.c.Read(b); return err })
	return n, err
}

func (p *packetConn) readFrom(b []byte) (n int, a net.Addr, err error) {
	err = p.read(func() (err error) { n, a, err = p.c.ReadFrom(b); return err })
	return n, a, err
}

// A packetRaw is the RawConn of a packetConn: what others read through it, as
// golang.org/x/net does, waits like any other read.
type packetRaw struct {
	syscall.RawConn
	p *packetConn
}

func (r packetRaw) Read(f func(fd uintptr) bool) error {
	return r.p.read(func() error { return r.RawConn.Read(f) })
}

// A UDPConn is a *net.UDPConn whose reading waits until Ready has succeeded
// and while an upgrade is being handed over. It is a net.Conn and a
// net.PacketConn with all the methods of the embedded one, and a program that
// reads through its SyscallConn waits as well.
//
// Code that insists on a *net.UDPConn gets one by ListenConfig.Raw. The embedded
// one is not for reading: its reads fail when an upgrade is handed over, and a
// deadline that is set on it makes a handover fail.
type UDPConn struct {
	*net.UDPConn
	p *packetConn
}

// Read is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) Read(b []byte) (int, error) { return c.p.readOnly(b) }

// ReadFrom is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) ReadFrom(b []byte) (int, net.Addr, error) { return c.p.readFrom(b) }

// ReadFromUDP is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) ReadFromUDP(b []byte) (n int, a *net.UDPAddr, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UDPConn.ReadFromUDP(b); return err })
	return n, a, err
}

// ReadFromUDPAddrPort is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) ReadFromUDPAddrPort(b []byte) (n int, a netip.AddrPort, err error) {
	if epoch := c.p.epoch.Load(); epoch%2 == 0 { // what read does, without the cost of a function value
		if n, a, err = c.UDPConn.ReadFromUDPAddrPort(b); !c.p.interrupted(epoch, err) {
			return n, a, err
		}
	}
	return c.readAddrPort(b)
}

// readAddrPort is ReadFromUDPAddrPort for a read that has to wait. The function
// value shares the results, so that they are allocated. It stands apart so that
// reads that need not wait do not pay for that.
func (c *UDPConn) readAddrPort(b []byte) (n int, a netip.AddrPort, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UDPConn.ReadFromUDPAddrPort(b); return err })
	return n, a, err
}

// ReadMsgUDP is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) ReadMsgUDP(b, oob []byte) (n, oobn, flags int, a *net.UDPAddr, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UDPConn.ReadMsgUDP(b, oob); return err })
	return n, oobn, flags, a, err
}

// ReadMsgUDPAddrPort is as of the embedded UDPConn, and waits as said there.
func (c *UDPConn) ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, a netip.AddrPort, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UDPConn.ReadMsgUDPAddrPort(b, oob); return err })
	return n, oobn, flags, a, err
}

// SetDeadline sets the time at which reading and writing fail with
// os.ErrDeadlineExceeded; the zero time is none.
func (c *UDPConn) SetDeadline(t time.Time) error { return c.p.setBothDeadlines(t) }

// SetReadDeadline sets the time at which reading fails with
// os.ErrDeadlineExceeded; the zero time is none.
func (c *UDPConn) SetReadDeadline(t time.Time) error { return c.p.setReadDeadline(t) }

// SyscallConn returns a raw connection whose Read waits like c's. A handover
// waits until the function given to that Read has returned, so that the
// successor reads nothing before the function has dealt with what it has
// received. The function must not block, because no process reads meanwhile.
func (c *UDPConn) SyscallConn() (syscall.RawConn, error) { return packetRaw{c.p.raw, c.p}, nil }

// Close makes reading fail with net.ErrClosed, withdraws the socket from what
// is handed on, and closes it here.
func (c *UDPConn) Close() error { return c.p.closeAll() }

// A UnixgramConn is a *net.UnixConn for datagrams whose reading waits until
// Ready has succeeded and while an upgrade is being handed over. The methods
// of the embedded one do not wait, and its CloseRead and CloseWrite shut the
// socket down for every process that has it.
type UnixgramConn struct {
	*net.UnixConn
	p *packetConn
}

// Read is as of the embedded UnixConn, and waits as said there.
func (c *UnixgramConn) Read(b []byte) (int, error) { return c.p.readOnly(b) }

// ReadFrom is as of the embedded UnixConn, and waits as said there.
func (c *UnixgramConn) ReadFrom(b []byte) (int, net.Addr, error) { return c.p.readFrom(b) }

// ReadFromUnix is as of the embedded UnixConn, and waits as said there.
func (c *UnixgramConn) ReadFromUnix(b []byte) (n int, a *net.UnixAddr, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UnixConn.ReadFromUnix(b); return err })
	return n, a, err
}

// ReadMsgUnix is as of the embedded UnixConn, and waits as said there.
func (c *UnixgramConn) ReadMsgUnix(b, oob []byte) (n, oobn, flags int, a *net.UnixAddr, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UnixConn.ReadMsgUnix(b, oob); return err })
	return n, oobn, flags, a, err
}

// SetDeadline sets the time at which reading and writing fail with
// os.ErrDeadlineExceeded; the zero time is none.
func (c *UnixgramConn) SetDeadline(t time.Time) error { return c.p.setBothDeadlines(t) }

// SetReadDeadline sets the time at which reading fails with
// os.ErrDeadlineExceeded; the zero time is none.
func (c *UnixgramConn) SetReadDeadline(t time.Time) error { return c.p.setReadDeadline(t) }

// SyscallConn returns a raw connection whose Read waits like c's.
func (c *UnixgramConn) SyscallConn() (syscall.RawConn, error) { return packetRaw{c.p.raw, c.p}, nil }

// Close makes reading fail with net.ErrClosed, withdraws the socket from what
// is handed on, removes its file if this process owns it, and closes it here.
func (c *UnixgramConn) Close() error { return c.p.closeAll() }

var (
	_ net.Conn       = (*UDPConn)(nil)
	_ net.PacketConn = (*UDPConn)(nil)
	_ syscall.Conn   = (*UDPConn)(nil)
	_ net.Conn       = (*UnixgramConn)(nil)
	_ net.PacketConn = (*UnixgramConn)(nil)
	_ syscall.Conn   = (*UnixgramConn)(nil)
)
