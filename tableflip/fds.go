package tableflip

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/ecdysis-go/ecdysis"
)

// The kinds of what is handed on, as the other package names them too.
const (
	kindListener = "listener"
	kindPacket   = "packet"
	kindConn     = "conn"
	kindFile     = "fd"
)

// A key is what something is handed on under. The name of a file is the
// network, and its address is empty.
type key struct{ kind, network, address string }

// name returns the key's name in package ecdysis. That of a file is its own,
// unless it could be taken for one of another kind.
func (k key) name() string {
	if k.kind != kindFile {
		return k.kind + " " + k.network + " " + k.address
	}
	kind, _, more := strings.Cut(k.network, " ")
	if k.network == "" || more && slices.Contains([]string{kindListener, kindPacket, kindConn, kindFile}, kind) {
		return kindFile + " " + k.network
	}
	return k.network
}

// keyOf is the inverse of key.name.
func keyOf(name string) key {
	kind, rest, more := strings.Cut(name, " ")
	switch {
	case !more:
	case kind == kindFile:
		return key{kindFile, rest, ""}
	case kind == kindListener || kind == kindPacket || kind == kindConn:
		network, address, _ := strings.Cut(rest, " ")
		return key{kind, network, address}
	}
	return key{kindFile, name, ""}
}

// socketFile returns the absolute path of a Unix socket's file, and the file;
// nil if there is none.
func (k key) socketFile() (path string, fi os.FileInfo) {
	if k.kind != kindListener && k.kind != kindPacket || !isUnix(k.network) || k.address == "" || k.address[0] == '@' {
		return "", nil
	}
	return socketFile(k.address)
}

func socketFile(name string) (path string, fi os.FileInfo) {
	path, err := filepath.Abs(name)
	if err != nil {
		return "", nil
	}
	if fi, err = os.Lstat(path); err != nil || fi.Mode().Type() != os.ModeSocket {
		return "", nil
	}
	return path, fi
}

func isUnix(network string) bool {
	return network == "unix" || network == "unixpacket" || network == "unixgram"
}

// Fds are the sockets, connections and files that this process has inherited,
// and those that it hands on.
type Fds struct {
	lc   net.ListenConfig
	core *ecdysis.Upgrader

	// mu guards what follows. It is held over calls that add, so that the
	// package's own name for something and the core's change as one.
	mu        sync.Mutex
	held      map[key]bool        // what the core has a copy of that was added here, or asked for: look-ups pass it over
	listeners map[key][]*listener // those that Listen and Listener have returned
	packets   map[key][]*packetConn
	ready     bool
	frozen    bool     // an upgrade is about to begin or runs
	later     []func() // what could not be added meanwhile

	// fileMu guards what follows. It may be taken under mu.
	fileMu  sync.Mutex
	files   map[string]os.FileInfo // of Unix sockets, by absolute path
	dropped []string               // paths of Unix sockets that nobody has asked for
}

func newFds(lc *net.ListenConfig) *Fds {
	f := &Fds{
		held:      make(map[key]bool),
		listeners: make(map[key][]*listener),
		packets:   make(map[key][]*packetConn),
		files:     make(map[string]os.FileInfo),
	}
	if lc != nil {
		f.lc = *lc
	}
	return f
}

// Listen returns the listener that was handed on under this network and
// address, or a new one. Accept waits until Ready has succeeded. Closing the
// listener does not withdraw it: the next process gets it nevertheless.
func (f *Fds) Listen(network, addr string) (net.Listener, error) {
	k := key{kindListener, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	ln, err := f.listener(k)
	if ln != nil || err != nil {
		return ln, err
	}
	if addr == "" && isUnix(network) { // a name that the system chooses
		return f.listenWith(k, func(network, addr string) (net.Listener, error) {
			return f.lc.Listen(context.Background(), network, addr)
		})
	}
	if err := f.mayAdd(); err != nil {
		return nil, err
	}
	c, err := f.core.ListenWith(ecdysis.ListenConfig{Control: f.lc.Control}, network, addr)
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't create new listener: %w", err)
	}
	return f.useListener(k, c.(coreListener)), nil
}

