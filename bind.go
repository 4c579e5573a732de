//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"os"
	"path"
	"strconv"
	"syscall"
	"time"
)

// Making a new socket: options, binding, stale files, and the lock of a
// directory.

// open makes a socket at a, which is not yet in net's hands.
func (a *bindAddr) open(kind string, lc ListenConfig) (*entry, error) {
	fd, err := newSocket(a.family, a.typ)
	if errors.Is(err, syscall.EPROTONOSUPPORT) {
		err = errorf("%w: %w", err, errors.ErrUnsupported)
	}
	if err != nil {
		return nil, err
	}
	e := &entry{wire: wire{kind: kind, keep: lc.KeepOnStop}}
	e.setBare(fd)
	if err := a.bind(fd, lc, e); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		e.removeFile()
		e.closeBare()
		return nil, os.NewSyscallError("getsockname", err)
	}
	e.boundKey = boundKey(a.typ, sa, a.v6only)
	return e, nil
}

// bind sets the options, binds, and listens if a is for connections.
func (a *bindAddr) bind(fd int, lc ListenConfig, e *entry) error {
	if a.family == syscall.AF_INET6 && dualStack {
		if err := syscall.SetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY, b2i(a.v6only)); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
	}
	if a.family != syscall.AF_UNIX {
		// As net does. Two UDP sockets with SO_REUSEADDR could take each
		// other's datagrams.
		option, name := syscall.SO_REUSEADDR, "setsockopt SO_REUSEADDR"
		if a.typ == syscall.SOCK_DGRAM {
			option, name = syscall.SO_BROADCAST, "setsockopt SO_BROADCAST"
		}
		if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, option, 1); err != nil {
			return os.NewSyscallError(name, err)
		}
	}
	if lc.ReusePort {
		if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, reusePort, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEPORT", err)
		}
	}
	if lc.Control != nil {
		network := a.network
		switch a.family {
		case syscall.AF_INET:
			network = network[:3] + "4"
		case syscall.AF_INET6:
			network = network[:3] + "6"
		}
		if err := lc.Control(network, a.addr.String(), e.raw); err != nil {
			return err
		}
	}
	if a.path != "" {
		return a.bindFile(fd, lc, e)
	}
	if err := syscall.Bind(fd, a.sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return a.listen(fd, lc)
}

// listen opens the socket to clients. One for packets is open when it is bound.
func (a *bindAddr) listen(fd int, lc ListenConfig) error {
	if a.typ == syscall.SOCK_DGRAM {
		return nil
	}
	backlog := lc.Backlog
	if backlog == 0 {
		backlog = 65535 // every kernel lowers it to its own maximum
	}
	return os.NewSyscallError("listen", syscall.Listen(fd, backlog))
}

// bindFile binds a socket that has a file. A file that no process listens to
// is replaced, under a lock of its directory, so that of several processes
// that find it stale only one replaces it.
func (a *bindAddr) bindFile(fd int, lc ListenConfig, e *entry) error {
	if lc.Mode != 0 && a.typ == syscall.SOCK_DGRAM {
		// Whatever may write to the file can send at once. On Linux the file
		// gets no more than these bits from the start. Other systems refuse
		// the call.
		_ = syscall.Fchmod(fd, uint32(lc.Mode))
	}
	err := syscall.Bind(fd, a.sa)
	if err == syscall.EADDRINUSE {
		unlock, lerr := lockDir(path.Dir(a.path))
		if lerr != nil {
			return lerr
		}
		defer unlock()
		if err := a.removeStale(); err != nil {
			return err
		}
		err = syscall.Bind(fd, a.sa)
	}
	if err != nil {
		return os.NewSyscallError("bind", err)
	}
	// Until listen a client is refused: nobody can connect before the mode
	// is set.
	e.path = a.path
	if lc.Mode != 0 {
		if cerr := chmod(a.path, lc.Mode); cerr != nil {
			err = &os.PathError{Op: "chmod", Path: a.path, Err: cerr}
		}
	}
	if err == nil {
		err = a.listen(fd, lc)
	}
	var st syscall.Stat_t
	if err == nil {
		err = os.NewSyscallError("lstat", lstat(a.path, &st))
	}
	if err != nil {
		_ = os.Remove(a.path)
		return err
	}
	e.dev, e.ino = uint64(st.Dev), uint64(st.Ino)
	return nil
}

