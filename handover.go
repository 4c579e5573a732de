package ecdysis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The conversation between two generations, as docs/design.md has it. A frame
// is its kind, the length of its payload in four bytes, most significant
// first, and the payload: records, each a list of "key=value" fields. A field
// is its length (a varint) and its bytes; an empty one ends the record.
// Unknown keys are ignored. In a SOCKETS frame each record has a descriptor.
type frame struct {
	kind    byte
	records []record
	fds     []int
}

type record []string

const (
	frameTake    = 'T' // new to old, in a takeover: version; answered by frameHello or frameFail
	frameHello   = 'H' // old to new: version, generation, pid
	frameSockets = 'S' // old to new: what is handed on; answered by frameAck
	frameEnd     = 'E' // old to new: that was all
	frameAck     = 'K' // new to old: a batch has arrived
	frameReady   = 'R' // new to old: pid, unclaimed
	frameFail    = 'F' // new to old: reason, inuse, network, address; old to new, for frameHello: reason
	frameCommit  = 'C' // old to new: probation
	frameAbort   = 'A' // old to new: go away
	frameDone    = 'D' // new to old: I serve
	frameBye     = 'B' // new to old, within probation: I was stopped, do not come back
	frameFinal   = 'L' // old to new: I will not come back
)

const (
	protocolVersion = "1"

	frameHeader = 5
	maxFrame    = 64 << 10
	maxBatch    = 16 << 10 // bytes of records in a SOCKETS frame, one record aside
	maxBatchFDs = 100
	maxFDs      = 254 // a message's most, on any system
)

var (
	errAgain     = errors.New("nothing there yet")
	errTruncated = errors.New("the system delivered fewer descriptors than were sent: the limit of open files (RLIMIT_NOFILE) is too low for what this process inherits")
)

func (r record) get(key string) string {
	for _, f := range r {
		if k, v, ok := strings.Cut(f, "="); ok && k == key {
			return v
		}
	}
	return ""
}

// first returns the value of a key in a frame of one record.
func (f frame) first(key string) string {
	if len(f.records) == 0 {
		return ""
	}
	return f.records[0].get(key)
}

func appendRecord(b []byte, r record) []byte {
	for _, f := range r {
		n := len(f)
		for ; n >= 0x80; n >>= 7 {
			b = append(b, byte(n)|0x80)
		}
		b = append(append(b, byte(n)), f...)
	}
	return append(b, 0)
}

func appendFrame(b []byte, kind byte, records []record) []byte {
	start := len(b)
	b = append(b, kind, 0, 0, 0, 0)
	for _, r := range records {
		b = appendRecord(b, r)
	}
	n := len(b) - start - frameHeader
	b[start+1], b[start+2], b[start+3], b[start+4] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return b
}

// parseFrame takes a frame from the front of b. It returns how many bytes
// that were, 0 if b does not hold a whole frame yet.
func parseFrame(b []byte) (f frame, n int, err error) {
	if len(b) < frameHeader {
		return f, 0, nil
	}
	size := uint32(b[1])<<24 | uint32(b[2])<<16 | uint32(b[3])<<8 | uint32(b[4])
	if size > maxFrame {
		return f, 0, fmt.Errorf("a frame %q of %d bytes, more than the %d that there can be: the peer does not speak this protocol", b[0], size, maxFrame)
	}
	if len(b)-frameHeader < int(size) {
		return f, 0, nil
	}
	f.kind = b[0]
	n = frameHeader + int(size)
	p := string(b[frameHeader:n]) // the fields are parts of it
	for len(p) > 0 {
		r := make(record, 0, 8)
		for {
			l, w := uvarint(p)
			if w == 0 || l > len(p)-w {
				return f, 0, fmt.Errorf("a frame %q that is not made of records: the peer does not speak this protocol", f.kind)
			}
			field := p[w : w+l]
			p = p[w+l:]
			if l == 0 {
				break
			}
			r = append(r, field)
		}
		f.records = append(f.records, r)
	}
	return f, n, nil
}

// uvarint returns the number at the front of b and how many bytes it took; 0:
// it is not a number, or one larger than a field can be.
func uvarint(b string) (n, size int) {
	for size < len(b) && size < 3 {
		c := b[size]
		n |= int(c&0x7f) << (7 * size)
		size++
		if c < 0x80 {
			return n, size
		}
	}
	return 0, 0
}

// A stream is one end of the connection between two generations. A successor
// hands on its end, as an entry, to those after it: its end of file tells them
// that the older process has exited.
//
// turn is held by the goroutine that waits for input; it alone sets conn's
// read deadline, except that the end of a context and wakeReader may set one
// that has passed, which the one that waits must be able to stand. rmu guards what was
// received, wmu what is to be sent; neither is held over a call that blocks.
type stream struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	turn chan struct{}

	inherits bool // this is the successor's end, which is sent descriptors

	rmu    sync.Mutex
	in     []byte
	fds    []int
	end    error // io.EOF and others that the stream ended with
	sender int   // the process that wrote what came last; 0: the system does not tell
	buf    []byte

	wmu sync.Mutex
	out []byte // of a frame that the system took the beginning of
}

