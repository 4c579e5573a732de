//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Handing on what the program brings: connections, files and sockets made
// elsewhere, and a pair of sockets between two generations. Taking them out
// again by name.

// maxName is the length of the longest name that something can be added under.
const maxName = 1024

// AddConn makes a copy of a connection that every successor gets until this
// process is replaced or stopped. There [Upgrader.Conn] returns it, with all
// that is unread in the system's buffer. The caller closes c: at once, or when
// Upgrade has returned, to have it back if the upgrade fails. Nothing here
// should read from c while a successor may be starting, because both processes
// have the same connection. The peer sees a close when neither process has a
// copy. Conn takes the copy back, when the connection has ended.
//
// A connection moves if it is a socket of TCP, UDP or Unix, a [SeqpacketConn]
// and a [UDPConn] among them. What the program has read and keeps in memory
// does not move. So a TLS connection is refused with an error, because its keys
// and unfinished records are in memory. Several connections may have one name.
//
// The errors are those of ListenWith. One from the system wraps an
// *os.SyscallError, and that for a closed c is net.ErrClosed.
func (u *Upgrader) AddConn(name string, c net.Conn) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return errorf("ecdysis: add connection %q: a %T has no descriptor that could move; want a connection of TCP, UDP or Unix", name, c)
	}
	return u.addCopy("connection", kindConn, name, sc)
}

// AddFile makes a copy of a file that every successor gets until this process
// is replaced or stopped. There [Upgrader.File] returns it. The caller closes
// f, at the latest when the upgrade has succeeded. Pipes, devices, directories
// and memfds move. A file keeps its offset, and its lock as long as nobody
// unlocks it. This is the lock of flock(2): that of fcntl(2) belongs to a
// process. Several files may have one name.
//
// It also brings in sockets that were made elsewhere. A socket that listens, or
// that is bound for packets, is found in this process and in its successors
// by [Upgrader.Listener] or [Upgrader.PacketConn] under that name, and by
// Listen or ListenPacket under its address. It is then like one that they
// have made, except that the package does not remove its file. Nothing may
// accept or read on f then.
//
// The errors are those of ListenWith. One from the system wraps an
// *os.SyscallError, and that for a closed f is os.ErrClosed.
func (u *Upgrader) AddFile(name string, f *os.File) error {
	return u.addCopy("file", kindFile, name, f)
}

