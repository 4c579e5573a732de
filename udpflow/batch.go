package udpflow

import (
	"errors"
	"net"
	"unsafe"
)

// A Message is golang.org/x/net's ipv4.Message, which is also its
// ipv6.Message, or a type of the same fields.
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

// A BatchConn is a Conn that reads several packets by one call. It is made for
// libraries that ask their socket for a ReadBatch, as quic-go does:
//
//	transport := &quic.Transport{Conn: udpflow.BatchConn[ipv4.Message]{conn}}
//
// The NewPacketConn of golang.org/x/net's ipv4 and ipv6 must not be used to
// read from a Conn, because what it reads cannot be sorted. It may be used for
// options and to write.
type BatchConn[M Message] struct{ *Conn }

// ReadBatch fills messages as the method of the same name of golang.org/x/net
// does, and returns how many, at most 64 and, on other systems than Linux, one.
// It waits until there is at least one. There are no flags: others than 0 are
// an error that wraps errors.ErrUnsupported. Packets of one client may have the
// same address, a *net.UDPAddr, which the caller must not change.
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