// unixConn takes fd over, or closes it.
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
		return nil, fmt.Errorf("a %T; want a Unix socket", c)
	}
	return conn, nil
}

// newStream takes fd over, or closes it.
func newStream(fd int) (*stream, error) {
	conn, err := unixConn(fd)
	if err != nil {
		return nil, err
	}
	return streamOn(conn)
}

// streamOn takes conn over, or closes it.
func streamOn(conn *net.UnixConn) (*stream, error) {
	raw, err := conn.SyscallConn()
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
		unix.Close(fd)
	}
}

// What an entry needs. Nobody accepts on a stream.

func (s *stream) quiet()                           {}
func (s *stream) resume()                          {}
func (s *stream) shut()                            {}
func (s *stream) control(f func(fd uintptr)) error { return s.raw.Control(f) }

// next returns a frame that has arrived, errAgain if there is none, or how
// the stream has ended: io.EOF when the peer is gone. It does not block.
func (s *stream) next() (frame, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for {
		f, n, err := parseFrame(s.in)
		if err == nil && n > 0 && f.kind == frameSockets {
			if len(f.records) > len(s.fds) {
				err = fmt.Errorf("%d descriptors were announced and %d came", len(f.records), len(s.fds))
			} else {
				f.fds = s.fds[:len(f.records):len(f.records)]
				s.fds = s.fds[len(f.records):]
			}
		}
		if err != nil {
			s.end = err
			return frame{}, err
		}
		if n > 0 {
			s.in = s.in[n:]
			return f, nil
		}
		if s.end != nil {
			return frame{}, s.end
		}
		again := false
		if err := s.raw.Control(func(fd uintptr) { again = !s.fill(int(fd)) }); err != nil {
			return frame{}, err
		}
		if again {
			return frame{}, errAgain
		}
	}
}

// atEnd reports whether the stream has ended and all of it was taken. It takes
// nothing itself.
func (s *stream) atEnd() bool {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.end == nil {
		_ = s.raw.Control(func(fd uintptr) { s.fill(int(fd)) })
	}
	_, n, _ := parseFrame(s.in)
	return s.end != nil && n == 0
}

// fill receives what is there. It reports false if nothing was. s.rmu is held.
func (s *stream) fill(fd int) bool {
	if s.buf == nil {
		s.buf = make([]byte, 8<<10+unix.CmsgSpace(4*maxFDs)+senderSpace)
	}
	p, oob := s.buf[:8<<10], s.buf[8<<10:]
	if !s.inherits {
		oob = oob[:senderSpace] // no room for descriptors: the system discards them
	}
	n, oobn, flags, err := recvmsg(fd, p, oob)
	switch {
	case err == unix.EAGAIN:
		return false
	case err == unix.ECONNRESET, err == unix.EPIPE:
		s.end = io.EOF
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
	switch truncated := flags&unix.MSG_CTRUNC != 0; {
	case !s.inherits && (truncated || len(s.fds) > 0):
		s.end = errors.New("the successor sent descriptors: it does not speak this protocol")
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
	s.in = append(s.in, p[:n]...)
	return true
}

// parseControl returns the descriptors that came with a message, and its
// sender.
func parseControl(oob []byte) (fds []int, sender int, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, 0, os.NewSyscallError("recvmsg", err)
	}
	for i := range msgs {
		if pid := senderOf(&msgs[i]); pid != 0 {
			sender = pid
		}
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		list, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, sender, os.NewSyscallError("recvmsg", err)
		}
		fds = append(fds, list...)
	}
	return fds, sender, nil
}

// waitInput returns when input has arrived or the read deadline, which a
// concurrent end of a context may have moved, has passed. s.turn is held.
func (s *stream) waitInput() error {
	return s.raw.Read(func(fd uintptr) bool {
		s.rmu.Lock()
		defer s.rmu.Unlock()
		return s.fill(int(fd))
	})
}

// read returns the next frame, os.ErrDeadlineExceeded after a last look when
// the time is over, or how the stream has ended.
func (s *stream) read(deadline time.Time) (frame, error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	for {
		f, err := s.next()
		if err != errAgain {
			return f, err
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return f, os.ErrDeadlineExceeded
		}
		if err := s.conn.SetReadDeadline(deadline); err != nil {
			return f, err
		}
		if err := s.waitInput(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return f, err
		}
	}
}

// wait passes what arrives, and at last the end of the stream, to hear until
// that returns true, done is closed, or ctx is done, whose error it returns.
func (s *stream) wait(ctx context.Context, done <-chan struct{}, hear func(frame, error) bool) error {
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
			if hear(f, err) || err != nil {
				return nil
			}
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		select {
		case <-done: // another goroutine has heard it; see wakeReader
			return nil
		default:
		}
		switch err := s.waitInput(); {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case ctx.Err() == nil: // wakeReader, or the context of one that waited before
			if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		}
	}
}

