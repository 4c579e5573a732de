package ecdysis

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A ListenConfig says how a new socket is made. It is never applied
// to an inherited one, which stays as it was made. The zero value works.
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
	// caller closes it: for health checks that are answered while the process
	// drains. The setting is handed on with the socket. An upgrade ends it
	// like any other.
	KeepOnStop bool
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
// *net.UnixConn, and fails only with net.ErrClosed (the listener was closed,
// this process was stopped or replaced) or with os.ErrDeadlineExceeded (the
// caller's own deadline): shortages of descriptors or memory, and connections
// that break before they are accepted, are waited out. The listener also has
// the methods SetDeadline and SyscallConn of a *net.TCPListener.
//
// Close withdraws the listener from what is handed on, and removes a Unix
// socket's file if this process is its owner: the last one that became ready,
// after its Probation. Just after Ready it may wait some seconds to learn
// whether it is. To leave it open is right, too: the package closes it
// when this process is stopped or replaced.
//
// The error wraps a *net.OpError, or is ErrInProgress during an upgrade,
// ErrUpgraded, ErrStopped or ErrAborted after it.
func (u *Upgrader) ListenWith(lc ListenConfig, network, address string) (net.Listener, error) {
	s, err := u.obtain(lc, kindListener, network, address)
	if err != nil {
		return nil, err
	}
	return s.(*listener).public(), nil
}

// obtain returns the inherited socket for the address, or a new one.
func (u *Upgrader) obtain(lc ListenConfig, kind, network, address string) (socket, error) {
	fail := func(a net.Addr, err error) (socket, error) {
		return nil, fmt.Errorf("ecdysis: %w", &net.OpError{Op: "listen", Net: network, Addr: a, Err: err})
	}
	asked := askedAddr{network, address}
	if err := lc.check(kind, network, address); err != nil {
		return fail(asked, err)
	}
	// The same words need no look-up, which may ask a name server.
	s, err := u.claim(asked, func(r *registry) *entry { return r.claimWords(network, address) })
	if s != nil || err != nil {
		return s, err
	}
	p, err := resolve(network, address)
	if err != nil {
		return fail(asked, err)
	}
	s, err = u.claim(asked, func(r *registry) *entry { return r.claimPlace(p) })
	if s != nil || err != nil {
		return s, err
	}
	e, err := p.open(kind, lc)
	if err != nil {
		return fail(p.addr, err)
	}
	s, err = u.claim(asked, func(*registry) *entry { return e })
	if err != nil {
		e.removeFile()
		e.drop()
		return nil, err
	}
	return s, nil
}

// check refuses what cannot be meant.
func (lc ListenConfig) check(kind, network, address string) error {
	want := "tcp, tcp4, tcp6, unix or unixpacket"
	if kind == kindPacket {
		want = "udp, udp4, udp6 or unixgram"
	}
	typ, isUnix := socketType(network)
	switch {
	case typ == 0 || (typ == unix.SOCK_DGRAM) != (kind == kindPacket):
		return fmt.Errorf("%w; want %s", net.UnknownNetworkError(network), want)
	case lc.Backlog < 0:
		return fmt.Errorf("ListenConfig.Backlog is %d; want 0 (for the system's maximum) or more", lc.Backlog)
	case lc.Backlog != 0 && kind == kindPacket:
		return fmt.Errorf("ListenConfig.Backlog is %d; it is for connections, and a socket for packets has none", lc.Backlog)
	case lc.Mode&^os.ModePerm != 0:
		return fmt.Errorf("ListenConfig.Mode is %#o; want permission bits alone, such as 0o660", uint32(lc.Mode))
	case lc.Mode != 0 && (!isUnix || isAbstract(address)):
		return fmt.Errorf("ListenConfig.Mode is %#o; it is for the files of Unix sockets, and this socket has none", uint32(lc.Mode))
	case lc.ReusePort && isUnix:
		return errors.New("ListenConfig.ReusePort is for TCP and UDP; the system has no such thing for Unix sockets")
	case isUnix && address == "":
		return errors.New("the address is empty; want the path of a socket file")
	case isUnix && strings.IndexByte(address, 0) > 0:
		return fmt.Errorf("the path %q has a zero byte", address)
	case isUnix && len(address) > maxUnixPath:
		return fmt.Errorf("the path %q has %d bytes; the system takes at most %d", address, len(address), maxUnixPath)
	}
	return nil
}

