//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package ecdysis

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// This file is the package on systems other than Unix, where a process cannot hand
// anything on. Each process is the first one of a chain, serves, and stops. Upgrade
// fails. The exported declarations are those of the other files, and the comments
// here say what differs.

// errOther is the reason why a call fails on these systems.
var errOther = errorf("this system cannot hand a process's sockets on: %w", errors.ErrUnsupported)

// Upgrader is as on Unix. See Upgrade for what differs.
type Upgrader struct {
	opts                          Options
	upgrades, stops, partialStops chan os.Signal
	ready, exit, ended            chan struct{}

	mu          sync.Mutex // guards the fields below, and is not held over a hook
	phase       phase
	pending     EventKind // a stop that came while Ready ran, or ""
	cause       os.Signal // the signal of the pending stop, or nil
	last        Event     // the result of Wait
	sockets     []*gate
	acceptError time.Time // of the last EventAcceptError
}

type phase int

const (
	starting phase = iota
	readying
	serving
	partial // accepting has ended
	stopped
)

// process is the Upgrader of this process.
var process atomic.Pointer[Upgrader]

// New returns this process's Upgrader. A process can have one. An option that names
// a control socket is an error that wraps errors.ErrUnsupported, because there are
// no control sockets on these systems.
func New(opts Options) (*Upgrader, error) {
	if err := opts.check(); err != nil {
		return nil, errorf("ecdysis: new: %w", err)
	}
	u := &Upgrader{
		opts:         opts,
		upgrades:     make(chan os.Signal, 1),
		stops:        make(chan os.Signal, 2),
		partialStops: make(chan os.Signal, 1),
		ready:        make(chan struct{}),
		exit:         make(chan struct{}),
		ended:        make(chan struct{}),
	}
	if !process.CompareAndSwap(nil, u) {
		return nil, errors.New("ecdysis: New was called before; a process has one Upgrader")
	}
	if len(opts.UpgradeSignals) > 0 {
		signal.Notify(u.upgrades, opts.UpgradeSignals...)
	}
	return u, nil
}

func absolute(name string) (string, error) { return filepath.Abs(name) }

func uncatchable(s os.Signal) bool { return s == os.Kill }

func controlPath(string) (string, error) {
	return "", errorf("there are no control sockets on this system: %w", errors.ErrUnsupported)
}

// Successor returns false.
func Successor() bool { return false }

// HasParent returns false.
func (u *Upgrader) HasParent() bool { return false }

// Generation returns 0.
func (u *Upgrader) Generation() int { return 0 }

// Exit is as on Unix: the channel is closed when this process has been stopped.
func (u *Upgrader) Exit() <-chan struct{} { return u.exit }

// WaitForParent returns nil, because there is no predecessor.
func (u *Upgrader) WaitForParent(context.Context) error { return nil }

// Fail returns reason.
func (u *Upgrader) Fail(reason error) error { return reason }

// State returns a reader that is at its end.
func (u *Upgrader) State() io.Reader { return strings.NewReader("") }

// Upgrade returns an error that wraps errors.ErrUnsupported, or ErrNotReady
// before Ready, or ErrStopped after a stop.
func (u *Upgrader) Upgrade() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch u.phase {
	case starting, readying:
		return ErrNotReady
	case partial, stopped:
		return ErrStopped
	}
	return errorf("ecdysis: upgrade: %w", errOther)
}