// wakeReader makes the goroutine that waits look again.
func (s *stream) wakeReader() { _ = s.conn.SetReadDeadline(past) }

// send writes a frame without blocking; every frame but the sockets fits the
// buffer. errAgain: the buffer is full and nothing was taken. The descriptors
// go with the frame's first byte.
func (s *stream) send(kind byte, records []record, fds []int) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.flush(); err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	b := appendFrame(nil, kind, records)
	if len(b) > frameHeader+maxFrame {
		return fmt.Errorf("a frame %q of %d bytes; there can be %d", kind, len(b), maxFrame)
	}
	n, err := s.write(b, oob)
	if err != nil {
		return err
	}
	s.out = b[n:]
	if err := s.flush(); err != errAgain {
		return err
	}
	return nil // the rest follows with the next call
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

func (s *stream) write(b, oob []byte) (n int, err error) {
	cerr := s.raw.Control(func(fd uintptr) {
		for {
			n, err = unix.SendmsgN(int(fd), b, oob, nil, 0)
			if err != unix.EINTR {
				return
			}
		}
	})
	switch {
	case cerr != nil:
		return 0, cerr
	case err == unix.EAGAIN, err == unix.ETOOMANYREFS, err == unix.ENOBUFS, err == unix.EMFILE:
		return 0, errAgain
	case err == unix.EPIPE, err == unix.ECONNRESET:
		return 0, io.EOF
	case err != nil:
		return 0, os.NewSyscallError("sendmsg", err)
	}
	return n, nil
}

// abort tells the successor that it was given up. There is room for that in
// the system's buffer even if the successor has read nothing: the end of the
// stream, which follows, would say without it that this process has died.
func (s *stream) abort() error {
	_ = s.raw.Control(func(fd uintptr) { useReserve(int(fd)) })
	return s.send(frameAbort, nil, nil)
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
	if errors.Is(reason, unix.EADDRINUSE) { // the old process may know why
		r = append(r, "inuse=1")
		for err := reason; err != nil; err = errors.Unwrap(err) {
			if oe, ok := err.(*net.OpError); ok && oe.Addr != nil {
				r = append(r, "network="+oe.Net, "address="+oe.Addr.String())
			}
		}
	}
	_ = s.send(frameFail, []record{r}, nil) // fails only if the old process is gone
}

// The successor's side.

// envName is the variable by which a successor finds its end of the stream
// and knows whose end the other one is: "fd=3 pid=1234 uid=0".
const envName = "ECDYSIS_PARENT"

// openInheritance returns the stream to the older process; nil: there is
// none. The variable is taken out of the environment.
func openInheritance() (*stream, error) {
	value, ok := os.LookupEnv(envName)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(envName); err != nil {
		return nil, err
	}
	s, err := openStream(value)
	if err != nil {
		return nil, fmt.Errorf("the environment variable %s is %q; want what an upgrading process sets for its successor: %w", envName, value, err)
	}
	return s, nil
}

func openStream(value string) (*stream, error) {
	r := record(strings.Split(value, " "))
	fd, err := strconv.Atoi(r.get("fd"))
	if err != nil || fd < 3 {
		return nil, errors.New("it names no descriptor")
	}
	pid, err := strconv.Atoi(r.get("pid"))
	if err != nil {
		return nil, errors.New("it names no process")
	}
	uid, err := strconv.Atoi(r.get("uid"))
	if err != nil {
		return nil, errors.New("it names no user")
	}
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_STREAM {
		return nil, fmt.Errorf("descriptor %d is not a stream socket", fd)
	}
	// Systems that do not tell for a socket pair are taken at their word.
	if peer, err := peerCred(fd); err == nil && (peer.UID != uid || peer.PID != 0 && peer.PID != pid) {
		return nil, fmt.Errorf("descriptor %d leads to process %d of user %d", fd, peer.PID, peer.UID)
	}
	s, err := newStream(fd)
	if err == nil {
		s.inherits = true
	}
	return s, err
}

// hearTake waits for the word of a process that takes over.
func (s *stream) hearTake() error {
	f, err := s.read(time.Now().Add(silence))
	if err != nil {
		return err
	}
	if f.kind != frameTake {
		return fmt.Errorf("it began with a frame %q; want %q", f.kind, frameTake)
	}
	return checkVersion(f)
}

func checkVersion(f frame) error {
	if v := f.first("version"); v != protocolVersion {
		return fmt.Errorf("the other process speaks version %q of the protocol, this one %s", v, protocolVersion)
	}
	return nil
}

// checkHello checks the first frame of an older process.
func checkHello(f frame) error {
	if f.kind != frameHello {
		return fmt.Errorf("the older process began with a frame %q; want %q: it does not speak this protocol", f.kind, frameHello)
	}
	return checkVersion(f)
}

