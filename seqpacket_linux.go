package ecdysis

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A packetIn is a packet on its way in.
//
// It is received by recvfrom(2) with MSG_TRUNC, which returns a packet's whole
// length. x/sys has calls for that, but they allocate the address of a sender
// that is bound, for each packet.
type packetIn struct {
	b   []byte
	n   int // the packet's length
	err error
}

func (p *packetIn) begin(b []byte) { p.b, p.n, p.err = b, 0, nil }

// receive reports whether there is a result.
func (p *packetIn) receive(fd int) bool {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&p.b[0])), uintptr(len(p.b)), syscall.MSG_TRUNC, 0, 0)
		switch errno {
		case 0:
			p.n = int(n)
			if n == 0 && atEnd(fd, 0) {
				p.err = io.EOF
			}
			return true
		case syscall.EINTR:
		case syscall.ECONNRESET:
			// The peer has closed without receiving everything. The system
			// says so once, and before what the peer has sent.
		case syscall.EAGAIN:
			return false
		default:
			p.err = os.NewSyscallError("recvfrom", errno)
			return true
		}
	}
}

func (p *packetIn) end() (int, error) {
	b := p.b
	p.b = nil
	if p.n > len(b) {
		return len(b), tooLong(len(b))
	}
	return p.n, p.err
}

// atEnd tells the end of a connection from an empty packet: the peer has
// closed its side, and nothing is left to receive.
func atEnd(fd, _ int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(fds, 0); err != nil || n == 0 {
		return err != nil
	}
	unread, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	return err != nil || unread == 0
}

// leftRest reports that there is none: what does not fit is lost.
func leftRest(_, _ int) bool { return false }

// transmit reports whether there is a result. The system takes a packet whole
// or not at all.
func (p *packetOut) transmit(fd int) bool {
	for {
		p.err = unix.Send(fd, p.b, unix.MSG_NOSIGNAL)
		switch {
		case p.err == syscall.EINTR:
			continue
		case p.err == syscall.EAGAIN:
			return false
		case p.err != nil:
			p.err = os.NewSyscallError("sendto", p.err)
		default:
			p.n = len(p.b)
		}
		return true
	}
}
