//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"math"
	"os"
	"strconv"
	"syscall"
)

// One thing that is handed on: what is said about it, and the descriptor.

// The kinds of what is handed on, as they are sent.
const (
	kindListener = "listener"
	kindPacket   = "packet" // a socket for datagrams
	kindConn     = "conn"
	kindFile     = "file"
	kindPair     = "pair" // the successor's end of a DatagramPair
	kindState    = "state"
	kindAncestor = "generation" // the stream to an older process that may still serve its clients
)

// A wire is what one process tells the other about a descriptor. It changes
// only at the moment at which its socket is asked for.
type wire struct {
	kind             string
	name             string // what it was added as; empty if Listen or ListenPacket has made it
	network, address string // of a socket: the words that it was asked for with
	boundKey         string // of the address that it is bound to
	path             string // absolute path of a Unix socket's file; empty if it has none
	dev, ino         uint64 // of that file when it was bound
	size             int64  // of a state
	keep             bool   // ListenConfig.KeepOnStop
	foreign          bool   // made elsewhere: its file is not the package's to remove
	renewed          bool   // bound to a name beside path, and renamed
	gone             bool   // the predecessor does not find its file at path any more
}

// appendTo appends w as a record of a SOCKETS frame. Fields are added in later
// versions and never changed.
func (w *wire) appendTo(b []byte) []byte {
	var dev, ino, size string
	if w.path != "" {
		dev, ino = strconv.FormatUint(w.dev, 10), strconv.FormatUint(w.ino, 10)
	}
	if w.kind == kindState {
		size = strconv.FormatInt(w.size, 10)
	}
	b = appendField(b, "kind", w.kind)
	b = appendField(b, "name", w.name)
	b = appendField(b, "network", w.network)
	b = appendField(b, "address", w.address)
	b = appendField(b, "at", w.boundKey)
	b = appendField(b, "keep", flag(w.keep))
	b = appendField(b, "path", w.path)
	b = appendField(b, "dev", dev)
	b = appendField(b, "ino", ino)
	b = appendField(b, "foreign", flag(w.foreign))
	b = appendField(b, "renewed", flag(w.renewed))
	b = appendField(b, "gone", flag(w.gone))
	b = appendField(b, "size", size)
	return endRecord(b)
}

// flag is the value of a field for a bool: "1", or none for false.
func flag(set bool) string {
	if set {
		return "1"
	}
	return ""
}

// decode is the reverse of appendTo, into the zero wire. With an error w is what
// it could read, for the error's text.
func (w *wire) decode(r record) error {
	var dev, ino, size string
	for _, f := range r {
		key, value, _ := cut(f, '=')
		switch key {
		case "kind":
			w.kind = value
		case "name":
			w.name = value
		case "network":
			w.network = value
		case "address":
			w.address = value
		case "at":
			w.boundKey = value
		case "keep":
			w.keep = value == "1"
		case "path":
			w.path = value
		case "dev":
			dev = value
		case "ino":
			ino = value
		case "foreign":
			w.foreign = value == "1"
		case "renewed":
			w.renewed = value == "1"
		case "gone":
			w.gone = value == "1"
		case "size":
			size = value
		}
	}
	if w.path != "" {
		var ok1, ok2 bool
		w.dev, ok1 = number64(dev)
		w.ino, ok2 = number64(ino)
		if !ok1 || !ok2 {
			return errorf("its file is device %q, inode %q; want numbers", dev, ino)
		}
	}
	if w.kind == kindState {
		n, ok := number64(size)
		if !ok || n > math.MaxInt64 {
			return errorf("its size is %q; want a number", size)
		}
		w.size = int64(n)
	}
	return nil
}

// isSocket reports whether clients find it by its address.
func (w *wire) isSocket() bool { return w.kind == kindListener || w.kind == kindPacket }

// label names w in an event or an error.
func (w *wire) label() string {
	switch {
	case w.network != "":
		return w.network + " " + w.address
	case w.name != "":
		return w.kind + " " + w.name
	}
	return w.kind
}

// key returns the key of the address where clients find the socket.
func (w *wire) key() string {
	if w.path != "" {
		return w.network + " " + w.path
	}
	return w.boundKey
}

// hasFile reports whether w's file is at path.
func (w *wire) hasFile(path string) bool {
	var st syscall.Stat_t
	return lstat(path, &st) == nil && uint64(st.Dev) == w.dev && uint64(st.Ino) == w.ino
}

// removeFile removes a Unix socket's file if it is still the one that was
// bound.
func (w *wire) removeFile() {
	if w.path != "" && !w.foreign && w.hasFile(w.path) {
		_ = os.Remove(w.path)
	}
}

// fileIsGone reports whether no client can connect to an inherited socket,
// because its file was deleted, or a file that nobody listens to is in its
// place.
func (w *wire) fileIsGone() bool { return w.gone && !w.hasFile(w.path) && !isLive(w.path) }