// Ready is as on Unix in the first process of a chain.
func (u *Upgrader) Ready() error {
	if u.ready == nil {
		return errZero
	}
	u.mu.Lock()
	p := u.phase
	if p == starting {
		u.phase = readying
	}
	u.mu.Unlock()
	switch p {
	case readying:
		return ErrInProgress
	case serving:
		return nil
	case partial, stopped:
		return ErrStopped
	}
	returned := false
	defer func() {
		if !returned { // the hook has panicked or ended the goroutine
			u.setPhase(starting)
			u.stopPending()
		}
	}()
	u.catchStops()
	err := u.writePIDFile()
	if err == nil {
		u.notify(Event{Kind: EventReady, PID: os.Getpid()})
	}
	returned = true
	if err != nil {
		u.setPhase(starting)
		if u.stopPending() {
			return ErrStopped
		}
		return errorf("ecdysis: ready: %w", err)
	}
	u.mu.Lock()
	u.phase = serving
	if u.pending == "" {
		close(u.ready)
	}
	u.mu.Unlock()
	if u.stopPending() {
		return ErrStopped
	}
	return nil
}

func (u *Upgrader) setPhase(p phase) {
	u.mu.Lock()
	u.phase = p
	u.mu.Unlock()
}

func (u *Upgrader) writePIDFile() error {
	path := u.opts.PIDFile
	if path == "" {
		return nil
	}
	temp := path + "." + strconv.Itoa(os.Getpid())
	err := os.WriteFile(temp, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return errorf("PID file: %w", err)
	}
	return nil
}

// Stop is as on Unix in the first process of a chain.
func (u *Upgrader) Stop() { u.stop(EventStopping, nil) }

func (u *Upgrader) stop(kind EventKind, cause os.Signal) {
	if u.ready == nil {
		return
	}
	u.mu.Lock()
	switch p := u.phase; {
	case p == stopped || p == partial && kind == EventPartialStop:
		u.mu.Unlock()
		return
	case p == readying: // Ready carries the stop out before it returns
		if u.pending != EventStopping {
			u.pending, u.cause = kind, cause
		}
		u.mu.Unlock()
		return
	case p == serving && kind == EventPartialStop:
		u.phase = partial
	default: // before Ready there is nothing to drain
		kind, u.phase = EventStopping, stopped
	}
	u.mu.Unlock()

	e := Event{Kind: kind, Signal: cause, PID: os.Getpid()}
	u.notify(e)
	u.mu.Lock()
	sockets := u.sockets
	u.sockets = nil
	for _, g := range sockets {
		if g.keep && kind == EventStopping {
			continue
		}
		g.end()
	}
	u.mu.Unlock()
	signal.Stop(u.stops)
	signal.Stop(u.partialStops)
	u.mu.Lock()
	first := u.last.Kind == ""
	if first {
		u.last = e
	}
	u.mu.Unlock()
	if first {
		close(u.ended)
	}
	if kind == EventPartialStop {
		return
	}
	if b, err := os.ReadFile(u.opts.PIDFile); err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(os.Getpid()) {
		_ = os.Remove(u.opts.PIDFile)
	}
	close(u.exit)
}

// stopPending carries out a stop that came while Ready ran.
func (u *Upgrader) stopPending() bool {
	u.mu.Lock()
	kind, cause := u.pending, u.cause
	u.pending, u.cause = "", nil
	u.mu.Unlock()
	if kind != "" {
		u.stop(kind, cause)
	}
	return kind != ""
}

func (u *Upgrader) catchStops() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last.Kind != "" {
		return
	}
	if len(u.opts.StopSignals) > 0 {
		signal.Notify(u.stops, u.opts.StopSignals...)
	}
	if len(u.opts.PartialStopSignals) > 0 {
		signal.Notify(u.partialStops, u.opts.PartialStopSignals...)
	}
}

// Wait is as on Unix, but it reports each of Options.UpgradeSignals as an upgrade
// that has failed.
func (u *Upgrader) Wait() Event {
	u.catchStops()
	for {
		select {
		case s := <-u.upgrades:
			if err := u.Upgrade(); err != ErrStopped {
				u.notify(Event{Kind: EventUpgradeFailed, Signal: s, Err: err})
			}
		case s := <-u.stops:
			u.stop(EventStopping, s)
		case s := <-u.partialStops:
			u.stop(EventPartialStop, s)
		case <-u.ended:
			u.mu.Lock()
			defer u.mu.Unlock()
			return u.last
		}
	}
}

