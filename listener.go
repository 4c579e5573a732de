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

// A ListenConfig says how a new listening socket is made. It is never applied
// to an inherited one, which stays as it was made. The zero value works.
type ListenConfig struct {
	// Control, if not nil, is called with the socket before it is bound, as
	// in net.ListenConfig.
	Control func(network, address string, c syscall.RawConn) error
	// Backlog is how many connections may wait to be accepted; the system
	// lowers it to its maximum. 0: that maximum.
	Backlog int
	// Mode are the permission bits of a Unix socket's file, set before the
	// first client can connect. 0: as the umask leaves them.
	Mode os.FileMode
	// ReusePort lets several TCP sockets have one address, and the system
	// spread the connections over them (SO_REUSEPORT; SO_REUSEPORT_LB on
	// FreeBSD). macOS, NetBSD and OpenBSD do not spread.
	ReusePort bool
	// KeepOnStop leaves the listener open on Stop, until the caller closes
	// it: for health checks that are answered while the process drains. The
	// setting is handed on with the socket. An upgrade closes it like any
	// other.
	KeepOnStop bool
}

// Listen is ListenWith with the zero ListenConfig.
func (u *Upgrader) Listen(network, address string) (net.Listener, error) {
	return u.ListenWith(ListenConfig{}, network, address)
}

// ListenWith returns a listener for the address: the inherited one if the
// older process hands it on, otherwise a new one. The network is "tcp",
// "tcp4", "tcp6" or "unix", and addresses are as for net.Listen, with two
// differences: TCP sockets are plain (net.Listen's speak Multipath TCP on
// Linux), and a Unix socket's file is replaced if no process listens to it
// any more. On Linux a Unix address that begins with "@" is abstract.
//
// An inherited socket is found by the words that it was asked for with, or
// else by what they resolve to: ":80" and "[::]:80" find the same one, and so
// do two paths of one file. Asked again for port 0, a successor finds the
// ports of its parent's calls for port 0 in the order of those calls. Several
// sockets of one address are found in that order, too.
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
	l, err := u.listen(lc, network, address)
	if err != nil { // not a nil *listener in an interface
		return nil, err
	}
	return l, nil
}

func (u *Upgrader) listen(lc ListenConfig, network, address string) (*listener, error) {
	fail := func(a net.Addr, err error) (*listener, error) {
		return nil, fmt.Errorf("ecdysis: %w", &net.OpError{Op: "listen", Net: network, Addr: a, Err: err})
	}
	asked := askedAddr{network, address}
	if err := lc.check(network, address); err != nil {
		return fail(asked, err)
	}
	// The same words need no look-up, which may ask a name server.
	e, err := u.claim(func(r *registry) *entry { return r.claimWords(network, address) })
	if err != nil {
		return nil, err
	}
	if e == nil {
		p, err := resolve(network, address)
		if err != nil {
			return fail(asked, err)
		}
		if e, err = u.claim(func(r *registry) *entry { return r.claimPlace(p) }); err != nil {
			return nil, err
		}
		if e == nil {
			if e, err = p.listen(lc); err != nil {
				return fail(p.addr, err)
			}
			e.keep = lc.KeepOnStop
		}
	}
	e.network, e.address = network, address
	l, err := newListener(u, e)
	if err != nil {
		return fail(asked, err)
	}
	if err := u.add(l); err != nil {
		if !e.inherited {
			e.removeFile()
		}
		l.shut()
		return nil, err
	}
	return l, nil
}

// check refuses what cannot be meant.
func (lc ListenConfig) check(network, address string) error {
	isUnix := network == "unix"
	switch {
	case network != "tcp" && network != "tcp4" && network != "tcp6" && !isUnix:
		return fmt.Errorf("%w; want tcp, tcp4, tcp6 or unix", net.UnknownNetworkError(network))
	case lc.Backlog < 0:
		return fmt.Errorf("ListenConfig.Backlog is %d; want 0 (for the system's maximum) or more", lc.Backlog)
	case lc.Mode&^os.ModePerm != 0:
		return fmt.Errorf("ListenConfig.Mode is %#o; want permission bits alone, such as 0o660", uint32(lc.Mode))
	case lc.Mode != 0 && (!isUnix || isAbstract(address)):
		return fmt.Errorf("ListenConfig.Mode is %#o; it is for the files of Unix sockets, and this socket has none", uint32(lc.Mode))
	case lc.ReusePort && isUnix:
		return errors.New("ListenConfig.ReusePort is for TCP; the system has no such thing for Unix sockets")
	case isUnix && address == "":
		return errors.New("the address is empty; want the path of a socket file")
	case isUnix && strings.IndexByte(address, 0) > 0:
		return fmt.Errorf("the path %q has a zero byte", address)
	case isUnix && len(address) > maxUnixPath:
		return fmt.Errorf("the path %q has %d bytes; the system takes at most %d", address, len(address), maxUnixPath)
	}
	return nil
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
	addr    net.Addr // *net.TCPAddr or *net.UnixAddr
	sa      unix.Sockaddr
	family  int
	v6only  bool
	path    string // absolute, of a Unix socket's file
}

