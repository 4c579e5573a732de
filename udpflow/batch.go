package udpflow

import (
	"errors"
	"net"
	"unsafe"
)

// A Message is golang.org/x/net's ipv4.Message, which is the same type as its
// ipv6.Message, or a type with the same fields.
type Message interface {
	~struct {
		Buffers [][]byte
		OOB     []byte
		Addr    net.Addr
		N       int
		NN      int
		Flags   int
	}
}

type netMessage = struct {
	Buffers [][]byte
	OOB     []byte
	Addr    net.Addr
	N       int
	NN      int
	Flags   int
}

// A BatchConn is a Conn that reads several packets by one call. It is for libraries
// that call ReadBatch on their socket if it has one, as quic-go does:
//
//	transport := &quic.Transport{Conn: udpflow.BatchConn[ipv4.Message]{conn}}
//
// Do not use the NewPacketConn of golang.org/x/net's ipv4 and ipv6 to read from a
// Conn, because the packets that it reads cannot be sorted by their flows. It may be
// used to set options and to write.
type BatchConn[M Message] struct{ *Conn }

// ReadBatch waits until there is a packet, and fills messages as the ReadBatch of
// golang.org/x/net does. It returns the number of messages that it has filled,
// which is at most 64, and 1 on systems other than Linux. Flags other than 0 are
// an error that wraps errors.ErrUnsupported. Packets of one client may share one
// *net.UDPAddr, which the caller must not change.
func (c BatchConn[M]) ReadBatch(ms []M, flags int) (int, error) {
	if flags != 0 {
		return 0, c.opError("read", errors.ErrUnsupported)
	}
	if len(ms) == 0 {
		return 0, nil
	}
	// The constraint says that this is the same in memory.
	return c.readBatch(unsafe.Slice((*netMessage)(unsafe.Pointer(unsafe.SliceData(ms))), min(len(ms), maxBatch)))
}

func (c *Conn) readBatch(ms []netMessage) (int, error) {
	r := newReader(len(ms))
	defer r.free()
	for i := range ms {
		r.msgs[i].bufs, r.msgs[i].oob = ms[i].Buffers, ms[i].OOB
	}
	if err := c.read(r); err != nil {
		return 0, err
	}
	for i := range r.msgs[:r.n] {
		m := &r.msgs[i]
		ms[i].N, ms[i].NN, ms[i].Flags, ms[i].Addr = m.n, m.oobn, m.flags, r.clients.of(m.from).udpAddr()
	}
	return r.n, nil
}
