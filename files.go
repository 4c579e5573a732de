package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxName is how long a name can be that something is handed on under.
const maxName = 1024

// errNoBytes is what a call says that would send descriptors with nothing.
var errNoBytes = errors.New("descriptors travel with at least one byte, and there is none")

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

// boundTo returns where a socket is bound; "": somewhere that net has no name
// for.
func boundTo(fd, typ int) (sa unix.Sockaddr, at string, err error) {
	if sa, err = unix.Getsockname(fd); err != nil {
		return nil, "", os.NewSyscallError("getsockname", err)
	}
	if networkOf(typ, sa) == "" {
		return sa, "", nil
	}
	v6only := false
	if sa6, ok := sa.(*unix.SockaddrInet6); ok && sa6.Addr == [16]byte{} {
		n, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		v6only = err != nil || n != 0
	}
	return sa, boundKey(typ, sa, v6only), nil
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
	fd, err := u.take(name, kindFile, kindListener, kindPacket, kindConn)
	if fd < 0 || err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

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

// Unregistered lists the sockets of this process that a successor would find
// in its way: those that listen, or are bound for packets and not connected,
// and are not handed on. Each is named by its address and descriptor, as in
// "tcp 127.0.0.1:80 (descriptor 7)". It looks at the descriptors of this
// process alone, not at those of its children. The error of an upgrade names
// them if the successor has called Fail with an error that is EADDRINUSE, or
// has ended without a word.
func (u *Upgrader) Unregistered() ([]string, error) {
	list, err := u.unregistered()
	if err != nil {
		return nil, fmt.Errorf("ecdysis: unregistered: %w", err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.where())
	}
	return names, nil
}

// unregistered returns an entry for each of these sockets, whose descriptor is
// not the entry's own.
func (u *Upgrader) unregistered() ([]*entry, error) {
	fds, err := openDescriptors()
	if err != nil {
		return nil, err
	}
	// A copy of a registered socket is no other socket.
	type id struct{ dev, ino uint64 }
	ident := func(fd int) (id, bool) {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		return id{uint64(st.Dev), uint64(st.Ino)}, err == nil && st.Ino != 0
	}
	numbers, known := make(map[int]bool), make(map[id]bool)
	u.mu.Lock()
	for _, list := range [][]*entry{u.reg.entries, u.reg.inherited} {
		for _, e := range list {
			_ = e.control(func(fd uintptr) {
				numbers[int(fd)] = true
				if i, ok := ident(int(fd)); ok {
					known[i] = true
				}
			})
		}
	}
	u.mu.Unlock()
	var list []*entry
	for _, fd := range fds {
		if i, ok := ident(fd); numbers[fd] || ok && known[i] {
			continue
		}
		e := &entry{kind: kindFile, fd: fd}
		if e.recognize(); e.kind != kindFile {
			list = append(list, e)
		}
	}
	return list, nil
}

// openDescriptors lists the open descriptors of this process: poll(2) tells
// which are not, a thousand at a time, on every system.
func openDescriptors() ([]int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, os.NewSyscallError("getrlimit", err)
	}
	end := 1 << 20
	if uint64(limit.Cur) < uint64(end) {
		end = int(limit.Cur)
	}
	var open []int
	for first := 0; first < end; first += 1024 {
		fds := make([]unix.PollFd, min(1024, end-first))
		for i := range fds {
			fds[i].Fd = int32(first + i)
		}
		for {
			_, err := unix.Poll(fds, 0)
			if err == nil {
				break
			}
			if err != unix.EINTR {
				return nil, os.NewSyscallError("poll", err)
			}
		}
		for _, p := range fds {
			if p.Revents&unix.POLLNVAL == 0 {
				open = append(open, int(p.Fd))
			}
		}
	}
	return open, nil
}

