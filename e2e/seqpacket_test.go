package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Connections of packets.

// needSeqpacket skips a test where the system has no such sockets.
func needSeqpacket(t testing.TB) {
	t.Helper()
	proctest.SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
}

// A callee is a call that runs in a goroutine of its own.
type callee struct {
	t    *testing.T
	id   string // of the goroutine
	done chan struct{}
	n    int
	err  error
}

func goCall(t *testing.T, f func() (int, error)) *callee {
	c := &callee{t: t, done: make(chan struct{})}
	id := make(chan string)
	go func() {
		var b [64]byte
		id <- strings.Fields(string(b[:runtime.Stack(b[:], false)]))[1]
		c.n, c.err = f()
		close(c.done)
	}()
	c.id = <-id
	return c
}

// inPoller reports whether the call waits for the system now.
func (c *callee) inPoller() bool {
	b := make([]byte, 1<<20)
	n := runtime.Stack(b, true)
	for n == len(b) {
		b = make([]byte, 2*len(b))
		n = runtime.Stack(b, true)
	}
	return bytes.Contains(b[:n], []byte("goroutine "+c.id+" [IO wait"))
}

// waits returns when the call waits for the system.
func (c *callee) waits() {
	c.t.Helper()
	for end := time.Now().Add(proctest.Patience); !c.inPoller(); time.Sleep(time.Millisecond) {
		select {
		case <-c.done:
			c.t.Fatalf("the call has returned %d, %v; it should block", c.n, c.err)
		default:
		}
		if time.Now().After(end) {
			c.t.Fatal("the call does not wait for the system")
		}
	}
}

// result returns what the call has returned.
func (c *callee) result() (int, error) {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(proctest.Patience):
		c.t.Fatal("the call has not returned")
	}
	return c.n, c.err
}

// withFD calls f with a connection's descriptor.
func withFD(t testing.TB, c syscall.Conn, f func(fd int)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sendRaw sends b with descriptors by sendmsg(2) itself. It marks a packet's end
// only where one that is not marked runs into the next.
func sendRaw(t testing.TB, c syscall.Conn, b []byte, files ...*os.File) {
	t.Helper()
	var fds []int
	var oob []byte
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	withFD(t, c, func(fd int) {
		flags := 0
		if typ, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); typ == unix.SOCK_SEQPACKET && runtime.GOOS == "freebsd" && release(t) >= 15 {
			flags = unix.MSG_EOR
		}
		if n, err := unix.SendmsgN(fd, b, oob, nil, flags); err != nil || n != len(b) {
			t.Fatalf("sendmsg: %d, %v", n, err)
		}
	})
}

// release is the system's major version.
func release(t testing.TB) int {
	t.Helper()
	var u unix.Utsname
	var major int
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d", &major); err != nil {
		t.Fatal(err)
	}
	return major
}

// fillQueue sends b until the system takes no more, and returns how often it did
// and how many bytes that were.
func fillQueue(t testing.TB, c syscall.Conn, b []byte) (packets, bytes int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if werr := raw.Write(func(fd uintptr) bool {
		for {
			var n int
			if n, err = unix.SendmsgN(int(fd), b, nil, nil, 0); err != nil {
				return true
			}
			packets++
			bytes += n
		}
	}); werr != nil {
		t.Fatal(werr)
	}
	// NetBSD calls a packet too long for what is left of the queue.
	if packets == 0 || err != syscall.EAGAIN && err != syscall.ENOBUFS && (runtime.GOOS != "netbsd" || err != syscall.EMSGSIZE) {
		t.Fatalf("%d packets sent, then %v", packets, err)
	}
	return packets, bytes
}