// socketType returns the type of a network's sockets; 0: there is no such
// network.
func socketType(network string) (typ int, isUnix bool) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		return unix.SOCK_STREAM, false
	case "udp", "udp4", "udp6":
		return unix.SOCK_DGRAM, false
	case "unix":
		return unix.SOCK_STREAM, true
	case "unixpacket":
		return unix.SOCK_SEQPACKET, true
	case "unixgram":
		return unix.SOCK_DGRAM, true
	}
	return 0, false
}

// askedAddr is the net.Addr of an address that could not be resolved.
type askedAddr struct{ network, address string }

func (a askedAddr) Network() string { return a.network }
func (a askedAddr) String() string  { return a.address }

// isAbstract tells a Linux name without a file from a path.
func isAbstract(address string) bool {
	return runtime.GOOS == "linux" && address != "" && (address[0] == '@' || address[0] == 0)
}

// A place is where a socket is to be bound.
type place struct {
	network string
	typ     int
	addr    net.Addr // *net.TCPAddr, *net.UDPAddr or *net.UnixAddr
	sa      unix.Sockaddr
	family  int
	v6only  bool
	path    string // absolute, of a Unix socket's file
}

// resolve finds the place that an address stands for, as net.Listen would.
func resolve(network, address string) (*place, error) {
	typ, isUnix := socketType(network)
	if isUnix {
		if address[0] == 0 && isAbstract(address) {
			address = "@" + address[1:]
		}
		p := &place{network: network, typ: typ, addr: &net.UnixAddr{Net: network, Name: address}, family: unix.AF_UNIX, sa: &unix.SockaddrUnix{Name: address}}
		if isAbstract(address) {
			return p, nil
		}
		path, err := absolute(address)
		if err != nil {
			return nil, err
		}
		p.path = path
		return p, nil
	}
	p := &place{network: network, typ: typ, family: unix.AF_INET}
	var ip net.IP
	var port int
	var zone string
	var err error
	if typ == unix.SOCK_DGRAM {
		var a *net.UDPAddr
		if a, err = net.ResolveUDPAddr(network, address); err == nil {
			p.addr, ip, port, zone = a, a.IP, a.Port, a.Zone
		}
	} else {
		var a *net.TCPAddr
		if a, err = net.ResolveTCPAddr(network, address); err == nil {
			p.addr, ip, port, zone = a, a.IP, a.Port, a.Zone
		}
	}
	if err != nil {
		if _, _, serr := net.SplitHostPort(address); serr != nil {
			err = fmt.Errorf("%w (want host:port, as in :80, 127.0.0.1:80 or [::1]:80)", err)
		}
		return nil, err
	}
	only4, only6 := network[len(network)-1] == '4', network[len(network)-1] == '6'
	p.v6only = only6
	ip4 := ip.To4()
	wildcard := ip == nil || ip.IsUnspecified()
	if only6 || ip != nil && ip4 == nil || !only4 && wildcard && dualStack && haveIPv6() {
		p.family = unix.AF_INET6
	}
	if p.family == unix.AF_INET6 {
		sa := &unix.SockaddrInet6{Port: port}
		if !wildcard {
			copy(sa.Addr[:], ip.To16())
		}
		if zone != "" {
			if sa.ZoneId, err = zoneID(zone); err != nil {
				return nil, err
			}
		}
		p.sa = sa
		return p, nil
	}
	sa := &unix.SockaddrInet4{Port: port}
	copy(sa.Addr[:], ip4)
	p.sa = sa
	return p, nil
}

// haveIPv6 reports whether the system has IPv6 at all.
func haveIPv6() bool {
	fd, err := newSocket(unix.AF_INET6, unix.SOCK_STREAM)
	if err == nil {
		unix.Close(fd)
	}
	return !errors.Is(err, unix.EAFNOSUPPORT)
}

