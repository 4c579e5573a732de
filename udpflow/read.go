package udpflow

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxBatch   = 64  // packets received by one system call
	maxForward = 64  // packets forwarded before a handover has its turn
	maxControl = 128 // bytes of control data that are forwarded
)

// A message is one packet of a read, in the caller's buffers.
type message struct {
	bufs [][]byte
	oob  []byte
	one  [1][]byte // holds bufs if there is one buffer

	n, oobn, flags int
	control        []byte // as it was received
	from           netip.AddrPort
	scope          uint32 // the number of from's zone
	named          bool   // it names its generation
	tracked        bool   // its flow is in the table
	dest           *peer  // the older process that it is for; nil means this process
	until          uint64 // the flow is this socket's until then, without a look at the table; may be 0
	sent           bool   // it was sent to dest, or dropped
}

// A record describes a packet that is sent to an inbox. The packet's control data
// and the packet itself follow the record. One message of the socket pair has any
// number of records.
type record struct {
	addr  [16]byte
	scope uint32
	flags int32
	n     uint32 // bytes of the packet
	port  uint16
	oobn  uint8 // bytes of control data
	bits  uint8
}

const (
	isIPv4 = 1 << iota
	hasNamed
)

const (
	recordSize = int(unsafe.Sizeof(record{}))
	maxPacket  = 64 << 10                            // more than a UDP packet can hold
	inboxSize  = maxPacket + recordSize + maxControl // the most that is sent by one system call
)

// encode fills a record from a message, and cuts the message's control data.
func (h *record) encode(m *message) {
	n, flags := cutControl(m.control, maxControl)
	m.control = m.control[:n]
	a := m.from.Addr()
	*h = record{addr: a.As16(), scope: m.scope, flags: int32(m.flags | flags), n: uint32(m.n), port: m.from.Port(), oobn: uint8(n)}
	if a.Is4() {
		h.bits |= isIPv4
	}
	if m.named {
		h.bits |= hasNamed
	}
}

// decode takes a packet from the front of b, and returns the rest. It reports
// false if there is none.
func (m *message) decode(b []byte) ([]byte, bool) {
	var h record
	if len(b) < recordSize {
		return nil, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), recordSize), b) // b may be unaligned
	b = b[recordSize:]
	if uint64(h.oobn)+uint64(h.n) > uint64(len(b)) {
		return nil, false
	}
	m.control, b = b[:h.oobn], b[h.oobn:]
	m.one[0], b = b[:h.n], b[h.n:]
	m.bufs = m.one[:]
	m.n, m.flags, m.named = int(h.n), int(h.flags), h.bits&hasNamed != 0
	a := netip.AddrFrom16(h.addr)
	if h.bits&isIPv4 != 0 {
		a = a.Unmap()
	}
	m.setFrom(a, h.port, h.scope)
	return b, true
}

// cutControl returns the length of the whole control messages for which there is
// room, and MSG_CTRUNC if some are missing.
func cutControl(control []byte, room int) (n, flags int) {
	if len(control) <= room {
		return len(control), 0
	}
	for rest := control; ; {
		_, _, next, err := unix.ParseOneSocketControlMessage(rest)
		end := len(control) - len(next)
		if err != nil || end > room {
			return n, unix.MSG_CTRUNC
		}
		rest, n = next, end
	}
}

func (m *message) setFrom(a netip.Addr, port uint16, scope uint32) {
	if scope != 0 {
		a = a.WithZone(zoneName(scope))
	}
	m.from, m.scope = netip.AddrPortFrom(a, port), scope
}

// first returns the part of the packet that is in the first buffer.
func (m *message) first() []byte {
	if len(m.bufs) == 0 {
		return nil
	}
	n := min(m.n, len(m.bufs[0]))
	return m.bufs[0][:n:n]
}

// take fills m from x, which may be m or another message of the batch.
func (m *message) take(x *message) {
	if m != x {
		m.n = 0
		i, done := 0, 0 // the buffer of m to fill, and the bytes that it has
		for left, j := x.n, 0; left > 0; j++ {
			b := x.bufs[j][:min(left, len(x.bufs[j]))]
			left -= len(b)
			for len(b) > 0 && i < len(m.bufs) {
				k := copy(m.bufs[i][done:], b)
				b, done, m.n = b[k:], done+k, m.n+k
				if done == len(m.bufs[i]) {
					i, done = i+1, 0
				}
			}
		}
		m.flags, m.from, m.scope, m.named = x.flags, x.from, x.scope, x.named
		if m.n < x.n {
			m.flags |= unix.MSG_TRUNC
		}
	}
	n, flags := cutControl(x.control, len(m.oob))
	m.oobn = copy(m.oob, x.control[:n])
	m.flags |= flags
	m.control = m.oob[:m.oobn]
}