// inherit takes what the older process hands on, after its first frame. The
// zero deadline is none.
func (u *Upgrader) inherit(f frame, deadline time.Time) error {
	generation, err := strconv.Atoi(f.first("generation"))
	if err != nil || generation < 0 {
		return fmt.Errorf("the older process says that its generation is %q; want a number", f.first("generation"))
	}
	u.generation = generation + 1
	for {
		f, err := u.parent.read(deadline)
		if err == io.EOF {
			break // it has died; what it could not hand on is bound anew
		}
		if err != nil {
			return u.disinherit(err)
		}
		switch f.kind {
		case frameSockets:
			for i, r := range f.records {
				e, err := inheritedEntry(r, f.fds[i])
				if err != nil {
					closeAll(f.fds[i:])
					return u.disinherit(err)
				}
				switch e.kind {
				case kindState:
					u.state.close() // there is one at most
					u.state = newStateReader(e)
				case kindOlder:
					u.reg.entries = append(u.reg.entries, e)
				default:
					u.reg.inherited = append(u.reg.inherited, e)
				}
			}
			_ = u.parent.send(frameAck, nil, nil) // fails only if nobody waits for it
			continue
		case frameAbort:
			return u.disinherit(ErrAborted)
		case frameEnd:
		default:
			continue // of a later version
		}
		break
	}
	u.reg.entries = append(u.reg.entries, &entry{kind: kindOlder, name: strconv.Itoa(generation), fd: -1, sock: u.parent, inherited: true})
	u.reg.index()
	return nil
}

func (u *Upgrader) disinherit(err error) error {
	u.state.close()
	for _, e := range slices.Concat(u.reg.inherited, u.reg.entries) {
		e.drop()
	}
	u.reg.inherited, u.reg.entries = nil, nil
	return err
}

// record returns e as it is handed on.
func (e *entry) record() record {
	r := record{"kind=" + e.kind}
	add := func(key, value string) {
		if value != "" {
			r = append(r, key+"="+value)
		}
	}
	add("name", e.name)
	add("network", e.network)
	add("address", e.address)
	add("at", e.at)
	if e.keep {
		add("keep", "1")
	}
	if e.path != "" {
		add("path", e.path)
		add("dev", strconv.FormatUint(e.dev, 10))
		add("ino", strconv.FormatUint(e.ino, 10))
	}
	if e.foreign {
		add("foreign", "1")
	}
	if e.kind == kindState {
		add("size", strconv.FormatInt(e.size, 10))
	}
	return r
}

// inheritedEntry checks a descriptor against what is said of it. One of a kind
// that a later version knows is there for nobody to ask for.
func inheritedEntry(r record, fd int) (*entry, error) {
	e := &entry{inherited: true, fd: fd, kind: r.get("kind"), name: r.get("name"), network: r.get("network"), address: r.get("address"), at: r.get("at"), keep: r.get("keep") == "1", foreign: r.get("foreign") == "1", path: r.get("path")}
	wrong := func(format string, args ...any) (*entry, error) {
		return nil, fmt.Errorf("inherited descriptor for %s: %s", e.label(), fmt.Sprintf(format, args...))
	}
	switch e.kind {
	case kindListener, kindPacket, kindPair, kindConn:
		typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil {
			return wrong("it is no socket: %v", os.NewSyscallError("getsockopt", err))
		}
		if e.kind == kindListener || e.kind == kindPacket {
			if err := e.checkBound(typ); err != nil {
				return wrong("%v", err)
			}
		}
	case kindState:
		var st unix.Stat_t
		var err error
		e.size, err = strconv.ParseInt(r.get("size"), 10, 64)
		if err != nil || unix.Fstat(fd, &st) != nil || e.size < 0 || int64(st.Size) < e.size {
			return wrong("%q bytes were announced and it has %d", r.get("size"), st.Size)
		}
	}
	if e.path != "" {
		var err1, err2 error
		e.dev, err1 = strconv.ParseUint(r.get("dev"), 10, 64)
		e.ino, err2 = strconv.ParseUint(r.get("ino"), 10, 64)
		if err1 != nil || err2 != nil {
			return wrong("its file is device %q, inode %q; want numbers", r.get("dev"), r.get("ino"))
		}
	}
	return e, nil
}

// checkBound reports, as an error, that a descriptor is not the socket that
// clients find at e's address.
func (e *entry) checkBound(typ int) error {
	want, isUnix := socketType(e.network)
	if typ != want {
		return fmt.Errorf("it is a socket of type %d; want %d", typ, want)
	}
	if e.kind == kindListener {
		if ok, err := isListening(e.fd); err == nil && !ok {
			return errors.New("it does not listen")
		}
	}
	sa, at, err := boundTo(e.fd, typ)
	if err != nil {
		return err
	}
	if _, ok := sa.(*unix.SockaddrUnix); ok != isUnix || at != e.at {
		return fmt.Errorf("it is bound to %q; want %q", at, e.at)
	}
	return nil
}

