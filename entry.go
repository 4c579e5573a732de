package ecdysis

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// The kinds of what is handed on.
const (
	kindListener = "listener"
	kindPacket   = "packet" // a socket for datagrams
	kindConn     = "conn"
	kindFile     = "file"
	kindPair     = "pair" // the successor's end of a DatagramPair
	kindState    = "state"
	kindOlder    = "generation" // the stream to an older process that may still serve its clients
)

// A socket is what an entry is here once it was asked for, if it goes on being
// handed on: a *listener or a *packetConn; or the *stream to the older process.
type socket interface {
	quiet()
	resume()
	shut()
	control(f func(fd uintptr)) error
}

// An entry is one thing that this process holds to hand it on, or has
// inherited and not yet been asked for.
type entry struct {
	kind             string
	name             string // what it was added as; "": Listen and ListenPacket have made it
	network, address string // of a socket: the words it was asked for with
	at               string // boundKey of its address
	keep             bool   // ListenConfig.KeepOnStop
	late             bool   // a control socket that accepts until the successor serves
	path             string // absolute, of a Unix socket's file; "": none
	dev, ino         uint64 // of that file when it was bound
	foreign          bool   // made elsewhere: its file is not the package's to remove
	size             int64  // of a state
	inherited        bool   // not made by this process

	// Guarded by Upgrader.mu. An entry of an upgrade that runs keeps its
	// descriptor or socket.
	fd      int    // until sock has it; -1: closed, or with sock
	sock    socket // nil: a bare descriptor
	claimed bool   // taken from the inheritance
	handed  bool   // the successor of the running upgrade has a copy
	closed  bool   // withdrawn while handed
}

// record returns e as it is handed on.
func (e *entry) record() record {
	r := record{"kind=" + e.kind}
	add := func(key, value string) {
		if value != "" {
			r = append(r, key+"="+value)
		}
	}
	add("name", e.name)
	add("network", e.network)
	add("address", e.address)
	add("at", e.at)
	if e.keep {
		add("keep", "1")
	}
	if e.path != "" {
		add("path", e.path)
		add("dev", strconv.FormatUint(e.dev, 10))
		add("ino", strconv.FormatUint(e.ino, 10))
	}
	if e.foreign {
		add("foreign", "1")
	}
	if e.kind == kindState {
		add("size", strconv.FormatInt(e.size, 10))
	}
	return r
}

// label names e for an event or an error.
func (e *entry) label() string {
	switch {
	case e.network != "":
		return e.network + " " + e.address
	case e.name != "":
		return e.kind + " " + e.name
	}
	return e.kind
}

// control calls f with e's descriptor, which stays what it is meanwhile.
func (e *entry) control(f func(fd uintptr)) error {
	switch {
	case e.sock != nil:
		return e.sock.control(f)
	case e.fd < 0:
		return os.ErrClosed
	}
	f(uintptr(e.fd))
	return nil
}

func (e *entry) quiet() {
	if e.sock != nil {
		e.sock.quiet()
	}
}

func (e *entry) resume() {
	if e.sock != nil {
		e.sock.resume()
	}
}

func (e *entry) shut() {
	if e.sock != nil {
		e.sock.shut()
	}
	e.drop()
}

// key returns the key of the place where e is.
func (e *entry) key() string {
	if e.path != "" {
		return e.network + " " + e.path
	}
	return e.at
}

// drop closes a bare descriptor.
func (e *entry) drop() {
	if e.fd >= 0 {
		unix.Close(e.fd)
		e.fd = -1
	}
}

// removeFile removes a Unix socket's file if it is still the one that was
// bound.
func (e *entry) removeFile() {
	var st unix.Stat_t
	if e.path == "" || e.foreign || unix.Lstat(e.path, &st) != nil {
		return
	}
	if uint64(st.Dev) == e.dev && uint64(st.Ino) == e.ino {
		_ = os.Remove(e.path)
	}
}

// rename makes path the one by which e's file is found, if that is where it is
// and the earlier one, which may be another mount namespace's, leads nowhere.
func (e *entry) rename(path string) {
	var st unix.Stat_t
	is := func(path string) bool {
		return unix.Lstat(path, &st) == nil && uint64(st.Dev) == e.dev && uint64(st.Ino) == e.ino
	}
	if !is(e.path) && is(path) {
		e.path = path
	}
}

// hungUp reports whether the other end of a stream is closed. Nothing unread
// can hide that from it, because FINAL is the last frame of an older process.
func (e *entry) hungUp() (yes bool) {
	err := e.control(func(fd uintptr) { yes = streamEnded(int(fd)) })
	return err != nil || yes
}
