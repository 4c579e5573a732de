package ecdysis

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxName is how long a name can be that something is handed on under.
const maxName = 1024

// AddConn makes a copy of a connection that every successor gets until this
// process is replaced or stopped: there [Upgrader.Conn] returns it, with all
// that is unread in the system's buffer. c stays the caller's, who closes it:
// at once or, to have it back if the upgrade fails, when Upgrade has returned.
// While a successor may be starting nobody here should read from c: both have
// the same connection. The peer sees a close when neither process has a copy.
// To take the copy back, for a connection that has ended, call Conn here.
//
// A connection moves if it is a socket of TCP, UDP or Unix, a [SeqpacketConn]
// and a [UDPConn] among them. What the program has read and keeps in memory
// does not move, so neither does a TLS connection, whose keys and unfinished
// records are memory: it is an error. Several connections may have one name.
//
// The errors are those of ListenWith; one from the system wraps an
// *os.SyscallError, and a closed c is net.ErrClosed.
func (u *Upgrader) AddConn(name string, c net.Conn) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return fmt.Errorf("ecdysis: add connection %q: a %T has no descriptor that could move; want a connection of TCP, UDP or Unix", name, c)
	}
	return u.addCopy("connection", kindConn, name, sc)
}

// AddFile makes a copy of a file that every successor gets until this process
// is replaced or stopped: there [Upgrader.File] returns it. f stays the
// caller's, who closes it when the upgrade has succeeded or before. Pipes,
// devices, directories and memfds move, with the file's offset and, as long
// as nobody unlocks it, with its lock: flock(2)'s, not that of fcntl(2), which
// belongs to a process. Several files may have one name.
//
// It is also the way in for sockets made elsewhere. A socket that listens, or
// that is bound for packets, is found in this process and in its successors
// by [Upgrader.Listener] or [Upgrader.PacketConn] under that name, and by
// Listen or ListenPacket under its address, and is then like one that they
// have made, save that the package does not remove its file. Nothing may
// accept or read on f then.
//
// The errors are those of ListenWith; one from the system wraps an
// *os.SyscallError, and a closed f is os.ErrClosed.
func (u *Upgrader) AddFile(name string, f *os.File) error {
	return u.addCopy("file", kindFile, name, f)
}

func (u *Upgrader) addCopy(what, kind, name string, c syscall.Conn) error {
	fail := func(err error) error { return fmt.Errorf("ecdysis: add %s %q: %w", what, name, err) }
	if err := checkName(name); err != nil {
		return fail(err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	e := &entry{kind: kind, name: name, fd: -1}
	if cerr := raw.Control(func(fd uintptr) { e.fd, err = duplicate(int(fd)) }); cerr != nil {
		return fail(closedError(c, cerr))
	}
	if err != nil {
		return fail(err)
	}
	if kind == kindFile {
		e.recognize()
	} else if err := checkConn(e.fd); err != nil {
		e.drop()
		return fail(fmt.Errorf("a %T: %w", c, err))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		e.drop()
		return err
	}
	u.reg.entries = append(u.reg.entries, e)
	if e.kind == kindListener || e.kind == kindPacket {
		u.reg.adopted = append(u.reg.adopted, e)
	}
	return nil
}

// closedError returns the error of a Control that has failed: there is one
// reason for that, which os does not give its name here.
func closedError(c syscall.Conn, err error) error {
	if _, ok := c.(*os.File); ok {
		return os.ErrClosed
	}
	return err
}

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty; want one that the successor asks by")
	case len(name) > maxName:
		return fmt.Errorf("the name has %d bytes; there can be %d", len(name), maxName)
	}
	return nil
}

func duplicate(fd int) (int, error) {
	for {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != unix.EINTR {
			return n, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
		}
	}
}

// checkConn reports, as an error, why net cannot make a connection of fd.
func checkConn(fd int) error {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil || networkOf(typ, sa) == "" {
		return errors.New("it is a socket of a kind that net has no connections for; AddFile moves it as a file")
	}
	return nil
}

// recognize makes e, a bare descriptor, a listener or a socket for packets if
// it is one that clients find by its address.
func (e *entry) recognize() {
	typ, err := unix.GetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return
	}
	sa, at, err := boundTo(e.fd, typ)
	if err != nil || at == "" {
		return
	}
	_, perr := unix.Getpeername(e.fd)
	kind := kindPacket
	if typ != unix.SOCK_DGRAM {
		kind = kindListener
		if yes, err := isListening(e.fd); err == nil && !yes {
			return
		}
	}
	if perr == nil { // connected
		return
	}
	switch sa := sa.(type) {
	case *unix.SockaddrUnix:
		if sa.Name == "" {
			return
		}
		if !isAbstract(sa.Name) {
			if e.path, err = absolute(sa.Name); err != nil {
				return
			}
			var st unix.Stat_t
			if unix.Stat(e.path, &st) == nil {
				e.dev, e.ino = uint64(st.Dev), uint64(st.Ino)
			}
		}
	case *unix.SockaddrInet4:
		if sa.Port == 0 {
			return
		}
	case *unix.SockaddrInet6:
		if sa.Port == 0 {
			return
		}
	}
	e.kind, e.at, e.foreign = kind, at, true
	e.network, e.address, _ = strings.Cut(at, " ")
}