func (u *Upgrader) notify(e Event) {
	if u.opts.Notify != nil {
		u.opts.Notify(e)
	}
}

// notifyAcceptError reports the first error of Accept, and then at most one a
// minute.
func (u *Upgrader) notifyAcceptError(err error) {
	u.mu.Lock()
	due := time.Since(u.acceptError) >= time.Minute
	if due {
		u.acceptError = time.Now()
	}
	u.mu.Unlock()
	if due {
		u.notify(Event{Kind: EventAcceptError, PID: os.Getpid(), Err: err})
	}
}

// Calls for things that are handed on elsewhere.

// AddConn does nothing, because there is no successor.
func (u *Upgrader) AddConn(string, net.Conn) error { return nil }

// AddFile does nothing, because there is no successor.
func (u *Upgrader) AddFile(string, *os.File) error { return nil }

// FileNames returns nil.
func (u *Upgrader) FileNames(string) []string { return nil }

// Conn returns an error that wraps fs.ErrNotExist.
func (u *Upgrader) Conn(name string) (net.Conn, error) { return nil, notInherited("connection", name) }

// File returns an error that wraps fs.ErrNotExist.
func (u *Upgrader) File(name string) (*os.File, error) { return nil, notInherited("file", name) }

// Listener returns an error that wraps fs.ErrNotExist.
func (u *Upgrader) Listener(name string) (net.Listener, error) {
	return nil, notInherited("listener", name)
}

// PacketConn returns an error that wraps fs.ErrNotExist.
func (u *Upgrader) PacketConn(name string) (net.PacketConn, error) {
	return nil, notInherited("packet socket", name)
}

func notInherited(what, name string) error {
	return errorf("ecdysis: %s %q: %w", what, name, fs.ErrNotExist)
}

// DatagramPair returns an error that wraps errors.ErrUnsupported.
func (u *Upgrader) DatagramPair(name string) (toParent, toChild *net.UnixConn, err error) {
	return nil, nil, errorf("ecdysis: datagram pair %q: %w", name, errOther)
}

// Unregistered returns an error that wraps errors.ErrUnsupported.
func (u *Upgrader) Unregistered() ([]string, error) {
	return nil, errorf("ecdysis: unregistered: %w", errOther)
}

// A Reply is as on Unix.
type Reply struct {
	PID        int // of the successor that serves, or of the process that stops
	Generation int // of that process
}

// String returns "pid=1234 generation=2".
func (r Reply) String() string {
	return "pid=" + strconv.Itoa(r.PID) + " generation=" + strconv.Itoa(r.Generation)
}

// Request returns an error that wraps errors.ErrUnsupported.
func Request(_ context.Context, path string) (Reply, error) {
	return Reply{}, errorf("ecdysis: request at %q: %w", path, errOther)
}

// A Cred is as on Unix.
type Cred struct {
	PID int // 0 if the system does not tell, or the process is not visible from here
	UID int // the effective user ID
}

// PeerCred returns an error that wraps errors.ErrUnsupported.
func PeerCred(syscall.Conn) (Cred, error) {
	return Cred{}, errorf("ecdysis: peer credentials: %w", errors.ErrUnsupported)
}

// ReadFiles returns an error that wraps errors.ErrUnsupported.
func ReadFiles(syscall.Conn, []byte) (n int, files []*os.File, err error) {
	return 0, nil, errorf("ecdysis: read files: %w", errors.ErrUnsupported)
}

// WriteFiles returns an error that wraps errors.ErrUnsupported.
func WriteFiles(syscall.Conn, []byte, ...*os.File) (n int, err error) {
	return 0, errorf("ecdysis: write files: %w", errors.ErrUnsupported)
}

// MemoryFile returns an error that wraps errors.ErrUnsupported.
func MemoryFile() (*os.File, error) {
	return nil, errorf("ecdysis: memory file: %w", errors.ErrUnsupported)
}