// checkOp asserts that err is a *net.OpError of a connection of packets, that
// it is want, and that it is a time-out if that is one.
func checkOp(t testing.TB, what string, err error, op string, want error) {
	t.Helper()
	oe, ok := err.(*net.OpError)
	if !ok || oe.Op != op || oe.Net != "unixpacket" || oe.Source == nil || oe.Addr == nil || !errors.Is(err, want) {
		t.Errorf("%s: %#v (%v); want a *net.OpError of %s that is %v", what, err, err, op, want)
		return
	}
	if oe.Timeout() != (want == os.ErrDeadlineExceeded) {
		t.Errorf("%s: %v: Timeout is %v", what, err, oe.Timeout())
	}
}

// receives asserts that the next packet is this one.
func receives(t testing.TB, c *ecdysis.SeqpacketConn, want string) {
	t.Helper()
	limited(t, c)
	b := make([]byte, 1<<17)
	if n, err := c.Recv(b); err != nil || string(b[:n]) != want {
		t.Fatalf("Recv: %d, %.40q, %v; want %.40q", n, b[:n], err, want)
	}
}

// receivesEnd asserts that the next thing is the end.
func receivesEnd(t testing.TB, c *ecdysis.SeqpacketConn) {
	t.Helper()
	limited(t, c)
	for range 2 {
		if n, err := c.Recv(make([]byte, 10)); n != 0 || err != io.EOF {
			t.Fatalf("Recv: %d, %v; want io.EOF", n, err)
		}
	}
}

// limited lets a call that should not block fail rather than hang.
func limited(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
}

// noneLeft asserts that no copy of the other end of a pipe is left.
func noneLeft(t testing.TB, what string, r *os.File) {
	t.Helper()
	if err := r.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("%s: Read of the pipe: %d, %v; want io.EOF, for every copy of the other end is closed", what, n, err)
	}
}

func pipeEnds(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestSeqpacketListener(t *testing.T) {
	t.Parallel()
	u := proctest.Ours(t)
	path := filepath.Join(proctest.ShortDir(t), "s")
	if runtime.GOOS == "darwin" {
		if _, err := u.ListenSeqpacket(path); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("ListenSeqpacket: %v", err)
		}
		return
	}
	for _, name := range []string{"Listen", "ListenSeqpacket"} {
		var ln net.Listener
		var err error
		if name == "Listen" {
			ln, err = u.Listen("unixpacket", path)
		} else {
			ln, err = u.ListenSeqpacket(path)
		}
		if err != nil {
			t.Fatal(err)
		}
		sl, ok := ln.(*ecdysis.SeqpacketListener)
		if !ok {
			t.Fatalf("%s returns a %T", name, ln)
		}
		if a, ok := sl.Addr().(*net.UnixAddr); !ok || a.Name != path || a.Net != "unixpacket" {
			t.Errorf("%s: address %#v", name, sl.Addr())
		}
		withFD(t, sl, func(fd int) {
			if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_SEQPACKET {
				t.Errorf("%s: a socket of type %d, %v", name, typ, err)
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%s: close-on-exec: %v, %v", name, flags, err)
			}
		})
		// The path of this process's own socket is taken, too.
		for _, network := range []string{"unixpacket", "unix"} {
			if _, err := u.Listen(network, path); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("%s at the path of a live socket: %v", network, err)
			}
		}
		far, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		sc, ok := c.(*ecdysis.SeqpacketConn)
		if !ok {
			t.Fatalf("%s: Accept returns a %T", name, c)
		}
		if a, ok := sc.LocalAddr().(*net.UnixAddr); !ok || a.Name != path || a.Net != "unixpacket" {
			t.Errorf("%s: local address %#v", name, sc.LocalAddr())
		}
		if a, ok := sc.RemoteAddr().(*net.UnixAddr); !ok || strings.Trim(a.Name, "@") != "" || a.Net != "unixpacket" {
			t.Errorf("%s: remote address %#v", name, sc.RemoteAddr())
		}
		far.Close()
		c.Close()

		if err := sl.SetDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if c, err := ln.Accept(); c != nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: Accept after the deadline: %v, %v", name, c, err)
		}
		if c, err := sl.AcceptSeqpacket(); c != nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: AcceptSeqpacket after the deadline: %v, %v", name, c, err)
		}
		if err := sl.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		accept := goCall(t, func() (int, error) { _, err := sl.Accept(); return 0, err })
		accept.waits()
		if err := ln.Close(); err != nil {
			t.Errorf("%s: Close: %v", name, err)
		}
		var oe *net.OpError
		if _, err := accept.result(); !errors.Is(err, net.ErrClosed) || !errors.As(err, &oe) || oe.Op != "accept" {
			t.Errorf("%s: Accept of a listener that is closed: %v", name, err)
		}
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: a second Close: %v", name, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the file after Close: %v", name, err)
		}
	}
}