// awaitCommit says READY and returns when the older process has given its
// word (false) or has died (true).
func (u *Upgrader) awaitCommit() (orphan bool, err error) {
	r := record{"pid=" + strconv.Itoa(os.Getpid())}
	size := 0
	u.mu.Lock()
	for _, e := range u.reg.unclaimed() {
		if e.path == "" {
			continue
		}
		size += len(e.path) + 16
		if size > maxFrame/2 {
			break // the files of the others stay, to be found stale
		}
		r = append(r, "unclaimed="+e.path)
	}
	u.mu.Unlock()
	if err := u.parent.send(frameReady, []record{r}, nil); err != nil && err != io.EOF {
		return false, fmt.Errorf("ecdysis: ready: %w", err)
	}
	for {
		f, err := u.parent.read(time.Now().Add(slice))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if u.mustStop() {
				return false, ErrStopped
			}
		case err == io.EOF:
			return true, nil
		case err != nil:
			return false, fmt.Errorf("ecdysis: ready: %w", err)
		case f.kind == frameAbort:
			return false, ErrAborted
		case f.kind == frameCommit:
			u.mu.Lock()
			u.standby = f.first("probation") != "0"
			u.mu.Unlock()
			return false, nil
		}
	}
}

// The old process's side.

// slice is the longest that Upgrade and Ready wait for the other process
// without a look at everything else.
const slice = 100 * time.Millisecond

// Upgrade starts the next generation and returns nil when it has taken over,
// after Options.Probation: this process then accepts no more, and should
// finish what is in flight and exit.
//
// Otherwise this process goes on serving, and may upgrade again at once, unless
// the reason is that it was stopped. The error is an *UpgradeError if an
// attempt was made and failed; ErrNotReady, ErrInProgress (another call runs,
// or the older process still stands by), ErrUpgraded, ErrStopped or ErrInit if
// none was made. Just after Ready the call may wait some seconds for the older
// process to step aside.
//
// A successor that has failed has ended and been reaped, unless the system did
// not let this process end it; then it has been told not to serve. What it has
// made itself, files and processes, is not cleared away.
func (u *Upgrader) Upgrade() error {
	if err := u.beginUpgrade(trigger{}); err != nil {
		return err
	}
	return u.attempt(trigger{})
}

// attempt is an upgrade from where beginUpgrade has succeeded to its end.
func (u *Upgrader) attempt(t trigger) error {
	a := &attempt{u: u, trigger: t, step: "prepare"}
	over := false
	defer u.stopPending()
	defer func() {
		if !over { // a hook has panicked or ended the goroutine
			t.refuse(a.fail(errors.New("a hook did not return")))
		}
	}()
	u.notify(a.event(EventUpgrading))
	err := a.run()
	over = true
	if err != nil {
		err = a.fail(err)
		e := a.event(EventUpgradeFailed)
		e.Err = err
		u.notify(e)
		t.refuse(err)
		return err
	}
	e := a.event(EventUpgraded)
	defer func() { // even if the hook panics
		answer(t.conn, okLine(e))
		u.end(e)
		close(u.exit)
		// Last of all: a program may exit as soon as its accept loop ends.
		for _, e := range a.handed {
			e.shut()
		}
	}()
	u.notify(e)
	return nil
}

func (u *Upgrader) beginUpgrade(t trigger) error {
	if os.Getpid() == 1 && t.taker == nil {
		return ErrInit
	}
	select {
	case <-u.ready:
	default:
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.phase == readying || u.phase == serving {
			return ErrNotReady
		}
		return u.phase.refusal()
	}
	settled := u.settle()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.phase != serving {
		return u.phase.refusal()
	}
	if !settled {
		return ErrInProgress
	}
	u.reg.forgetGone()
	if n, limit := u.reg.draining(), u.opts.MaxDraining; limit > 0 && n > limit {
		return fmt.Errorf("%w: %d are alive, and Options.MaxDraining is %d", ErrDraining, n, limit)
	}
	u.phase = preparing
	return nil
}

// An attempt is one call of Upgrade. Only the goroutine of that call touches
// it.
type attempt struct {
	u *Upgrader
	trigger
	step      string
	s         *stream
	child     *child   // the successor; one that takes over is not a child
	stateFile *os.File // what SendState has written; nil: nothing
	state     *entry   // of that
	handed    []*entry // all else that the successor gets
	rest      []*entry // of these, not sent yet
	sent      int      // frames that want to be acknowledged
	endSent   bool
	readyPID  int         // of the process that said READY; 0: none yet
	ownPID    int         // what that one takes its process ID for: another number in another namespace
	wrapped   bool        // that is not the process that was started
	other     *os.Process // that process, if the system names it
	quiet     bool        // the listeners are
	told      bool        // EventHandover was
	committed bool
	bye       bool     // the successor was stopped
	unclaimed []string // paths that the successor does not want
}

// event returns an event about the successor.
func (a *attempt) event(kind EventKind) Event {
	e := a.trigger.event(kind)
	e.PID, e.Generation = a.pid(), a.u.generation+1
	return e
}

func (a *attempt) pid() int {
	if a.readyPID == 0 && a.child != nil {
		return a.child.pid
	}
	return a.readyPID
}