// A reader is one call of a read method. While its functions run, no other call
// uses the socket or the inbox.
type reader struct {
	c     *Conn
	msgs  []message
	n     int   // how many of msgs are filled
	empty bool  // the inbox was empty, and no successor can fill it
	err   error // of the system

	vector       // msgs in the system's form
	batch  []int // the messages that go to one peer
	sent   int   // how many of batch were sent
	serr   error // of sending

	clients *clientCache

	// The methods as function values, made once, because the raw connections
	// take functions.
	fromSocket, stashFromSocket, stashFromInbox func(fd uintptr) bool
	sendTo                                      func(fd uintptr)
}

func makeReader() *reader {
	r := &reader{clients: new(clientCache)}
	r.fromSocket, r.stashFromSocket, r.stashFromInbox = r.receive, r.fillFromSocket, r.fillFromInbox
	r.sendTo = r.sendBatch
	return r
}

func (r *reader) setLen(n int) {
	if cap(r.msgs) < n {
		r.msgs = make([]message, n)
		r.batch = make([]int, 0, n)
		r.vector.grow(n)
	}
	r.msgs = r.msgs[:n]
	r.n, r.err = 0, nil
}

var readers sync.Pool

// newReader returns a reader of n messages. The caller sets their buffers.
func newReader(n int) *reader {
	r, _ := readers.Get().(*reader)
	if r == nil {
		r = makeReader()
	}
	r.setLen(n)
	return r
}

func newSingleReader(b, oob []byte) *reader {
	r := newReader(1)
	m := &r.msgs[0]
	m.one[0] = b
	m.bufs, m.oob = m.one[:], oob
	return r
}

// free puts r back into the pool. It keeps none of the caller's buffers.
func (r *reader) free() {
	for i := range r.msgs {
		m := &r.msgs[i]
		m.bufs, m.oob, m.one[0], m.control, m.dest = nil, nil, nil, nil, nil
	}
	r.vector.clear()
	r.c = nil
	readers.Put(r)
}

// A clientCache remembers clients that have sent a packet, because most of them
// send more. Each client has one possible place in it.
type clientCache [256]client

type client struct {
	from netip.AddrPort
	addr *net.UDPAddr // nil until udpAddr makes it

	// The client's flow belongs to this socket until the time until, if the
	// table's number of changes is still the same. Sockets of all groups have
	// different numbers.
	socket  uint64
	changes uint32
	until   uint64
}

func (x *clientCache) of(a netip.AddrPort) *client {
	place := &x[uint8(a.Port())]
	if place.from != a {
		*place = client{from: a}
	}
	return place
}

func (x *client) udpAddr() *net.UDPAddr {
	if x.addr == nil {
		x.addr = udpAddr(x.from)
	}
	return x.addr
}

// A stash holds packets of this process that no read method has returned yet. One
// system call on the inbox may receive several packets. Reads of single packets
// also fill it from the socket, because receiving and forwarding several packets
// at once is cheaper. A handover does not change the packets in it.
type stash struct {
	have atomic.Bool // there is a packet

	mu   sync.Mutex // also held while the stash is filled
	msgs []message  // in the buffers of socket or of inbox

	socket    *reader // nil until the first single read
	inbox     []byte
	inboxMsgs []message
}

const stashSize = 16

// pop moves messages to r until r is full or none is left.
func (s *stash) pop(r *reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r.n = 0; r.n < len(r.msgs) && len(s.msgs) > 0; r.n++ {
		r.msgs[r.n].take(&s.msgs[0])
		s.msgs = s.msgs[1:]
	}
	s.have.Store(len(s.msgs) > 0)
}

// fillFromSocket receives packets into the stash. Its result is that of receive.
func (r *reader) fillFromSocket(fd uintptr) bool {
	s := &r.c.stash
	s.mu.Lock()
	defer s.mu.Unlock()
	r.n, r.err = 0, nil
	if len(s.msgs) > 0 { // another reader has filled it
		return true
	}
	if s.socket == nil {
		s.socket = makeReader()
		s.socket.setLen(stashSize)
		s.socket.c = r.c
		for i := range s.socket.msgs {
			m := &s.socket.msgs[i]
			m.one[0] = make([]byte, maxPacket)
			m.bufs, m.oob = m.one[:], make([]byte, 4*maxControl)
		}
	}
	done := s.socket.receive(fd)
	s.msgs, r.err = s.socket.msgs[:s.socket.n], s.socket.err
	s.have.Store(len(s.msgs) > 0)
	return done
}

