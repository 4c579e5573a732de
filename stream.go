//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The connection between two generations: frames in both directions, and
// descriptors to the successor.

// A stream is one end of the connection between two generations. A successor
// hands its end on to the processes after it, whom its end of file tells that
// the older process has exited.
//
// Sending never blocks. A goroutine that waits for input holds turn. It is
// woken by input, by its deadline or context, and by wakeReader.
type stream struct {
	conn streamConn
	raw  syscall.RawConn

	// turn is held by the goroutine that waits for input. It alone sets conn's
	// read deadline, except that the end of a context and wakeReader may set
	// one that has passed: the goroutine then looks again, and goes on.
	turn chan struct{}

	inherits bool // this is the successor's end, to which descriptors are sent

	// rmu guards what was received. It is not held over a call that blocks.
	rmu    sync.Mutex
	in     []byte // bytes that have come; there is room behind them for more
	fds    []int
	end    error  // how the stream has ended: io.EOF or another error
	sender int    // the process that wrote what came last; 0 if the system does not tell
	oob    []byte // room for a message's control data

	// wmu guards what is to be sent. It is not held over a call that blocks.
	wmu  sync.Mutex
	out  []byte   // the rest of a frame of which the system has taken a part
	sent struct { // the system's last answer; variables of write would be allocated in every call
		n   int
		err error
	}
}

// A streamConn is a *os.File, or a *net.UnixConn where net has made the
// connection. Net would make a copy of a descriptor first, and ask the system
// for addresses that nobody needs.
type streamConn interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	Close() error
}

// unixConn makes a connection of fd. With an error fd is closed.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "")
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errorf("a %T; want a Unix socket", c)
	}
	return conn, nil
}

// newStream makes a stream of fd. With an error fd is closed.
func newStream(fd int) (*stream, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, os.NewSyscallError("setnonblock", err)
	}
	return streamOn(os.NewFile(uintptr(fd), "stream"))
}

// streamOn makes a stream of conn. With an error conn is closed.
func streamOn(conn streamConn) (*stream, error) {
	raw, err := conn.SyscallConn()
	if err == nil {
		err = conn.SetReadDeadline(time.Time{}) // fails if the poller could not take it
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &stream{conn: conn, raw: raw, turn: make(chan struct{}, 1)}, nil
}

func (s *stream) close() {
	s.conn.Close()
	s.rmu.Lock()
	defer s.rmu.Unlock()
	closeAll(s.fds)
	s.fds = nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		syscall.Close(fd)
	}
}

// next returns a frame that has come. It returns errAgain if there is none, and
// the error that the stream ended with, io.EOF if the peer is gone, when all
// frames before were returned. It does not block.
func (s *stream) next() (*frame, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for {
		f, n, err := parseFrame(s.in)
		if err == nil && n > 0 && f.kind == frameSockets {
			if len(f.records) > len(s.fds) {
				err = errorf("%d descriptors were announced and %d came", len(f.records), len(s.fds))
			} else {
				f.fds = s.fds[:len(f.records):len(f.records)]
				s.fds = s.fds[len(f.records):]
			}
		}
		if err != nil {
			s.end = err
			return nil, err
		}
		if n > 0 {
			s.in = s.in[:copy(s.in, s.in[n:])] // what comes next finds room there
			return f, nil
		}
		if s.end != nil {
			return nil, s.end
		}
		again := false
		if err := s.raw.Control(func(fd uintptr) { again = !s.fill(int(fd)) }); err != nil {
			return nil, err
		}
		if again {
			return nil, errAgain
		}
	}
}

// atEnd reports whether the stream has ended and every frame was returned. It
// takes no frame itself.
func (s *stream) atEnd() bool {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.end == nil {
		_ = s.raw.Control(func(fd uintptr) { s.fill(int(fd)) })
	}
	_, n, _ := parseFrame(s.in)
	return s.end != nil && n == 0
}