// run takes the attempt from its preparation to its end. After an error the
// caller calls fail.
func (a *attempt) run() error {
	u := a.u
	u.reap()
	cmd := &Command{}
	if a.taker == nil {
		cmd = defaultCommand()
	}
	if u.opts.Prepare != nil {
		if err := u.opts.Prepare(cmd); err != nil {
			return err
		}
	}
	var err error
	if a.stateFile, a.state, err = writeState(u.opts.SendState); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	a.step = "start"
	deadline := time.Now().Add(u.opts.UpgradeTimeout)
	if err := a.start(cmd); err != nil {
		return err
	}
	a.step = "init"
	err = a.handOn(deadline)
	if err == nil {
		err = a.awaitReady(deadline)
	}
	cause := err
	if err != nil {
		err = a.blame(err)
	}
	switch cause {
	case nil:
	case os.ErrDeadlineExceeded:
		return fmt.Errorf("not ready within %v (Options.UpgradeTimeout): %w", u.opts.UpgradeTimeout, err)
	case io.ErrUnexpectedEOF:
		return fmt.Errorf("it ended without a call of Ready or Fail: %w", err)
	default:
		return err
	}
	a.closeState()
	a.step = "handover"
	if err := a.handOver(); err != nil {
		return err
	}
	a.step = "probation"
	if err := a.standBy(); err != nil {
		return err
	}
	return a.finish()
}

// start makes the stream, fills it as far as it goes, and starts the
// successor: who ends this process from then on finds it all in the system.
func (a *attempt) start(cmd *Command) error {
	u := a.u
	u.mu.Lock()
	if u.pending != "" {
		u.mu.Unlock()
		return ErrStopped
	}
	u.phase = upgrading
	a.handed = slices.Clone(u.reg.entries)
	for _, e := range a.handed {
		e.handed = true
	}
	u.mu.Unlock()
	if a.state != nil { // first: it is there if this process ends early
		a.rest = append(a.rest, a.state)
	}
	a.rest = append(a.rest, a.handed...)

	if a.taker != nil {
		return a.admit()
	}
	fds, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer unix.Close(fds[1])
	if a.s, err = newStream(fds[0]); err != nil {
		return err
	}
	if err := a.fill(); err != nil {
		return err
	}
	env := "pid=" + strconv.Itoa(os.Getpid()) + " uid=" + strconv.Itoa(os.Geteuid())
	a.child, err = startChild(cmd, fds[1], env)
	return err
}

// admit makes the process that takes over the successor.
func (a *attempt) admit() error {
	cred, err := PeerCred(a.taker.conn)
	if err != nil {
		return err
	}
	a.s, a.child = a.taker, foundChild(cred.PID)
	if a.s.atEnd() { // from here on the process is the one that was found, or has ended
		return io.ErrUnexpectedEOF
	}
	return gone(a.fill())
}

// fill begins the conversation, as far as the system's buffer goes.
func (a *attempt) fill() error {
	u := a.u
	_ = a.s.raw.Control(func(fd uintptr) { keepReserve(int(fd)); wantSender(int(fd)) })
	hello := record{"version=" + protocolVersion, "generation=" + strconv.Itoa(u.generation), "pid=" + strconv.Itoa(os.Getpid())}
	if err := a.s.send(frameHello, []record{hello}, nil); err != nil {
		return err
	}
	for !a.endSent {
		if err := a.sendMore(); err == errAgain {
			break
		} else if err != nil {
			return err
		}
		if oneBatchUnread && len(a.rest) > 0 {
			break
		}
	}
	return nil
}

// sendMore sends the next batch, or the end of them.
func (a *attempt) sendMore() error {
	if len(a.rest) > 0 {
		n, err := a.sendBatch(a.rest)
		if err == nil {
			a.rest = a.rest[n:]
		}
		return err
	}
	err := a.s.send(frameEnd, nil, nil)
	a.endSent = err == nil
	return err
}

// sendBatch sends the next entries, at most maxBatchFDs, and returns how many
// of the list they were. The descriptors are taken and sent within calls of
// Control, so that none can be closed, and its number used again, meanwhile.
func (a *attempt) sendBatch(list []*entry) (n int, err error) {
	var records []record
	var fds []int
	var step func(size int) error
	step = func(size int) error {
		if n == len(list) || len(fds) == maxBatchFDs || size >= maxBatch {
			if len(fds) == 0 {
				return nil
			}
			err := a.s.send(frameSockets, records, fds)
			if err == nil {
				a.sent++
			}
			return err
		}
		e := list[n]
		n++
		r := e.record()
		for _, f := range r {
			size += len(f) + 2
		}
		var serr error
		cerr := e.control(func(fd uintptr) {
			records = append(records, r)
			fds = append(fds, int(fd))
			serr = step(size)
		})
		if cerr != nil { // closed by the caller
			return step(size)
		}
		return serr
	}
	err = step(0)
	return n, err
}

