package udpflow

import (
	"net/netip"
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

	n, oobn, flags int
	control        []byte // as it was received, into oob or a record
	from           netip.AddrPort
	scope          uint32 // the number of from's zone
	named          bool   // it has named its generation
	dest           *peer  // the older process that it is for; nil: this one
	sent           bool   // it was sent there, or dropped
}

// A record precedes each packet in an inbox.
type record struct {
	addr    [16]byte
	scope   uint32
	flags   int32
	port    uint16
	is4     bool
	named   bool
	oobn    uint8
	_       [3]byte
	control [maxControl]byte
}

const recordSize = int(unsafe.Sizeof(record{}))

func (h *record) encode(m *message) {
	a := m.from.Addr()
	h.addr, h.is4 = a.As16(), a.Is4()
	h.port, h.scope, h.flags, h.named = m.from.Port(), m.scope, int32(m.flags), m.named
	n, flags := copyControl(h.control[:], m.control)
	h.oobn = uint8(n)
	h.flags |= int32(flags)
}

// copyControl copies whole control messages, as many as there is room for, and
// returns the flag that some are missing.
func copyControl(to, from []byte) (n, flags int) {
	if len(from) <= len(to) {
		return copy(to, from), 0
	}
	for rest := from; ; {
		_, _, next, err := unix.ParseOneSocketControlMessage(rest)
		end := len(from) - len(next)
		if err != nil || end > len(to) {
			return copy(to[:n], from), unix.MSG_CTRUNC
		}
		rest, n = next, end
	}
}

func (h *record) decode(m *message) {
	a := netip.AddrFrom16(h.addr)
	if h.is4 {
		a = a.Unmap()
	}
	m.setFrom(a, h.port, h.scope)
	m.flags |= int(h.flags)
	m.named = h.named
	m.control = h.control[:min(int(h.oobn), maxControl)]
}

func (m *message) setFrom(a netip.Addr, port uint16, scope uint32) {
	if scope != 0 {
		a = a.WithZone(zoneName(scope))
	}
	m.from, m.scope = netip.AddrPortFrom(a, port), scope
}

// first returns the packet, or what of it is in the first buffer.
func (m *message) first() []byte {
	if len(m.bufs) == 0 {
		return nil
	}
	n := min(m.n, len(m.bufs[0]))
	return m.bufs[0][:n:n]
}

