package udpflow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
)

// A Conn is a UDP socket whose flows stay with the processes in which they began.
// [ListenPacket] makes it.
//
// The read methods wait until Ready has succeeded. In the newest process they
// return the packets of this process's flows, and forward packets of older
// processes' flows. When this process has been replaced, they return the packets
// that newer processes forward to it, until Close. A read deadline applies
// throughout.
//
// The write methods write to the socket at any time. If Config.Key is nil, a
// packet that is written to a flow's address keeps the flow from expiring.
//
// The embedded UDPConn must not be used to read, because it would take packets of
// older processes. The same is true of the file that File returns.
type Conn struct {
	*ecdysis.UDPConn
	config    Config
	g         *group
	self      *peer
	raw       syscall.RawConn // of the socket; its Read is paused like the core's reads
	inbox     *os.File        // packets from newer processes
	inboxRaw  syscall.RawConn
	idle      uint64 // Config.IdleTimeout in milliseconds
	byAddress bool   // a flow is a remote address
	stash     stash
	done      chan struct{} // closed by Close

	source    atomic.Uint32 // fromSocket, fromInbox or fromBoth
	named     atomic.Uint64 // the time at which a packet last named this generation
	own       atomic.Uint64
	forwarded atomic.Uint64
	dropped   atomic.Uint64
	received  atomic.Uint64
	takenOver atomic.Uint64
	untracked atomic.Uint64
	mu        sync.Mutex // guards the fields below, and the deadlines of socket and inbox
	deadline  time.Time
	closed    bool
}

// What a Conn reads.
const (
	fromSocket = iota // this process is the newest, as far as it knows
	fromInbox         // a successor has the socket
	fromBoth          // the successor has ended; first the inbox is emptied, then the socket read
)

func newConn(u *ecdysis.Upgrader, core *ecdysis.UDPConn, config Config) (*Conn, error) {
	c := &Conn{UDPConn: core, config: config, idle: uint64((config.IdleTimeout + time.Millisecond - 1) / time.Millisecond), done: make(chan struct{})}
	c.byAddress = config.Key == nil && config.Generation == nil
	var err error
	if c.raw, err = core.SyscallConn(); err != nil {
		return nil, err
	}
	if c.g, err = findGroup(u, core.LocalAddr().String(), config); err != nil {
		return nil, err
	}
	if err := c.g.join(c, config.Buffer); err != nil {
		c.g.endUnused()
		return nil, err
	}
	return c, nil
}

// read waits until r has at least one packet.
func (c *Conn) read(r *reader) error {
	r.c = c
	for {
		if c.stash.have.Load() {
			if c.stash.pop(r); r.n > 0 {
				return nil
			}
		}
		var err error
		source := c.source.Load()
		switch {
		case source != fromSocket:
			err = c.inboxRaw.Read(r.stashFromInbox)
		case len(r.msgs) == 1:
			err = c.raw.Read(r.stashFromSocket)
		default:
			err = c.raw.Read(r.fromSocket)
		}
		switch {
		case err == nil && r.err != nil:
			return c.opError("read", r.err)
		case err == nil && r.n > 0:
			return nil
		case err == nil:
			if source == fromBoth && r.empty {
				c.source.CompareAndSwap(fromBoth, fromSocket)
			}
		case c.isClosed():
			return c.opError("read", net.ErrClosed)
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return c.opError("read", err)
		case c.expired():
			return c.opError("read", os.ErrDeadlineExceeded)
		}
	}
}

func (c *Conn) opError(op string, err error) error {
	if e, ok := err.(*net.OpError); ok {
		err = e.Err
	}
	return &net.OpError{Op: op, Net: "udp", Source: c.LocalAddr(), Err: err}
}

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// expired reports whether the caller's deadline has passed. Otherwise a read that
// has timed out was woken by the package.
func (c *Conn) expired() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.deadline.IsZero() && !time.Now().Before(c.deadline)
}

var past = time.Unix(1, 0)

// handOver makes the readers read from the inbox. The deadline wakes those that
// wait in the core.
func (c *Conn) handOver() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	_ = c.inbox.SetReadDeadline(c.deadline) // like the calls below, fails only if the file is closed
	c.source.Store(fromInbox)
	_ = c.UDPConn.SetReadDeadline(past)
}