func zoneID(zone string) (uint32, error) {
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index), nil
	}
	n, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("no network interface is called %q", zone)
	}
	return uint32(n), nil
}

// key is equal for two places if a socket bound to one serves the other.
func (p *place) key() string {
	if p.path != "" {
		return p.network + " " + p.path
	}
	return boundKey(p.typ, p.sa, p.v6only)
}

// open makes a socket at p, not yet in net's hands.
func (p *place) open(kind string, lc ListenConfig) (*entry, error) {
	fd, err := newSocket(p.family, p.typ)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		err = fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	if err != nil {
		return nil, err
	}
	e := &entry{kind: kind, fd: fd, keep: lc.KeepOnStop}
	if err := p.bind(fd, lc, e); err != nil {
		unix.Close(fd)
		return nil, err
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		e.removeFile()
		e.drop()
		return nil, os.NewSyscallError("getsockname", err)
	}
	e.at = boundKey(p.typ, sa, p.v6only)
	return e, nil
}

// bind sets the options, binds, and listens if p is for connections.
func (p *place) bind(fd int, lc ListenConfig, e *entry) error {
	if p.family == unix.AF_INET6 && dualStack {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, b2i(p.v6only)); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
	}
	if p.family != unix.AF_UNIX {
		// As net does. Two UDP sockets with SO_REUSEADDR could take each
		// other's datagrams.
		option, name := unix.SO_REUSEADDR, "setsockopt SO_REUSEADDR"
		if p.typ == unix.SOCK_DGRAM {
			option, name = unix.SO_BROADCAST, "setsockopt SO_BROADCAST"
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
			return os.NewSyscallError(name, err)
		}
	}
	if lc.ReusePort {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, reusePort, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEPORT", err)
		}
	}
	if lc.Control != nil {
		network := p.network
		switch p.family {
		case unix.AF_INET:
			network = network[:3] + "4"
		case unix.AF_INET6:
			network = network[:3] + "6"
		}
		if err := lc.Control(network, p.addr.String(), rawFD(fd)); err != nil {
			return err
		}
	}
	if p.path != "" {
		return p.bindFile(fd, lc, e)
	}
	if err := unix.Bind(fd, p.sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return p.listen(fd, lc)
}

// listen opens the socket to clients; one for packets is open when it is bound.
func (p *place) listen(fd int, lc ListenConfig) error {
	if p.typ == unix.SOCK_DGRAM {
		return nil
	}
	backlog := lc.Backlog
	if backlog == 0 {
		backlog = 65535 // every kernel lowers it to its own maximum
	}
	return os.NewSyscallError("listen", unix.Listen(fd, backlog))
}

// bindFile binds a socket that has a file. A file that no process listens to
// is replaced, under a lock of its directory, so that of several processes
// that find it stale only one replaces it.
func (p *place) bindFile(fd int, lc ListenConfig, e *entry) error {
	if lc.Mode != 0 && p.typ == unix.SOCK_DGRAM {
		// Who may write to the file can send at once: on Linux it gets no
		// more than these bits from the start. Others refuse the call.
		_ = unix.Fchmod(fd, uint32(lc.Mode))
	}
	err := unix.Bind(fd, p.sa)
	if err == unix.EADDRINUSE {
		unlock, lerr := lockDir(path.Dir(p.path))
		if lerr != nil {
			return lerr
		}
		defer unlock()
		if err := p.removeStale(); err != nil {
			return err
		}
		err = unix.Bind(fd, p.sa)
	}
	if err != nil {
		return os.NewSyscallError("bind", err)
	}
	// Until listen a client is refused: nobody can connect before the mode
	// is set.
	e.path = p.path
	if lc.Mode != 0 {
		err = os.Chmod(p.path, lc.Mode)
	}
	if err == nil {
		err = p.listen(fd, lc)
	}
	var st unix.Stat_t
	if err == nil {
		err = os.NewSyscallError("lstat", unix.Lstat(p.path, &st))
	}
	if err != nil {
		_ = os.Remove(p.path)
		return err
	}
	e.dev, e.ino = uint64(st.Dev), uint64(st.Ino)
	return nil
}

