//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A ListenConfig says how a new socket is made. An inherited one stays as it was
// made, except for KeepOnStop and Raw. The zero value works.
type ListenConfig struct {
	// Control, if not nil, is called with the socket before it is bound, as
	// in net.ListenConfig.
	Control func(network, address string, c syscall.RawConn) error
	// Backlog is how many connections may wait to be accepted; the system
	// lowers it to its maximum. 0: that maximum. Not for packets.
	Backlog int
	// Mode are the permission bits of a Unix socket's file, set before the
	// first client can connect or, on Linux, send. 0: as the umask leaves
	// them.
	Mode os.FileMode
	// ReusePort lets several TCP or UDP sockets have one address, and the
	// system spread the clients over them (SO_REUSEPORT; SO_REUSEPORT_LB on
	// FreeBSD). macOS, NetBSD and OpenBSD do not spread.
	ReusePort bool
	// KeepOnStop lets the socket accept, or read, through a Stop, until the
	// caller closes it, so that health checks are answered while the process
	// drains. It is also set for an inherited socket. A socket that is looked
	// up by name keeps the setting that came with it. An upgrade ends such a
	// socket like any other.
	KeepOnStop bool
	// Raw makes ListenPacketWith return net's own *net.UDPConn, for libraries
	// that insist on it. It is for UDP alone. Such a socket is handed on and
	// never paused: for a moment both generations read it, and each datagram
	// is read by one of them. The program starts to read after Ready, and
	// closes the socket when this process is to end. It is the one exception
	// to the rule that two generations never receive at once.
	Raw bool
}

// Listen is ListenWith with the zero ListenConfig.
func (u *Upgrader) Listen(network, address string) (net.Listener, error) {
	return u.ListenWith(ListenConfig{}, network, address)
}

// ListenWith returns a listener for the address: the inherited one if the
// older process hands it on, otherwise a new one. The network is "tcp",
// "tcp4", "tcp6", "unix" or "unixpacket" (then it is a *SeqpacketListener),
// and addresses are as for net.Listen, with two differences: TCP sockets are
// plain (net.Listen's speak Multipath TCP on Linux), and a Unix socket's file
// is replaced if no process listens to it any more. On Linux a Unix address
// that begins with "@" is abstract.
//
// An inherited socket is found by the words that it was asked for with, or
// else by what they resolve to: ":80" and "[::]:80" find the same one, and so
// do two paths of one file. Asked again for port 0, a successor finds the
// ports of its parent's calls for port 0 in the order of those calls. Several
// sockets of one address are found in that order, too. So is a socket that
// AddFile has brought in.
//
// Accept waits until Ready has succeeded. It returns plain *net.TCPConn and
// *net.UnixConn. Only the caller ends it: it fails with net.ErrClosed when the
// caller has closed the listener, and with os.ErrDeadlineExceeded when the
// caller's deadline has passed. When this process is stopped or replaced, the
// package closes the socket in the system, and Accept waits for the caller's
// Close: Wait, Exit and the events tell of the end. Shortages of descriptors or
// memory, and connections that break before they are accepted, are waited out;
// EventAcceptError tells of them. The listener also has the methods SetDeadline
// and SyscallConn of a *net.TCPListener.
//
// Close withdraws the listener from what is handed on. It removes a Unix
// socket's file if this process owns it: if it is the last one that became
// ready, after its Probation. If that cannot be known yet, the call that learns
// it removes the file. A program that serves until its end need not call Close
// before that.
//
// The error wraps a *net.OpError, or is ErrInProgress during an upgrade,
// ErrUpgraded, ErrStopped or ErrAborted after it.
func (u *Upgrader) ListenWith(lc ListenConfig, network, address string) (net.Listener, error) {
	s, err := u.listenOrInherit(lc, kindListener, newListener, network, address)
	if err != nil {
		return nil, err
	}
	return s.(*listener).public(), nil
}