// resume makes the readers read from the socket again, after the packets that the
// successor has sent to the inbox. It returns when no reader waits for the inbox.
func (c *Conn) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	_ = c.UDPConn.SetReadDeadline(c.deadline)
	c.source.Store(fromBoth)
	_ = c.inbox.SetReadDeadline(past)
	_ = c.inboxRaw.Read(func(uintptr) bool { return true }) // begins when each read that waits has ended
	_ = c.inbox.SetReadDeadline(time.Time{})
}

// SetDeadline sets the time after which reads and writes fail with
// os.ErrDeadlineExceeded. The zero time means no deadline.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetWriteDeadline(t); err != nil {
		return err
	}
	return c.SetReadDeadline(t)
}

// SetReadDeadline sets the time after which reads fail with
// os.ErrDeadlineExceeded. The zero time means no deadline.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	c.deadline = t
	if c.source.Load() == fromInbox {
		return c.inbox.SetReadDeadline(t)
	}
	return c.UDPConn.SetReadDeadline(t)
}

// Close makes reads fail with net.ErrClosed and closes this process's copy of the
// socket. In the newest process it also withdraws the socket and its flows from
// what is handed on. In an older process it leaves the remaining flows to the
// newest process.
func (c *Conn) Close() error {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return c.opError("close", net.ErrClosed)
	}
	close(c.done)
	err := c.UDPConn.Close() // waits for running reads
	if ierr := c.inbox.Close(); err == nil {
		err = ierr
	}
	process.mu.Lock()
	defer process.mu.Unlock()
	c.g.leave(c)
	return err
}

// SyscallConn returns the raw connection of the socket, for setting options and
// for writing. Its Read fails with an error that wraps errors.ErrUnsupported,
// because packets that a function reads by itself cannot be sorted by their
// flows. Use a [BatchConn] to read several packets by one call, as
// golang.org/x/net's ReadBatch does.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return rawConn{c.raw, c}, nil }

type rawConn struct {
	syscall.RawConn
	c *Conn
}

func (r rawConn) Read(func(uintptr) bool) error {
	return r.c.opError("read", fmt.Errorf("by SyscallConn, which would take the packets of older processes; use a udpflow.BatchConn: %w", errors.ErrUnsupported))
}

// Claim makes the flow of a key this process's flow, before its first packet or
// while another process has it. A program calls it when it begins a flow itself,
// or when it gives a client another key. If Config.Key is nil, a key is what
// MarshalBinary returns for the address. A claim that a successor makes before it
// is ready is lost if a packet of the flow comes before the successor is ready.
func (c *Conn) Claim(key []byte) {
	c.g.life.RLock()
	defer c.g.life.RUnlock()
	t := c.g.table
	if t == nil {
		return
	}
	now := c.g.clock.now()
	if !t.claim(t.hash(key), c.self.owner, now, c.expiry(now)) {
		c.untracked.Add(1)
	}
}

// expiry returns the time at which a flow ends if its last packet has come now.
// The time is an eighth longer than promised, so that the slot of a busy flow is
// not written for each packet.
func (c *Conn) expiry(now uint64) uint64 { return now + c.idle + c.idle/8 + 1 }

// refresh keeps a flow from expiring. Its packet has come at the time now.
func (c *Conn) refresh(s *slot, state, now uint64) {
	if expiryOf(state) <= now+c.idle {
		s.refresh(state, c.expiry(now))
	}
}

// Drained waits until this process has no live flow, and returns nil. If ctx is
// done first, it returns an error that wraps ctx's cause. After Close it returns
// an error that wraps net.ErrClosed. All packets for which Config.Generation has
// named this process count as one flow, which ends Config.IdleTimeout after its
// last packet.
func (c *Conn) Drained(ctx context.Context) error {
	for {
		wait, err := c.untilDrained()
		if err != nil {
			return c.opError("drain", err)
		}
		if wait <= 0 {
			return nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-c.done:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("udpflow: drain: %w", context.Cause(ctx))
		}
		timer.Stop()
	}
}