// removeStale removes the socket file at p.path, unless a process listens to
// it or it is something else. It asks by connecting with a datagram socket: a
// live one of another type answers that the type is wrong, one of this type
// gets nothing that it would notice, and nobody is disturbed.
func (p *place) removeStale() error {
	fi, err := os.Lstat(p.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%w: %s is not a socket; remove it or choose another path", os.NewSyscallError("bind", unix.EADDRINUSE), p.path)
	}
	fd, err := newSocket(unix.AF_UNIX, unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, p.sa); err != unix.ECONNREFUSED {
		return fmt.Errorf("%w: another process listens there", os.NewSyscallError("bind", unix.EADDRINUSE))
	}
	if err := os.Remove(p.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing a stale socket file: %w", err)
	}
	return nil
}

// lockDir locks a directory against other processes that replace a file in
// it. Where the directory cannot be opened for want of permission, there is
// no lock to be had, and it does without.
func lockDir(dir string) (unlock func(), err error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.EACCES || err == unix.EPERM {
		return func() {}, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	unlock = func() { unix.Close(fd) }
	for range 200 {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR { // locked, or a file system without locks
			return unlock, nil
		}
		time.Sleep(5 * time.Millisecond) // a lock's end is no event
	}
	unlock()
	return nil, fmt.Errorf("%w: another process has held the lock of %s for a second", os.NewSyscallError("flock", err), dir)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// rawFD is a syscall.RawConn for a socket that is not in the poller's hands.
type rawFD int

func (fd rawFD) Control(f func(uintptr)) error  { f(uintptr(fd)); return nil }
func (fd rawFD) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (fd rawFD) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// A gate holds the calls back that take what clients send: accepting, or
// reading packets. It can be quieted and resumed.
//
// epoch is odd while the gate is quiet. A call that began in another epoch
// than it ended in was interrupted by the package, not by the caller's
// deadline. mu guards the fields below it, every change of epoch and the
// socket's deadline; it is held over no call that blocks.
type gate struct {
	u     *Upgrader
	e     *entry
	side  side
	raw   syscall.RawConn
	epoch atomic.Uint64

	mu       sync.Mutex
	deadline time.Time     // the caller's
	closed   bool          // by the caller
	gone     bool          // by the package
	changed  chan struct{} // if not nil: closed on the next change of any of these
}

// A side is what a gate is the gate of: a *listener or a *packetConn.
type side interface {
	socketDeadline(time.Time) error // sets that of the calls which are held back
	drain()                         // returns when no call is in flight that began before that deadline
}

func (g *gate) control(f func(fd uintptr)) error { return g.raw.Control(f) }

// pass makes a call when the gate is open, and again each time that it was
// interrupted by the package.
func (g *gate) pass(f func() error) error {
	for {
		epoch := g.epoch.Load()
		if epoch%2 != 0 {
			if err := g.sleep(epoch, 0); err != nil {
				return err
			}
			continue
		}
		err := f()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || g.epoch.Load() == epoch {
			return err
		}
	}
}

// sleep waits until the epoch is over, the time is (0: without a limit), or
// with an error until the socket is closed or the caller's deadline is over.
func (g *gate) sleep(epoch uint64, limit time.Duration) error {
	var timer *time.Timer
	for start := time.Now(); ; {
		g.mu.Lock()
		if g.closed || g.gone {
			g.mu.Unlock()
			return net.ErrClosed
		}
		if g.epoch.Load() != epoch {
			g.mu.Unlock()
			return nil
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed, deadline := g.changed, g.deadline
		g.mu.Unlock()

		now := time.Now()
		if !deadline.IsZero() && !now.Before(deadline) {
			return os.ErrDeadlineExceeded
		}
		wait := time.Duration(1<<63 - 1)
		if limit > 0 {
			if wait = limit - now.Sub(start); wait <= 0 {
				return nil
			}
		}
		if !deadline.IsZero() {
			wait = min(wait, deadline.Sub(now))
		}
		if timer == nil {
			timer = time.NewTimer(wait)
			defer timer.Stop()
		} else {
			timer.Reset(wait)
		}
		select {
		case <-changed:
		case <-timer.C:
		}
	}
}

// wake makes those that sleep look again. g.mu is held.
func (g *gate) wake() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// setDeadline sets the caller's deadline.
func (g *gate) setDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.gone {
		return net.ErrClosed
	}
	g.deadline = t
	g.wake()
	if g.epoch.Load()%2 != 0 {
		return nil // resume sets it
	}
	return g.side.socketDeadline(t)
}

// quiet returns when no call is in flight and none can begin.
func (g *gate) quiet() {
	g.mu.Lock()
	if g.epoch.Load()%2 == 0 {
		g.epoch.Add(1)
	}
	_ = g.side.socketDeadline(past) // fails only when closed, which is as quiet
	g.wake()
	g.mu.Unlock()
	g.side.drain()
}

// resume opens a quiet gate. The deadline comes first: a call that sees the new
// epoch must not find the old deadline.
func (g *gate) resume() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.epoch.Load()%2 == 0 {
		return
	}
	_ = g.side.socketDeadline(g.deadline)
	g.epoch.Add(1)
	g.wake()
}

// leave makes the calls fail on the package's account: the caller's Close,
// which comes later, is not an error.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone = true
	g.wake()
}