// fill receives what has come. It reports false if nothing has. s.rmu is held.
func (s *stream) fill(fd int) bool {
	const chunk = 8 << 10
	if s.oob == nil { // one allocation, because the first of each size costs two page faults
		n := syscall.CmsgSpace(4*maxFDs) + senderSpace
		b := make([]byte, n+chunk)
		s.oob, s.in = b[:n], b[n:n]
	}
	s.in = slices.Grow(s.in, chunk)
	p, oob := s.in[len(s.in):len(s.in)+chunk], s.oob
	// There is room for descriptors even where none are taken: some systems
	// leave those open that have none, and say nothing.
	n, oobn, flags, err := recvmsg(fd, p, oob)
	switch {
	case err == syscall.EAGAIN:
		return false
	case err == syscall.ECONNRESET, err == syscall.EPIPE:
		s.end = io.EOF
		return true
	case err == syscall.EMFILE:
		s.end = errTruncated
		return true
	case err != nil:
		s.end = os.NewSyscallError("recvmsg", err)
		return true
	}
	if oobn > 0 {
		fds, sender, err := parseControl(oob[:oobn])
		s.fds = append(s.fds, fds...)
		s.sender = sender
		if err != nil {
			s.end = err
		}
	}
	switch truncated := flags&syscall.MSG_CTRUNC != 0; {
	case !s.inherits && (truncated || len(s.fds) > 0):
		s.end = errors.New("the successor sent descriptors: it does not use this protocol")
	case truncated:
		s.end = errTruncated
	}
	if s.end != nil {
		closeAll(s.fds)
		s.fds, s.in = nil, nil
		return true
	}
	if n == 0 {
		s.end = io.EOF
	}
	s.in = s.in[:len(s.in)+n]
	return true
}

// parseControl returns the descriptors that came with a message, and the
// process that sent it.
func parseControl(oob []byte) (fds []int, sender int, err error) {
	for len(oob) >= unix.CmsgLen(0) {
		header, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return fds, sender, os.NewSyscallError("recvmsg", err)
		}
		oob = rest
		m := unix.SocketControlMessage{Header: header, Data: data}
		if pid := senderOf(&m); pid != 0 {
			sender = pid
		}
		if header.Level != unix.SOL_SOCKET || header.Type != unix.SCM_RIGHTS {
			continue
		}
		list, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, sender, os.NewSyscallError("recvmsg", err)
		}
		fds = append(fds, list...)
	}
	return fds, sender, nil
}

// waitInput returns when input has come or the read deadline has passed, which
// the end of a context or wakeReader may have moved. s.turn is held.
func (s *stream) waitInput() error {
	return s.raw.Read(func(fd uintptr) bool {
		s.rmu.Lock()
		defer s.rmu.Unlock()
		return s.fill(int(fd))
	})
}

// waitShortly waits in poll(2) for input or the end of the stream, for a few
// milliseconds at most. It is for the moment of a handover, in which the other
// process answers at once. A thread that waits in the system goes on sooner than
// a goroutine that another thread has to wake.
func (s *stream) waitShortly() {
	const milliseconds = 5
	// What goes wrong here goes wrong again in read, which follows.
	_ = s.raw.Control(func(fd uintptr) {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, milliseconds)
	})
}

// read returns the next frame. It returns os.ErrDeadlineExceeded, after a last
// look, when the deadline has passed, and the error that the stream ended with.
// The zero deadline is none.
func (s *stream) read(deadline time.Time) (*frame, error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	for {
		f, err := s.next()
		if err != errAgain {
			return f, err
		}
		if err := s.await(deadline); err != nil {
			return nil, err
		}
	}
}

// await returns when input may have come, and sends the rest of a frame
// meanwhile. It returns os.ErrDeadlineExceeded if the deadline had passed
// before. s.turn is held.
func (s *stream) await(deadline time.Time) error {
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded
	}
	until := deadline
	if s.sendRest() == errAgain { // nothing tells when there is room
		if soon := time.Now().Add(restInterval); until.IsZero() || soon.Before(until) {
			until = soon
		}
	}
	if err := s.conn.SetReadDeadline(until); err != nil {
		return err
	}
	if err := s.waitInput(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// wait passes what comes, and at last the end of the stream, to handle. It
// returns when handle returns true, done is closed, or ctx is done, and then
// ctx's error.
func (s *stream) wait(ctx context.Context, done <-chan struct{}, handle func(*frame, error) bool) error {
	select {
	case s.turn <- struct{}{}:
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.turn }()
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(past) })
	defer stop()
	for {
		f, err := s.next()
		if err != errAgain {
			if handle(f, err) || err != nil {
				return nil
			}
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		select {
		case <-done: // another goroutine has handled it, and has called wakeReader
			return nil
		default:
		}
		switch err := s.waitInput(); {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case ctx.Err() == nil: // by wakeReader, or by the context of an earlier wait
			if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		}
	}
}

// wakeReader makes the goroutine that waits for input look again.
func (s *stream) wakeReader() { _ = s.conn.SetReadDeadline(past) }

