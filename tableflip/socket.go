package tableflip

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

type (
	rawConn = syscall.RawConn
	conn    = syscall.Conn
)

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// A coreListener is a listener of the core, a *net.TCPListener or a
// *net.UnixListener.
type coreListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// A listener is the listener that Listen returns. Close ends accepting in this
// process, and leaves the socket with the core, which hands it on.
type listener struct {
	f *Fds

	mu       sync.Mutex
	ln       coreListener
	detached bool // ln is net's, and no longer handed on
	closed   bool
}

var (
	_ Listener     = (*listener)(nil)
	_ coreListener = (*listener)(nil)
)

func (l *listener) current() (ln coreListener, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ln, l.closed
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		ln, closed := l.current()
		if closed {
			return nil, l.errClosed("accept")
		}
		c, err := ln.Accept()
		if err == nil {
			if tc, ok := c.(*net.TCPConn); ok {
				l.f.keepAlive(tc)
			}
			return c, nil
		}
		now, closed := l.current()
		if closed {
			return nil, l.errClosed("accept")
		}
		if now == ln {
			return nil, err
		}
	}
}

// keepAlive applies the settings of f.lc. Package net has already applied those of
// the zero ListenConfig.
func (f *Fds) keepAlive(c *net.TCPConn) {
	switch cfg := f.lc.KeepAliveConfig; {
	case cfg.Enable:
		_ = c.SetKeepAliveConfig(cfg)
	case f.lc.KeepAlive < 0:
		_ = c.SetKeepAlive(false)
	case f.lc.KeepAlive > 0:
		_ = c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: f.lc.KeepAlive})
	}
}

func (l *listener) errClosed(op string) error {
	a := l.Addr()
	return &net.OpError{Op: op, Net: a.Network(), Addr: a, Err: net.ErrClosed}
}

func (l *listener) Addr() net.Addr {
	ln, _ := l.current()
	return ln.Addr()
}

func (l *listener) SyscallConn() (syscall.RawConn, error) {
	ln, closed := l.current()
	if closed {
		return nil, l.errClosed("raw-control")
	}
	return ln.SyscallConn()
}

// File returns a copy of the socket, as File of a *net.TCPListener does.
func (l *listener) File() (*os.File, error) {
	ln, closed := l.current()
	if closed {
		return nil, l.errClosed("file")
	}
	return duplicate(ln, ln.Addr().String())
}

func (l *listener) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		a := l.ln.Addr()
		return &net.OpError{Op: "set", Net: a.Network(), Addr: a, Err: net.ErrClosed}
	}
	return l.ln.SetDeadline(t)
}

func (l *listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		a := l.ln.Addr()
		return &net.OpError{Op: "close", Net: a.Network(), Addr: a, Err: net.ErrClosed}
	}
	l.closed = true
	if l.detached {
		return l.ln.Close()
	}
	_ = l.ln.SetDeadline(past) // fails only if the core has closed the socket
	return nil
}

// detach takes the socket from the core, because another socket is handed on in its
// place. The listener goes on accepting until the program closes it.
func (l *listener) detach() {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.ln
	if l.detached {
		return
	}
	if file, err := duplicate(old, ""); err == nil && !l.closed {
		if ln, err := net.FileListener(file); err == nil {
			keepFile(ln)
			l.ln, l.detached = ln.(coreListener), true
		}
		file.Close()
	}
	old.Close()
}

// A corePacketConn is a socket of the core for packets.
type corePacketConn interface {
	net.PacketConn
	syscall.Conn
}

// A packetConn is a socket for packets that the program uses and the core hands
// on.
type packetConn struct {
	f      *Fds
	k      key
	core   corePacketConn
	closed bool // guarded by f.mu
}

// A udpConn is the socket that ListenPacket returns for UDP.
type udpConn struct {
	*ecdysis.UDPConn
	p *packetConn
}

// A unixgramConn is the socket that ListenPacket returns for "unixgram".
type unixgramConn struct {
	*ecdysis.UnixgramConn
	p *packetConn
}

var (
	_ PacketConn = (*udpConn)(nil)
	_ PacketConn = (*unixgramConn)(nil)
)

// Close closes the socket, and leaves a copy with the core, so that it is
// handed on.
func (c *udpConn) Close() error { return c.p.close() }

// Close closes the socket, and leaves a copy with the core, so that it is
// handed on.
func (c *unixgramConn) Close() error { return c.p.close() }

func (p *packetConn) close() error {
	f := p.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.closed || !slices.Contains(f.packets[p.k], p) {
		return p.core.Close()
	}
	p.closed = true
	f.held[p.k] = true
	if !f.frozen {
		if err := f.addCopy(p.k, p.core); !errors.Is(err, ecdysis.ErrInProgress) {
			return p.core.Close() // any other error means that nothing is handed on any more
		}
	}
	// The successor may still have to get its copy, so the socket stays open.
	f.later = append(f.later, func() {
		_ = f.addCopy(p.k, p.core)
		_ = p.core.Close()
	})
	return p.core.SetDeadline(past)
}