// take fills m with a message that was received for another place of the
// batch, or for its own.
func (m *message) take(x *message) {
	if m != x {
		m.n = 0
		i, done := 0, 0 // where m is filled
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
	n, flags := copyControl(m.oob, x.control)
	m.oobn = n
	m.flags |= flags
	m.control = m.oob[:m.oobn]
}

// A reader is one call of a read method. Its functions run while the socket,
// or the inbox, is this call's alone.
type reader struct {
	c     *Conn
	msgs  []message
	n     int   // how many are filled
	empty bool  // the inbox was, and no successor is there to fill it
	err   error // the system's

	vector           // what the system sees of msgs
	batch  []int     // the messages that go to one peer
	sent   int       // of these
	serr   error     // of sending
	one    [1][]byte // the buffer of a single message

	// The functions as the raw connections get them.
	fromSocket, fromInbox           func(fd uintptr) bool
	stashFromSocket, stashFromInbox func(fd uintptr) bool
	sendTo                          func(fd uintptr)
}

func makeReader() *reader {
	r := new(reader)
	r.fromSocket, r.fromInbox = r.receive, r.receiveForwarded
	r.stashFromSocket, r.stashFromInbox = r.fillFromSocket, r.fillFromInbox
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

// newReader returns a reader of n messages, whose buffers the caller sets.
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
	r.one[0] = b
	r.msgs[0].bufs, r.msgs[0].oob = r.one[:], oob
	return r
}

// free gives r back. It keeps nothing of the caller.
func (r *reader) free() {
	for i := range r.msgs {
		m := &r.msgs[i]
		m.bufs, m.oob, m.control, m.dest = nil, nil, nil, nil
	}
	r.vector.clear(len(r.msgs))
	r.c, r.one[0] = nil, nil
	readers.Put(r)
}

// A stash holds packets that are this process's, and that no read method has
// returned yet. Reads of single packets go through it, because receiving and
// forwarding several by one system call is cheaper. A handover changes nothing
// about what is in it.
type stash struct {
	have atomic.Bool // there is one

	mu   sync.Mutex // held while it is filled, too
	r    *reader    // nil until it is needed
	next int        // of the r.n messages
}

const stashSize = 16

// pop moves messages to r as long as both have some.
func (s *stash) pop(r *reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r.n = 0; r.n < len(r.msgs) && s.next < s.r.n; r.n++ {
		m := &r.msgs[r.n]
		m.take(&s.r.msgs[s.next])
		s.next++
	}
	s.have.Store(s.next < s.r.n)
}

// fill receives packets into the stash by f, a receive function of a reader. It
// reports what f does.
func (s *stash) fill(r *reader, f func(*reader, uintptr) bool, fd uintptr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.n, r.err, r.empty = 0, nil, false
	if s.r == nil {
		s.r = makeReader()
		s.r.setLen(stashSize)
		s.r.c = r.c
		for i := range s.r.msgs {
			m := &s.r.msgs[i]
			m.bufs, m.oob = [][]byte{make([]byte, 64<<10)}, make([]byte, 4*maxControl)
		}
	}
	if s.next < s.r.n { // another reader has filled it
		return true
	}
	s.next = 0
	done := f(s.r, fd)
	r.err, r.empty = s.r.err, s.r.empty
	s.have.Store(s.r.n > 0)
	return done
}

func (r *reader) fillFromSocket(fd uintptr) bool { return r.c.stash.fill(r, (*reader).receive, fd) }
func (r *reader) fillFromInbox(fd uintptr) bool {
	return r.c.stash.fill(r, (*reader).receiveForwarded, fd)
}

// receive takes packets from the socket until one of them is this process's,
// or until a handover must have its turn. It reports false if there is none.
func (r *reader) receive(fd uintptr) bool {
	c := r.c
	r.n, r.err = 0, nil
	for forwarded := 0; forwarded < maxForward; {
		n, err := r.recv(int(fd))
		if err == unix.EAGAIN {
			return false
		}
		if err != nil {
			r.err = err
			return true
		}
		now := c.g.clock.now()
		for i := range r.msgs[:n] {
			m := &r.msgs[i]
			m.named, m.sent = false, false
			m.dest = c.decide(m, m.first(), now)
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
// returns how many that were. If a process turns out to have ended, the table
// is asked again.
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
			i-- // it may be another process's meanwhile
		}
	}
	return count
}

// isFull reports whether an error of sending means that there is no room. Any
// other means that nobody will receive any more.
func isFull(err error) bool {
	switch err {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE:
		return true
	}
	return false
}

// sendBatch sends what is in r.batch. It stops at the first error.
func (r *reader) sendBatch(fd uintptr) {
	r.serr = nil
	for r.sent < len(r.batch) && r.serr == nil {
		var n int
		n, r.serr = r.send(int(fd), r.batch[r.sent:])
		r.sent += n
	}
}

// receiveForwarded takes packets from the inbox. It reports false if there is
// none and a successor may send more.
func (r *reader) receiveForwarded(fd uintptr) bool {
	c := r.c
	r.n, r.err, r.empty = 0, nil, false
	for r.n == 0 {
		n, err := r.recvForwarded(int(fd))
		if err == unix.EAGAIN || err == nil && r.msgs[0].n == -recordSize {
			// The end of the inbox is a packet of no bytes: nobody can write
			// to it any more.
			r.empty = c.source.Load() != fromInbox
			return r.empty
		}
		if err != nil {
			r.err = err
			return true
		}
		for i := range r.msgs[:n] {
			m := &r.msgs[i]
			if m.n < 0 {
				continue
			}
			if m.named {
				c.named.Store(c.g.clock.now())
			}
			r.msgs[r.n].take(m)
			r.n++
		}
	}
	c.received.Add(uint64(r.n))
	return true
}