// Sockets.

// A ListenConfig is as on Unix. Backlog has no effect, and ReusePort is
// not supported.
type ListenConfig struct {
	Control    func(network, address string, c syscall.RawConn) error
	Backlog    int
	Mode       os.FileMode
	ReusePort  bool
	KeepOnStop bool
	Raw        bool
}

// A gate holds the calls that receive from clients, until Ready has succeeded. After
// a stop it holds them until the caller ends them.
type gate struct {
	u    *Upgrader
	keep bool                    // ListenConfig.KeepOnStop
	shut func()                  // ends the calls that wait in the system
	set  func(t time.Time) error // sets the deadline of the calls

	mu       sync.Mutex    // guards the fields below
	deadline time.Time     // the caller's deadline
	closed   bool          // the caller has closed the socket
	over     bool          // a stop has ended the socket
	changed  chan struct{} // closed on the next change of the other fields
}

// register makes g one of u's sockets.
func (u *Upgrader) register(g *gate) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch u.phase {
	case readying:
		return ErrInProgress
	case partial, stopped:
		return ErrStopped
	}
	u.sockets = append(u.sockets, g)
	return nil
}

func newGate(u *Upgrader, keep bool) *gate {
	return &gate{u: u, keep: keep, changed: make(chan struct{})}
}

// change wakes the calls in wait. g.mu is held.
func (g *gate) change() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// pass waits until f may run, and calls it. It does not return an error that a stop
// has caused, but waits again.
func (g *gate) pass(f func() error) error {
	for {
		if err := g.wait(); err != nil {
			return err
		}
		err := f()
		g.mu.Lock()
		over := g.over && !g.closed
		g.mu.Unlock()
		if err == nil || !over || !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// wait returns nil when a call may begin. It returns an error if the caller has
// closed the socket or its deadline has passed.
func (g *gate) wait() error {
	for {
		g.mu.Lock()
		closed, over, deadline, changed := g.closed, g.over, g.deadline, g.changed
		g.mu.Unlock()
		ready := g.u.ready
		select {
		case <-ready:
			if !over && !closed {
				return nil
			}
			ready = nil
		default:
		}
		if closed {
			return net.ErrClosed
		}
		var limit <-chan time.Time
		if !deadline.IsZero() {
			d := time.Until(deadline)
			if d <= 0 {
				return os.ErrDeadlineExceeded
			}
			limit = time.After(d)
		}
		select {
		case <-ready:
		case <-changed:
		case <-limit:
		}
	}
}

func (g *gate) setDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return net.ErrClosed
	}
	g.deadline = t
	g.change()
	if g.over {
		return nil
	}
	return g.set(t)
}

// end ends the socket because of a stop.
func (g *gate) end() {
	g.mu.Lock()
	g.over = true
	g.change()
	g.mu.Unlock()
	g.shut()
}

// close records that the caller has closed the socket. It reports whether this is
// the first call, and whether a stop has ended the socket before.
func (g *gate) close() (first, over bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	first, g.closed = !g.closed, true
	g.change()
	return first, g.over
}

// Listen is ListenWith with the zero ListenConfig.
func (u *Upgrader) Listen(network, address string) (net.Listener, error) {
	return u.ListenWith(ListenConfig{}, network, address)
}