// await returns the successor's next frame. It gives up when the successor
// has ended (io.ErrUnexpectedEOF), at the deadline (os.ErrDeadlineExceeded;
// the zero time is none), or, before the word was given, on Stop.
func (a *attempt) await(deadline time.Time) (frame, error) {
	for {
		until := time.Now().Add(slice)
		if !deadline.IsZero() && until.After(deadline) {
			until = deadline
		}
		f, err := a.s.read(until)
		switch {
		case err == nil:
			return f, nil
		case err == io.EOF:
			return f, io.ErrUnexpectedEOF
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return f, err
		}
		if a.ended() {
			// Its last words may have come since.
			if f, err := a.s.next(); err == nil {
				return f, nil
			}
			return f, io.ErrUnexpectedEOF
		}
		if !a.committed && a.u.mustStop() {
			return f, ErrStopped
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return f, os.ErrDeadlineExceeded
		}
	}
}

// ended reports whether the successor is gone, even if a process that it left
// behind holds its end of the stream open.
func (a *attempt) ended() bool {
	if a.child.pid == 0 { // its stream is all that there is to see of it
		return a.s.atEnd()
	}
	if !a.child.exited(0) {
		return false
	}
	return !a.wrapped || a.s.atEnd()
}

// handOn sends what start could not, batch by batch: the next goes when the
// successor has taken all before it.
func (a *attempt) handOn(deadline time.Time) error {
	for acked := 0; !a.endSent; {
		if acked < a.sent {
			f, err := a.await(deadline)
			if err != nil {
				return err
			}
			if f.kind != frameAck {
				return a.unexpected(f)
			}
			acked++
			continue
		}
		err := a.sendMore()
		if err != nil && err != errAgain {
			return gone(err)
		}
		if err == errAgain {
			// Not the buffer, which is empty, but the system's limit of
			// descriptors in flight, whose end is no event.
			if a.child.exited(5 * time.Millisecond) {
				return io.ErrUnexpectedEOF
			}
			if a.u.mustStop() {
				return ErrStopped
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%w: too many descriptors are in flight between processes of this user (see RLIMIT_NOFILE)", os.ErrDeadlineExceeded)
			}
		}
	}
	return nil
}

// gone is err from sending, as Upgrade reports it.
func gone(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (a *attempt) awaitReady(deadline time.Time) error {
	for {
		f, err := a.await(deadline)
		if err != nil {
			return err
		}
		switch f.kind {
		case frameAck:
		case frameFail:
			return failReason(f)
		case frameReady:
			pid, err := strconv.Atoi(f.first("pid"))
			if err != nil || pid <= 0 {
				return fmt.Errorf("the successor says that its process ID is %q; want a number", f.first("pid"))
			}
			a.ownPID = pid
			// Its own word is good enough to print. What may be killed is
			// for the system to say.
			if a.s.sender != 0 {
				pid = a.s.sender
			}
			a.readyPID, a.wrapped = pid, a.child.pid != 0 && pid != a.child.pid
			if a.wrapped && a.s.sender != 0 {
				if a.other, err = os.FindProcess(pid); err != nil {
					return err
				}
			}
			for _, field := range f.records[0] {
				if path, ok := strings.CutPrefix(field, "unclaimed="); ok {
					a.unclaimed = append(a.unclaimed, path)
				}
			}
			return nil
		default:
			return a.unexpected(f)
		}
	}
}

// A successorError is the reason that a successor gave.
type successorError struct {
	reason           string
	inUse            bool   // it is that an address is in use
	network, address string // this one; "": it did not say
}

func (e successorError) Error() string { return "it says: " + e.reason }

func failReason(f frame) error {
	return successorError{f.first("reason"), f.first("inuse") == "1", f.first("network"), f.first("address")}
}

// hasSaid reports whether err is the reason that a successor gave.
func hasSaid(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if _, ok := err.(successorError); ok {
			return true
		}
	}
	return false
}

func (a *attempt) unexpected(f frame) error {
	if f.kind == frameFail {
		return failReason(f)
	}
	return fmt.Errorf("the successor sent a frame %q at step %s: it does not speak this protocol", f.kind, a.step)
}

// handOver gives the word that this process accepts no more, and returns when
// the successor serves.
func (a *attempt) handOver() error {
	u := a.u
	a.quiet = true
	for _, e := range a.handed {
		if !e.late {
			e.quiet()
		}
	}
	a.told = true
	u.notify(a.event(EventHandover))
	if u.mustStop() {
		return ErrStopped
	}
	a.committed = true
	probation := strconv.FormatInt(int64(u.opts.Probation), 10)
	if err := a.s.send(frameCommit, []record{{"probation=" + probation}}, nil); err != nil {
		return gone(err)
	}
	f, err := a.await(time.Now().Add(handoverTimeout))
	if err == os.ErrDeadlineExceeded && a.kill() != nil {
		// This process may not end it, and it may serve at any moment: what
		// it does next decides.
		f, err = a.await(time.Time{})
	}
	if err != nil {
		return err
	}
	if f.kind != frameDone {
		return a.unexpected(f)
	}
	for _, e := range a.handed {
		e.quiet()
	}
	return nil
}

