package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
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
// A nil relay is no way at all: no predecessor has started this process.
// Notifier.mu guards its use.
type relay struct {
	address string
	c       *net.UnixConn // nil if it has ended, or could not be made
	err     error         // why it could not be made, although the predecessor listens; nil otherwise
}

// dialRelay returns nil if there is no predecessor. One that could not listen,
// or that has died, is a relay that has ended.
func dialRelay(address string) *relay {
	if address == "" {
		return nil
	}
	r := &relay{address: address}
	r.dial()
	return r
}

func (r *relay) dial() {
	r.c, r.err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: r.address})
	if errors.Is(r.err, unix.ECONNREFUSED) {
		r.err = nil // it has ended
	}
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
	if r != nil && r.err != nil {
		r.dial() // its queue may have room by now
	}
	switch {
	case r == nil:
		return false, nil
	case r.err != nil:
		return true, fmt.Errorf("to the old process, for systemd: %w", r.err)
	case r.c == nil:
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

// A relayListener is where the successor of one attempt finds this process, until
// close ends its goroutine. Any process can connect to an abstract name, so the
// goroutine lets those of other users go at once: their connections must not
// fill the queue. A nil relayListener takes nobody.
type relayListener struct {
	l    *net.UnixListener
	done chan struct{} // closed when the goroutine has ended

	mu   sync.Mutex
	kept []*net.UnixConn // of this user, in the order of their coming
}

// maxKept is how many connections of this process's user are kept, one of which
// is the successor's.
const maxKept = 16

// listenRelay listens at an abstract name that the system chooses. If it cannot,
// what the successor says reaches systemd after it is introduced.
func listenRelay() *relayListener {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket"})
	if err != nil {
		return nil
	}
	r := &relayListener{l: l, done: make(chan struct{})}
	go r.serve()
	return r
}

// serve accepts until close or accept ends it by a deadline.
func (l *relayListener) serve() {
	defer close(l.done)
	for {
		c, err := l.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil { // a lack of descriptors, whose end is no event
			time.Sleep(10 * time.Millisecond)
			continue
		}
		l.keep(c)
	}
}

func (l *relayListener) keep(c *net.UnixConn) {
	cred, err := ecdysis.PeerCred(c)
	if err != nil || cred.UID != os.Geteuid() && cred.UID != 0 {
		c.Close()
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.kept) == maxKept {
		l.kept[0].Close()
		l.kept = l.kept[1:]
	}
	l.kept = append(l.kept, c)
}

func (l *relayListener) address() string {
	if l == nil {
		return ""
	}
	return l.l.Addr().String()
}

func (l *relayListener) close() {
	if l == nil {
		return
	}
	l.l.Close()
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.kept {
		c.Close()
	}
	l.kept = nil
}

// accept returns the connection of this process, or nil if it has made none. It
// does not wait for one.
func (l *relayListener) accept(pid int) (*net.UnixConn, error) {
	if l == nil {
		return nil, nil
	}
	if err := l.l.SetDeadline(time.Unix(1, 0)); err != nil {
		return nil, err
	}
	<-l.done
	if err := l.acceptRest(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, c := range l.kept {
		if cred, err := ecdysis.PeerCred(c); err == nil && cred.PID == pid {
			l.kept = slices.Delete(l.kept, i, i+1)
			return c, nil
		}
	}
	return nil, nil
}

// acceptRest accepts what has come, and does not wait.
func (l *relayListener) acceptRest() error {
	raw, err := l.l.SyscallConn()
	if err != nil {
		return err
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
		switch {
		case cerr != nil:
			return cerr
		case err == unix.EAGAIN:
			return nil
		case err != nil:
			return os.NewSyscallError("accept4", err)
		}
		f := os.NewFile(uintptr(nfd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return err
		}
		l.keep(c.(*net.UnixConn))
	}
}