// untilDrained returns the time until the last flow ends if no packet comes.
func (c *Conn) untilDrained() (time.Duration, error) {
	c.g.life.RLock()
	defer c.g.life.RUnlock()
	if c.g.table == nil || c.isClosed() {
		return 0, net.ErrClosed
	}
	now := c.g.clock.now()
	last := c.g.table.last(c.self.owner, now)
	if at := c.named.Load(); at != 0 {
		last = max(last, at+c.idle)
	}
	if last <= now {
		return 0, nil
	}
	return time.Duration(last-now) * time.Millisecond, nil
}

// Stats returns what c has done so far.
func (c *Conn) Stats() Stats {
	return Stats{
		Own:       c.own.Load(),
		Forwarded: c.forwarded.Load(),
		Dropped:   c.dropped.Load(),
		Received:  c.received.Load(),
		TakenOver: c.takenOver.Load(),
		Untracked: c.untracked.Load(),
	}
}

// decide returns the older process that a packet is for, or nil if the packet is
// for this process. It is called while the packet is received.
func (c *Conn) decide(m *message, packet []byte, now uint64) *peer {
	peers := c.g.peers.Load()
	m.named, m.tracked, m.until = false, false, 0
	if c.config.Generation != nil {
		if b, ok := c.config.Generation(packet); ok {
			m.named = true
			back := int(byte(c.self.generation) - b)
			var p *peer
			if back > 0 {
				p = peers.named(c.self.generation-back, c.self.member)
			}
			if p == nil {
				c.named.Store(now)
			}
			return p
		}
	}
	var key []byte
	var buf [64]byte
	if c.config.Key == nil {
		key = addressKey(buf[:0], m.from)
	} else if key = c.config.Key(packet, unmapped(m.from)); key == nil {
		return nil
	}
	t := c.g.table
	hash := t.hash(key)
	for {
		s, state := t.find(hash, now)
		if s == nil {
			if m.tracked = t.open(hash, c.self.owner, now, c.expiry(now)); !m.tracked {
				c.untracked.Add(1)
			}
			return nil
		}
		m.tracked = true
		owner := ownerOf(state)
		if owner == c.self.owner {
			c.refresh(s, state, now)
			if expiry := expiryOf(state); expiry > now+c.idle { // else the next packet finds it refreshed
				m.until = expiry - c.idle
			}
			return nil
		}
		switch p := peers.find(owner); {
		case p != nil:
			c.refresh(s, state, now)
			if p.own {
				return nil
			}
			return p
		case s.take(state, c.self.owner, c.expiry(now)):
			t.h.changes.Add(1)
			c.takenOver.Add(1)
			return nil
		}
	}
}

// addressKey appends what MarshalBinary returns for an address.
func addressKey(b []byte, a netip.AddrPort) []byte {
	if ip := a.Addr(); ip.Is4() || ip.Is4In6() { // most addresses, and this is faster
		ip4 := ip.As4()
		return binary.LittleEndian.AppendUint16(append(b, ip4[:]...), a.Port())
	}
	b, _ = a.AppendBinary(b) // never fails
	return b
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	if a.Addr().Is4In6() {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return a
}

// wrote keeps the flow of an address from expiring.
func (c *Conn) wrote(to netip.AddrPort) {
	if c.config.Key != nil {
		return
	}
	c.g.life.RLock()
	defer c.g.life.RUnlock()
	t := c.g.table
	if t == nil {
		return
	}
	var buf [64]byte
	key := addressKey(buf[:0], to)
	now := c.g.clock.now()
	if s, state := t.find(t.hash(key), now); s != nil && ownerOf(state) == c.self.owner {
		c.refresh(s, state, now)
	}
}

// zoneNames has the names of interfaces by their numbers, because net's addresses
// have the names.
var zoneNames sync.Map

func zoneName(id uint32) string {
	if s, ok := zoneNames.Load(id); ok {
		return s.(string)
	}
	s := strconv.FormatUint(uint64(id), 10)
	if i, err := net.InterfaceByIndex(int(id)); err == nil {
		s = i.Name
	}
	zoneNames.Store(id, s)
	return s
}

// ReadFromUDPAddrPort is as of net.UDPConn.
func (c *Conn) ReadFromUDPAddrPort(b []byte) (n int, from netip.AddrPort, err error) {
	r := newSingleReader(b, nil)
	defer r.free()
	if err := c.read(r); err != nil {
		return 0, netip.AddrPort{}, err
	}
	return r.msgs[0].n, r.msgs[0].from, nil
}

// ReadMsgUDPAddrPort is as of net.UDPConn.
func (c *Conn) ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, from netip.AddrPort, err error) {
	r := newSingleReader(b, oob)
	defer r.free()
	if err := c.read(r); err != nil {
		return 0, 0, 0, netip.AddrPort{}, err
	}
	m := &r.msgs[0]
	return m.n, m.oobn, m.flags, m.from, nil
}