// resolve finds the place that an address stands for, as net.Listen would.
func resolve(network, address string) (*place, error) {
	if network == "unix" {
		if address[0] == 0 && isAbstract(address) {
			address = "@" + address[1:]
		}
		p := &place{network: network, addr: &net.UnixAddr{Net: network, Name: address}, family: unix.AF_UNIX, sa: &unix.SockaddrUnix{Name: address}}
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
	a, err := net.ResolveTCPAddr(network, address)
	if err != nil {
		if _, _, serr := net.SplitHostPort(address); serr != nil {
			err = fmt.Errorf("%w (want host:port, as in :80, 127.0.0.1:80 or [::1]:80)", err)
		}
		return nil, err
	}
	p := &place{network: network, addr: a, family: unix.AF_INET, v6only: network == "tcp6"}
	ip4 := a.IP.To4()
	wildcard := a.IP == nil || a.IP.IsUnspecified()
	if network == "tcp6" || a.IP != nil && ip4 == nil || network == "tcp" && wildcard && dualStack && haveIPv6() {
		p.family = unix.AF_INET6
	}
	if p.family == unix.AF_INET6 {
		sa := &unix.SockaddrInet6{Port: a.Port}
		if !wildcard {
			copy(sa.Addr[:], a.IP.To16())
		}
		if a.Zone != "" {
			if sa.ZoneId, err = zoneID(a.Zone); err != nil {
				return nil, err
			}
		}
		p.sa = sa
		return p, nil
	}
	sa := &unix.SockaddrInet4{Port: a.Port}
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
		return "unix " + p.path
	}
	return boundKey(p.sa, p.v6only)
}

// listen makes a listening socket at p, not yet in net's hands.
func (p *place) listen(lc ListenConfig) (*entry, error) {
	fd, err := newSocket(p.family, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	e := &entry{fd: fd}
	if err := p.bind(fd, lc, e); err != nil {
		unix.Close(fd)
		return nil, err
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		e.drop()
		return nil, os.NewSyscallError("getsockname", err)
	}
	e.at = boundKey(sa, p.v6only)
	return e, nil
}

// bind sets the options, binds and listens.
func (p *place) bind(fd int, lc ListenConfig, e *entry) error {
	if p.family == unix.AF_INET6 && dualStack {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, b2i(p.v6only)); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
	}
	if p.family != unix.AF_UNIX {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
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
			network = "tcp4"
		case unix.AF_INET6:
			network = "tcp6"
		}
		if err := lc.Control(network, p.addr.String(), rawFD(fd)); err != nil {
			return err
		}
	}
	backlog := lc.Backlog
	if backlog == 0 {
		backlog = 65535 // every kernel lowers it to its own maximum
	}
	if p.path != "" {
		return p.bindFile(fd, lc.Mode, backlog, e)
	}
	if err := unix.Bind(fd, p.sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, backlog))
}