func (u *Upgrader) addCopy(what, kind, name string, c syscall.Conn) error {
	fail := func(err error) error { return errorf("ecdysis: add %s %q: %w", what, name, err) }
	if err := checkName(name); err != nil {
		return fail(err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	e := &entry{wire: wire{kind: kind, name: name}}
	var fd int
	if cerr := raw.Control(func(from uintptr) { fd, err = duplicate(int(from)) }); cerr != nil {
		return fail(closedError(c, cerr))
	}
	if err != nil {
		return fail(err)
	}
	e.setBare(fd)
	if kind == kindFile {
		e.recognize(fd)
	} else if err := checkConn(fd); err != nil {
		e.closeBare()
		return fail(errorf("a %T: %w", c, err))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.life.mayAdd(); err != nil {
		e.closeBare()
		return err
	}
	u.reg.entries = append(u.reg.entries, e)
	if e.isSocket() {
		u.reg.adopted = append(u.reg.adopted, e)
	}
	return nil
}

// closedError returns the error of a Control that has failed, for which os has
// no better name: the file is closed.
func closedError(c syscall.Conn, err error) error {
	if _, ok := c.(*os.File); ok {
		return os.ErrClosed
	}
	return err
}

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty; want one by which the successor asks for it")
	case len(name) > maxName:
		return errorf("the name has %d bytes; there can be %d", len(name), maxName)
	}
	return nil
}

func duplicate(fd int) (int, error) {
	for {
		n, err := unix.FcntlInt(uintptr(fd), syscall.F_DUPFD_CLOEXEC, 0)
		if err != syscall.EINTR {
			return n, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
		}
	}
}

// checkConn returns an error that says why net cannot make a connection of fd.
func checkConn(fd int) error {
	typ, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil || networkOf(typ, sa) == "" {
		return errors.New("it is a socket of a kind that net has no connections for; AddFile moves it as a file")
	}
	return nil
}

// recognize makes w a listener or a socket for packets if fd is one that clients
// find by its address.
func (w *wire) recognize(fd int) {
	typ, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err != nil {
		return
	}
	sa, key, err := boundTo(fd, typ)
	if err != nil || key == "" {
		return
	}
	_, perr := syscall.Getpeername(fd)
	kind := kindPacket
	if typ != syscall.SOCK_DGRAM {
		kind = kindListener
		if yes, err := isListening(fd); err == nil && !yes {
			return
		}
	}
	if perr == nil { // connected
		return
	}
	switch sa := sa.(type) {
	case *syscall.SockaddrUnix:
		if sa.Name == "" {
			return
		}
		if !isAbstract(sa.Name) {
			if w.path, err = absolute(sa.Name); err != nil {
				return
			}
			var st syscall.Stat_t
			if stat(w.path, &st) == nil {
				w.dev, w.ino = uint64(st.Dev), uint64(st.Ino)
			}
		}
	case *syscall.SockaddrInet4:
		if sa.Port == 0 {
			return
		}
	case *syscall.SockaddrInet6:
		if sa.Port == 0 {
			return
		}
	}
	w.kind, w.boundKey, w.foreign = kind, key, true
	w.network, w.address, _ = cut(key, ' ')
}

// Listener returns the listening socket that was added under this name, by
// AddFile in this process or in an older one, as Listen would return it. Of
// several with one name each call returns the next. If there is none, the error
// wraps fs.ErrNotExist. The other errors are those of ListenWith.
func (u *Upgrader) Listener(name string) (net.Listener, error) {
	s, err := u.claimName(kindListener, newListener, name)
	if err != nil {
		return nil, err
	}
	return s.(*listener).public(), nil
}

// PacketConn returns the socket for packets that was added under this name, by
// AddFile in this process or in an older one, as ListenPacket would return it.
// Of several with one name each call returns the next. If there is none, the
// error wraps fs.ErrNotExist. The other errors are those of ListenWith.
func (u *Upgrader) PacketConn(name string) (net.PacketConn, error) {
	s, err := u.claimName(kindPacket, newPacketConn, name)
	if err != nil {
		return nil, err
	}
	return s.(*packetConn).public(), nil
}

func (u *Upgrader) claimName(kind string, open opener, name string) (pausable, error) {
	s, err := u.claim(nil, open, func(r *registry) *entry { return r.findName(kind, name) })
	if s == nil && err == nil {
		err = noneNamed(kind, name)
	}
	return s, err
}

// noneNamed is the error of a call that finds nothing by a name.
func noneNamed(what, name string) error {
	return errorf("ecdysis: no %s is called %q: %w", what, name, fs.ErrNotExist)
}

// Conn returns the connection that was added under this name, by the
// predecessor or in this process. It moves out: the package keeps no copy, the
// caller closes it, and it is added again to be handed on again. Of several
// with one name each call returns the next. The predecessor may still have it
// until Ready has returned.
//
// A connection of TCP is a *net.TCPConn, for which net sets its own defaults
// of keep-alive and no-delay. Others are a *net.UDPConn, a *net.UnixConn or a
// *SeqpacketConn. If there is none, the error wraps fs.ErrNotExist. The other
// errors are those of ListenWith.
func (u *Upgrader) Conn(name string) (net.Conn, error) {
	fd, err := u.take(name, kindConn)
	if err != nil {
		return nil, err
	}
	c, err := fileConn(fd)
	if err != nil {
		return nil, errorf("ecdysis: connection %q: %w", name, err)
	}
	return c, nil
}

// File returns the file that was added under this name, by the predecessor or
// in this process. It moves out: the package keeps no copy, the caller closes
// it, and it is added again to be handed on again. Of several with one name
// each call returns the next. File also returns a connection, and a socket
// that no other call has asked for. If there is none, the error wraps
// fs.ErrNotExist. The other errors are those of ListenWith.
func (u *Upgrader) File(name string) (*os.File, error) {
	fd, err := u.take(name, fileKinds...)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// FileNames lists the names that begin with prefix and under which File returns
// something: first what the predecessor has handed on and no call has asked for
// yet, then what was added here, both in the order of adding. A name that
// several files have is listed as often.
func (u *Upgrader) FileNames(prefix string) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var names []string
	for _, e := range append(u.reg.unclaimed(), u.reg.entries...) {
		if e.name != "" && strings.HasPrefix(e.name, prefix) && e.isBare() && slices.Contains(fileKinds, e.kind) {
			names = append(names, e.name)
		}
	}
	return names
}

// fileKinds are the kinds of what File returns, in the order in which it looks.
var fileKinds = []string{kindFile, kindListener, kindPacket, kindConn}

// take moves the first bare descriptor of one of the kinds out.
func (u *Upgrader) take(name string, kinds ...string) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.life.mayAdd(); err != nil {
		return -1, err
	}
	for _, kind := range kinds {
		if e := u.reg.takeBare(kind, name); e != nil {
			return e.moveOut(), nil
		}
	}
	return -1, noneNamed(kinds[0], name)
}