// blame adds to err, the reason of a failed start, which sockets of this
// process have been in the successor's way.
func (a *attempt) blame(err error) error {
	said, ok := err.(successorError)
	if ok && !said.inUse || !ok && err != io.ErrUnexpectedEOF {
		return err
	}
	list, lerr := a.u.unregistered()
	if lerr != nil {
		return err
	}
	cause := "perhaps because of"
	list = slices.DeleteFunc(list, (*entry).autobound)
	if said.address != "" {
		cause = "the cause is"
		list = slices.DeleteFunc(list, func(e *entry) bool { return !said.meets(e) })
	}
	if len(list) == 0 {
		return err
	}
	var names []string
	for _, e := range list {
		names = append(names, e.where())
	}
	return fmt.Errorf("%w; %s what this process has bound and does not hand on: %s", err, cause, strings.Join(names, ", "))
}

// autobound reports whether a socket has an abstract name that the system has
// chosen (unix(7), Autobind), by which it is in nobody's way.
func (e *entry) autobound() bool {
	return isAbstract(e.address) && len(e.address) == len("@00000") && strings.Trim(e.address[1:], "0123456789abcdef") == ""
}

// where names a socket by its address and descriptor.
func (e *entry) where() string { return e.label() + " (descriptor " + strconv.Itoa(e.fd) + ")" }

// meets reports whether a socket can have been in the way of the address that
// a successor has found in use.
func (s successorError) meets(e *entry) bool {
	_, isUnix := socketType(e.network)
	if isUnix {
		return strings.HasPrefix(s.network, "unix") && e.address == s.address
	}
	host1, port1, err1 := net.SplitHostPort(e.address)
	host2, port2, err2 := net.SplitHostPort(s.address)
	return e.network[:3] == s.network[:min(3, len(s.network))] && err1 == nil && err2 == nil &&
		port1 == port2 && (host1 == host2 || isWildcard(host1) || isWildcard(host2))
}

func isWildcard(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}

// ReadFiles reads from a Unix connection of any kind into b, and returns the
// descriptors that came with what it has read, close-on-exec, as files that
// the caller closes. It blocks like a Read of c, whose deadline and Close end
// it. At the end of the stream it returns io.EOF.
//
// If the system had to cut the descriptors (the process has as many open as it
// may), those that came are closed and the error is EMFILE; if a packet was
// longer than b, they are closed and the error is EMSGSIZE. See recvmsg(2) and
// unix(7). A plain Read of such a connection drops descriptors. If b is empty,
// ReadFiles returns at once and takes nothing.
//
// c is a *net.UnixConn, a *SeqpacketConn or a *UnixgramConn.
func ReadFiles(c syscall.Conn, b []byte) (n int, files []*os.File, err error) {
	fail := func(err error) (int, []*os.File, error) {
		return 0, nil, fmt.Errorf("ecdysis: read files: %w", err)
	}
	if len(b) == 0 {
		return 0, nil, nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	oob := make([]byte, unix.CmsgSpace(4*maxFDs)+senderSpace)
	var oobn, flags int
	end := false
	rerr := raw.Read(func(fd uintptr) bool {
		n, oobn, flags, err = recvmsg(int(fd), b, oob)
		if err == unix.ECONNRESET { // told once, and before what the peer has sent
			n, oobn, flags, err = recvmsg(int(fd), b, oob)
		}
		if err == nil && n == 0 {
			typ, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
			end = typ == unix.SOCK_STREAM || typ == unix.SOCK_SEQPACKET && atEnd(int(fd))
		}
		return err != unix.EAGAIN
	})
	if rerr != nil {
		return fail(rerr)
	}
	if err != nil {
		return fail(os.NewSyscallError("recvmsg", err))
	}
	fds, _, err := parseControl(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%w: the system delivered fewer descriptors than were sent (see RLIMIT_NOFILE)", os.NewSyscallError("recvmsg", unix.EMFILE))
	case flags&unix.MSG_TRUNC != 0:
		err = tooLong(len(b))
	case end && len(fds) == 0:
		return 0, nil, io.EOF
	}
	if err != nil {
		closeAll(fds)
		return fail(err)
	}
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "received"))
	}
	return n, files, nil
}