// bindFile binds a socket that has a file. A file that no process listens to
// is replaced, under a lock of its directory, so that of several processes
// that find it stale only one replaces it.
func (p *place) bindFile(fd int, mode os.FileMode, backlog int, e *entry) error {
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
	if mode != 0 {
		err = os.Chmod(p.path, mode)
	}
	if err == nil {
		err = os.NewSyscallError("listen", unix.Listen(fd, backlog))
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
// it or it is something else. It asks by connecting with a different type of
// socket: a live one answers that the type is wrong, and nobody is disturbed.
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

// netListener is what *net.TCPListener and *net.UnixListener have in common.
type netListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// A listener is a net.Listener whose accept loop can be quieted and resumed.
//
// epoch is odd while the listener is quiet. An accept that began in another
// epoch than it ended in was interrupted by the package, not by the caller's
// deadline. mu guards the fields below it, every change of epoch and ln's
// deadline; it is held over no call that blocks.
type listener struct {
	u     *Upgrader
	e     *entry
	ln    netListener
	raw   syscall.RawConn
	epoch atomic.Uint64

	mu       sync.Mutex
	deadline time.Time     // the caller's
	closed   bool          // by the caller
	gone     bool          // by the package
	changed  chan struct{} // if not nil: closed on the next change of any of these
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
	l := &listener{u: u, e: e, ln: nl, raw: raw}
	l.epoch.Store(1)
	e.l = l
	return l, nil
}

func (l *listener) Addr() net.Addr { return l.ln.Addr() }

func (l *listener) SyscallConn() (syscall.RawConn, error) { return l.ln.SyscallConn() }

func (l *listener) Accept() (net.Conn, error) {
	var pause time.Duration
	for {
		epoch := l.epoch.Load()
		if epoch%2 != 0 {
			if err := l.sleep(epoch, 0); err != nil {
				return nil, l.opError("accept", err)
			}
			continue
		}
		c, err := l.ln.Accept()
		if err == nil {
			return c, nil
		}
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if l.epoch.Load() == epoch {
				return nil, err
			}
			continue
		}
		// Nothing that the caller did, and it would end the caller's loop:
		// the process would go on holding a socket that it never answers.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		if err := l.sleep(epoch, pause); err != nil {
			return nil, l.opError("accept", err)
		}
	}
}

// sleep waits until the epoch is over, the time is (0: without a limit), or
// with an error until the listener is closed or the caller's deadline is over.
func (l *listener) sleep(epoch uint64, limit time.Duration) error {
	var timer *time.Timer
	for start := time.Now(); ; {
		l.mu.Lock()
		if l.closed || l.gone {
			l.mu.Unlock()
			return net.ErrClosed
		}
		if l.epoch.Load() != epoch {
			l.mu.Unlock()
			return nil
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed, deadline := l.changed, l.deadline
		l.mu.Unlock()

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

func (l *listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
}

// wake makes those that sleep look again. l.mu is held.
func (l *listener) wake() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// SetDeadline sets the time at which Accept fails with
// os.ErrDeadlineExceeded; the zero time is none.
func (l *listener) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.gone {
		return l.opError("set", net.ErrClosed)
	}
	l.deadline = t
	l.wake()
	if l.epoch.Load()%2 != 0 {
		return nil // resume sets it
	}
	return l.ln.SetDeadline(t)
}

// quiet returns when no accept is in flight and none can begin.
func (l *listener) quiet() {
	l.mu.Lock()
	if l.epoch.Load()%2 == 0 {
		l.epoch.Add(1)
	}
	_ = l.ln.SetDeadline(past) // fails only when closed, which is as quiet
	l.wake()
	l.mu.Unlock()
	// An accept holds ln's read lock. This one, which takes nothing because
	// its time has passed, gets that lock after every accept in flight, and
	// those that come after it find the deadline.
	if c, err := l.ln.Accept(); err == nil {
		c.Close()
	}
}

// resume lets a quiet listener accept. The deadline comes first: an accept
// that sees the new epoch must not find the old deadline.
func (l *listener) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch.Load()%2 == 0 {
		return
	}
	_ = l.ln.SetDeadline(l.deadline)
	l.epoch.Add(1)
	l.wake()
}

// shut closes the socket on the package's account: the caller's Close, which
// comes later, is not an error.
func (l *listener) shut() {
	l.mu.Lock()
	l.gone = true
	l.wake()
	l.mu.Unlock()
	_ = l.ln.Close()
}

// Close makes Accept fail with net.ErrClosed, withdraws the socket from what
// is handed on, and removes its file if it has one and this process owns it.
func (l *listener) Close() error {
	l.mu.Lock()
	closed, gone := l.closed, l.gone
	l.closed = true
	l.wake()
	l.mu.Unlock()
	if closed {
		return l.opError("close", net.ErrClosed)
	}
	if l.u.withdraw(l.e) {
		l.e.removeFile()
	}
	if gone {
		return nil
	}
	return l.ln.Close()
}
