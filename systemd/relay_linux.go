package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

// A relay is a successor's way to systemd, which does not listen to it yet: a
// connection of packets to the old process. That one does not look at them
// before it introduces the successor. It then takes no more (which the
// successor sees as EPIPE), forwards what it has, makes the successor the main
// process, and closes the connection. If it dies or gives the successor up, the
// connection ends, too.
//
// A nil relay is no way at all: nobody has started this process. Notifier.mu
// guards its use.
type relay struct {
	c *net.UnixConn // nil: it has ended
}

// dialRelay returns nil if there is nobody: an old process that could not
// listen, or that has died.
func dialRelay(address string) *relay {
	if address == "" {
		return nil
	}
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: address})
	if err != nil {
		return &relay{}
	}
	return &relay{c}
}

// open reports whether the old process still speaks for this one.
func (r *relay) open() bool { return r != nil && r.c != nil && !r.ended() }

func (r *relay) ended() bool {
	raw, err := r.c.SyscallConn()
	if err != nil {
		return true
	}
	ended := true
	_ = raw.Control(func(fd uintptr) {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ended = err != unix.EAGAIN && err != unix.EINTR
	})
	return ended
}

// send reports true if the old process has the message or will find it, or if
// that went wrong, and false if systemd itself is to be told.
func (r *relay) send(message string, files []*os.File) (done bool, err error) {
	if r == nil || r.c == nil {
		return false, nil
	}
	// Nobody reads until the end: what does not fit now will not.
	if err := r.c.SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return true, err
	}
	_, err = ecdysis.WriteFiles(r.c, []byte(message), files...)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return true, fmt.Errorf("to the old process, for systemd: %w", err)
	}
	// It is introducing this process just now.
	defer r.close()
	if err := r.c.SetDeadline(time.Now().Add(2 * sendTimeout)); err != nil {
		return true, err
	}
	if _, err := r.c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return true, fmt.Errorf("the old process has not introduced this one to systemd: %w", err)
	}
	return false, nil
}

func (r *relay) close() {
	if r != nil && r.c != nil {
		r.c.Close()
		r.c = nil
	}
}

// A relayListener is where the successor of one attempt finds this process. A
// nil one takes nobody.
type relayListener struct{ l *net.UnixListener }

// listenRelay listens at an abstract name that the system chooses. If it cannot,
// the successor is heard when it is introduced.
func listenRelay() *relayListener {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket"})
	if err != nil {
		return nil
	}
	return &relayListener{l}
}

func (l *relayListener) address() string {
	if l == nil {
		return ""
	}
	return l.l.Addr().String()
}

func (l *relayListener) close() {
	if l != nil {
		l.l.Close()
	}
}

// accept returns the connection of this process; nil: it has made none. Anybody
// may connect, so it looks who it is. It does not wait.
func (l *relayListener) accept(pid int) (*net.UnixConn, error) {
	if l == nil {
		return nil, nil
	}
	raw, err := l.l.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		nfd := -1
		cerr := raw.Control(func(fd uintptr) {
			for {
				nfd, _, err = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
				if err != unix.EINTR && err != unix.ECONNABORTED {
					return
				}
			}
		})
		if cerr != nil {
			return nil, cerr
		}
		if err == unix.EAGAIN {
			return nil, nil
		}
		if err != nil {
			return nil, os.NewSyscallError("accept4", err)
		}
		f := os.NewFile(uintptr(nfd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		if cred, err := ecdysis.PeerCred(c.(*net.UnixConn)); err == nil && cred.PID == pid {
			return c.(*net.UnixConn), nil
		}
		c.Close()
	}
}
