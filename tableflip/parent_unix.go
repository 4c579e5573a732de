//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package tableflip

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

const supported = true

// A tableflip process starts its successor with the variable parentVar and these
// descriptors. readyFD is the write end of a pipe, to which the successor writes
// readyByte when it is ready. namesFD is the read end of another pipe. The
// tableflip process writes a list of names to that pipe, and keeps its end open
// until it exits. The descriptors from firstNamed on have these names.
const (
	parentVar  = "TABLEFLIP_HAS_PARENT_7DIU3"
	readyByte  = 42
	readyFD    = 3
	namesFD    = 4
	firstNamed = 5
)

// tellTimeout bounds the wait for a parent that does not read the ready byte. Such
// a process is stopped or starved, and does not serve.
const tellTimeout = 5 * time.Second

// passed has the descriptors from readyFD on that a tableflip process has passed to
// this one. It is nil if there are none, or if openParent has taken them. It is set
// and the variable removed at initialisation, before the program can start another
// program, which would take them for its own.
var passed = passedHere()

func passedHere() []int {
	if os.Getenv(parentVar) == "" {
		return nil
	}
	_ = os.Unsetenv(parentVar) // cannot fail for this name
	// Every program that a tableflip process starts has the variable. Only its
	// successor has the pipes.
	if !isPipe(readyFD, unix.O_WRONLY) || !isPipe(namesFD, unix.O_RDONLY) {
		return nil
	}
	var fds []int
	for fd := readyFD; ; fd++ {
		// Descriptors that the Go runtime has opened are close-on-exec.
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return fds
		}
		unix.CloseOnExec(fd)
		fds = append(fds, fd)
	}
}

// isPipe reports whether a descriptor that was passed is an end of a pipe.
func isPipe(fd, mode int) bool {
	var st unix.Stat_t
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 || unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return false
	}
	flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == mode
}

// A parent is the tableflip process that has started this one.
type parent struct {
	ready *os.File      // for the ready byte
	alive *os.File      // ends when the parent exits
	turn  chan struct{} // held by the call that reads from alive
	named []named
}

// A named is a descriptor that the parent hands on.
type named struct {
	key
	file *os.File
}

// openParent returns the tableflip process that has started this one, with the
// descriptors that it hands on. It returns nil if there is no such process, or if
// an earlier call has returned it.
func openParent(deadline time.Time) (*parent, error) {
	if passed == nil {
		return nil, nil
	}
	fds := passed
	passed = nil
	for _, fd := range fds[:firstNamed-readyFD] { // deadlines need it
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
	}
	p := &parent{
		ready: os.NewFile(readyFD, "to the parent"),
		alive: os.NewFile(namesFD, "from the parent"),
		turn:  make(chan struct{}, 1),
	}
	fds = fds[firstNamed-readyFD:]
	names, err := p.readNames(deadline)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		// The parent has died before it has written the names. The sockets are
		// here, and package ecdysis finds them by their addresses.
		names, err = nil, nil
		for _, fd := range fds {
			names = append(names, []string{kindListener, "descriptor", strconv.Itoa(fd)})
		}
	}
	if err == nil && len(names) > len(fds) {
		err = fmt.Errorf("it names %d descriptors, but has passed %d", len(names), len(fds))
	}
	if err != nil {
		p.close()
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("the tableflip process that has started this one: %w", err)
	}
	for i, fd := range fds {
		if i >= len(names) { // it has no name, so the program has left it inheritable on purpose
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
			continue
		}
		var k [3]string
		copy(k[:], names[i])
		n := named{key: key{k[0], k[1], k[2]}}
		n.file = os.NewFile(uintptr(fd), n.name())
		p.named = append(p.named, n)
	}
	return p, nil
}

func (p *parent) readNames(deadline time.Time) (names [][]string, err error) {
	if err := p.alive.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	if err := gob.NewDecoder(p.alive).Decode(&names); err != nil {
		return nil, fmt.Errorf("reading the names of its descriptors: %w", err)
	}
	return names, p.alive.SetReadDeadline(time.Time{})
}

// addTo adds everything that the parent hands on to the core.
func (p *parent) addTo(u *ecdysis.Upgrader) error {
	for _, n := range p.named {
		if err := n.addTo(u); err != nil {
			return fmt.Errorf("adding %q of the tableflip process: %w", n.name(), err)
		}
	}
	return nil
}

func (n named) addTo(u *ecdysis.Upgrader) error {
	if n.kind == kindConn {
		// A socket that net does not support as a connection is added as a file.
		if c, err := net.FileConn(n.file); err == nil {
			defer c.Close()
			if err := u.AddConn(n.name(), c); err == nil {
				return nil
			}
		}
	}
	return u.AddFile(n.name(), n.file)
}

// closeFiles closes the descriptors, because the core has copies.
func (p *parent) closeFiles() {
	for _, n := range p.named {
		n.file.Close()
	}
}

func (p *parent) close() {
	p.ready.Close()
	p.alive.Close()
}

// tell writes the ready byte to the parent. It returns when the parent has read
// the byte or has died, or after tellTimeout. Errors are ignored, because a parent
// that has given this process up kills it.
func (p *parent) tell() {
	defer p.ready.Close()
	if _, err := p.ready.Write([]byte{readyByte}); err != nil {
		return // the parent has died
	}
	raw, err := p.ready.SyscallConn()
	if err != nil || p.ready.SetWriteDeadline(time.Now().Add(tellTimeout)) != nil {
		return
	}
	// The parent closes its end when it has read the byte.
	_ = raw.Write(func(fd uintptr) bool { return hungUp(fd, unix.POLLOUT) })
}

// hungUp reports whether no process has the other end of a pipe.
func hungUp(fd uintptr, events int16) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return err != nil || fds[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
		}
	}
}

// wait waits until the parent has exited.
func (p *parent) wait(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-p.turn }()
	stop := context.AfterFunc(ctx, func() { _ = p.alive.SetReadDeadline(past) })
	defer stop()
	var b [64]byte
	for {
		_, err := p.alive.Read(b[:])
		switch {
		case err == nil: // the parent sends nothing of interest
		case !errors.Is(err, os.ErrDeadlineExceeded): // io.EOF, or os.ErrClosed in a call after that
			p.forget()
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		default: // the deadline is left from an earlier call, whose context has ended
			_ = p.alive.SetReadDeadline(time.Time{})
		}
	}
}

// gone reports whether the parent has exited.
func (p *parent) gone() bool {
	gone := false
	raw, err := p.alive.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { gone = hungUp(fd, unix.POLLIN) })
	}
	if gone {
		p.forget()
	}
	return gone || err != nil // err is not nil if wait has closed the pipe
}

// forget closes the pipe by which this process sees the parent exit.
func (p *parent) forget() { p.alive.Close() }

// duplicate returns a copy of a descriptor.
func duplicate(c syscall.Conn, name string) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var n int
	cerr := raw.Control(func(fd uintptr) {
		for {
			if n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err != unix.EINTR {
				return
			}
		}
	})
	if cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return os.NewFile(uintptr(n), name), nil
}