// ListenWith is net.ListenConfig.Listen, but Accept is as on Unix. The network is
// "tcp", "tcp4", "tcp6" or "unix".
func (u *Upgrader) ListenWith(lc ListenConfig, network, address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) { return nil, errorf("ecdysis: %w", err) }
	if lc.ReusePort || lc.Raw || network == "unixpacket" {
		return fail(&net.OpError{Op: "listen", Net: network, Err: errors.ErrUnsupported})
	}
	nlc := net.ListenConfig{Control: lc.Control}
	ln, err := nlc.Listen(context.Background(), network, address)
	if err != nil {
		return fail(err)
	}
	nl, ok := ln.(netListener)
	if ok && lc.Mode != 0 {
		err = os.Chmod(address, lc.Mode)
	}
	l := &listener{gate: newGate(u, lc.KeepOnStop), ln: nl}
	if err == nil && ok {
		l.shut, l.set = func() { _ = nl.Close() }, nl.SetDeadline
		err = u.register(l.gate)
	}
	if err != nil || !ok {
		ln.Close()
		if err == nil || err == ErrInProgress || err == ErrStopped {
			return nil, err
		}
		return fail(err)
	}
	return l, nil
}

type netListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

type listener struct {
	*gate
	ln netListener
}

func (l *listener) Addr() net.Addr { return l.ln.Addr() }

func (l *listener) SyscallConn() (syscall.RawConn, error) { return l.ln.SyscallConn() }

func (l *listener) opError(op string, err error) error {
	if _, ok := err.(*net.OpError); ok || err == nil {
		return err
	}
	return &net.OpError{Op: op, Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
}

func (l *listener) Accept() (c net.Conn, err error) {
	for pause := time.Duration(0); ; {
		err = l.pass(func() (err error) {
			c, err = l.ln.Accept()
			return err
		})
		if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return c, l.opError("accept", err)
		}
		l.u.notifyAcceptError(l.opError("accept", err))
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		time.Sleep(pause)
	}
}

func (l *listener) SetDeadline(t time.Time) error { return l.opError("set", l.setDeadline(t)) }

func (l *listener) Close() error {
	first, over := l.close()
	switch {
	case !first:
		return l.opError("close", net.ErrClosed)
	case over:
		return nil
	}
	return l.ln.Close()
}

// ListenPacket is ListenPacketWith with the zero ListenConfig.
func (u *Upgrader) ListenPacket(network, address string) (net.PacketConn, error) {
	return u.ListenPacketWith(ListenConfig{}, network, address)
}

// ListenPacketWith is net.ListenConfig.ListenPacket, but reads are as on Unix.
func (u *Upgrader) ListenPacketWith(lc ListenConfig, network, address string) (net.PacketConn, error) {
	fail := func(err error) (net.PacketConn, error) { return nil, errorf("ecdysis: %w", err) }
	if lc.ReusePort {
		return fail(&net.OpError{Op: "listen", Net: network, Err: errors.ErrUnsupported})
	}
	nlc := net.ListenConfig{Control: lc.Control}
	c, err := nlc.ListenPacket(context.Background(), network, address)
	if err != nil {
		return fail(err)
	}
	p := &packetConn{gate: newGate(u, lc.KeepOnStop)}
	var public net.PacketConn
	switch c := c.(type) {
	case *net.UDPConn:
		if lc.Raw {
			return c, nil
		}
		p.c, public = c, &UDPConn{c, p}
	case *net.UnixConn:
		p.c, public = c, &UnixgramConn{c, p}
	default:
		c.Close()
		return fail(net.UnknownNetworkError(network))
	}
	p.shut, p.set = func() { _ = p.c.SetReadDeadline(time.Unix(1, 0)) }, p.c.SetReadDeadline
	if err := u.register(p.gate); err != nil {
		c.Close()
		return nil, err
	}
	return public, nil
}

type netPacketConn interface {
	net.Conn
	net.PacketConn
	syscall.Conn
}

type packetConn struct {
	*gate
	c netPacketConn
}

func (p *packetConn) read(f func() error) error {
	err := p.pass(f)
	if err == net.ErrClosed || err == os.ErrDeadlineExceeded { // an error of the gate itself
		err = p.opError("read", err)
	}
	return err
}

func (p *packetConn) opError(op string, err error) error {
	a := p.c.LocalAddr()
	return &net.OpError{Op: op, Net: a.Network(), Source: a, Err: err}
}

