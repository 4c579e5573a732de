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

// The kinds of things that are handed on. The names are part of the protocol of
// github.com/cloudflare/tableflip.
const (
	kindListener = "listener"
	kindPacket   = "packet"
	kindConn     = "conn"
	kindFile     = "fd"
)

// A key identifies one thing that is handed on. The key of a file has the file's
// name as its network, and no address.
type key struct{ kind, network, address string }

// name returns the name by which package ecdysis hands the thing on. A file keeps
// its own name, unless that looks like the name of another kind.
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

// socketFile returns the absolute path of a Unix socket's file, and what Lstat
// says of the file. It returns nil if there is no such file.
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

	// mu guards the fields below, up to fileMu. It is held over the core's calls
	// that add and look up, so that several of them are one step.
	mu        sync.Mutex
	held      map[key]bool        // things of which the core has a copy and that look-ups do not return, because they were added or asked for here
	listeners map[key][]*listener // those that Listen and Listener have returned
	packets   map[key][]*packetConn
	ready     bool
	frozen    bool     // an upgrade is about to begin or runs
	later     []func() // calls that add what could not be added while frozen

	// fileMu guards the fields below. It may be taken under mu.
	fileMu  sync.Mutex
	files   map[string]os.FileInfo // of Unix sockets, by absolute path
	dropped []string               // paths of Unix sockets that the program has not asked for
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
// listener does not withdraw it, so the successor gets it nevertheless.
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

// ListenWithCallback is like Listen, but callback makes a new listener. The
// callback must not use f. If it returns a *net.TCPListener or a
// *net.UnixListener, ListenWithCallback returns another listener for the same
// socket, whose Accept waits until Ready has succeeded. It returns a listener of
// any other type as it is.
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
	if err != nil {
		return made, nil // the core cannot pause this socket
	}
	delete(f.held, k)
	made.Close()
	return f.useListener(k, c.(coreListener)), nil
}