// ListenWithCallback is Listen, save that callback makes a new listener. The
// callback must not use f. What it returns is replaced by a listener whose
// Accept waits until Ready, if it is net's own, and otherwise returned as it is.
func (f *Fds) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	k := key{kindListener, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	ln, err := f.listener(k)
	if ln != nil || err != nil {
		return ln, err
	}
	return f.listenWith(k, callback)
}

func (f *Fds) listenWith(k key, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	if err := f.mayAdd(); err != nil {
		return nil, err
	}
	made, err := callback(k.network, k.address)
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't create new listener: %w", err)
	}
	l, ok := made.(Listener)
	if !ok {
		made.Close()
		return nil, fmt.Errorf("tableflip: %T doesn't implement tableflip.Listener", made)
	}
	if err := f.addSocket(k, l); err != nil {
		made.Close()
		return nil, err
	}
	switch made.(type) {
	case *net.TCPListener, *net.UnixListener:
	default:
		return made, nil
	}
	c, err := f.core.Listener(k.name())
	if err != nil || c == nil {
		return made, nil // a socket that the core cannot hold back
	}
	delete(f.held, k)
	made.Close()
	return f.useListener(k, c.(coreListener)), nil
}

// Listener returns the listener that was handed on under this network and
// address; nil if there is none. It may be closed, as that of Listen.
func (f *Fds) Listener(network, addr string) (net.Listener, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.listener(key{kindListener, network, addr})
}

func (f *Fds) listener(k key) (net.Listener, error) {
	if f.ready || f.held[k] {
		return nil, nil
	}
	ln, err := f.core.Listener(k.name())
	if none(ln == nil, err) {
		ln, err = f.core.ListenWith(ecdysis.ListenConfig{Control: refuse}, k.network, k.address)
	}
	if err == nil {
		return f.useListener(k, ln.(coreListener)), nil
	}
	if !isNetError(err) {
		return nil, fmt.Errorf("tableflip: can't inherit listener %s %s: %w", k.network, k.address, err)
	}
	file, err := f.takeFile(k)
	if file == nil || err != nil {
		return nil, err
	}
	defer file.Close()
	if ln, err = net.FileListener(file); err != nil {
		return nil, fmt.Errorf("tableflip: can't inherit listener %s %s: %w", k.network, k.address, err)
	}
	return ln, nil
}

// AddListener hands on a listener under this network and address, in the place
// of any other. It makes a copy: ln may be closed. ln itself accepts as long as
// the program lets it, also when the next process does.
func (f *Fds) AddListener(network, addr string, ln Listener) error {
	k := key{kindListener, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	if l, ok := ln.(*listener); ok && slices.Contains(f.listeners[k], l) {
		return nil
	}
	if len(f.listeners[k]) > 0 && f.hasFile(k) {
		return nil // a copy of that listener, since the path leads to its socket
	}
	return f.addSocket(k, ln)
}

// ListenPacket returns the socket for packets that was handed on under this
// network and address, or a new one. Reading waits until Ready has succeeded.
// Closing it does not withdraw it.
func (f *Fds) ListenPacket(network, addr string) (net.PacketConn, error) {
	k := key{kindPacket, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.packetConn(k)
	if c != nil || err != nil {
		return c, err
	}
	if netAlone(network, addr) {
		return f.listenPacketWith(k, func(network, addr string) (net.PacketConn, error) {
			return f.lc.ListenPacket(context.Background(), network, addr)
		})
	}
	if err := f.mayAdd(); err != nil {
		return nil, err
	}
	c, err = f.core.ListenPacketWith(ecdysis.ListenConfig{Control: f.lc.Control}, network, addr)
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't create new listener: %w", err)
	}
	return f.usePacketConn(k, c), nil
}

// netAlone reports whether package net has to make a socket for packets: a raw
// one, or one of a group, which package ecdysis makes otherwise or not at all;
// and one of Unix, whose file package ecdysis would remove when it is closed.
func netAlone(network, addr string) bool {
	switch network {
	case "udp", "udp4", "udp6":
		a, err := net.ResolveUDPAddr(network, addr)
		return err == nil && a.IP.IsMulticast()
	}
	return true
}

// ListenPacketWithCallback is ListenPacket, save that callback makes a new
// socket. The callback must not use f. What it returns is replaced by one whose
// reading waits until Ready, if it is net's own for UDP or Unix, and otherwise
// returned as it is.
func (f *Fds) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	k := key{kindPacket, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.packetConn(k)
	if c != nil || err != nil {
		return c, err
	}
	return f.listenPacketWith(k, callback)
}

func (f *Fds) listenPacketWith(k key, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	if err := f.mayAdd(); err != nil {
		return nil, err
	}
	made, err := callback(k.network, k.address)
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't create new listener: %w", err)
	}
	p, ok := made.(PacketConn)
	if !ok {
		made.Close()
		return nil, fmt.Errorf("tableflip: %T doesn't implement tableflip.PacketConn", made)
	}
	if err := f.addSocket(k, p); err != nil {
		made.Close()
		return nil, err
	}
	switch made.(type) {
	case *net.UDPConn, *net.UnixConn:
	default:
		return made, nil
	}
	c, err := f.core.PacketConn(k.name())
	if err != nil || c == nil {
		return made, nil // a socket that the core cannot hold back
	}
	delete(f.held, k)
	made.Close()
	return f.usePacketConn(k, c), nil
}