func (p *packetConn) setReadDeadline(t time.Time) error {
	err := p.setDeadline(t)
	if err == net.ErrClosed {
		err = p.opError("set", err)
	}
	return err
}

func (p *packetConn) setBothDeadlines(t time.Time) error {
	if err := p.c.SetWriteDeadline(t); err != nil {
		return err
	}
	return p.setReadDeadline(t)
}

func (p *packetConn) closeAll() error {
	p.close()
	return p.c.Close() // returns the error of a second call
}

func (p *packetConn) readOnly(b []byte) (n int, err error) {
	err = p.read(func() (err error) { n, err = p.c.Read(b); return err })
	return n, err
}

func (p *packetConn) readFrom(b []byte) (n int, a net.Addr, err error) {
	err = p.read(func() (err error) { n, a, err = p.c.ReadFrom(b); return err })
	return n, a, err
}

func (p *packetConn) raw() (syscall.RawConn, error) {
	raw, err := p.c.SyscallConn()
	return packetRaw{raw, p}, err
}

type packetRaw struct {
	syscall.RawConn
	p *packetConn
}

func (r packetRaw) Read(f func(fd uintptr) bool) error {
	return r.p.read(func() error { return r.RawConn.Read(f) })
}

// A UDPConn is a *net.UDPConn whose reads wait until Ready has succeeded.
type UDPConn struct {
	*net.UDPConn
	p *packetConn
}

// Read is as on Unix.
func (c *UDPConn) Read(b []byte) (int, error) { return c.p.readOnly(b) }

// ReadFrom is as on Unix.
func (c *UDPConn) ReadFrom(b []byte) (int, net.Addr, error) { return c.p.readFrom(b) }

// ReadFromUDP is as on Unix.
func (c *UDPConn) ReadFromUDP(b []byte) (n int, a *net.UDPAddr, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UDPConn.ReadFromUDP(b); return err })
	return n, a, err
}

// ReadFromUDPAddrPort is as on Unix.
func (c *UDPConn) ReadFromUDPAddrPort(b []byte) (n int, a netip.AddrPort, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UDPConn.ReadFromUDPAddrPort(b); return err })
	return n, a, err
}

// ReadMsgUDP is as on Unix.
func (c *UDPConn) ReadMsgUDP(b, oob []byte) (n, oobn, flags int, a *net.UDPAddr, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UDPConn.ReadMsgUDP(b, oob); return err })
	return n, oobn, flags, a, err
}

// ReadMsgUDPAddrPort is as on Unix.
func (c *UDPConn) ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, a netip.AddrPort, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UDPConn.ReadMsgUDPAddrPort(b, oob); return err })
	return n, oobn, flags, a, err
}

// SetDeadline is as on Unix.
func (c *UDPConn) SetDeadline(t time.Time) error { return c.p.setBothDeadlines(t) }

// SetReadDeadline is as on Unix.
func (c *UDPConn) SetReadDeadline(t time.Time) error { return c.p.setReadDeadline(t) }

// SyscallConn is as on Unix.
func (c *UDPConn) SyscallConn() (syscall.RawConn, error) { return c.p.raw() }

// Close is as on Unix.
func (c *UDPConn) Close() error { return c.p.closeAll() }

// A UnixgramConn is a *net.UnixConn whose reads wait until Ready has succeeded.
type UnixgramConn struct {
	*net.UnixConn
	p *packetConn
}

// Read is as on Unix.
func (c *UnixgramConn) Read(b []byte) (int, error) { return c.p.readOnly(b) }

// ReadFrom is as on Unix.
func (c *UnixgramConn) ReadFrom(b []byte) (int, net.Addr, error) { return c.p.readFrom(b) }

// ReadFromUnix is as on Unix.
func (c *UnixgramConn) ReadFromUnix(b []byte) (n int, a *net.UnixAddr, err error) {
	err = c.p.read(func() (err error) { n, a, err = c.UnixConn.ReadFromUnix(b); return err })
	return n, a, err
}

