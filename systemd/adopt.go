package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

// firstPassed is the number of the first descriptor that systemd passes.
const firstPassed = 3

// Adopt takes the sockets that systemd has passed to this process, from socket
// units and from the descriptor store (sd_listen_fds(3)). Call it after
// [ecdysis.New] and before the program listens. A socket's name is that of
// FileDescriptorName= in the socket unit. Without that line it is the unit's
// name, such as "web.socket".
//
// systemd names a descriptor "stored" if it was stored without a name, and
// "connection" if it is the connection of a unit with Accept=yes. Descriptors
// that another program than systemd has passed without names are "unknown".
//
// After Adopt, in this process and in its successors,
//
//   - Upgrader.Listen and ListenPacket find a socket by its address, so that a
//     program need not know whether there is a socket unit;
//   - Upgrader.Listener and PacketConn find a socket by its name. Sockets with
//     equal names are returned one after the other, in the order of their socket
//     unit. The order across units is not stable, so sockets of several units
//     need different names;
//   - Upgrader.Conn finds a connection by its name;
//   - Upgrader.File finds anything else, such as FIFOs, devices and message
//     queues.
//
// A descriptor that the program does not ask for stays with this process and is
// handed on. The successor closes it if the successor does not ask for it either.
//
// Adopt does nothing in a successor, which inherits the sockets from its
// predecessor. It also does nothing if the variables, such as LISTEN_FDS, are not
// set or LISTEN_PID names another process. It removes the variables from the
// environment in any case. It sets close-on-exec on the descriptors, and makes
// sockets and FIFOs non-blocking whether or not the unit has NonBlocking=.
//
// An error says which variable does not have systemd's form, or which descriptor
// is not open, or comes from AddFile. Nothing was adopted then, and the passed
// descriptors are closed.
func Adopt(u *ecdysis.Upgrader) error {
	_, err := adopt(u, false)
	return err
}

// A passed is a descriptor that systemd has passed.
type passed struct {
	fd   int
	name string
}

// adopt returns what was adopted. With restore it leaves out Unix sockets whose
// file has gone, because no client can find them.
func adopt(u *ecdysis.Upgrader, restore bool) ([]storedSocket, error) {
	list, err := passedHere()
	if err != nil {
		return nil, fmt.Errorf("systemd: adopt: %w", err)
	}
	var had []storedSocket
	for i, p := range list {
		s := storedSocket{p.name, inode(p.fd)}
		f, err := p.file()
		if err == nil {
			if !restore || !fileGone(p.fd) {
				err = add(u, p, f)
			}
			f.Close()
		}
		if err != nil {
			closePassed(list[i+1:])
			for _, s := range had {
				if f, _ := u.File(s.name); f != nil {
					f.Close()
				}
			}
			return nil, fmt.Errorf("systemd: adopt descriptor %d: %w", p.fd, err)
		}
		had = append(had, s)
	}
	return had, nil
}

// passedHere returns what was passed to this process, close-on-exec, and clears
// the environment.
func passedHere() ([]passed, error) {
	pid, isPID := os.LookupEnv("LISTEN_PID")
	fds, isFDs := os.LookupEnv("LISTEN_FDS")
	names, named := os.LookupEnv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		_ = os.Unsetenv(name) // cannot fail for these names
	}
	if !isPID || !isFDs {
		return nil, nil
	}
	if p, err := strconv.Atoi(pid); err != nil || p <= 0 {
		return nil, fmt.Errorf("LISTEN_PID is %q; want a process ID", pid)
	} else if p != os.Getpid() {
		return nil, nil
	}
	if !supported {
		return nil, errors.ErrUnsupported
	}
	count, label, err := parseListen(fds, names, named)
	if err != nil {
		closePassed(inherited(count))
		return nil, err
	}
	list := inherited(count)
	for i := range list {
		unix.CloseOnExec(list[i].fd)
		if list[i].name = "unknown"; label != nil && label[i] != "" {
			list[i].name = label[i]
		}
	}
	if len(list) < count {
		missing := firstPassed + len(list)
		closePassed(list)
		return nil, fmt.Errorf("LISTEN_FDS is %d, but descriptor %d was not passed, or this process has closed or replaced it", count, missing)
	}
	return list, nil
}

// parseListen returns what LISTEN_FDS and, if there is one, LISTEN_FDNAMES say:
// the number of descriptors, and their names. With an error about the names it
// returns the number, too.
func parseListen(fds, names string, named bool) (count int, label []string, err error) {
	count, err = strconv.Atoi(fds)
	if err != nil || count < 0 {
		return 0, nil, fmt.Errorf("LISTEN_FDS is %q; want a number of descriptors", fds)
	}
	if !named {
		return count, nil, nil
	}
	label = strings.Split(names, ":")
	if len(label) != count && (count > 0 || names != "") {
		return count, nil, fmt.Errorf("LISTEN_FDNAMES is %q, which is %d names for the %d descriptors of LISTEN_FDS", names, len(label), count)
	}
	return count, label, nil
}

// inherited returns the descriptors that were passed, up to the first one that
// was not. A passed descriptor is not close-on-exec. One that this process or the
// Go runtime has opened is close-on-exec.
func inherited(count int) []passed {
	var list []passed
	for fd := firstPassed; fd-firstPassed < count; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			break
		}
		list = append(list, passed{fd: fd})
	}
	return list
}

func closePassed(list []passed) {
	for _, p := range list {
		unix.Close(p.fd)
	}
}

// file returns p as a file. Sockets and FIFOs become non-blocking, so that os and
// net wait for them as for files of their own.
func (p passed) file() (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(p.fd, &st)
	if err == nil && (st.Mode&unix.S_IFMT == unix.S_IFSOCK || st.Mode&unix.S_IFMT == unix.S_IFIFO) {
		err = unix.SetNonblock(p.fd, true)
	}
	if err != nil {
		unix.Close(p.fd)
		return nil, err
	}
	return os.NewFile(uintptr(p.fd), p.name), nil
}

// add adds f to u, as a connection if net knows its kind.
func add(u *ecdysis.Upgrader, p passed, f *os.File) error {
	peer, err := unix.Getpeername(p.fd)
	if err == nil {
		switch peer.(type) {
		case *unix.SockaddrInet4, *unix.SockaddrInet6, *unix.SockaddrUnix:
			c, err := net.FileConn(f)
			if err != nil {
				return err
			}
			defer c.Close()
			return u.AddConn(p.name, c)
		}
	}
	return u.AddFile(p.name, f)
}

// fileGone reports whether fd is bound to a path where there is no socket now.
func fileGone(fd int) bool {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	su, ok := sa.(*unix.SockaddrUnix)
	if !ok || su.Name == "" || su.Name[0] != '/' {
		return false
	}
	var st unix.Stat_t
	return unix.Stat(su.Name, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK
}

// inode returns the number that distinguishes a socket from all others that are
// open now.
func inode(fd int) uint64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}