// PacketConn returns the socket for packets that was handed on under this
// network and address; nil if there is none. It may be closed, as that of
// ListenPacket.
func (f *Fds) PacketConn(network, addr string) (net.PacketConn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.packetConn(key{kindPacket, network, addr})
}

func (f *Fds) packetConn(k key) (net.PacketConn, error) {
	if f.ready || f.held[k] {
		return nil, nil
	}
	c, err := f.core.PacketConn(k.name())
	if none(c == nil, err) {
		c, err = f.core.ListenPacketWith(ecdysis.ListenConfig{Control: refuse}, k.network, k.address)
	}
	if err == nil {
		return f.usePacketConn(k, c), nil
	}
	if !isNetError(err) {
		return nil, fmt.Errorf("tableflip: can't inherit packet conn %s %s: %w", k.network, k.address, err)
	}
	file, err := f.takeFile(k)
	if file == nil || err != nil {
		return nil, err
	}
	defer file.Close()
	if c, err = net.FilePacketConn(file); err != nil {
		return nil, fmt.Errorf("tableflip: can't inherit packet conn %s %s: %w", k.network, k.address, err)
	}
	return c, nil
}

// AddPacketConn hands on a socket for packets under this network and address,
// in the place of any other. It makes a copy: conn may be closed.
func (f *Fds) AddPacketConn(network, addr string, conn PacketConn) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addSocket(key{kindPacket, network, addr}, conn)
}

