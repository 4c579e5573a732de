package ecdysis

import (
	"errors"
	"fmt"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

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

func (fd rawFD) Control(f func(uintptr)) error { f(uintptr(fd)); return nil }

func (fd rawFD) Read(func(uintptr) bool) error { return errors.ErrUnsupported }

func (fd rawFD) Write(func(uintptr) bool) error { return errors.ErrUnsupported }