// listenOrInherit returns the inherited socket for the address, or a new one.
func (u *Upgrader) listenOrInherit(lc ListenConfig, kind string, open opener, network, address string) (pausable, error) {
	asked := &socketRequest{askedAddr{network, address}, lc} // does not escape: most calls find what they ask for
	if err := lc.check(kind, network, address); err != nil {
		return nil, asked.failed(askedAddr{network, address}, err)
	}
	// Equal words need no look-up, which may ask a name server.
	s, err := u.claim(asked, open, func(r *registry) *entry { return r.findWords(network, address) })
	if s != nil || err != nil {
		return s, err
	}
	return u.listenOrInheritAddr(asked, kind, open)
}

// listenOrInheritAddr is listenOrInherit after no inherited socket was asked for
// with the same words.
func (u *Upgrader) listenOrInheritAddr(asked *socketRequest, kind string, open opener) (pausable, error) {
	a, err := resolve(asked.network, asked.address)
	if err != nil {
		return nil, asked.failed(askedAddr{asked.network, asked.address}, err)
	}
	s, err := u.claim(asked, open, func(r *registry) *entry { return r.findAddr(a) })
	if s != nil || err != nil {
		return s, err
	}
	e, err := a.open(kind, asked.lc)
	if err != nil {
		return nil, asked.failed(a.addr, u.explainInUse(a, err))
	}
	if s, err = u.claim(asked, open, func(*registry) *entry { return e }); err != nil {
		e.removeFile()
		e.closeBare()
		return nil, err
	}
	return s, nil
}

// explainInUse adds to an error which inherited socket is in the way of a new
// one: that of an address which has changed its width, such as ":80" to
// "127.0.0.1:80".
func (u *Upgrader) explainInUse(a *bindAddr, err error) error {
	if !errors.Is(err, syscall.EADDRINUSE) || a.family == syscall.AF_UNIX {
		return err
	}
	key := a.key()
	port := key[strings.LastIndexByte(key, ':'):]
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range u.reg.inherited {
		if typ, isUnix := socketType(e.network); e.isSocket() && !isUnix && typ == a.typ && strings.HasSuffix(e.boundKey, port) {
			return errorf("%w: the predecessor hands on %s, which is in the way; listen on that address until a stop and a start have changed it", err, e.label())
		}
	}
	return err
}

// check refuses what cannot be meant.
func (lc ListenConfig) check(kind, network, address string) error {
	want := "tcp, tcp4, tcp6, unix or unixpacket"
	if kind == kindPacket {
		want = "udp, udp4, udp6 or unixgram"
	}
	octal := strconv.FormatUint(uint64(lc.Mode), 8)
	typ, isUnix := socketType(network)
	switch {
	case typ == 0 || (typ == syscall.SOCK_DGRAM) != (kind == kindPacket):
		return errorf("%w; want %s", net.UnknownNetworkError(network), want)
	case lc.Backlog < 0:
		return errorf("ListenConfig.Backlog is %d; want 0 (for the system's maximum) or more", lc.Backlog)
	case lc.Backlog != 0 && kind == kindPacket:
		return errorf("ListenConfig.Backlog is %d; it is for connections, and a socket for packets has none", lc.Backlog)
	case lc.Mode&^os.ModePerm != 0:
		return errorf("ListenConfig.Mode is 0%s; want permission bits alone, such as 0o660", octal)
	case lc.Mode != 0 && (!isUnix || isAbstract(address)):
		return errorf("ListenConfig.Mode is 0%s; it is for the files of Unix sockets, and this socket has none", octal)
	case lc.Raw && (isUnix || kind != kindPacket):
		return errorf("ListenConfig.Raw is for UDP; the network is %q", network)
	case lc.ReusePort && isUnix:
		return errors.New("ListenConfig.ReusePort is for TCP and UDP; the system has no such thing for Unix sockets")
	case isUnix && address == "":
		return errors.New("the address is empty; want the path of a socket file")
	case isUnix && strings.IndexByte(address, 0) > 0:
		return errorf("the path %q has a zero byte", address)
	case isUnix && len(address) > maxUnixPath:
		return errorf("the path %q has %d bytes; the system takes at most %d", address, len(address), maxUnixPath)
	}
	return nil
}