// Read is as of net.UDPConn.
func (c *Conn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFromUDPAddrPort(b)
	return n, err
}

// ReadFrom is as of net.UDPConn.
func (c *Conn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		return 0, nil, err
	}
	return n, udpAddr(from), nil
}

// ReadFromUDP is as of net.UDPConn.
func (c *Conn) ReadFromUDP(b []byte) (int, *net.UDPAddr, error) {
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		return 0, nil, err
	}
	return n, udpAddr(from), nil
}

// ReadMsgUDP is as of net.UDPConn.
func (c *Conn) ReadMsgUDP(b, oob []byte) (n, oobn, flags int, from *net.UDPAddr, err error) {
	n, oobn, flags, a, err := c.ReadMsgUDPAddrPort(b, oob)
	if err != nil {
		return 0, 0, 0, nil, err
	}
	return n, oobn, flags, udpAddr(a), nil
}

// An addrBlock is a net.UDPAddr and the bytes of its IP address in one allocation.
type addrBlock struct {
	a  net.UDPAddr
	ip [16]byte
}

func (x *addrBlock) set(a netip.AddrPort) *net.UDPAddr {
	if ip := a.Addr(); ip.Is4() {
		*(*[4]byte)(x.ip[:]) = ip.As4()
		x.a.IP = x.ip[:4:4]
	} else {
		x.ip = ip.As16()
		x.a.IP, x.a.Zone = x.ip[:], ip.Zone()
	}
	x.a.Port = int(a.Port())
	return &x.a
}

// udpAddr is net.UDPAddrFromAddrPort with one allocation.
func udpAddr(a netip.AddrPort) *net.UDPAddr { return new(addrBlock).set(a) }

// WriteTo is as of net.UDPConn.
func (c *Conn) WriteTo(b []byte, to net.Addr) (int, error) {
	if a, ok := to.(*net.UDPAddr); ok && a != nil {
		c.wrote(a.AddrPort())
	}
	return c.UDPConn.WriteTo(b, to)
}

// WriteToUDP is as of net.UDPConn.
func (c *Conn) WriteToUDP(b []byte, to *net.UDPAddr) (int, error) {
	if to != nil {
		c.wrote(to.AddrPort())
	}
	return c.UDPConn.WriteToUDP(b, to)
}

// WriteToUDPAddrPort is as of net.UDPConn.
func (c *Conn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	c.wrote(to)
	return c.UDPConn.WriteToUDPAddrPort(b, to)
}

// WriteMsgUDP is as of net.UDPConn.
func (c *Conn) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error) {
	if to != nil {
		c.wrote(to.AddrPort())
	}
	return c.UDPConn.WriteMsgUDP(b, oob, to)
}

// WriteMsgUDPAddrPort is as of net.UDPConn.
func (c *Conn) WriteMsgUDPAddrPort(b, oob []byte, to netip.AddrPort) (n, oobn int, err error) {
	c.wrote(to)
	return c.UDPConn.WriteMsgUDPAddrPort(b, oob, to)
}

// peerGone reports whether the other end of an inbox is closed, if the system
// tells it. On other systems a send finds out.
func peerGone(f *os.File) (gone bool) {
	raw, err := f.SyscallConn()
	if err != nil {
		return true
	}
	cerr := raw.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if err == unix.EINTR {
				continue
			}
			gone = err == nil && n == 0 || err == unix.ECONNRESET || err == unix.ENOTCONN
			return
		}
	})
	return gone || cerr != nil
}

var (
	_ net.Conn       = (*Conn)(nil)
	_ net.PacketConn = (*Conn)(nil)
	_ syscall.Conn   = (*Conn)(nil)
)