// standBy watches the successor for the time of its probation.
func (a *attempt) standBy() error {
	u := a.u
	for end := time.Now().Add(u.opts.Probation); ; {
		if u.opts.Probation == 0 || u.mustStop() {
			return nil
		}
		until := time.Now().Add(slice)
		if until.After(end) {
			until = end
		}
		f, err := a.await(until)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !time.Now().Before(end) {
				return nil
			}
		case err != nil:
			return err
		case f.kind == frameBye:
			a.bye = true
			return nil
		default:
			// It serves. A frame of a later version is no reason to end it.
		}
	}
}

// finish makes the upgrade final, unless the successor has died since. The
// stream stays open: its end tells the successor that this process has exited.
func (a *attempt) finish() error {
	if a.ended() && !a.saidBye() {
		return io.ErrUnexpectedEOF
	}
	if err := a.s.send(frameFinal, nil, nil); err != nil && !a.saidBye() {
		return gone(err)
	}
	u := a.u
	u.mu.Lock()
	u.phase = upgraded
	u.successor = a.s
	u.reg.entries, u.reg.adopted = nil, nil
	u.mu.Unlock()
	for _, e := range a.handed {
		if slices.Contains(a.unclaimed, e.path) {
			e.removeFile()
		}
	}
	a.child.release()
	a.releaseOther()
	return nil
}

// closeState frees what SendState has written.
func (a *attempt) closeState() {
	if a.stateFile != nil {
		a.stateFile.Close()
		a.stateFile, a.state.fd = nil, -1
	}
}

// saidBye reports whether the successor was stopped, and not killed: it may
// have ended since it said so.
func (a *attempt) saidBye() bool {
	for !a.bye {
		f, err := a.s.next()
		if err != nil {
			return false
		}
		a.bye = f.kind == frameBye
	}
	return true
}

func (a *attempt) releaseOther() {
	if a.other != nil {
		_ = a.other.Release()
	}
}

// fail ends the successor, if there is one, takes everything back, and
// returns err with all that is known.
func (a *attempt) fail(err error) error {
	u := a.u
	ue := &UpgradeError{Step: a.step, PID: a.pid(), Err: err}
	if a.child != nil {
		ue.State = a.end(err)
	}
	a.releaseOther()
	a.closeState()
	if a.s != nil {
		a.s.close()
	}
	if path := u.opts.PIDFile; path != "" && a.child != nil {
		// It had no time to remove what it had written beside the file.
		pidFile{temp: tempPIDFile(path, cmp.Or(a.ownPID, a.pid())), path: path}.discard()
		if perr := u.restorePIDFile(); perr != nil {
			ue.Err = fmt.Errorf("%w (then this process's own %w)", ue.Err, perr)
		}
	}
	defer a.resume() // even if the hook panics
	if a.told {
		e := a.event(EventResumed)
		e.PID, e.Generation = os.Getpid(), u.generation
		u.notify(e)
	}
	return ue
}

// resume lets this process serve as before.
func (a *attempt) resume() {
	u := a.u
	u.mu.Lock()
	var closed []*entry
	for _, e := range a.handed {
		if e.closed {
			closed = append(closed, e)
		}
		e.handed = false
		if a.quiet {
			e.resume()
		}
	}
	u.phase = serving
	u.mu.Unlock()
	for _, e := range closed {
		e.removeFile()
	}
}

// end tells the successor that it was given up, ends it, and returns how it
// ended; nil: unknown.
func (a *attempt) end(cause error) *os.ProcessState {
	err := a.s.abort()
	if a.taker != nil && !a.committed && err != errAgain {
		a.child.release()
		return nil // it knows, and is not this process's to end
	}
	if hasSaid(cause) || errors.Is(cause, io.ErrUnexpectedEOF) {
		// It is about to exit by itself, with a status that tells more.
		grace := time.Second
		if a.committed {
			grace = slice
		}
		a.child.exited(grace)
	}
	err = a.kill()
	if a.committed {
		// It has the word and may serve at any moment: only its end, and no
		// guess, lets this process resume.
		for !a.ended() {
			if _, err := a.s.read(time.Now().Add(slice)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				a.child.exited(slice)
			}
		}
	} else if err != nil || !a.child.exited(handoverTimeout) {
		// It has no word and will not serve.
		a.u.mu.Lock()
		a.u.zombies = append(a.u.zombies, a.child)
		a.u.mu.Unlock()
		return nil
	}
	return a.child.wait()
}

// kill ends the successor, and the process that it really is if it was not
// that one which was started. It returns nil if there is nothing left to end.
func (a *attempt) kill() error {
	err := a.child.kill()
	if a.other != nil {
		if kerr := a.other.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
			err = kerr
		}
	}
	return err
}

// reap removes from the system what is left of successors that could not be
// ended when they were given up.
func (u *Upgrader) reap() {
	u.mu.Lock()
	list := u.zombies
	u.zombies = nil
	u.mu.Unlock()
	for _, c := range list {
		if c.exited(0) {
			c.wait()
			continue
		}
		u.mu.Lock()
		u.zombies = append(u.zombies, c)
		u.mu.Unlock()
	}
}