// netListener is what *net.TCPListener and *net.UnixListener have in common.
type netListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// A listener is a net.Listener whose accept loop can be paused and unpaused.
type listener struct {
	gate
	ln     netListener
	silent bool // a control socket's: its loop calls no hook
}

// newListener makes e a listener, which takes the descriptor over. With an
// error the descriptor is closed. The listener is paused.
func newListener(u *Upgrader, e *entry) error {
	var ln net.Listener
	err := u.lend(e, func(f *os.File) (err error) {
		ln, err = net.FileListener(f) // makes a copy of its own, close-on-exec from birth
		return err
	})
	if err != nil {
		return err
	}
	var nl netListener
	switch ln := ln.(type) { // an assertion to netListener makes a table at run time
	case *net.TCPListener:
		nl, err = ln, e.checkFound(ln.Addr())
	case *net.UnixListener:
		nl, err = ln, e.checkFound(ln.Addr())
	default:
		err = errorf("a %T cannot be paused", ln)
	}
	if err != nil {
		ln.Close()
		return err
	}
	raw, err := nl.SyscallConn()
	if err != nil {
		ln.Close()
		return err
	}
	l := &listener{gate: gate{u: u, e: e, raw: raw}, ln: nl}
	l.side = l
	l.epoch.Store(1)
	e.raw, e.sock = raw, l
	return nil
}

// public returns l as its callers know it.
func (l *listener) public() net.Listener {
	if l.Addr().Network() == "unixpacket" {
		return &SeqpacketListener{l}
	}
	return l
}

// Addr returns the listener's address.
func (l *listener) Addr() net.Addr {
	if l.e.renewed {
		return &net.UnixAddr{Net: l.e.network, Name: l.e.address}
	}
	return l.ln.Addr()
}

func (l *listener) SyscallConn() (syscall.RawConn, error) { return l.ln.SyscallConn() }

func (l *listener) Accept() (net.Conn, error) {
	var c net.Conn
	for wait := time.Duration(0); ; {
		epoch := l.epoch.Load()
		err := l.pass(func() (err error) {
			c, err = l.ln.Accept()
			return err
		})
		if err == nil {
			return c, nil
		}
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, l.opError("accept", err)
		}
		// The caller has not caused it, and it would end the caller's loop: the
		// process would go on holding a socket that it never answers.
		if !errors.Is(err, syscall.ECONNABORTED) && !l.silent {
			l.u.notifyAcceptError(l.opError("accept", err))
		}
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		if err := l.sleep(epoch, wait); err != nil {
			return nil, l.opError("accept", err)
		}
	}
}

func (l *listener) opError(op string, err error) error {
	if _, ok := err.(*net.OpError); ok {
		return err
	}
	return &net.OpError{Op: op, Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
}

// SetDeadline sets the time at which Accept fails with
// os.ErrDeadlineExceeded; the zero time is none.
func (l *listener) SetDeadline(t time.Time) error {
	if err := l.setDeadline(t); err != nil {
		return l.opError("set", err)
	}
	return nil
}

func (l *listener) setSocketDeadline(t time.Time) error { return l.ln.SetDeadline(t) }

// barrier accepts, and takes nothing because the deadline has passed. The call
// gets ln's read lock after every accept in flight, and those after it find the
// deadline.
func (l *listener) barrier() {
	if c, err := l.ln.Accept(); err == nil {
		c.Close()
	}
}

// detach closes the socket on the package's account. Accept waits for the
// caller's Close.
func (l *listener) detach() {
	l.detachGate()
	_ = l.ln.Close()
}

// Close makes Accept fail with net.ErrClosed, withdraws the socket from what
// is handed on, and removes its file if it has one and this process owns it.
func (l *listener) Close() error {
	detached, err := l.close()
	if err != nil {
		return l.opError("close", err)
	}
	if detached {
		return nil
	}
	return l.ln.Close()
}

// end is detach, except that Accept fails: a control socket's loop ends.
func (l *listener) end() {
	l.mu.Lock()
	l.closed = true
	l.wake()
	l.mu.Unlock()
	l.detach()
}