// removeStale removes the socket file at a.path, unless a process listens to
// it or it is something else. It finds out by connecting with a datagram
// socket, which disturbs no process: a live socket of another type answers that
// the type is wrong, and one of this type does not notice.
func (a *bindAddr) removeStale() error {
	inUse := os.NewSyscallError("bind", syscall.EADDRINUSE)
	var st syscall.Stat_t
	err := lstat(a.path, &st)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "lstat", Path: a.path, Err: err}
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return errorf("%w: %s is not a socket; remove it or choose another path", inUse, a.path)
	}
	fd, err := newSocket(syscall.AF_UNIX, syscall.SOCK_DGRAM)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	switch err := syscall.Connect(fd, a.sa); err {
	case syscall.ECONNREFUSED: // stale
	case syscall.ENOENT: // it has gone since
		return nil
	case syscall.EACCES, syscall.EPERM:
		return errorf("%w: whether a process listens at %s cannot be told: %w", inUse, a.path, os.NewSyscallError("connect", err))
	default:
		return errorf("%w: another process listens there", inUse)
	}
	if err := os.Remove(a.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errorf("removing a stale socket file: %w", err)
	}
	return nil
}

// isLive reports whether something is at path that must be left alone: a socket
// that a process listens to, or a file that is no socket.
func isLive(path string) bool {
	var st syscall.Stat_t
	if err := lstat(path, &st); err != nil {
		return err != syscall.ENOENT && err != syscall.ENOTDIR
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return true
	}
	fd, err := newSocket(syscall.AF_UNIX, syscall.SOCK_DGRAM)
	if err != nil {
		return true
	}
	defer syscall.Close(fd)
	return syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}) != syscall.ECONNREFUSED
}

// besidePath is where a process makes the file of a socket that takes the place
// of another one. Its predecessor knows the name, too.
func besidePath(path string, pid int) string { return path + "." + strconv.Itoa(pid) }

// renew returns a new socket in the place of e, whose file is gone: it is bound
// beside e's path until this process is committed to. e is closed.
func renew(asked *socketRequest, e *entry) (*entry, error) {
	a, err := resolve(asked.network, besidePath(e.path, os.Getpid()))
	if err != nil {
		return nil, err
	}
	if len(a.path) > maxUnixPath {
		return nil, errorf("the path %q has %d bytes; the system takes at most %d", a.path, len(a.path), maxUnixPath)
	}
	fresh, err := a.open(e.kind, asked.lc)
	if err != nil {
		return nil, err
	}
	fresh.beside, fresh.path, fresh.renewed, fresh.inherited = a.path, e.path, true, true
	e.closeBare()
	return fresh, nil
}

// place renames the file of a socket that renew has made to its path. It reports
// false, and removes the file, if another process's is there.
func (e *entry) place() bool {
	beside := e.beside
	e.beside = ""
	if isLive(e.path) || rename(beside, e.path) != nil {
		_ = os.Remove(beside)
		return false
	}
	return true
}

// lockDir locks a directory against other processes that replace a file in
// it. It goes on without a lock if the directory cannot be opened for want of
// permission, or if a process has held the lock for a second: any process that
// can read the directory could.
func lockDir(dir string) (unlock func(), err error) {
	fd, err := syscall.Open(dir, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err == syscall.EACCES || err == syscall.EPERM {
		return func() {}, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	unlock = func() { syscall.Close(fd) }
	for range 200 {
		err = syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB)
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR { // locked, or a file system without locks
			return unlock, nil
		}
		time.Sleep(5 * time.Millisecond) // a lock's end is no event
	}
	return unlock, nil // whatever holds it has nothing to do with sockets
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