// patternOf returns n bytes that are not those of another packet.
func patternOf(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i) + byte(i>>8)
	}
	return b
}

func TestSeqpacketBoundaries(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	sizes := []int{1, 2, 100, 4096, 1, 3000}
	for round, c := range [][2]*ecdysis.SeqpacketConn{{far, near}, {near, far}} {
		limited(t, c[0])
		limited(t, c[1])
		var sender sync.WaitGroup
		sender.Go(func() { // not all of it has room in the queue everywhere
			for i, size := range sizes {
				p := patternOf(size, byte(10*round+i))
				if i%2 == 0 {
					if err := c[0].Send(p); err != nil {
						t.Error(err)
					}
				} else if n, err := c[0].Write(p); n != size || err != nil {
					t.Errorf("Write of %d bytes: %d, %v", size, n, err)
				}
			}
		})
		for i, size := range sizes {
			b := make([]byte, 8192)
			recv := c[1].Recv
			if i%3 == 0 {
				recv = c[1].Read
			}
			if n, err := recv(b); err != nil || !bytes.Equal(b[:n], patternOf(size, byte(10*round+i))) {
				t.Errorf("packet %d of %d bytes: %d bytes, %v, or others", i, size, n, err)
			}
		}
		sender.Wait()
	}
}

// A packet that does not fit is an error, and it alone.
func TestSeqpacketTooLong(t *testing.T) {
	t.Parallel()
	c, far := proctest.AcceptSeqpacket(t, "")
	limited(t, c)
	for _, size := range []int{1, 2, 10, 1000} { // three times the last has room everywhere
		exact, over, much := patternOf(size, 1), patternOf(size+1, 2), patternOf(3*size+7, 3)
		for _, p := range [][]byte{exact, over, much, exact} {
			sendRaw(t, far, p)
			sendRaw(t, far, []byte("next"))
			whole := bytes.Repeat([]byte{0xee}, size+100)
			b := whole[:size]
			n, err := c.Recv(b)
			if n != size || !bytes.Equal(b, p[:size]) {
				t.Errorf("a packet of %d bytes for a buffer of %d: %d bytes, or others", len(p), size, n)
			}
			if len(p) == size {
				if err != nil {
					t.Errorf("a packet of the buffer's length, %d: %v", size, err)
				}
			} else {
				checkOp(t, fmt.Sprintf("a packet of %d bytes for a buffer of %d", len(p), size), err, "read", syscall.EMSGSIZE)
				if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("buffer of %d bytes", size)) {
					t.Errorf("the error does not name the buffer's length, %d: %v", size, err)
				}
			}
			if !bytes.Equal(whole[size:], bytes.Repeat([]byte{0xee}, 100)) {
				t.Errorf("a packet of %d bytes for a buffer of %d: what lies behind it was written to", len(p), size)
			}
			receives(t, c, "next")
		}
	}
	// Also in Read.
	sendRaw(t, far, []byte("xyz"))
	b := make([]byte, 2)
	n, err := c.Read(b)
	checkOp(t, "Read", err, "read", syscall.EMSGSIZE)
	if n != 2 || string(b) != "xy" {
		t.Errorf("Read: %d, %q", n, b)
	}
}