// rename makes path the one by which the file is found, if the file is there
// and not at the earlier path, which may be that of another mount namespace.
func (w *wire) rename(path string) {
	if !w.hasFile(w.path) && w.hasFile(path) {
		w.path = path
	}
}

// An entryState is what becomes of an entry.
type entryState int

const (
	held            entryState = iota // the next successor gets a copy
	unclaimed                         // inherited, and no call has asked for it yet
	inTransit                         // the successor of the running upgrade has or gets a copy
	closedInTransit                   // withdrawn meanwhile: its file goes if the upgrade fails
)

// A pausable is what an entry is once it was asked for, if clients find it by
// its address: a *listener, a *packetConn or a rawUDP.
type pausable interface {
	pause()
	unpause()
	detach()
}

// An entry is one thing that this process holds to hand it on, or that it has
// inherited and nobody has asked for yet.
type entry struct {
	wire
	inherited        bool // not made by this process
	acceptsUntilDone bool // a control socket that is not paused until the successor serves

	beside string // where the file is that is to be renamed to path; empty if there is none

	// Upgrader.mu guards what follows. While an upgrade runs its entries keep
	// raw and sock, so that the attempt may use them without the lock.
	state entryState
	raw   syscall.RawConn // &bare until sock has the descriptor; nil if it was closed or moved out
	bare  bareFD
	sock  pausable // nil for a bare descriptor
}

// A bareFD is a syscall.RawConn for a descriptor that is not in the poller's
// hands.
type bareFD int

func (fd *bareFD) Control(f func(uintptr)) error  { f(uintptr(*fd)); return nil }
func (fd *bareFD) Read(func(uintptr) bool) error  { return os.ErrInvalid }
func (fd *bareFD) Write(func(uintptr) bool) error { return os.ErrInvalid }

// setBare gives e a descriptor that is in nobody's hands.
func (e *entry) setBare(fd int) {
	e.bare = bareFD(fd)
	e.raw = &e.bare
}

// control calls f with e's descriptor, which stays what it is meanwhile.
func (e *entry) control(f func(fd uintptr)) error {
	if e.raw == nil {
		return os.ErrClosed
	}
	return e.raw.Control(f)
}

// isBare reports whether e is a descriptor in nobody's hands.
func (e *entry) isBare() bool {
	return e.raw == &e.bare
}

// moveOut returns e's bare descriptor, which is then the caller's, or -1.
func (e *entry) moveOut() int {
	if !e.isBare() {
		return -1
	}
	e.raw = nil
	return int(e.bare)
}

// closeBare closes a bare descriptor.
func (e *entry) closeBare() {
	if fd := e.moveOut(); fd >= 0 {
		syscall.Close(fd)
	}
}

// A spare is a file into which descriptors are put one after the other, for
// functions of net that make a copy of a file's. It blocks, so that os does not
// watch it: a file for each descriptor would be put into the poller and taken
// out again. Between two of them it refers to the first one's socket, so it is
// for sockets that the predecessor has as well. The zero spare works.
type spare struct{ file *os.File }

// put puts fd into the spare, and closes fd. It returns the file, or nil if
// there can be none: then fd is still the caller's.
func (s *spare) put(fd int) *os.File {
	if s.file == nil {
		s.open()
	}
	if s.file == nil || dup3(fd, int(s.file.Fd())) != nil {
		return nil
	}
	syscall.Close(fd)
	return s.file
}

// open makes the spare refer to a new socket. It returns the number of this
// process's network namespace, or 0 if the system does not tell.
func (s *spare) open() (network uint64) {
	fd, err := newSocket(syscall.AF_UNIX, syscall.SOCK_DGRAM)
	if err != nil {
		return 0
	}
	network = networkOfSocket(fd)
	if syscall.SetNonblock(fd, false) != nil {
		syscall.Close(fd)
		return network
	}
	s.close()
	s.file = os.NewFile(uintptr(fd), "")
	return network
}

func (s *spare) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// lend calls f with a file that has e's bare descriptor, of which f makes a
// copy, and closes the descriptor. Upgrader.mu is held.
func (u *Upgrader) lend(e *entry, f func(*os.File) error) error {
	fd := e.moveOut()
	if e.inherited && u.life.phase == starting {
		if file := u.reg.spare.put(fd); file != nil {
			return f(file)
		}
	}
	file := os.NewFile(uintptr(fd), "")
	defer file.Close()
	return f(file)
}

func (e *entry) pause() {
	if e.sock != nil {
		e.sock.pause()
	}
}

func (e *entry) unpause() {
	if e.sock != nil {
		e.sock.unpause()
	}
}

// detach ends e on the package's account: a listener and a bare descriptor are
// closed, and a socket for packets is left to the caller.
func (e *entry) detach() {
	if e.sock != nil {
		e.sock.detach()
	}
	e.closeBare()
}

// hungUp reports whether the other end of a stream is closed. Nothing unread
// can hide that from it, because FINAL is the last frame of an older process.
func (e *entry) hungUp() (yes bool) {
	err := e.control(func(fd uintptr) { yes = streamEnded(int(fd)) })
	return err != nil || yes
}
