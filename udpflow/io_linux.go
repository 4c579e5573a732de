package udpflow

import (
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A vector has the arguments of recvmmsg(2) and sendmsg(2) for the messages of a
// reader. The system calls are made directly, because the functions of x/sys
// allocate the sender's address of each packet and receive one packet each.
type vector struct {
	headers []mmsghdr
	names   []unix.RawSockaddrInet6
	records []record
	iovecs  []unix.Iovec
	first   []int // where the iovecs of each message begin
	out     unix.Msghdr
}

type mmsghdr struct {
	header unix.Msghdr
	n      uint32
}

func (v *vector) grow(n int) {
	*v = vector{
		headers: make([]mmsghdr, n),
		names:   make([]unix.RawSockaddrInet6, n),
		records: make([]record, n),
		first:   make([]int, n),
	}
}

// clear drops the references to the caller's buffers.
func (v *vector) clear() {
	clear(v.iovecs)
	for i := range v.headers {
		v.headers[i].header.Control = nil
	}
}

func iovec(base *byte, n int) (v unix.Iovec) {
	v.Base = base
	v.SetLen(n)
	return v
}

// recv receives the packets that are in the socket, as far as r.msgs has room.
func (r *reader) recv(fd int) (int, error) {
	v := &r.vector
	v.iovecs = v.iovecs[:0]
	for i := range r.msgs {
		v.first[i] = len(v.iovecs)
		for _, b := range r.msgs[i].bufs {
			v.iovecs = append(v.iovecs, iovec(unsafe.SliceData(b), len(b)))
		}
	}
	for i := range r.msgs {
		m, h := &r.msgs[i], &v.headers[i].header
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&v.names[i])), uint32(unsafe.Sizeof(v.names[i]))
		h.Iov = nil
		if len(m.bufs) > 0 {
			h.Iov = &v.iovecs[v.first[i]]
		}
		h.SetIovlen(len(m.bufs))
		h.Control = unsafe.SliceData(m.oob)
		h.SetControllen(len(m.oob))
	}
	n, err := v.recvmmsg(fd, len(r.msgs))
	for i := range r.msgs[:n] {
		m, h := &r.msgs[i], &v.headers[i]
		m.n, m.flags = int(h.n), int(h.header.Flags)
		m.control = m.oob[:h.header.Controllen]
		r.setName(m, &v.names[i])
	}
	return n, err
}

func (r *reader) setName(m *message, name *unix.RawSockaddrInet6) {
	switch name.Family {
	case unix.AF_INET:
		name := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		m.setFrom(netip.AddrFrom4(name.Addr), swap(name.Port), 0)
	case unix.AF_INET6:
		m.setFrom(netip.AddrFrom16(name.Addr), swap(name.Port), name.Scope_id)
	}
}

// swap converts a port from network byte order.
func swap(port uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}

// recvmmsg receives at most n messages, and at least one.
func (v *vector) recvmmsg(fd, n int) (int, error) {
	for {
		got, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&v.headers[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(got), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// send sends messages to an inbox, each after its record.
func (r *reader) send(fd int, list []int) error {
	v := &r.vector
	v.iovecs = v.iovecs[:0]
	for _, i := range list {
		m := &r.msgs[i]
		v.iovecs = append(v.iovecs, iovec((*byte)(unsafe.Pointer(&v.records[i])), recordSize), iovec(unsafe.SliceData(m.control), len(m.control)))
		left := m.n
		for _, b := range m.bufs {
			n := min(left, len(b))
			v.iovecs = append(v.iovecs, iovec(unsafe.SliceData(b), n))
			left -= n
		}
	}
	v.out.Iov = &v.iovecs[0]
	v.out.SetIovlen(len(v.iovecs))
	for {
		_, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&v.out)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// inboxPair returns the two ends of an inbox, the first for reading and the second
// for writing. The inbox holds about buffer bytes.
func inboxPair(buffer int) ([2]int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fds, os.NewSyscallError("socketpair", err)
	}
	// Packets that wait count against the sender's buffer. A privileged process may
	// exceed the system's limit.
	if unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, buffer) != nil {
		_ = unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUF, buffer)
	}
	return fds, nil
}