// Nothing is sent for an empty b, and nothing taken into one.
func TestSeqpacketEmptyBuffer(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	limited(t, near)
	limited(t, far)
	for _, b := range [][]byte{nil, {}} {
		err := near.Send(b)
		checkOp(t, "Send of nothing", err, "write", err)
		if err == nil || !strings.Contains(err.Error(), "at least one byte") {
			t.Errorf("Send of nothing: %v", err)
		}
		if n, err := near.Write(b); n != 0 || err == nil {
			t.Errorf("Write of nothing: %d, %v", n, err)
		}
	}
	if err := near.Send([]byte("first")); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{nil, {}} {
		if n, err := far.Recv(b); n != 0 || err != nil {
			t.Errorf("Recv into nothing: %d, %v", n, err)
		}
	}
	receives(t, far, "first")
	// Nor does it wait for a packet.
	if n, err := far.Recv(nil); n != 0 || err != nil {
		t.Errorf("Recv into nothing: %d, %v", n, err)
	}
}

// An empty packet of a foreign peer is not taken for the end. On Linux there is
// more to it, in seqpacket_linux_test.go.
func TestSeqpacketForeignEmpty(t *testing.T) {
	t.Parallel()
	proctest.SkipOn(t, "it does not keep such a packet", "openbsd")
	c, far := proctest.AcceptSeqpacket(t, "")
	if runtime.GOOS == "freebsd" && release(t) >= 15 {
		t.Skip("FreeBSD does not send such a packet from 15 on")
	}
	limited(t, c)
	for _, s := range []string{"", "one", "", "two"} {
		withFD(t, far, func(fd int) {
			if _, err := unix.SendmsgN(fd, []byte(s), nil, nil, unix.MSG_EOR); err != nil {
				t.Fatal(err)
			}
		})
	}
	for _, s := range []string{"", "one"} {
		receives(t, c, s)
	}
	b := make([]byte, 10)
	if n, files, err := ecdysis.ReadFiles(c, b); n != 0 || files != nil || err != nil {
		t.Errorf("ReadFiles of an empty packet: %d, %d files, %v", n, len(files), err)
	}
	receives(t, c, "two")
	far.Close()
	receivesEnd(t, c)
}