// fileConn takes fd into net's hands, or closes it.
func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "")
	defer f.Close() // net makes a copy of its own
	if err := checkConn(fd); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	if uc, ok := c.(*net.UnixConn); ok && uc.LocalAddr().Network() == "unixpacket" {
		return newSeqpacketConn(uc)
	}
	return c, nil
}

// DatagramPair returns two ends of Unix datagram sockets, by which a process
// exchanges messages with its predecessor and with its successor: toParent leads
// to the socket that the predecessor has got as toChild. The caller closes both.
//
// If the predecessor did not call DatagramPair with this name, or this is the
// first process, toParent is nil and the error wraps fs.ErrNotExist. toChild is
// there all the same.
//
// Call it before Ready, once for each name. A second call is an error. The
// successor's end waits in this process until a successor takes it: after a
// failed upgrade the next successor gets the same, and what the failed one has
// sent can still be read. A datagram socket does not see the end of the other
// process; [Upgrader.WaitForParent] does.
//
// The other errors are those of ListenWith. One from the system wraps an
// *os.SyscallError. toChild is then nil.
func (u *Upgrader) DatagramPair(name string) (toParent, toChild *net.UnixConn, err error) {
	fail := func(err error) (*net.UnixConn, *net.UnixConn, error) {
		return nil, nil, errorf("ecdysis: datagram pair %q: %w", name, err)
	}
	if err := checkName(name); err != nil {
		return fail(err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.life.mayAdd(); err != nil {
		return nil, nil, err
	}
	if slices.ContainsFunc(u.reg.entries, func(e *entry) bool { return e.kind == kindPair && e.name == name }) {
		return fail(errors.New("there is one with this name already"))
	}
	fds, err := socketpair(syscall.SOCK_DGRAM)
	if err != nil {
		return fail(err)
	}
	if toChild, err = datagramEnd(fds[0]); err != nil {
		syscall.Close(fds[1])
		return fail(err)
	}
	e := u.reg.findName(kindPair, name)
	if e != nil {
		if toParent, err = datagramEnd(e.moveOut()); err != nil {
			toChild.Close()
			syscall.Close(fds[1])
			return fail(err)
		}
	}
	kept := &entry{wire: wire{kind: kindPair, name: name}}
	kept.setBare(fds[1])
	u.reg.entries = append(u.reg.entries, kept)
	if e == nil {
		return nil, toChild, noneNamed("datagram pair of the predecessor", name)
	}
	return toParent, toChild, nil
}

func datagramEnd(fd int) (*net.UnixConn, error) {
	c, err := fileConn(fd)
	if err != nil {
		return nil, err
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errorf("a %T; want a Unix socket", c)
	}
	return uc, nil
}
