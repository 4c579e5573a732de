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

// A relay is a connection of packets to the predecessor, for a successor from
// which systemd accepts no messages yet. The predecessor reads the messages only
// when it makes the successor the main process. It first closes its side for
// reading, which the successor sees as EPIPE. It then forwards the messages,
// makes the successor the main process, and closes the connection. The connection
// also ends if the predecessor dies or gives the successor up.
//
// A relay is nil if no predecessor has started this process. Notifier.mu guards
// its use.
type relay struct {
	address string
	c       *net.UnixConn // nil if the connection has ended or could not be made
	err     error         // why the connection could not be made, if the predecessor listens
}

// dialRelay returns nil if there is no predecessor. If the predecessor does not
// listen or has died, the relay has ended.
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
		r.err = nil // nobody listens, so the relay has ended
	}
}

// open reports whether this process's messages still go to the predecessor.
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

// send sends a message to the predecessor. It returns false if the relay has
// ended, so that the caller has to send the message to systemd itself.
func (r *relay) send(message string, files []*os.File) (done bool, err error) {
	if r != nil && r.err != nil {
		r.dial() // its queue may have room by now
	}
	switch {
	case r == nil:
		return false, nil
	case r.err != nil:
		return true, fmt.Errorf("to the predecessor, for systemd: %w", r.err)
	case r.c == nil:
		return false, nil
	}
	// The predecessor reads nothing before the end, so a message that does not fit
	// now will not fit later.
	if err := r.c.SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return true, err
	}
	_, err = ecdysis.WriteFiles(r.c, []byte(message), files...)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return true, fmt.Errorf("to the predecessor, for systemd: %w", err)
	}
	// The predecessor is making this process the main process.
	defer r.close()
	if err := r.c.SetDeadline(time.Now().Add(2 * sendTimeout)); err != nil {
		return true, err
	}
	if _, err := r.c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return true, fmt.Errorf("the predecessor has not introduced this process to systemd: %w", err)
	}
	return false, nil
}

func (r *relay) close() {
	if r != nil && r.c != nil {
		r.c.Close()
		r.c = nil
	}
}

// A relayListener accepts the relay of one attempt's successor. Its goroutine
// runs until close. Any process can connect to an abstract name, so the goroutine
// closes connections of other users at once. They must not fill the queue. A nil
// relayListener accepts nothing.
type relayListener struct {
	l    *net.UnixListener
	done chan struct{} // closed when the goroutine has ended

	mu   sync.Mutex
	kept []*net.UnixConn // of this user, in the order in which they were accepted
}

// maxKept is how many connections of this process's user are kept. One of them is
// the successor's.
const maxKept = 16

// listenRelay listens at an abstract name that the system chooses. It returns nil
// if it cannot. The successor then sends its messages to systemd itself, which
// accepts them when the successor is the main process.
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
		if err != nil { // a lack of descriptors, whose end cannot be waited for
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

// accept returns the connection that process pid has made, or nil if there is
// none. It does not wait for one.
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

// acceptRest accepts the connections that are in the queue, and does not wait.
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
