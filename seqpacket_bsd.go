//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package ecdysis

import (
	"io"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// On the BSDs the end of a packet is a mark that the sender sets (MSG_EOR). It
// tells an empty packet from the end of the connection. macOS has no such
// sockets; there this is only compiled.

// A packetIn is a packet on its way in. It is received into the caller's buffer
// and a byte more: a packet that reaches that byte did not fit.
type packetIn struct {
	b     []byte
	spare [1]byte
	n     int
	err   error
}

func (p *packetIn) begin(b []byte) { p.b, p.n, p.err = b, 0, nil }

// receive reports whether there is a result.
func (p *packetIn) receive(fd int) bool {
	n, flags, err := recvBuffers(fd, [][]byte{p.b, p.spare[:]})
	switch {
	case err == syscall.EAGAIN:
		return false
	case err != nil:
		p.err = os.NewSyscallError("recvmsg", err)
	case n == 0 && atEnd(fd, flags):
		p.err = io.EOF
	case n > len(p.b):
		p.n, p.err = len(p.b), tooLong(len(p.b))
		leftRest(fd, flags)
	default:
		p.n = n
		if flags&syscall.MSG_TRUNC != 0 {
			p.err = tooLong(len(p.b))
		}
	}
	return true
}

// atEnd reports whether what was received without a byte is the end of the
// connection.
func atEnd(_, flags int) bool { return flags&syscall.MSG_EOR == 0 }

func (p *packetIn) end() (int, error) {
	p.b = nil
	return p.n, p.err
}

// leftRest reports whether a full buffer was too small for a packet whose rest
// would be received next. It takes the rest.
func leftRest(fd, flags int) bool {
	if flags&(syscall.MSG_EOR|syscall.MSG_TRUNC) != 0 || !restStays() || socketTypeOf(fd) != syscall.SOCK_SEQPACKET {
		return false
	}
	drainPacket(fd)
	return true
}

// restStays reports whether what is left of a packet that was longer than the
// buffer is received next, as from FreeBSD 15 on. Others drop it, and what is
// received next is another packet.
var restStays = sync.OnceValue(func() bool {
	if runtime.GOOS != "freebsd" {
		return false
	}
	release, err := unix.SysctlUint32("kern.osreldate")
	return err == nil && release >= 1500000
})

// drainPacket takes what is left of a packet, up to the mark.
func drainPacket(fd int) {
	b := make([]byte, 4<<10)
	for {
		n, flags, err := recvBuffers(fd, [][]byte{b})
		if err != nil || n == 0 || flags&syscall.MSG_EOR != 0 {
			return
		}
	}
}

func recvBuffers(fd int, bufs [][]byte) (n, flags int, err error) {
	for {
		n, _, flags, _, err = unix.RecvmsgBuffers(fd, bufs, nil, 0)
		if err != syscall.EINTR {
			return n, flags, err
		}
	}
}

// transmit reports whether there is a result. From FreeBSD 15 on a packet may
// go in parts, of which the last has the mark.
func (p *packetOut) transmit(fd int) bool {
	for p.n < len(p.b) {
		n, err := sendmsg(fd, p.b[p.n:], nil, syscall.MSG_EOR)
		switch err {
		case nil:
			p.n += n
		case syscall.EAGAIN, syscall.ENOBUFS:
			return false
		default:
			p.err = os.NewSyscallError("sendmsg", err)
			return true
		}
	}
	return true
}
