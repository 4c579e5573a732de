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

// Adopt takes the sockets that systemd has passed to this process, of socket
// units and of the descriptor store (sd_listen_fds(3)), and is called after
// [ecdysis.New] and before anything listens. Their names are those of
// FileDescriptorName= in the socket unit or, without it, of the unit, such as
// "web.socket". systemd's own names are "stored" for what was stored without
// one and "connection" for the one of a unit with Accept=yes; what comes without
// names, by another program than systemd, is "unknown".
//
// Then, in this process and in its successors,
//
//   - Upgrader.Listen and ListenPacket find a socket by its address, so that a
//     program need not know whether there is a socket unit;
//   - Upgrader.Listener and PacketConn find it by its name, and with equal names
//     one after the other. The order within a socket unit is that of the unit;
//     across units it is not stable: there the names have to tell;
//   - Upgrader.Conn finds a connection by its name;
//   - Upgrader.File finds anything else: FIFOs, devices, message queues.
//
// What is not asked for stays with this process, is handed on, and is closed by
// the successor if that does not ask, either.
//
// In a successor, which has all this from the older process, there is nothing to
// adopt, and neither is there if the variables (LISTEN_FDS and its like) are not
// set or, by LISTEN_PID, another process's. They are removed from the
// environment in any case. The descriptors get close-on-exec; sockets and FIFOs
// become non-blocking, whatever NonBlocking= in the unit says.
//
// An error says which variable has not the form that systemd gives it, or which
// descriptor is not open. Then nothing was adopted, and what was passed is
// closed. The errors of AddFile are among them.
func Adopt(u *ecdysis.Upgrader) error {
	_, err := adopt(u, false)
	return err
}

// A passed is a descriptor that systemd has passed.
type passed struct {
	fd   int
	name string
}

// adopt returns what was adopted. Of a Unix socket whose file has gone, which no
// client can find, there is nothing to restore.
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
		_ = os.Unsetenv(name) // fails for no name like these
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
	count, err := strconv.Atoi(fds)
	if err != nil || count < 0 {
		return nil, fmt.Errorf("LISTEN_FDS is %q; want a number of descriptors", fds)
	}
	label := strings.Split(names, ":")
	if named && len(label) != count && (count > 0 || names != "") {
		closePassed(inherited(count))
		return nil, fmt.Errorf("LISTEN_FDNAMES is %q, which is %d names for the %d descriptors of LISTEN_FDS", names, len(label), count)
	}
	list := inherited(count)
	for i := range list {
		unix.CloseOnExec(list[i].fd)
		if list[i].name = "unknown"; named && label[i] != "" {
			list[i].name = label[i]
		}
	}
	if len(list) < count {
		missing := firstPassed + len(list)
		closePassed(list)
		return nil, fmt.Errorf("LISTEN_FDS is %d, and descriptor %d was not passed, or something else in this process has taken or closed it", count, missing)
	}
	return list, nil
}

// inherited returns the descriptors that were passed, up to the first that was
// not. What this process has opened itself, as the Go runtime has, is
// close-on-exec; what was passed is not.
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

// file takes p over. What can be waited for becomes non-blocking, so that os and
// net wait for it as for files of their own.
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

// add brings f in: as a connection if it is one that net knows.
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

// fileGone reports whether fd is bound to a path at which no socket is.
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

// inode is what tells a socket from every other one that is there.
func inode(fd int) uint64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}