// ReadMsgUnix is as on Unix.
func (c *UnixgramConn) ReadMsgUnix(b, oob []byte) (n, oobn, flags int, a *net.UnixAddr, err error) {
	err = c.p.read(func() (err error) { n, oobn, flags, a, err = c.UnixConn.ReadMsgUnix(b, oob); return err })
	return n, oobn, flags, a, err
}

// SetDeadline is as on Unix.
func (c *UnixgramConn) SetDeadline(t time.Time) error { return c.p.setBothDeadlines(t) }

// SetReadDeadline is as on Unix.
func (c *UnixgramConn) SetReadDeadline(t time.Time) error { return c.p.setReadDeadline(t) }

// SyscallConn is as on Unix.
func (c *UnixgramConn) SyscallConn() (syscall.RawConn, error) { return c.p.raw() }

// Close is as on Unix.
func (c *UnixgramConn) Close() error { return c.p.closeAll() }

// ListenSeqpacket returns an error that wraps errors.ErrUnsupported.
func (u *Upgrader) ListenSeqpacket(path string) (*SeqpacketListener, error) {
	_, err := u.Listen("unixpacket", path)
	return nil, err
}

// A SeqpacketListener is as on Unix. These systems have none.
type SeqpacketListener struct{ l *listener }

// Accept is as on Unix.
func (l *SeqpacketListener) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }

// AcceptSeqpacket is as on Unix.
func (l *SeqpacketListener) AcceptSeqpacket() (*SeqpacketConn, error) {
	return nil, errors.ErrUnsupported
}

// Addr is as on Unix.
func (l *SeqpacketListener) Addr() net.Addr { return l.l.Addr() }

// SetDeadline is as on Unix.
func (l *SeqpacketListener) SetDeadline(t time.Time) error { return l.l.SetDeadline(t) }

// SyscallConn is as on Unix.
func (l *SeqpacketListener) SyscallConn() (syscall.RawConn, error) { return l.l.SyscallConn() }

// Close is as on Unix.
func (l *SeqpacketListener) Close() error { return l.l.Close() }

// A SeqpacketConn is as on Unix. These systems have none.
type SeqpacketConn struct{ c *net.UnixConn }

// Recv is as on Unix.
func (c *SeqpacketConn) Recv(b []byte) (n int, err error) { return c.c.Read(b) }

// Send is as on Unix.
func (c *SeqpacketConn) Send(b []byte) error {
	_, err := c.c.Write(b)
	return err
}

// Read is as on Unix.
func (c *SeqpacketConn) Read(b []byte) (int, error) { return c.c.Read(b) }

// Write is as on Unix.
func (c *SeqpacketConn) Write(b []byte) (int, error) { return c.c.Write(b) }

// LocalAddr is as on Unix.
func (c *SeqpacketConn) LocalAddr() net.Addr { return c.c.LocalAddr() }

// RemoteAddr is as on Unix.
func (c *SeqpacketConn) RemoteAddr() net.Addr { return c.c.RemoteAddr() }

// SetDeadline is as on Unix.
func (c *SeqpacketConn) SetDeadline(t time.Time) error { return c.c.SetDeadline(t) }

// SetReadDeadline is as on Unix.
func (c *SeqpacketConn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// SetWriteDeadline is as on Unix.
func (c *SeqpacketConn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }

// SyscallConn is as on Unix.
func (c *SeqpacketConn) SyscallConn() (syscall.RawConn, error) { return c.c.SyscallConn() }

// CloseRead is as on Unix.
func (c *SeqpacketConn) CloseRead() error { return c.c.CloseRead() }

// CloseWrite is as on Unix.
func (c *SeqpacketConn) CloseWrite() error { return c.c.CloseWrite() }

// Close is as on Unix.
func (c *SeqpacketConn) Close() error { return c.c.Close() }