// fillFromInbox receives packets into the stash. It returns false if there is none
// and a successor may still send one.
func (r *reader) fillFromInbox(fd uintptr) bool {
	c, s := r.c, &r.c.stash
	s.mu.Lock()
	defer s.mu.Unlock()
	r.n, r.err, r.empty = 0, nil, false
	if len(s.msgs) > 0 {
		return true
	}
	if s.inbox == nil {
		s.inbox, s.inboxMsgs = make([]byte, inboxSize), make([]message, 0, maxBatch)
	}
	for len(s.msgs) == 0 {
		n, err := unix.Read(int(fd), s.inbox)
		switch {
		case err == unix.EINTR || err == unix.ECONNRESET: // a writer has closed
			continue
		case err == unix.EAGAIN || err == nil && n == 0:
			// n is 0 at the end of the inbox, when no process can write to it.
			r.empty = c.source.Load() != fromInbox
			return r.empty
		case err != nil:
			r.err = os.NewSyscallError("read", err)
			return true
		}
		s.msgs = s.inboxMsgs[:0]
		for b, ok := s.inbox[:n], true; ok && len(s.msgs) < maxBatch; {
			s.msgs = append(s.msgs, message{})
			if b, ok = s.msgs[len(s.msgs)-1].decode(b); !ok {
				s.msgs = s.msgs[:len(s.msgs)-1]
			}
		}
		for i := range s.msgs {
			if s.msgs[i].named {
				c.named.Store(c.g.clock.now())
			}
		}
	}
	c.received.Add(uint64(len(s.msgs)))
	s.have.Store(true)
	return true
}

// receive takes packets from the socket until one of them is this process's, or
// until maxForward packets were forwarded, so that a handover has its turn. It
// returns false if the socket has no packet.
func (r *reader) receive(fd uintptr) bool {
	c := r.c
	r.n, r.err = 0, nil
	for forwarded := 0; forwarded < maxForward; {
		n, err := r.recv(int(fd))
		if err == unix.EAGAIN {
			return false
		}
		if err != nil {
			r.err = os.NewSyscallError("recvmsg", err)
			return true
		}
		t := c.g.table.h
		now, changes, socket := c.g.clock.now(), t.changes.Load(), t.k0+uint64(c.self.owner)
		for i := range r.msgs[:n] {
			m := &r.msgs[i]
			m.sent = false
			switch {
			case !c.byAddress:
				m.dest = c.decide(m, m.first(), now)
			case i > 0 && r.msgs[i-1].tracked && m.from == r.msgs[i-1].from:
				// Packets of one flow often come together.
				m.named, m.tracked, m.dest = false, true, r.msgs[i-1].dest
			default:
				x := r.clients.of(m.from)
				if x.socket == socket && x.changes == changes && now < x.until {
					m.named, m.tracked, m.dest = false, true, nil
					break
				}
				m.dest = c.decide(m, m.first(), now)
				x.socket, x.changes, x.until = socket, changes, m.until
			}
		}
		forwarded += r.forward(n, now)
		for i := range r.msgs[:n] {
			if m := &r.msgs[i]; !m.sent {
				r.msgs[r.n].take(m)
				r.n++
			}
		}
		if r.n > 0 {
			c.own.Add(uint64(r.n))
			return true
		}
	}
	return true
}

// forward sends those of the first n messages that are for older processes, and
// returns their number. If a process turns out to have ended, forward decides
// again on its messages.
func (r *reader) forward(n int, now uint64) (count int) {
	c := r.c
	for i := 0; i < n; i++ {
		p := r.msgs[i].dest
		if p == nil || r.msgs[i].sent {
			continue
		}
		r.batch, r.sent = r.batch[:0], 0
		for j := i; j < n; j++ {
			if m := &r.msgs[j]; m.dest == p && !m.sent {
				r.records[j].encode(m)
				r.batch = append(r.batch, j)
			}
		}
		err := p.raw.Control(r.sendTo)
		if err == nil {
			err = r.serr
		}
		done := len(r.batch)
		switch {
		case err == nil:
			c.forwarded.Add(uint64(done))
		case isFull(err):
			c.forwarded.Add(uint64(r.sent))
			c.dropped.Add(uint64(done - r.sent))
		default:
			done = r.sent
			c.forwarded.Add(uint64(done))
			p.gone.Store(true)
		}
		for k, j := range r.batch {
			m := &r.msgs[j]
			if k < done {
				m.sent = true
			} else {
				m.dest = c.decide(m, m.first(), now)
			}
		}
		count += done
		if done < len(r.batch) {
			i-- // the message may belong to another process now
		}
	}
	return count
}

// isFull reports whether an error of sending means that there is no room. Any
// other error means that the receiver has gone.
func isFull(err error) bool {
	switch err {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE:
		return true
	}
	return false
}

// sendBatch sends the messages in r.batch, with as many in one system call as
// inboxSize allows. It stops at the first error. If there is no room for several
// messages at once, it tries one by one.
func (r *reader) sendBatch(fd uintptr) {
	r.serr = nil
	most := len(r.batch)
	for r.sent < len(r.batch) {
		size, n := 0, 0
		for _, i := range r.batch[r.sent:] {
			size += recordSize + len(r.msgs[i].control) + r.msgs[i].n
			if n == most || n > 0 && size > inboxSize {
				break
			}
			n++
		}
		r.serr = r.send(int(fd), r.batch[r.sent:r.sent+n])
		switch {
		case r.serr == nil:
			r.sent += n
		case n > 1 && isFull(r.serr):
			most = 1
		default:
			return
		}
	}
}