// WriteFiles writes b to a Unix connection of any kind, and with its first
// byte copies of the files' descriptors, at most 100. The files stay the
// caller's. It blocks like a Write of c, whose deadline and Close end it. If
// it returns n > 0, the descriptors have been sent. b must not be empty.
//
// ETOOMANYREFS means that this user has too many descriptors under way that
// nobody has received yet; see sendmsg(2) and unix(7).
//
// c is a *net.UnixConn, a *SeqpacketConn or, if it is connected, a
// *UnixgramConn.
func WriteFiles(c syscall.Conn, b []byte, files ...*os.File) (n int, err error) {
	fail := func(err error) (int, error) {
		return n, fmt.Errorf("ecdysis: write files: %w", err)
	}
	switch {
	case len(files) > maxBatchFDs:
		return fail(fmt.Errorf("%d files; a message takes at most %d on every system", len(files), maxBatchFDs))
	case len(b) == 0:
		return fail(errNoBytes)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	err = withDescriptors(files, nil, func(fds []int) error {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		var err error
		werr := raw.Write(func(fd uintptr) bool {
			flags := 0
			if typ, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); typ == unix.SOCK_SEQPACKET {
				flags = unix.MSG_EOR
			}
			for n < len(b) {
				var m int
				m, err = unix.SendmsgN(int(fd), b[n:], oob, nil, flags)
				switch err {
				case nil:
					n += m
					oob = nil
				case unix.EINTR:
				case unix.EAGAIN:
					return false
				default:
					return true
				}
			}
			return true
		})
		if werr != nil {
			return werr
		}
		return os.NewSyscallError("sendmsg", err)
	})
	if err != nil {
		return fail(err)
	}
	return n, nil
}

// withDescriptors calls f with the files' descriptors, which stay what they
// are meanwhile.
func withDescriptors(files []*os.File, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = withDescriptors(files[1:], append(fds, int(fd)), f) })
	if cerr != nil {
		return closedError(files[0], cerr)
	}
	return err
}

// A Cred says who is at the other end of a Unix connection.
type Cred struct {
	PID int // 0: the system does not tell, or the process is not visible from here
	UID int // the effective user ID
}

// PeerCred returns who made the other end of a Unix connection: who called
// connect, listen or socketpair, as the system has noted it then (SO_PEERCRED
// on Linux and OpenBSD, LOCAL_PEERCRED, LOCAL_PEEREID on NetBSD; see unix(7)
// and unix(4)). FreeBSD and DragonFly do not tell the PID. A connection that
// is none of Unix, or not connected, is an error, and so is, on Linux, a
// datagram socket that is no socketpair's.
//
// c is a *net.UnixConn or a *SeqpacketConn.
func PeerCred(c syscall.Conn) (Cred, error) {
	fail := func(err error) (Cred, error) { return Cred{}, fmt.Errorf("ecdysis: peer credentials: %w", err) }
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	var cred Cred
	cerr := raw.Control(func(fd uintptr) {
		sa, serr := unix.Getsockname(int(fd))
		if _, isUnix := sa.(*unix.SockaddrUnix); !isUnix {
			err = fmt.Errorf("a %T is no Unix connection: %w", c, errors.ErrUnsupported)
			if serr != nil {
				err = os.NewSyscallError("getsockname", serr)
			}
			return
		}
		if cred, err = peerCred(int(fd)); err != nil {
			err = os.NewSyscallError("getsockopt", err)
		} else if cred.UID == -1 || uint32(cred.UID) == 1<<32-1 {
			err = os.NewSyscallError("getsockopt", unix.ENOTCONN)
		}
	})
	if cerr != nil {
		return fail(cerr)
	}
	if err != nil {
		return fail(err)
	}
	return cred, nil
}