// close is the caller's Close, but for the socket's own: it makes the calls
// fail, withdraws the socket from what is handed on, and removes its file if
// it has one and this process owns it.
func (g *gate) close() (gone bool, err error) {
	g.mu.Lock()
	closed, gone := g.closed, g.gone
	g.closed = true
	g.wake()
	g.mu.Unlock()
	if closed {
		return gone, net.ErrClosed
	}
	if g.u.withdraw(g.e) && !gone {
		// Whose socket is gone, its file was seen to: a file with that name
		// and even that inode may be another process's by now.
		g.e.removeFile()
	}
	return gone, nil
}

// netListener is what *net.TCPListener and *net.UnixListener have in common.
type netListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// A listener is a net.Listener whose accept loop can be quieted and resumed.
type listener struct {
	gate
	ln netListener
}

// newListener takes e's descriptor into net's hands, or closes it. The
// listener is quiet.
func newListener(u *Upgrader, e *entry) (*listener, error) {
	// net makes a copy of its own, which is close-on-exec from birth.
	f := os.NewFile(uintptr(e.fd), "")
	e.fd = -1
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	nl, ok := ln.(netListener)
	if !ok {
		ln.Close()
		return nil, fmt.Errorf("a %T cannot be quieted", ln)
	}
	raw, err := nl.SyscallConn()
	if err != nil {
		ln.Close()
		return nil, err
	}
	l := &listener{gate: gate{u: u, e: e, raw: raw}, ln: nl}
	l.side = l
	l.epoch.Store(1)
	return l, nil
}

// public returns l as its callers know it.
func (l *listener) public() net.Listener {
	if l.Addr().Network() == "unixpacket" {
		return &SeqpacketListener{l}
	}
	return l
}

func (l *listener) Addr() net.Addr { return l.ln.Addr() }

func (l *listener) SyscallConn() (syscall.RawConn, error) { return l.ln.SyscallConn() }

func (l *listener) Accept() (net.Conn, error) {
	var c net.Conn
	for pause := time.Duration(0); ; {
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
		// Nothing that the caller did, and it would end the caller's loop:
		// the process would go on holding a socket that it never answers.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		if err := l.sleep(epoch, pause); err != nil {
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

func (l *listener) socketDeadline(t time.Time) error { return l.ln.SetDeadline(t) }

// drain accepts, to take nothing, because the time for it has passed: the call
// gets ln's read lock after every accept in flight, and those that come after
// it find the deadline.
func (l *listener) drain() {
	if c, err := l.ln.Accept(); err == nil {
		c.Close()
	}
}

// shut closes the socket on the package's account.
func (l *listener) shut() {
	l.leave()
	_ = l.ln.Close()
}

// Close makes Accept fail with net.ErrClosed, withdraws the socket from what
// is handed on, and removes its file if it has one and this process owns it.
func (l *listener) Close() error {
	gone, err := l.close()
	if err != nil {
		return l.opError("close", err)
	}
	if gone {
		return nil
	}
	return l.ln.Close()
}