// Conn returns the connection that was handed on under this network and
// address; nil if there is none. It is a copy, which may be closed: the next
// process gets the connection, too.
func (f *Fds) Conn(network, addr string) (net.Conn, error) {
	k := key{kindConn, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready || f.held[k] {
		return nil, nil
	}
	c, err := f.core.Conn(k.name())
	if none(c == nil, err) {
		file, err := f.takeFile(k)
		if file == nil || err != nil {
			return nil, err
		}
		defer file.Close()
		if c, err = net.FileConn(file); err != nil {
			return nil, fmt.Errorf("tableflip: can't inherit connection %s %s: %w", network, addr, err)
		}
		return c, nil
	}
	if err == nil {
		err = f.core.AddConn(k.name(), c)
	}
	if err != nil {
		if c != nil {
			c.Close()
		}
		return nil, fmt.Errorf("tableflip: can't inherit connection %s %s: %w", network, addr, err)
	}
	f.held[k] = true
	return c, nil
}

// AddConn hands on a connection under this network and address, in the place of
// any other. It makes a copy: conn may be closed.
func (f *Fds) AddConn(network, addr string, conn Conn) error {
	k := key{kindConn, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replace(k, func() error {
		if _, ok := conn.(*net.IPConn); ok { // which only files are for the core
			return f.addCopy(k, conn)
		}
		return f.core.AddConn(k.name(), conn)
	})
}

// Files returns all files that were handed on and not asked for, as File does.
func (f *Fds) Files() ([]*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready {
		return nil, nil
	}
	var files []*os.File
	for _, name := range f.core.FileNames("") {
		k := keyOf(name)
		if k.kind != kindFile || f.held[k] {
			continue
		}
		file, err := f.takeFile(k)
		if err != nil {
			for _, file := range files {
				file.Close()
			}
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// File returns the file that was handed on under this name; nil if there is
// none. It is a copy, which may be closed: the next process gets the file, too.
// The descriptor may be in blocking mode.
func (f *Fds) File(name string) (*os.File, error) {
	k := key{kindFile, name, ""}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready || f.held[k] {
		return nil, nil
	}
	return f.takeFile(k)
}

// AddFile hands on a file under this name, in the place of any other. It makes
// a copy: file may be closed.
func (f *Fds) AddFile(name string, file *os.File) error {
	k := key{kindFile, name, ""}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replace(k, func() error { return f.core.AddFile(k.name(), file) })
}

// What the core says.

var errNotInherited = errors.New("it was not handed on")

// refuse is the Control of a call that is to find an inherited socket, and to
// make none.
func refuse(string, string, rawConn) error { return errNotInherited }

// none reports whether a look-up by name has found nothing.
func none(isNil bool, err error) bool {
	return err == nil && isNil || errors.Is(err, fs.ErrNotExist)
}

// isNetError reports whether a call was made that refuse has ended, or that
// failed for its address: nothing was handed on that the core knows it by.
func isNetError(err error) bool {
	var oe *net.OpError
	return errors.As(err, &oe)
}

// mayAdd reports, as an error, that nothing can be added now. f.mu is held.
func (f *Fds) mayAdd() error {
	if f.frozen {
		return fmt.Errorf("tableflip: %w", ecdysis.ErrInProgress)
	}
	return nil
}

// freeze lets nothing be added until catchUp. It waits for a call that has taken
// something from the core to add it again: a successor that starts in between
// would not get it.
func (f *Fds) freeze() {
	f.mu.Lock()
	f.frozen = true
	f.mu.Unlock()
}

// catchUp ends what freeze began.
func (f *Fds) catchUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = false
	for _, add := range f.later {
		add()
	}
	f.later = nil
}

// takeFile returns a copy of what is k's in the core as a file, and leaves it
// there; nil if there is none. f.mu is held.
func (f *Fds) takeFile(k key) (*os.File, error) {
	file, err := f.core.File(k.name())
	if none(file == nil, err) {
		return nil, nil
	}
	if err == nil {
		err = f.core.AddFile(k.name(), file)
	}
	if err != nil {
		if file != nil {
			file.Close()
		}
		return nil, fmt.Errorf("tableflip: can't inherit %s: %w", k.name(), err)
	}
	f.held[k] = true
	return file, nil
}

// replace adds something in the place of what has its key. f.mu is held.
func (f *Fds) replace(k key, add func() error) error {
	err := f.mayAdd()
	var old *os.File
	if err == nil {
		if old, err = f.core.File(k.name()); none(old == nil, err) {
			old, err = nil, nil
		}
	}
	if err == nil {
		if err = add(); err != nil && old != nil {
			err = errors.Join(err, f.core.AddFile(k.name(), old))
		}
	}
	if old != nil {
		old.Close()
	}
	if err != nil {
		return fmt.Errorf("tableflip: can't add %s: %w", k.name(), err)
	}
	f.held[k] = true
	for _, l := range f.listeners[k] {
		l.detach()
	}
	for _, p := range f.packets[k] {
		_ = p.core.Close()
	}
	delete(f.listeners, k)
	delete(f.packets, k)
	return nil
}

// addSocket adds a copy of a socket. f.mu is held.
func (f *Fds) addSocket(k key, s conn) error {
	keepFile(s)
	if err := f.replace(k, func() error { return f.addCopy(k, s) }); err != nil {
		return err
	}
	f.noteFile(k)
	return nil
}

// keepFile lets a Unix listener be closed without its file being removed.
func keepFile(s any) {
	if u, ok := s.(interface{ SetUnlinkOnClose(bool) }); ok {
		u.SetUnlinkOnClose(false)
	}
}

func (f *Fds) addCopy(k key, s conn) error {
	file, err := duplicate(s, k.name())
	if err != nil {
		return err
	}
	defer file.Close()
	return f.core.AddFile(k.name(), file)
}

// useListener makes one of the core's the caller's. f.mu is held.
func (f *Fds) useListener(k key, c coreListener) net.Listener {
	l := &listener{f: f, ln: c}
	f.noteFile(k)
	f.listeners[k] = append(f.listeners[k], l)
	return l
}

// usePacketConn makes one of the core's the caller's. f.mu is held.
func (f *Fds) usePacketConn(k key, c net.PacketConn) net.PacketConn {
	f.noteFile(k)
	p := &packetConn{f: f, k: k, core: c.(corePacketConn)}
	f.packets[k] = append(f.packets[k], p)
	if c, ok := c.(*ecdysis.UDPConn); ok {
		return &udpConn{c, p}
	}
	return &unixgramConn{c.(*ecdysis.UnixgramConn), p}
}

// noteFile keeps what tells a Unix socket's file from any other.
func (f *Fds) noteFile(k key) {
	path, fi := k.socketFile()
	if fi == nil {
		return
	}
	f.fileMu.Lock()
	f.files[path] = fi
	f.fileMu.Unlock()
}

// hasFile reports whether the file that noteFile has found is still there.
func (f *Fds) hasFile(k key) bool {
	path, fi := k.socketFile()
	f.fileMu.Lock()
	defer f.fileMu.Unlock()
	return fi != nil && f.files[path] != nil && os.SameFile(fi, f.files[path])
}

// unlink removes the files of the Unix sockets.
func (f *Fds) unlink() {
	f.fileMu.Lock()
	defer f.fileMu.Unlock()
	for path, was := range f.files {
		if fi, err := os.Lstat(path); err == nil && os.SameFile(fi, was) {
			_ = os.Remove(path)
		}
	}
}

// dropUnclaimed closes what a process of the other package has handed on and
// nobody has asked for.
func (f *Fds) dropUnclaimed() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready {
		return nil
	}
	for _, name := range f.core.FileNames("") {
		k := keyOf(name)
		if f.held[k] {
			continue
		}
		file, err := f.core.File(name)
		if none(file == nil, err) {
			continue
		}
		if err != nil {
			return err
		}
		file.Close()
		if k.kind == kindListener || k.kind == kindPacket {
			f.noteDropped(k.network + " " + k.address)
		}
	}
	return nil
}

// noteDropped keeps the path of a Unix socket that was closed here, as in
// "unix /path".
func (f *Fds) noteDropped(label string) {
	network, path, _ := strings.Cut(label, " ")
	if !isUnix(network) || path == "" || path[0] == '@' {
		return
	}
	f.fileMu.Lock()
	f.dropped = append(f.dropped, path)
	f.fileMu.Unlock()
}

// becomeReady ends the look-ups, and removes the files of the Unix sockets that
// nobody has asked for. It reports whether this is the first time that Ready has
// succeeded.
func (f *Fds) becomeReady() bool {
	f.mu.Lock()
	first := !f.ready
	f.ready = true
	f.mu.Unlock()
	f.fileMu.Lock()
	defer f.fileMu.Unlock()
	for _, path := range f.dropped {
		path, fi := socketFile(path)
		if fi != nil && f.files[path] == nil {
			_ = os.Remove(path)
		}
	}
	f.dropped = nil
	return first
}
