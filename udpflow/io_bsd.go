//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package udpflow

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// On these systems packets are received and sent one by one. An inbox is a pair of
// datagram sockets, because macOS has no sequenced-packet sockets. Those of the
// BSDs may send a part of a packet if they have no room for the whole.

// A vector is the records of a reader's messages.
type vector struct{ records []record }

func (v *vector) grow(n int) { v.records = make([]record, n) }

func (v *vector) clear() {}

// recv receives a packet from the socket.
func (r *reader) recv(fd int) (int, error) {
	m := &r.msgs[0]
	for {
		n, oobn, flags, from, err := unix.RecvmsgBuffers(fd, m.bufs, m.oob, unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		m.n, m.flags, m.control = n, flags, m.oob[:oobn]
		switch from := from.(type) {
		case *unix.SockaddrInet4:
			m.setFrom(netip.AddrFrom4(from.Addr), uint16(from.Port), 0)
		case *unix.SockaddrInet6:
			m.setFrom(netip.AddrFrom16(from.Addr), uint16(from.Port), from.ZoneId)
		}
		return 1, nil
	}
}

// send sends messages to an inbox, each after its record.
func (r *reader) send(fd int, list []int) error {
	var bufs [][]byte
	for _, i := range list {
		m := &r.msgs[i]
		bufs = append(bufs, unsafe.Slice((*byte)(unsafe.Pointer(&r.records[i])), recordSize), m.control)
		left := m.n
		for _, b := range m.bufs {
			b = b[:min(left, len(b))]
			bufs = append(bufs, b)
			left -= len(b)
		}
	}
	for {
		_, err := unix.SendmsgBuffers(fd, bufs, nil, nil, unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err
		}
	}
}

// inboxPair returns the two ends of an inbox, the first for reading and the second
// for writing. The inbox holds about buffer bytes.
func inboxPair(buffer int) ([2]int, error) {
	fds, err := datagramPair()
	if err != nil {
		return fds, err
	}
	// Packets that wait are in the receiver's buffer. The sender's buffer limits the
	// size of a packet. The system refuses a value above its limit.
	for n := buffer; n >= 4<<10 && unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_RCVBUF, n) != nil; n /= 2 {
	}
	for n := inboxSize; n >= 4<<10 && unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUF, n) != nil; n /= 2 {
	}
	return fds, nil
}
