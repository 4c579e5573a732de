//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Finding the sockets that would be in a successor's way.

// Unregistered lists the sockets of this process that a successor would find
// in its way: those that listen, or are bound for packets and not connected,
// and are not handed on. Each is named by its address and descriptor, as in
// "tcp 127.0.0.1:80 (descriptor 7)". It looks at the descriptors of this
// process alone, not at those of its children. The error of an upgrade names
// them if the successor has called Fail with an error that is EADDRINUSE, or
// has ended without calling Ready or Fail.
func (u *Upgrader) Unregistered() ([]string, error) {
	list, err := u.unregistered()
	if err != nil {
		return nil, errorf("ecdysis: unregistered: %w", err)
	}
	var names []string
	for _, s := range list {
		names = append(names, s.String())
	}
	return names, nil
}

// A strayedSocket is a socket that is not handed on.
type strayedSocket struct {
	wire
	fd int // another part of the program's, which may close it
}

func (s *strayedSocket) String() string {
	return s.label() + " (descriptor " + strconv.Itoa(s.fd) + ")"
}

// autobound reports whether the system has chosen the socket's abstract name
// (unix(7), Autobind), by which it is in no successor's way.
func (s *strayedSocket) autobound() bool {
	if !isAbstract(s.address) || len(s.address) != len("@00000") {
		return false
	}
	for _, c := range s.address[1:] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func (u *Upgrader) unregistered() ([]*strayedSocket, error) {
	fds, err := openDescriptors()
	if err != nil {
		return nil, err
	}
	// A copy of a registered socket is no other socket.
	type id struct{ dev, ino uint64 }
	ident := func(fd int) (id, bool) {
		var st syscall.Stat_t
		err := syscall.Fstat(fd, &st)
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
	if f := u.reg.spare.file; f != nil {
		numbers[int(f.Fd())] = true
	}
	u.mu.Unlock()
	var list []*strayedSocket
	for _, fd := range fds {
		if i, ok := ident(fd); numbers[fd] || ok && known[i] {
			continue
		}
		s := &strayedSocket{wire: wire{kind: kindFile}, fd: fd}
		if s.recognize(fd); s.isSocket() {
			list = append(list, s)
		}
	}
	return list, nil
}

// openDescriptors lists the open descriptors of this process: poll(2) tells
// which are not, on every system. NetBSD refuses more than a thousand at a
// time, and macOS tells of nothing that was not asked for.
func openDescriptors() ([]int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return nil, os.NewSyscallError("getrlimit", err)
	}
	end := 1 << 20
	if uint64(limit.Cur) < uint64(end) {
		end = int(limit.Cur)
	}
	var open []int
	const most = 1000
	for first := 0; first < end; first += most {
		fds := make([]unix.PollFd, min(most, end-first))
		for i := range fds {
			fds[i] = unix.PollFd{Fd: int32(first + i), Events: unix.POLLHUP}
		}
		for {
			_, err := unix.Poll(fds, 0)
			if err == nil {
				break
			}
			if err != syscall.EINTR {
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
