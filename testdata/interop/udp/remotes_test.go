package udp

import (
	"context"
	"net"
	"net/netip"
	"sync"

	"github.com/ecdysis-go/ecdysis/udpflow"
)

// remotes is a listener for libraries that want a connection for each remote
// address, and none for all. A program that serves DTLS or CoAP needs one like
// it, because the listeners of these libraries make their sockets themselves.
type remotes struct {
	c        *udpflow.Conn
	accepted chan net.Conn

	mu sync.Mutex
	m  map[netip.AddrPort]chan []byte
}

func listenRemotes(c *udpflow.Conn) *remotes {
	l := &remotes{c: c, accepted: make(chan net.Conn), m: map[netip.AddrPort]chan []byte{}}
	go l.read()
	return l
}

func (l *remotes) read() {
	b := make([]byte, 64<<10)
	for {
		n, from, err := l.c.ReadFromUDPAddrPort(b)
		if err != nil {
			close(l.accepted)
			return
		}
		l.mu.Lock()
		in, ok := l.m[from]
		if !ok {
			in = make(chan []byte, 100)
			l.m[from] = in
		}
		l.mu.Unlock()
		if !ok {
			l.accepted <- l.connect(from, in)
		}
		select {
		case in <- append([]byte(nil), b[:n]...):
		default: // as a socket does that is full
		}
	}
}

// A remote is the connection with one address.
type remote struct {
	net.Conn // a pipe, of which each read returns one packet
	l        *remotes
	addr     net.Addr
}

func (r remote) LocalAddr() net.Addr  { return r.l.c.LocalAddr() }
func (r remote) RemoteAddr() net.Addr { return r.addr }

func (l *remotes) connect(addr netip.AddrPort, in chan []byte) net.Conn {
	outer, inner := net.Pipe()
	go func() {
		for p := range in {
			if _, err := inner.Write(p); err != nil {
				l.mu.Lock()
				delete(l.m, addr)
				l.mu.Unlock()
				return
			}
		}
	}()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := inner.Read(b)
			if err != nil {
				inner.Close()
				return
			}
			_, _ = l.c.WriteToUDPAddrPort(b[:n], addr)
		}
	}()
	return remote{outer, l, net.UDPAddrFromAddrPort(addr)}
}

func (l *remotes) Accept() (net.Conn, error) { return l.AcceptWithContext(context.Background()) }

func (l *remotes) AcceptWithContext(ctx context.Context) (net.Conn, error) {
	select {
	case c, ok := <-l.accepted:
		if !ok {
			return nil, net.ErrClosed
		}
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *remotes) Close() error   { return l.c.Close() }
func (l *remotes) Addr() net.Addr { return l.c.LocalAddr() }
