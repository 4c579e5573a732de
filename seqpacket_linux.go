package ecdysis

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A packetIn is a packet on its way in.
//
// It is received by readv(2) into the caller's buffer and a byte more: a packet
// that reaches that byte did not fit. recvmsg(2) would tell by a flag, but
// x/sys then allocates the sender's address for each packet.
type packetIn struct {
	bufs  [2][]byte // the caller's, and spare
	spare [1]byte
	n     int
	err   error
}

func (p *packetIn) begin(b []byte) {
	p.bufs = [2][]byte{b, p.spare[:]}
	p.n, p.err = 0, nil
}

// receive reports whether there is a result.
func (p *packetIn) receive(fd int) bool {
	for {
		p.n, p.err = unix.Readv(fd, p.bufs[:])
		switch {
		case p.err == unix.EINTR:
			continue
		case p.err == unix.ECONNRESET:
			// The peer has closed without receiving everything. The system
			// says so once, and before what the peer has sent.
			continue
		case p.err == unix.EAGAIN:
			return false
		case p.err != nil:
			p.err = os.NewSyscallError("readv", p.err)
		case p.n == 0 && atEnd(fd):
			p.err = io.EOF
		}
		return true
	}
}

func (p *packetIn) end() (int, error) {
	b := p.bufs[0]
	p.bufs = [2][]byte{}
	if p.err == nil && p.n > len(b) {
		return len(b), tooLong(len(b))
	}
	return max(p.n, 0), p.err
}

// atEnd tells the end of a connection from an empty packet: the peer has
// closed its side, and nothing is left to receive.
func atEnd(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(fds, 0); err != nil || n == 0 {
		return err != nil
	}
	unread, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	return err != nil || unread == 0
}

// transmit reports whether there is a result. The system takes a packet whole
// or not at all.
func (p *packetOut) transmit(fd int) bool {
	for {
		p.err = unix.Send(fd, p.b, unix.MSG_NOSIGNAL)
		switch {
		case p.err == unix.EINTR:
			continue
		case p.err == unix.EAGAIN:
			return false
		case p.err != nil:
			p.err = os.NewSyscallError("sendto", p.err)
		default:
			p.n = len(p.b)
		}
		return true
	}
}