// Listener returns the listening socket that was added under this name, by
// AddFile in this process or in an older one, as Listen would return it; nil:
// there is none. Of several with one name each call returns the next. The
// errors are those of ListenWith.
func (u *Upgrader) Listener(name string) (net.Listener, error) {
	s, err := u.claim(askedAddr{}, func(r *registry) *entry { return r.claimName(kindListener, name) })
	if s == nil || err != nil {
		return nil, err
	}
	return s.(*listener).public(), nil
}

// PacketConn returns the socket for packets that was added under this name, by
// AddFile in this process or in an older one, as ListenPacket would return
// it; nil: there is none. Of several with one name each call returns the next.
// The errors are those of ListenWith.
func (u *Upgrader) PacketConn(name string) (net.PacketConn, error) {
	s, err := u.claim(askedAddr{}, func(r *registry) *entry { return r.claimName(kindPacket, name) })
	if s == nil || err != nil {
		return nil, err
	}
	return s.(*packetConn).public(), nil
}

// Conn returns the connection that was added under this name, by the older
// process or in this one; nil: there is none. It moves out: the package keeps
// no copy, the caller closes it, and to hand it on it is added again. Of
// several with one name each call returns the next. The older process may
// still have it until Ready has returned.
//
// A connection of TCP is a *net.TCPConn, for which net sets its own defaults
// of keep-alive and no-delay; others are a *net.UDPConn, a *net.UnixConn or a
// *SeqpacketConn. The errors are those of ListenWith.
func (u *Upgrader) Conn(name string) (net.Conn, error) {
	fd, err := u.take(name, kindConn)
	if fd < 0 || err != nil {
		return nil, err
	}
	c, err := fileConn(fd)
	if err != nil {
		return nil, fmt.Errorf("ecdysis: connection %q: %w", name, err)
	}
	return c, nil
}

// File returns the file that was added under this name, by the older process
// or in this one; nil: there is none. It moves out: the package keeps no copy,
// the caller closes it, and to hand it on it is added again. Of several with
// one name each call returns the next. A socket that nobody has asked for
// otherwise, and a connection, can be had as a file, too. The errors are those
// of ListenWith.
func (u *Upgrader) File(name string) (*os.File, error) {
	fd, err := u.take(name, fileKinds...)
	if fd < 0 || err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// FileNames lists the names that begin with prefix and under which File returns
// something: first what the predecessor has handed on and nobody has asked for
// yet, then what was added here, both in the order of adding. A name that
// several files have is listed as often.
func (u *Upgrader) FileNames(prefix string) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var names []string
	for _, e := range append(u.reg.unclaimed(), u.reg.entries...) {
		if e.name != "" && strings.HasPrefix(e.name, prefix) && e.sock == nil && slices.Contains(fileKinds, e.kind) {
			names = append(names, e.name)
		}
	}
	return names
}

// fileKinds are the kinds of what File returns, in the order in which it looks.
var fileKinds = []string{kindFile, kindListener, kindPacket, kindConn}

// take moves a bare descriptor of one of the kinds out; -1: there is none.
func (u *Upgrader) take(name string, kinds ...string) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		return -1, err
	}
	for _, kind := range kinds {
		e := claimFirst(u.reg.names, nameKey(kind, name))
		if e == nil {
			i := slices.IndexFunc(u.reg.entries, func(e *entry) bool { return e.kind == kind && e.name == name && e.sock == nil })
			if i < 0 {
				continue
			}
			e = u.reg.entries[i]
			u.reg.remove(e)
		}
		fd := e.fd
		e.fd = -1
		return fd, nil
	}
	return -1, nil
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
// talks with the one before it and with the one after it: toParent leads to
// what the older process has got as toChild; nil: there is none, because this
// is the first process, or the older one did not call DatagramPair with this
// name. The caller closes both.
//
// Call it before Ready, once for each name; a second call is an error. The
// successor's end waits in this process until there is one that takes it:
// after a failed upgrade the next successor gets the same, and what the failed
// one has sent is still there to be read. A datagram socket does not see the
// end of the other process: for that there is [Upgrader.WaitForParent].
//
// The errors are those of ListenWith; one from the system wraps an
// *os.SyscallError.
func (u *Upgrader) DatagramPair(name string) (toParent, toChild *net.UnixConn, err error) {
	fail := func(err error) (*net.UnixConn, *net.UnixConn, error) {
		return nil, nil, fmt.Errorf("ecdysis: datagram pair %q: %w", name, err)
	}
	if err := checkName(name); err != nil {
		return fail(err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		return nil, nil, err
	}
	if slices.ContainsFunc(u.reg.entries, func(e *entry) bool { return e.kind == kindPair && e.name == name }) {
		return fail(errors.New("there is one with this name already"))
	}
	fds, err := socketpair(unix.SOCK_DGRAM)
	if err != nil {
		return fail(err)
	}
	if toChild, err = datagramEnd(fds[0]); err != nil {
		unix.Close(fds[1])
		return fail(err)
	}
	if e := claimFirst(u.reg.names, nameKey(kindPair, name)); e != nil {
		fd := e.fd
		e.fd = -1
		if toParent, err = datagramEnd(fd); err != nil {
			toChild.Close()
			unix.Close(fds[1])
			return fail(err)
		}
	}
	u.reg.entries = append(u.reg.entries, &entry{kind: kindPair, name: name, fd: fds[1]})
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
		return nil, fmt.Errorf("a %T; want a Unix socket", c)
	}
	return uc, nil
}
