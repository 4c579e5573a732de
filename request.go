package ecdysis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The client of a control socket.

// Request asks the process that serves a control socket for what the socket is
// for, and waits until it is done. The socket is one of Options.UpgradeSocket,
// StopSocket and PartialStopSocket. Request returns a line such as
// "pid=1234 generation=2": the successor that serves, or the process that has
// stopped. The connection itself is the request, so that what is done is not
// undone when ctx ends. Request works in any program of the same user or root,
// with or without an Upgrader.
//
// The error has the reason that the process gives, as text. Otherwise it wraps
// ctx's error, io.ErrUnexpectedEOF if the process ended without an answer, or a
// *net.OpError if no process listens there (syscall.ENOENT,
// syscall.ECONNREFUSED) or this user may not connect (os.ErrPermission).
func Request(ctx context.Context, path string) (string, error) {
	line, err := request(ctx, path)
	if err != nil {
		return "", fmt.Errorf("ecdysis: request at %q: %w", path, err)
	}
	return line, nil
}

func request(ctx context.Context, path string) (string, error) {
	c, err := dialControl(ctx, path)
	if err != nil {
		return "", err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(past) })
	defer stop()
	b, err := io.ReadAll(io.LimitReader(c, maxFrame))
	line, _, whole := strings.Cut(string(b), "\n")
	switch {
	case whole:
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil || errors.Is(err, unix.ECONNRESET):
		return "", fmt.Errorf("the process there has ended, or does not serve the socket, without an answer: %w", io.ErrUnexpectedEOF)
	default:
		return "", err
	}
	if text, ok := strings.CutPrefix(line, "ok "); ok {
		return text, nil
	}
	text, ok := strings.CutPrefix(line, "error: ")
	if !ok {
		return "", fmt.Errorf("it answers %q, which no control socket does", line)
	}
	return "", errors.New(text)
}

// dialControl connects to a Unix socket. An error of the system is a
// *net.OpError.
func dialControl(ctx context.Context, path string) (*net.UnixConn, error) {
	if err := (ListenConfig{}).check(kindListener, "unix", path); err != nil {
		return nil, err
	}
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Net: "unix", Name: path}, Err: err}
	}
	fd, err := newSocket(unix.AF_UNIX, unix.SOCK_STREAM)
	if err != nil {
		return nil, fail(err)
	}
	for {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err == nil || err == unix.EISCONN {
			break
		}
		if err == unix.EAGAIN { // the queue is full, and room in it is no event
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		if err != unix.EAGAIN && err != unix.EINTR {
			unix.Close(fd)
			return nil, fail(os.NewSyscallError("connect", err))
		}
		if err := ctx.Err(); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	return unixConn(fd)
}