// send sends a frame of one record, or of none if there are no fields.
func (s *stream) send(kind byte, fields ...string) error {
	var records []record
	if len(fields) > 0 {
		records = []record{fields}
	}
	return s.sendFrames(makeFrame(kind, records), nil)
}

// sendFrames sends frames, one behind the other, without blocking. All except
// SOCKETS fit the system's buffer. It returns errAgain if the buffer is full and
// nothing was taken. The descriptors go with the first byte.
func (s *stream) sendFrames(b []byte, fds []int) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.flush(); err != nil {
		return err
	}
	var oob []byte
	switch {
	case len(fds) > 0:
		oob = syscall.UnixRights(fds...)
	case b[0] == frameReady: // whose sender the predecessor watches
		oob = nameSender()
	}
	for rest := b; len(rest) > 0; {
		n := payload(rest)
		if n > maxFrame {
			return errorf("a frame %q of %d bytes; there can be %d", rest[0], n, maxFrame)
		}
		rest = rest[frameHeader+n:]
	}
	first := b
	if len(fds) > 0 && dropsDescriptors {
		first = b[:1] // the rest can wait for room without being lost
	}
	n, err := s.write(first, oob)
	if err != nil {
		return err
	}
	s.out = b[n:]
	if err := s.flush(); err != errAgain {
		return err
	}
	return nil // the rest follows with the next call of send or read
}

// restInterval is how often read looks for room for the rest of a frame.
const restInterval = 5 * time.Millisecond

// sendRest sends what the system has not taken of an earlier frame. It returns
// errAgain if it does not take all of that either.
func (s *stream) sendRest() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	return s.flush()
}

// flush sends the rest of an earlier frame. s.wmu is held.
func (s *stream) flush() error {
	for len(s.out) > 0 {
		n, err := s.write(s.out, nil)
		if err != nil {
			return err
		}
		s.out = s.out[n:]
	}
	return nil
}

// write sends once. s.wmu is held.
func (s *stream) write(b, oob []byte) (int, error) {
	if err := s.raw.Control(func(fd uintptr) { s.sent.n, s.sent.err = sendmsg(int(fd), b, oob, 0) }); err != nil {
		return 0, err
	}
	switch err := s.sent.err; {
	case err == syscall.EAGAIN, err == syscall.ETOOMANYREFS, err == syscall.ENOBUFS, err == syscall.EMFILE:
		return 0, errAgain
	case err == syscall.EPIPE, err == syscall.ECONNRESET:
		return 0, io.EOF
	case err != nil:
		return 0, os.NewSyscallError("sendmsg", err)
	}
	return s.sent.n, nil
}

// abort tells the successor that it was given up. Buffer space is reserved so
// that ABORT fits even if the successor has read nothing. Without it, the
// end of the stream that follows would mean that this process has died.
func (s *stream) abort(reason string) error {
	_ = s.raw.Control(func(fd uintptr) { useReserve(int(fd)) })
	return s.send(frameAbort, "reason="+reason[:min(len(reason), maxAbortReason)])
}

// maxAbortReason is how much of a reason ABORT has room for, in bytes.
const maxAbortReason = 1024

// aborted returns the error that a predecessor's ABORT means.
func aborted(f *frame) error {
	reason := f.first("reason")
	if reason == "" {
		return ErrAborted
	}
	return errorf("%w: %s", ErrAborted, reason)
}

func (s *stream) sendFail(reason error) {
	text := "no reason was given"
	if reason != nil {
		text = reason.Error()
	}
	if len(text) > maxFrame/2 {
		text = text[:maxFrame/2]
	}
	r := record{"reason=" + text}
	if errors.Is(reason, syscall.EADDRINUSE) { // the predecessor may know why
		r = append(r, "inuse=1")
		for err := reason; err != nil; err = errors.Unwrap(err) {
			if oe, ok := err.(*net.OpError); ok && oe.Addr != nil {
				r = append(r, "network="+oe.Net, "address="+oe.Addr.String())
			}
		}
	}
	if s.send(frameFail, r...) == nil { // fails only if the predecessor is gone
		s.finishSending(time.Now().Add(time.Second))
	}
}

// finishSending waits until the system has taken what was sent, or until the
// deadline: the process may exit when it returns. Room in the system's buffer
// wakes it.
func (s *stream) finishSending(deadline time.Time) {
	if s.conn.SetWriteDeadline(deadline) != nil {
		return
	}
	_ = s.raw.Write(func(uintptr) bool {
		s.wmu.Lock()
		defer s.wmu.Unlock()
		return s.flush() != errAgain
	})
	_ = s.conn.SetWriteDeadline(time.Time{})
}