// Listener returns the listener that was handed on under this network and
// address. It returns nil, nil if there is none. Closing the listener does not
// withdraw it.
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
	if errors.Is(err, fs.ErrNotExist) {
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

// AddListener hands on a copy of a listener under this network and address, in
// the place of any other. The caller may close ln. Until then ln accepts, even
// when the successor does.
func (f *Fds) AddListener(network, addr string, ln Listener) error {
	k := key{kindListener, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	if l, ok := ln.(*listener); ok && slices.Contains(f.listeners[k], l) {
		return nil
	}
	if len(f.listeners[k]) > 0 && f.hasFile(k) {
		return nil // ln is a copy of that listener, because the path leads to its socket
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

// netAlone reports whether package net has to make the socket. Package ecdysis
// makes no raw sockets, makes those of multicast groups in another way, and would
// remove the file of a Unix socket when the socket is closed.
func netAlone(network, addr string) bool {
	switch network {
	case "udp", "udp4", "udp6":
		a, err := net.ResolveUDPAddr(network, addr)
		return err == nil && a.IP.IsMulticast()
	}
	return true
}

// ListenPacketWithCallback is like ListenPacket, but callback makes a new socket.
// The callback must not use f. If it returns a *net.UDPConn or a *net.UnixConn,
// ListenPacketWithCallback returns another net.PacketConn for the same socket,
// whose reads wait until Ready has succeeded. It returns a net.PacketConn of any
// other type as it is.
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
	if err != nil {
		return made, nil // the core cannot pause this socket
	}
	delete(f.held, k)
	made.Close()
	return f.usePacketConn(k, c), nil
}

// PacketConn returns the socket for packets that was handed on under this
// network and address. It returns nil, nil if there is none. Closing the socket
// does not withdraw it.
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
	if errors.Is(err, fs.ErrNotExist) {
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

// AddPacketConn hands on a copy of a socket for packets under this network and
// address, in the place of any other. The caller may close conn.
func (f *Fds) AddPacketConn(network, addr string, conn PacketConn) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addSocket(key{kindPacket, network, addr}, conn)
}

// Conn returns a copy of the connection that was handed on under this network and
// address. It returns nil, nil if there is none. The caller may close the copy.
// The successor gets the connection, too.
func (f *Fds) Conn(network, addr string) (net.Conn, error) {
	k := key{kindConn, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready || f.held[k] {
		return nil, nil
	}
	c, err := f.core.Conn(k.name())
	if errors.Is(err, fs.ErrNotExist) {
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

// AddConn hands on a copy of a connection under this network and address, in the
// place of any other. The caller may close conn.
func (f *Fds) AddConn(network, addr string, conn Conn) error {
	k := key{kindConn, network, addr}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replace(k, func() error {
		if _, ok := conn.(*net.IPConn); ok { // the core hands an IPConn on only as a file
			return f.addCopy(k, conn)
		}
		return f.core.AddConn(k.name(), conn)
	})
}

// Files returns copies of all files that were handed on and that File has not
// returned.
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

// File returns a copy of the file that was handed on under this name. It returns
// nil, nil if there is none. The caller may close the copy. The successor gets the
// file, too. The descriptor may be in blocking mode.
func (f *Fds) File(name string) (*os.File, error) {
	k := key{kindFile, name, ""}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready || f.held[k] {
		return nil, nil
	}
	return f.takeFile(k)
}

// AddFile hands on a copy of a file under this name, in the place of any other.
// The caller may close file.
func (f *Fds) AddFile(name string, file *os.File) error {
	k := key{kindFile, name, ""}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replace(k, func() error { return f.core.AddFile(k.name(), file) })
}

var errNotInherited = errors.New("it was not handed on")

// refuse is the ListenConfig.Control of a call that looks for an inherited
// socket and must not make a new one.
func refuse(string, string, rawConn) error { return errNotInherited }

// isNetError reports whether err means that no socket was handed on for this
// address. It is then the error of refuse, or that of an address on which the core
// cannot listen.
func isNetError(err error) bool {
	var oe *net.OpError
	return errors.As(err, &oe)
}

// mayAdd returns an error if nothing can be added now. f.mu is held.
func (f *Fds) mayAdd() error {
	if f.frozen {
		return fmt.Errorf("tableflip: %w", ecdysis.ErrInProgress)
	}
	return nil
}

// freeze makes sure that nothing is added until catchUp. It waits for a call that
// has taken something from the core until the call has added it again. A successor
// that starts in between would not get it.
func (f *Fds) freeze() {
	f.mu.Lock()
	f.frozen = true
	f.mu.Unlock()
}

// catchUp ends what freeze began, and adds what was to be added meanwhile.
func (f *Fds) catchUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = false
	for _, add := range f.later {
		add()
	}
	f.later = nil
}

// takeFile returns a copy of the core's descriptor for k as a file. It returns nil
// if there is none. f.mu is held.
func (f *Fds) takeFile(k key) (*os.File, error) {
	file, err := f.core.File(k.name())
	if errors.Is(err, fs.ErrNotExist) {
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

// replace adds a thing by a call of add, and takes out the thing that had its key
// before. f.mu is held.
func (f *Fds) replace(k key, add func() error) error {
	err := f.mayAdd()
	var old *os.File
	if err == nil {
		if old, err = f.core.File(k.name()); errors.Is(err, fs.ErrNotExist) {
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

// keepFile makes Close of a Unix listener leave the listener's file.
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

// useListener returns the program's listener for one of the core's. f.mu is held.
func (f *Fds) useListener(k key, c coreListener) net.Listener {
	l := &listener{f: f, ln: c}
	f.noteFile(k)
	f.listeners[k] = append(f.listeners[k], l)
	return l
}

// usePacketConn returns the program's socket for one of the core's. f.mu is held.
func (f *Fds) usePacketConn(k key, c net.PacketConn) net.PacketConn {
	f.noteFile(k)
	p := &packetConn{f: f, k: k, core: c.(corePacketConn)}
	f.packets[k] = append(f.packets[k], p)
	if c, ok := c.(*ecdysis.UDPConn); ok {
		return &udpConn{c, p}
	}
	return &unixgramConn{c.(*ecdysis.UnixgramConn), p}
}

// noteFile records the file of a Unix socket, so that it can be distinguished from
// another file of the same name later.
func (f *Fds) noteFile(k key) {
	path, fi := k.socketFile()
	if fi == nil {
		return
	}
	f.fileMu.Lock()
	f.files[path] = fi
	f.fileMu.Unlock()
}

// hasFile reports whether the file that noteFile has recorded is still there.
func (f *Fds) hasFile(k key) bool {
	path, fi := k.socketFile()
	f.fileMu.Lock()
	defer f.fileMu.Unlock()
	return fi != nil && f.files[path] != nil && os.SameFile(fi, f.files[path])
}

// unlink removes the files that noteFile has recorded.
func (f *Fds) unlink() {
	f.fileMu.Lock()
	defer f.fileMu.Unlock()
	for path, was := range f.files {
		if fi, err := os.Lstat(path); err == nil && os.SameFile(fi, was) {
			_ = os.Remove(path)
		}
	}
}

// dropUnclaimed closes the sockets, connections and files that a tableflip process
// has handed on and that the program has not asked for.
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
		if errors.Is(err, fs.ErrNotExist) {
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

// noteDropped records the path of a Unix socket that the program has not asked
// for. The label is of the form "unix /path".
func (f *Fds) noteDropped(label string) {
	network, path, _ := strings.Cut(label, " ")
	if !isUnix(network) || path == "" || path[0] == '@' {
		return
	}
	f.fileMu.Lock()
	f.dropped = append(f.dropped, path)
	f.fileMu.Unlock()
}

// becomeReady makes look-ups find nothing from now on, and removes the files whose
// paths noteDropped has recorded. It reports whether this is the first call.
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