func TestSeqpacketEnd(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	for _, s := range []string{"one", "two", "three"} {
		if err := far.Send([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"one", "two", "three"} {
		receives(t, near, s)
	}
	receivesEnd(t, near)
	for range 2 {
		checkOp(t, "Send to a peer that has closed", near.Send([]byte("x")), "write", syscall.EPIPE)
	}

	near, far = proctest.SeqpacketPair(t)
	recv := goCall(t, func() (int, error) { return near.Recv(make([]byte, 10)) })
	recv.waits()
	far.Close()
	if n, err := recv.result(); n != 0 || err != io.EOF {
		t.Errorf("a Recv that waits when the peer closes: %d, %v", n, err)
	}
}

func TestSeqpacketCloseWrite(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	if err := far.Send([]byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := far.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	checkOp(t, "Send after CloseWrite", far.Send([]byte("x")), "write", syscall.EPIPE)
	receives(t, near, "last")
	receivesEnd(t, near)
	for range 3 { // the other way is open
		if err := near.Send([]byte("back")); err != nil {
			t.Fatal(err)
		}
		receives(t, far, "back")
	}
	near.Close()
	receivesEnd(t, far)
}

func TestSeqpacketCloseRead(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	recv := goCall(t, func() (int, error) { return near.Recv(make([]byte, 10)) })
	recv.waits()
	if err := near.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if n, err := recv.result(); n != 0 || err != io.EOF {
		t.Errorf("a Recv that waits while CloseRead is called: %d, %v", n, err)
	}
	// Elsewhere than on Linux, and on FreeBSD before 15, it has not noticed.
	if err := far.Send([]byte("x")); err != nil || runtime.GOOS == "linux" {
		checkOp(t, "Send to a peer that does not read", err, "write", syscall.EPIPE)
	} else {
		receives(t, near, "x")
	}
	receivesEnd(t, near)
	if err := near.Send([]byte("back")); err != nil {
		t.Fatal(err)
	}
	receives(t, far, "back")
}

// Deadlines, Close, and many goroutines.

func TestSeqpacketDeadlines(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	b := make([]byte, 10)
	for _, c := range []struct {
		op     string
		call   func() (int, error)
		set    func(time.Time) error
		others func(time.Time) error
		ready  func() // makes the call one that does not block
	}{
		{"read", func() (int, error) { return near.Recv(b) }, near.SetReadDeadline, near.SetWriteDeadline, func() {
			if err := far.Send([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}},
		{"write", func() (int, error) { return near.Write([]byte("y")) }, near.SetWriteDeadline, near.SetReadDeadline, func() {
			limited(t, far)
			for n := 0; n != 1; { // the call's packet
				var err error
				if n, err = far.Recv(make([]byte, 10000)); err != nil {
					t.Fatal(err)
				}
			}
		}},
	} {
		set := func(f func(time.Time) error, at time.Time) {
			t.Helper()
			if err := f(at); err != nil {
				t.Fatal(err)
			}
		}
		fails := func(what string, n int, err error) {
			t.Helper()
			if n != 0 {
				t.Errorf("%s: %d bytes", what, n)
			}
			checkOp(t, c.op+": "+what, err, c.op, os.ErrDeadlineExceeded)
			if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
				t.Errorf("%s: %s: %v is no time-out", c.op, what, err)
			}
		}
		// One that has passed, though the call would not have to wait.
		if c.op == "read" {
			c.ready()
		}
		set(c.set, time.Unix(1, 0))
		for range 3 {
			n, err := c.call()
			fails("the deadline has passed", n, err)
		}
		set(c.set, time.Time{})
		if n, err := c.call(); n != 1 || err != nil {
			t.Errorf("%s: the deadline was taken away: %d, %v", c.op, n, err)
		}

		if c.op == "write" {
			c.ready() // takes that packet
			fillQueue(t, near, patternOf(4096, 0))
		}
		// One of the future, and the other direction's, which is not its own.
		set(c.others, time.Unix(1, 0))
		set(c.set, time.Now().Add(time.Millisecond))
		n, err := c.call()
		fails("the deadline comes", n, err)
		for _, f := range []func(time.Time) error{c.set, near.SetDeadline} {
			set(c.set, time.Now().Add(time.Hour))
			call := goCall(t, c.call)
			call.waits()
			set(f, time.Now())
			n, err := call.result()
			fails("the deadline comes while it waits", n, err)
			set(c.set, time.Time{})
			call = goCall(t, c.call)
			call.waits()
			set(f, time.Now())
			n, err = call.result()
			fails("the deadline comes while it waits without one", n, err)
		}
		set(c.set, time.Now().Add(time.Hour))
		call := goCall(t, c.call)
		call.waits()
		// Neither of these ends it.
		set(c.set, time.Time{})
		set(c.others, time.Unix(1, 0))
		call.waits()
		c.ready()
		if n, err := call.result(); n != 1 || err != nil {
			t.Errorf("%s: after the other direction's deadline: %d, %v", c.op, n, err)
		}
		set(near.SetDeadline, time.Time{})
	}
}

// A Send whose deadline has come has sent nothing.
func TestSeqpacketSendTimeout(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	count, _ := fillQueue(t, near, patternOf(4096, 7))
	for range 5 {
		if err := near.SetWriteDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := near.Write(patternOf(4096, 8))
		checkOp(t, "Write", err, "write", os.ErrDeadlineExceeded)
		if n != 0 {
			t.Errorf("Write: %d", n)
		}
	}
	near.Close()
	for range count {
		receives(t, far, string(patternOf(4096, 7)))
	}
	receivesEnd(t, far)
}

// Close ends every call that waits, and all that come after it.
func TestSeqpacketClose(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	fillQueue(t, near, patternOf(4096, 0))
	var reads, writes []*callee
	for range 3 {
		reads = append(reads, goCall(t, func() (int, error) { return near.Recv(make([]byte, 10)) }))
		writes = append(writes, goCall(t, func() (int, error) { return near.Write([]byte("x")) }))
	}
	// The others wait for it, or will.
	oneWaits(t, reads)
	oneWaits(t, writes)
	if err := near.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range reads {
		n, err := reads[i].result()
		checkOp(t, "a Recv that waits", err, "read", net.ErrClosed)
		m, err := writes[i].result()
		checkOp(t, "a Write that waits", err, "write", net.ErrClosed)
		if n != 0 || m != 0 {
			t.Errorf("Recv: %d bytes; Write: %d", n, m)
		}
	}
	_, err := near.Recv(make([]byte, 10))
	checkOp(t, "Recv", err, "read", net.ErrClosed)
	checkOp(t, "Send", near.Send([]byte("x")), "write", net.ErrClosed)
	for name, err := range map[string]error{
		"Close": near.Close(), "CloseRead": near.CloseRead(), "CloseWrite": near.CloseWrite(),
		"SetDeadline": near.SetDeadline(time.Now()), "SetReadDeadline": near.SetReadDeadline(time.Now()),
		"SetWriteDeadline": near.SetWriteDeadline(time.Now()),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	if near.LocalAddr() == nil || near.RemoteAddr() == nil {
		t.Error("the addresses are gone")
	}
	far.Close()
}

// oneWaits returns when one of the calls waits for the system.
func oneWaits(t *testing.T, calls []*callee) {
	t.Helper()
	for end := time.Now().Add(proctest.Patience); ; time.Sleep(time.Millisecond) {
		for _, c := range calls {
			if c.inPoller() {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatal("no call waits for the system")
		}
	}
}

// Each packet is received once and whole, with many senders and receivers.
func TestSeqpacketConcurrent(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	const goroutines, each = 5, 400
	length := func(id uint32) int { return 4 + int(id*7919%3000) }
	var directions sync.WaitGroup
	for _, ends := range [][2]*ecdysis.SeqpacketConn{{near, far}, {far, near}} {
		from, to := ends[0], ends[1]
		limited(t, from)
		directions.Go(func() {
			var senders, receivers sync.WaitGroup
			for g := range uint32(goroutines) {
				senders.Go(func() {
					for i := range uint32(each) {
						id := g*each + i
						b := patternOf(length(id), byte(id))
						binary.BigEndian.PutUint32(b, id)
						if err := from.Send(b); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			var mu sync.Mutex
			seen := make(map[uint32]int)
			for range goroutines {
				receivers.Go(func() {
					b := make([]byte, 4096)
					for {
						n, err := to.Recv(b)
						if err == io.EOF {
							return
						}
						if err != nil || n < 4 {
							t.Errorf("Recv: %d, %v", n, err)
							return
						}
						id := binary.BigEndian.Uint32(b)
						if n != length(id) || !bytes.Equal(b[4:n], patternOf(n, byte(id))[4:]) {
							t.Errorf("packet %d: %d bytes, or others", id, n)
							return
						}
						mu.Lock()
						seen[id]++
						mu.Unlock()
					}
				})
			}
			senders.Wait()
			if err := from.CloseWrite(); err != nil {
				t.Error(err)
			}
			receivers.Wait()
			if len(seen) != goroutines*each {
				t.Errorf("%d packets received; want %d", len(seen), goroutines*each)
			}
			for id, n := range seen {
				if n != 1 {
					t.Errorf("packet %d was received %d times", id, n)
				}
			}
		})
	}
	directions.Wait()
}

// Every method at once, for the race detector.
func TestSeqpacketConcurrentMethods(t *testing.T) {
	t.Parallel()
	for range 20 {
		near, far := proctest.SeqpacketPair(t)
		go func() { _, _ = io.Copy(io.Discard, far) }()
		var wg sync.WaitGroup
		for range 3 {
			for _, f := range []func(){
				func() { _, _ = near.Recv(make([]byte, 100)) },
				func() { _, _ = near.Write(make([]byte, 100)) },
				func() { _ = near.SetDeadline(time.Now().Add(10 * time.Millisecond)) },
				func() { _ = near.SetReadDeadline(time.Now().Add(10 * time.Millisecond)) },
				func() { _ = near.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)) },
				func() { _ = near.LocalAddr().String() + near.RemoteAddr().String() },
				func() { _, _ = ecdysis.PeerCred(near) },
				func() { _, _ = ecdysis.WriteFiles(near, []byte("x"), os.Stderr) },
				func() { _, _, _ = ecdysis.ReadFiles(near, make([]byte, 100)) },
			} {
				wg.Go(func() {
					for range 20 {
						f()
					}
				})
			}
		}
		wg.Wait()
		near.Close()
		far.Close()
	}
}

// A connection is a net.Conn, for code that knows no packets.
func TestSeqpacketNetConn(t *testing.T) {
	t.Parallel()
	// Both are the package's, because net does not wait where NetBSD calls a
	// packet too long for what is left of the queue. No packet is longer than
	// 4096 bytes, which is all that NetBSD takes.
	near, far := proctest.SeqpacketPair(t)
	limited(t, near)
	limited(t, far)

	t.Run("bufio", func(t *testing.T) {
		r := bufio.NewReader(near)
		for i := range 100 {
			want := strings.Repeat("x", 40*i) + "\n"
			if _, err := io.WriteString(far, want); err != nil {
				t.Fatal(err)
			}
			if line, err := r.ReadString('\n'); line != want || err != nil {
				t.Fatalf("line %d: %d bytes, %v", i, len(line), err)
			}
		}
		w := bufio.NewWriterSize(near, 4096)
		fmt.Fprintf(w, "a %s", strings.Repeat("b", 4000))
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8192)
		if n, err := far.Read(b); n != 4002 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	})
	t.Run("json", func(t *testing.T) {
		enc, dec := json.NewEncoder(near), json.NewDecoder(bufio.NewReaderSize(near, 1<<16))
		go func() {
			fdec, fenc := json.NewDecoder(bufio.NewReaderSize(far, 1<<16)), json.NewEncoder(far)
			for {
				var s []string
				if fdec.Decode(&s) != nil || fenc.Encode(s) != nil {
					return
				}
				if len(s) == 0 {
					return
				}
			}
		}()
		for i := 20; i >= 0; i-- {
			want := slices.Repeat([]string{"text"}, 25*i)
			if err := enc.Encode(want); err != nil {
				t.Fatal(err)
			}
			var got []string
			if err := dec.Decode(&got); err != nil || !slices.Equal(got, want) {
				t.Fatalf("%d strings, %v; want %d", len(got), err, len(want))
			}
		}
	})
	t.Run("copy", func(t *testing.T) {
		var want bytes.Buffer
		go func() {
			for i := range 200 {
				if _, err := far.Write(patternOf(1+20*i, byte(i))); err != nil {
					t.Error(err)
				}
			}
			far.CloseWrite()
		}()
		for i := range 200 {
			want.Write(patternOf(1+20*i, byte(i)))
		}
		var got bytes.Buffer
		n, err := io.Copy(struct{ io.Writer }{&got}, near) // with a buffer of 32 KiB
		if err != nil || n != int64(want.Len()) || !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Errorf("Copy: %d, %v; want %d", n, err, want.Len())
		}
		// And out, one packet for each Write of Copy's.
		go func() {
			_, err := io.CopyBuffer(struct{ io.Writer }{near}, struct{ io.Reader }{&want}, make([]byte, 3000))
			if err != nil {
				t.Error(err)
			}
			near.Close()
		}()
		all, err := io.ReadAll(bufio.NewReaderSize(far, 3000))
		if err != nil || !bytes.Equal(all, got.Bytes()) {
			t.Errorf("%d bytes came back, %v; want %d", len(all), err, got.Len())
		}
	})
}
