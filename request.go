//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The client of a control socket.

// A Reply is the answer of the process that serves a control socket.
type Reply struct {
	PID        int // of the successor that serves, or of the process that stops
	Generation int // of that process
}

// String returns "pid=1234 generation=2".
func (r Reply) String() string {
	return "pid=" + strconv.Itoa(r.PID) + " generation=" + strconv.Itoa(r.Generation)
}

// Request asks the process that serves a control socket for what the socket is
// for, and waits until it is done. The socket is one of Options.UpgradeSocket,
// StopSocket and PartialStopSocket. An upgrade is done when the successor
// serves. A stop is done when the process has exited, so that a script that
// stops a service waits until its clients are served. The connection itself is
// the request: what is done is not undone when ctx ends. Request works in any
// program of the same user or root, with or without an Upgrader.
//
// If ctx ends after a stop was answered and before the process has exited,
// Request returns the Reply and an error that wraps ctx's. Otherwise the Reply
// of an error is zero. The error has the reason that the process gives, as text,
// or it wraps ctx's error, io.ErrUnexpectedEOF if the process ended without an
// answer, or a *net.OpError if no process listens there (syscall.ENOENT,
// syscall.ECONNREFUSED) or this user may not connect (os.ErrPermission).
//
// Between units that take over from each other, stop by signals: the socket is
// served by the newest process.
func Request(ctx context.Context, path string) (Reply, error) {
	r, err := request(ctx, path)
	if err != nil {
		return r, errorf("ecdysis: request at %q: %w", path, err)
	}
	return r, nil
}

func request(ctx context.Context, path string) (Reply, error) {
	fd, err := dialControl(ctx, path)
	if err != nil {
		return Reply{}, err
	}
	c, err := unixConn(fd)
	if err != nil {
		return Reply{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(past) })
	defer stop()
	b, err := io.ReadAll(io.LimitReader(c, maxFrame)) // its end is that of the process, if that stops
	if ctx.Err() != nil {
		b = append(b, unread(c)...) // the answer may have come in the same moment
	}
	line, _, whole := cut(string(b), '\n')
	switch {
	case whole:
	case ctx.Err() != nil:
		return Reply{}, ctx.Err()
	case err == nil || errors.Is(err, syscall.ECONNRESET):
		return Reply{}, errorf("the process there has ended, or does not serve the socket, without an answer: %w", io.ErrUnexpectedEOF)
	default:
		return Reply{}, err
	}
	if text, ok := strings.CutPrefix(line, "error: "); ok {
		return Reply{}, errors.New(text)
	}
	r, ok := parseReply(line)
	if !ok {
		return Reply{}, errorf("it answers %q, which no control socket does", line)
	}
	if err != nil {
		return r, ctx.Err() // nil after a reset, by which the process has ended, too
	}
	return r, nil
}

// unread returns what has come and was not read.
func unread(c *net.UnixConn) (b []byte) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	_ = raw.Control(func(fd uintptr) {
		b = make([]byte, 4<<10)
		n, _ := syscall.Read(int(fd), b)
		b = b[:max(n, 0)]
	})
	return b
}

func parseReply(line string) (r Reply, ok bool) {
	rec := record(split(line, ' '))
	pid, ok1 := number(rec.get("pid"))
	generation, ok2 := number(rec.get("generation"))
	return Reply{pid, generation}, rec[0] == "ok" && ok1 && ok2
}

// dialControl returns a descriptor that is connected to a Unix socket. An error
// of the system is a *net.OpError.
func dialControl(ctx context.Context, path string) (fd int, err error) {
	if err := (ListenConfig{}).check(kindListener, "unix", path); err != nil {
		return -1, err
	}
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Net: "unix", Name: path}, Err: err}
	}
	fd, err = newSocket(syscall.AF_UNIX, syscall.SOCK_STREAM)
	if err != nil {
		return -1, fail(err)
	}
	for {
		err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
		if err == nil || err == syscall.EISCONN {
			break
		}
		if err == syscall.EAGAIN { // the queue is full, and room in it is no event
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		if err != syscall.EAGAIN && err != syscall.EINTR {
			syscall.Close(fd)
			return -1, fail(os.NewSyscallError("connect", err))
		}
		if err := ctx.Err(); err != nil {
			syscall.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}
