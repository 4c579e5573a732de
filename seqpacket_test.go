//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

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
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Connections of packets, descriptors that travel over Unix connections, and
// who is at their other end.

func init() {
	setUp = append(setUp, func(d *daemon) {
		for _, path := range strings.Fields(d.spec.Extra["seqpacket"]) {
			ln, err := d.u.ListenSeqpacket(path)
			if err != nil {
				d.send(message{At: "listen failed", Err: toErrMsg(err)})
				fatal(d.u.Fail(err))
			}
			d.lns = append(d.lns, ln)
		}
	})
	roles["peer"] = peerMain
}

// needSeqpacket skips a test where the system has no such sockets.
func needSeqpacket(t testing.TB) {
	t.Helper()
	proctest.SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
}

// acceptSeqpacket returns both ends of a connection: the one that was accepted
// through the package, and the client's. local is where the client is bound;
// "": nowhere.
func acceptSeqpacket(t testing.TB, local string) (*ecdysis.SeqpacketConn, *net.UnixConn) {
	t.Helper()
	needSeqpacket(t)
	u := proctest.Ours(t)
	ln, err := u.ListenSeqpacket(filepath.Join(shortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var laddr *net.UnixAddr
	if local != "" {
		laddr = &net.UnixAddr{Name: local, Net: "unixpacket"}
	}
	far, err := net.DialUnix("unixpacket", laddr, ln.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	c, err := ln.AcceptSeqpacket()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, far
}

// seqpacketPair returns a connection whose both ends are the package's: the
// far one goes in by AddConn and comes back by Conn.
func seqpacketPair(t testing.TB) (near, far *ecdysis.SeqpacketConn) {
	t.Helper()
	near, c := acceptSeqpacket(t, "")
	return near, ownEnd(t, c)
}

func ownEnd(t testing.TB, c *net.UnixConn) *ecdysis.SeqpacketConn {
	t.Helper()
	u := proctest.Ours(t)
	name := fmt.Sprintf("%s %p", t.Name(), c)
	if err := u.AddConn(name, c); err != nil {
		t.Fatal(err)
	}
	c.Close()
	nc, err := u.Conn(name)
	if err != nil {
		t.Fatal(err)
	}
	sc, ok := nc.(*ecdysis.SeqpacketConn)
	if !ok {
		t.Fatalf("Conn returns a %T; want a *SeqpacketConn", nc)
	}
	t.Cleanup(func() { sc.Close() })
	return sc
}

// socketPair returns a pair of Unix sockets of this type, as net has them.
func socketPair(t testing.TB, typ int) (a, b *net.UnixConn) {
	t.Helper()
	a, b, err := newSocketPair(typ)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func newSocketPair(typ int) (a, b *net.UnixConn, err error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1], nil
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
	for end := time.Now().Add(patience); !c.inPoller(); time.Sleep(time.Millisecond) {
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
	case <-time.After(patience):
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
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
}

// noneLeft asserts that no copy of the other end of a pipe is left.
func noneLeft(t testing.TB, what string, r *os.File) {
	t.Helper()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
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

// Upgrades.

// A client of packets never sees an upgrade.
func TestSeqpacketUpgrades(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	h := newHub(t)
	a, b := filepath.Join(h.dir, "a"), filepath.Join(h.dir, "b")
	s := spec{Listen: [][2]string{{"unixpacket", a}}, Extra: map[string]string{"seqpacket": b}, Wait: true}
	addrs := [][2]string{{"unixpacket", a}, {"unixpacket", b}}
	if runtime.GOOS == "linux" {
		abstract := "@ecdysis-test-" + filepath.Base(h.dir)
		s.Listen = append(s.Listen, [2]string{"unixpacket", abstract})
		addrs = append(addrs, [2]string{"unixpacket", abstract})
	}
	h.next(s)
	p := h.serving()
	l := startLoad(t, 1, false, addrs...)
	before := p.call("sockets").Text
	for i := range 30 {
		c, err := net.Dial("unixpacket", addrs[i%len(addrs)][1])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if pid, _, err := askOn(c); err != nil || pid != p.pid {
			t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
		}
		l.more(5)
		if i%10 == 5 {
			h.next(s.do("listened", "exit 1"))
			answer := p.begin(command{Verb: "upgrade"})
			h.proc().at("listened")
			checkErr(t, answer().Err, "init", "unexpected EOF")
			p.serves()
			h.next(s)
		}
		old := p
		p = p.upgrade()
		l.more(5)
		if e := p.event(ecdysis.EventReady, 0); len(e.Unclaimed) != 0 {
			t.Errorf("unclaimed: %v", e.Unclaimed)
		}
		// What the old process has accepted is its own to the end.
		if pid, g, err := askOn(c); err != nil || pid != old.pid || g != i {
			t.Fatalf("process %d of generation %d answers on a connection that %d has accepted, %v", pid, g, old.pid, err)
		}
		c.Close()
		old.ended() // when its clients have gone
	}
	l.more(20)
	l.check()
	p.serves()
	if after := p.call("sockets").Text; len(after) != len(addrs) || !slices.Equal(before, after) {
		t.Errorf("sockets %v, handed on as %v", before, after)
	}
	p.begin(command{Verb: "stop"})
	p.ended()
	h.hasFiles()
}

// A successor that dies in its probation gives the sockets back.
func TestSeqpacketProbation(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	h := newHub(t)
	s := spec{Listen: [][2]string{{"unixpacket", h.sock()}}}
	h.next(s.probation(time.Minute), s)
	p := h.serving()
	held, err := net.Dial("unixpacket", h.sock())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, _, err := askOn(held); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		answer := p.begin(command{Verb: "upgrade"})
		g := h.proc()
		g.at("serving")
		g.serves()
		g.kill()
		checkErr(t, answer().Err, "probation", "unexpected EOF")
		p.serves()
		h.hasFiles("sock")
	}
	l := startLoad(t, 2, false, [2]string{"unixpacket", h.sock()})
	l.more(20)
	answer := p.begin(command{Verb: "upgrade"})
	g := h.proc()
	g.at("serving")
	l.more(20)
	if pid, _, err := askOn(held); err != nil || pid != p.pid {
		t.Errorf("process %d answers, %v; want %d", pid, err, p.pid)
	}
	g.serves()
	p.call("stop") // makes it final
	if m := answer(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	l.more(20)
	l.check()
	g.call("stop")
	g.call("awaitexit")
	h.hasFiles()
}

// A socket of packets is found by its path, whatever the words, and by no
// other network.
func TestSeqpacketMatching(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	dir := shortDir(t)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join("sub", "s"), filepath.Join(dir, "file")); err != nil {
		t.Fatal(err)
	}
	sock, stream := filepath.Join(dir, "sub", "s"), filepath.Join(dir, "stream")
	first := func(s spec) *proc {
		return newHub(t, s).serving(func(c *exec.Cmd) { c.Dir = dir })
	}
	answers := func(p *proc, network, path string) {
		t.Helper()
		if pid, _, err := ask(network, path); err != nil || pid != p.pid {
			t.Errorf("%s %s: process %d answers, %v; want %d", network, path, pid, err, p.pid)
		}
	}
	p := first(spec{Listen: [][2]string{{"unixpacket", sock}}})
	inode := p.call("sockets").Text
	for _, words := range []string{"sub/s", "./link/../sub//s", dir + "/link/s", dir + "/file", sock} {
		for _, extra := range []bool{false, true} {
			s := spec{Listen: [][2]string{{"unixpacket", words}}}
			if extra {
				s = spec{Extra: map[string]string{"seqpacket": words}}
			}
			p.h.next(s)
			p = p.upgrade()
			if got := p.call("sockets").Text; !slices.Equal(got, inode) {
				t.Fatalf("asked for as %s: sockets %v; want %v", words, got, inode)
			}
			if e := p.event(ecdysis.EventReady, 0); len(e.Unclaimed) != 0 {
				t.Errorf("asked for as %s: unclaimed: %v", words, e.Unclaimed)
			}
			answers(p, "unixpacket", sock)
		}
	}
	copied := filepath.Join(dir, "copy") // of the name
	if err := os.Link(sock, copied); err != nil {
		t.Fatal(err)
	}
	answers(p, "unixpacket", copied)
	p.call("stop")
	p.call("awaitexit")
	if _, err := os.Lstat(sock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's file after Stop: %v", err)
	}
	if _, err := net.Dial("unixpacket", copied); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the socket after Stop: %v", err)
	}
	// A relative path is one of the directory in which the program started.
	p = first(spec{Listen: [][2]string{{"unixpacket", "sub/s"}}})
	answers(p, "unixpacket", sock)
	p.h.next(spec{Listen: [][2]string{{"unixpacket", sock}}})
	p = p.upgrade()
	answers(p, "unixpacket", sock)
	p.call("stop")
	p.call("awaitexit")
	if _, err := os.Lstat(sock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of a relative path after Stop: %v", err)
	}

	for _, networks := range [][2]string{{"unix", "unixpacket"}, {"unixpacket", "unix"}} {
		p := first(spec{Listen: [][2]string{{networks[0], stream}}})
		p.h.next(spec{Listen: [][2]string{{networks[1], stream}}})
		answer := p.begin(command{Verb: "upgrade"})
		s := p.h.proc()
		if m := s.at("listen failed"); m.Err == nil || !slices.Contains(m.Err.Is, "EADDRINUSE") {
			t.Errorf("asked for as %s, inherited as %s: %+v", networks[1], networks[0], m.Err)
		}
		if m := answer(); m.Err == nil || m.Err.Step != "init" {
			t.Errorf("asked for as %s, inherited as %s: %+v", networks[1], networks[0], m.Err)
		}
		answers(p, networks[0], stream)
		p.call("stop")
		p.call("awaitexit")
	}
}

func TestSeqpacketListener(t *testing.T) {
	t.Parallel()
	u := listenTest(t)
	path := filepath.Join(shortDir(t), "s")
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
		// A live socket's path is taken, here and for others.
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
	// Files that are stale, of either type, are replaced.
	for _, network := range []string{"unixpacket", "unix"} {
		old, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
		if err != nil {
			t.Fatal(err)
		}
		old.SetUnlinkOnClose(false)
		if _, err := u.ListenSeqpacket(path); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "another process listens there") {
			t.Errorf("at the path of another's live socket: %v", err)
		}
		old.Close()
		// A process that another test starts has a copy until it runs its
		// program.
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			c, err := net.Dial(network, path)
			if err != nil {
				break
			}
			c.Close()
		}
		ln, err := u.ListenWith(ecdysis.ListenConfig{Mode: 0o640}, "unixpacket", path)
		if err != nil {
			t.Fatalf("at the path of a stale %s socket: %v", network, err)
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o640 {
			t.Errorf("mode %v, %v", fi.Mode(), err)
		}
		ln.Close()
	}
	if _, err := u.ListenWith(ecdysis.ListenConfig{ReusePort: true}, "unixpacket", path); err == nil {
		t.Error("ReusePort: no error")
	}
	if _, err := u.ListenSeqpacket(""); err == nil {
		t.Error("an empty path: no error")
	}
}

// Packets.

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
	near, far := seqpacketPair(t)
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
	c, far := acceptSeqpacket(t, "")
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
	near, far := seqpacketPair(t)
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
	c, far := acceptSeqpacket(t, "")
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
	near, far := seqpacketPair(t)
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

	near, far = seqpacketPair(t)
	recv := goCall(t, func() (int, error) { return near.Recv(make([]byte, 10)) })
	recv.waits()
	far.Close()
	if n, err := recv.result(); n != 0 || err != io.EOF {
		t.Errorf("a Recv that waits when the peer closes: %d, %v", n, err)
	}
}

func TestSeqpacketCloseWrite(t *testing.T) {
	t.Parallel()
	near, far := seqpacketPair(t)
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
	near, far := seqpacketPair(t)
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

// runRole runs this program in a role, with an argument, and returns the lines
// that it prints.
func runRole(t *testing.T, role, arg string) []string {
	t.Helper()
	cmd := exec.Command(testBinary(t))
	cmd.Env = append(os.Environ(), roleVar+"="+role, roleArgVar+"="+arg)
	stderr := new(lockedBuffer)
	cmd.Stderr = stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("role %s: %v\n%s%s", role, err, out, stderr)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
}

const roleArgVar = "ECDYSIS_TEST_ARG"

// Deadlines, Close, and many goroutines.

func TestSeqpacketDeadlines(t *testing.T) {
	t.Parallel()
	near, far := seqpacketPair(t)
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
	near, far := seqpacketPair(t)
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
	near, far := seqpacketPair(t)
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
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
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

// Each packet is received once and whole, whoever sends and receives.
func TestSeqpacketConcurrent(t *testing.T) {
	t.Parallel()
	near, far := seqpacketPair(t)
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
		near, far := seqpacketPair(t)
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
	near, far := seqpacketPair(t)
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

// Descriptors.

// fileKinds are the connections that files travel over: a to b, and back if
// both is set.
var fileKinds = []struct {
	name   string
	packet bool // keeps boundaries
	open   func(t *testing.T) (a, b fileConn)
}{
	{"stream", false, func(t *testing.T) (a, b fileConn) { return socketPair(t, syscall.SOCK_STREAM) }},
	{"SeqpacketConn", true, func(t *testing.T) (a, b fileConn) { return seqpacketPair(t) }},
	{"seqpacket", true, func(t *testing.T) (a, b fileConn) {
		needSeqpacket(t)
		return socketPair(t, syscall.SOCK_SEQPACKET)
	}},
	{"datagrams", true, func(t *testing.T) (a, b fileConn) { return socketPair(t, syscall.SOCK_DGRAM) }},
	{"UnixgramConn", true, func(t *testing.T) (a, b fileConn) {
		dir := shortDir(t)
		u := listenTest(t)
		var ends [2]*ecdysis.UnixgramConn
		for i, path := range []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")} {
			c, err := u.ListenPacket("unixgram", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			ends[i] = c.(*ecdysis.UnixgramConn)
		}
		for i := range ends {
			withFD(t, ends[i], func(fd int) {
				if err := unix.Connect(fd, &unix.SockaddrUnix{Name: ends[1-i].LocalAddr().String()}); err != nil {
					t.Fatal(err)
				}
			})
		}
		return ends[0], ends[1]
	}},
}

type fileConn interface {
	net.Conn
	syscall.Conn
}

// eachKind runs f for each kind of connection.
func eachKind(t *testing.T, f func(t *testing.T, a, b fileConn, packet bool)) {
	for _, k := range fileKinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			a, b := k.open(t)
			f(t, a, b, k.packet)
		})
	}
}

// receivesFiles asserts that these bytes come next, with so many files, and
// returns those, which the test closes.
func receivesFiles(t *testing.T, c fileConn, want string, files int) []*os.File {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1000)
	n, list, err := ecdysis.ReadFiles(c, b)
	t.Cleanup(func() { closeFiles(list) })
	if err != nil || string(b[:n]) != want || len(list) != files {
		t.Fatalf("ReadFiles: %d, %q, %d files, %v; want %q and %d", n, b[:n], len(list), err, want, files)
	}
	return list
}

func closeFiles(list []*os.File) {
	for _, f := range list {
		f.Close()
	}
}

func TestFilesTravel(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		most := 100
		if runtime.GOOS == "dragonfly" {
			most = 40
		}
		for _, count := range []int{0, 1, most, 2} {
			var readers, writers []*os.File
			for range count {
				r, w := pipeEnds(t)
				readers, writers = append(readers, r), append(writers, w)
			}
			text := fmt.Sprint(count, " files")
			if n, err := ecdysis.WriteFiles(a, []byte(text), writers...); n != len(text) || err != nil {
				t.Fatalf("WriteFiles of %d files: %d, %v", count, n, err)
			}
			for _, w := range writers { // they stayed the caller's
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
			list := receivesFiles(t, b, text, count)
			for i, f := range list {
				if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Errorf("file %d: close-on-exec: %v, %v", i, flags, err)
				}
				if _, err := fmt.Fprint(f, i); err != nil {
					t.Errorf("file %d: %v", i, err)
				}
				if err := f.Close(); err != nil {
					t.Errorf("file %d: %v", i, err)
				}
			}
			for i, r := range readers {
				if got, err := io.ReadAll(r); err != nil || string(got) != strconv.Itoa(i) {
					t.Errorf("pipe %d: %q, %v", i, got, err)
				}
			}
		}
		// And back, of another sort.
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := ecdysis.WriteFiles(b, []byte("back"), f, os.Stderr); err != nil {
			t.Fatal(err)
		}
		got := receivesFiles(t, a, "back", 2)
		for i, want := range []*os.File{f, os.Stderr} {
			x, err1 := got[i].Stat()
			y, err2 := want.Stat()
			if err1 != nil || err2 != nil || !os.SameFile(x, y) {
				t.Errorf("file %d is another: %v, %v", i, err1, err2)
			}
		}
	})
}

// What cannot be sent is an error before anything is.
func TestWriteFilesBadInput(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		r, w := pipeEnds(t)
		closed, _ := pipeEnds(t)
		closed.Close()
		for _, c := range []struct {
			what  string
			b     string
			files []*os.File
			is    error
			says  string
		}{
			{"101 files", "x", slices.Repeat([]*os.File{w}, 101), nil, "101 files"},
			{"no bytes", "", []*os.File{w}, nil, "at least one byte"},
			{"neither bytes nor files", "", nil, nil, "at least one byte"},
			{"a closed file", "x", []*os.File{closed}, os.ErrClosed, ""},
			{"a closed file behind others", "x", []*os.File{w, w, closed}, os.ErrClosed, ""},
			{"a closed file before others", "x", []*os.File{closed, w}, os.ErrClosed, ""},
			{"a nil file", "x", []*os.File{nil}, os.ErrInvalid, ""},
			{"a nil file behind others", "x", []*os.File{w, nil}, os.ErrInvalid, ""},
		} {
			n, err := ecdysis.WriteFiles(a, []byte(c.b), c.files...)
			if n != 0 || err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %d, %v", c.what, n, err)
			}
		}
		if _, err := ecdysis.WriteFiles(a, []byte("next"), w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		closeFiles(receivesFiles(t, b, "next", 1)) // nothing was before it
		noneLeft(t, "after the last copy was closed", r)
	})
}

// A packet that does not fit closes the files that came with it.
func TestReadFilesTooLong(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		r, w := pipeEnds(t)
		if _, err := ecdysis.WriteFiles(a, []byte("12345"), w, w, w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		p := make([]byte, 4)
		if err := b.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, files, err := ecdysis.ReadFiles(b, p)
		if !packet { // of a stream this is a part
			if n != 4 || string(p) != "1234" || len(files) != 3 || err != nil {
				t.Errorf("ReadFiles: %d, %q, %d files, %v", n, p, len(files), err)
			}
			closeFiles(files)
			noneLeft(t, "closed", r)
			receivesFiles(t, b, "5", 0)
			return
		}
		if n != 0 || files != nil || !errors.Is(err, syscall.EMSGSIZE) || !strings.Contains(err.Error(), "buffer of 4 bytes") {
			t.Errorf("ReadFiles: %d, %d files, %v", n, len(files), err)
		}
		noneLeft(t, "the packet was longer than the buffer", r)
		r, w = pipeEnds(t)
		if _, err := ecdysis.WriteFiles(a, []byte("1234"), w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if n, files, err = ecdysis.ReadFiles(b, p); n != 4 || string(p) != "1234" || len(files) != 1 || err != nil {
			t.Errorf("a packet of the buffer's length: %d, %q, %d files, %v", n, p, len(files), err)
		}
		closeFiles(files)
		noneLeft(t, "closed", r)
	})
}

// A read that does not ask for descriptors leaves none behind.
func TestFilesNotAskedFor(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		proctest.SkipOn(t, "it closes such descriptors when some Unix socket is closed", "netbsd")
		r, w := pipeEnds(t)
		for _, s := range []string{"one", "two"} {
			if _, err := ecdysis.WriteFiles(a, []byte(s), w, w); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 10)
			if n, err := b.Read(p); string(p[:n]) != s || err != nil {
				t.Errorf("Read: %q, %v; want %q", p[:n], err, s)
			}
		}
		w.Close()
		noneLeft(t, "Read has taken the packet", r)
		if _, err := ecdysis.WriteFiles(a, []byte("three"), os.Stderr); err != nil {
			t.Fatal(err)
		}
		receivesFiles(t, b, "three", 1)
	})
}

// With the system's buffer full, or nothing in it, deadlines and Close end a
// call.
func TestFilesInterrupted(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		if a.LocalAddr().Network() == "unixgram" {
			proctest.OnlyOn(t, "a full queue of datagrams is an error (ENOBUFS) and nothing that is waited for", "linux")
		}
		fillQueue(t, a, patternOf(1000, 0))
		read := func() (int, error) {
			n, files, err := ecdysis.ReadFiles(a, make([]byte, 10))
			if files != nil {
				t.Errorf("ReadFiles: %d files", len(files))
			}
			return n, err
		}
		write := func() (int, error) { return ecdysis.WriteFiles(a, []byte("x"), os.Stderr) }
		check := func(what string, c *callee, want error) {
			t.Helper()
			if n, err := c.result(); n != 0 || !errors.Is(err, want) {
				t.Errorf("%s: %d, %v; want %v", what, n, err, want)
			}
		}
		for _, set := range []func(time.Time) error{a.SetDeadline, nil} {
			r, w := goCall(t, read), goCall(t, write)
			r.waits()
			w.waits()
			if set == nil {
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
				check("ReadFiles, closed", r, net.ErrClosed)
				check("WriteFiles, closed", w, net.ErrClosed)
				break
			}
			if err := set(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			check("ReadFiles, deadline", r, os.ErrDeadlineExceeded)
			check("WriteFiles, deadline", w, os.ErrDeadlineExceeded)
			check("ReadFiles, past deadline", goCall(t, read), os.ErrDeadlineExceeded)
			check("WriteFiles, past deadline", goCall(t, write), os.ErrDeadlineExceeded)
			if err := set(time.Time{}); err != nil {
				t.Fatal(err)
			}
		}
		check("ReadFiles after Close", goCall(t, read), net.ErrClosed)
		check("WriteFiles after Close", goCall(t, write), net.ErrClosed)
	})
}

func TestFilesEnd(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		if a.LocalAddr().Network() == "unixgram" {
			t.Skip("datagrams have no end")
		}
		r, w := pipeEnds(t)
		if _, err := ecdysis.WriteFiles(a, []byte("last"), w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		a.Close()
		closeFiles(receivesFiles(t, b, "last", 1))
		noneLeft(t, "closed", r)
		for range 2 {
			if n, files, err := ecdysis.ReadFiles(b, make([]byte, 10)); n != 0 || files != nil || err != io.EOF {
				t.Errorf("ReadFiles: %d, %d files, %v; want io.EOF", n, len(files), err)
			}
		}
		if n, err := ecdysis.WriteFiles(b, []byte("x"), os.Stderr); n != 0 || !errors.Is(err, syscall.EPIPE) {
			t.Errorf("WriteFiles to a peer that has closed: %d, %v", n, err)
		}
	})
}

// What nobody has received is closed with the connection.
func TestFilesUnderWay(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		r, w := pipeEnds(t)
		if _, err := ecdysis.WriteFiles(a, []byte("x"), w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		a.Close()
		b.Close()
		noneLeft(t, "both ends are closed", r)
	})
}

// Of many bytes the first one takes the files along, once.
func TestFilesOfStream(t *testing.T) {
	t.Parallel()
	a, b := socketPair(t, syscall.SOCK_STREAM)
	limited(t, a)
	limited(t, b)
	r, w := pipeEnds(t)
	want := patternOf(5<<20, 3)
	write := goCall(t, func() (int, error) {
		n, err := ecdysis.WriteFiles(a, want, w, w)
		w.Close()
		a.Close()
		return n, err
	})
	write.waits() // it has written a part
	var got []byte
	var files []*os.File
	p := make([]byte, 10000)
	for {
		n, list, err := ecdysis.ReadFiles(b, p)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(list) > 0 && len(got) > 0 {
			t.Errorf("%d files after %d bytes", len(list), len(got))
		}
		got, files = append(got, p[:n]...), append(files, list...)
	}
	if n, err := write.result(); n != len(want) || err != nil {
		t.Errorf("WriteFiles: %d, %v", n, err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes, or others; want %d", len(got), len(want))
	}
	if len(files) != 2 {
		t.Errorf("%d files", len(files))
	}
	closeFiles(files)
	noneLeft(t, "closed", r)

	// A part, and then the deadline: it says how much.
	a, b = socketPair(t, syscall.SOCK_STREAM)
	write = goCall(t, func() (int, error) { return ecdysis.WriteFiles(a, want, os.Stderr) })
	write.waits()
	if err := a.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	n, err := write.result()
	if n <= 0 || n >= len(want) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("WriteFiles: %d, %v", n, err)
	}
	a.Close()
	m, list, err := ecdysis.ReadFiles(b, p)
	if err != nil || len(list) != 1 {
		t.Fatalf("%d files, %v", len(list), err)
	}
	closeFiles(list)
	rest, err := io.ReadAll(b)
	if err != nil || m+len(rest) != n {
		t.Errorf("%d bytes were received, %v; WriteFiles has said %d", m+len(rest), err, n)
	}
}

// Files of several calls come in order, none with the bytes of a later call.
func TestFilesInOrder(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		var readers []*os.File
		calls := []int{2, 0, 1, 3} // their files
		for i, count := range calls {
			var list []*os.File
			for range count {
				r, w := pipeEnds(t)
				readers, list = append(readers, r), append(list, w)
			}
			if _, err := ecdysis.WriteFiles(a, []byte{byte('a' + i)}, list...); err != nil {
				t.Fatal(err)
			}
			closeFiles(list)
		}
		if err := b.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		text, arrived := "", 0
		for len(text) < len(calls) {
			p := make([]byte, 10)
			n, files, err := ecdysis.ReadFiles(b, p)
			if err != nil || packet && (n != 1 || len(files) != calls[len(text)]) {
				t.Fatalf("ReadFiles after %q: %d bytes, %d files, %v", text, n, len(files), err)
			}
			text += string(p[:n])
			for _, f := range files {
				fmt.Fprint(f, arrived)
				arrived++
			}
			closeFiles(files)
		}
		if text != "abcd" || arrived != len(readers) {
			t.Fatalf("%q and %d files", text, arrived)
		}
		for i, r := range readers {
			if got, err := io.ReadAll(r); err != nil || string(got) != strconv.Itoa(i) {
				t.Errorf("pipe %d: %q, %v", i, got, err)
			}
		}
	})
}

// Several goroutines at once get each file with its own byte.
func TestFilesConcurrent(t *testing.T) {
	t.Parallel()
	proctest.SkipOn(t, "it drops descriptors that have no room in the queue", "netbsd", "dragonfly")
	near, far := seqpacketPair(t)
	limited(t, near)
	limited(t, far)
	const goroutines, each = 4, 50
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range each {
				r, w, err := os.Pipe()
				if err != nil {
					t.Error(err)
					return
				}
				text := fmt.Sprint(g, " ", i)
				if _, err := io.WriteString(w, text); err != nil {
					t.Error(err)
				}
				if _, err := ecdysis.WriteFiles(near, []byte(text), r); err != nil {
					t.Error(err)
				}
				w.Close()
				r.Close()
			}
		})
		wg.Go(func() {
			for range each {
				p := make([]byte, 100)
				n, files, err := ecdysis.ReadFiles(far, p)
				if err != nil || len(files) != 1 {
					t.Errorf("ReadFiles: %d files, %v", len(files), err)
					return
				}
				got, err := io.ReadAll(files[0])
				if err != nil || string(got) != string(p[:n]) {
					t.Errorf("the file of %q holds %q, %v", p[:n], got, err)
				}
				files[0].Close()
			}
		})
	}
	wg.Wait()
}

// Who is there.

// peerMain connects, says whom it has found there, and stays until the other
// end closes.
func peerMain() {
	network, path, _ := strings.Cut(os.Getenv(roleArgVar), " ")
	c, err := net.Dial(network, path)
	if err != nil {
		fatal(err)
	}
	cred, err := ecdysis.PeerCred(c.(*net.UnixConn))
	if err != nil {
		fatal(err)
	}
	fmt.Fprintf(c, "%d %d %d", os.Getpid(), cred.PID, cred.UID)
	_, _ = c.Read(make([]byte, 1))
}

// checkPeer asserts that c's other end was made by this process and user.
func checkPeer(t *testing.T, what string, c syscall.Conn, pid, uid int) {
	t.Helper()
	if runtime.GOOS == "freebsd" || runtime.GOOS == "dragonfly" {
		pid = 0
	}
	if got, err := ecdysis.PeerCred(c); err != nil || got != (ecdysis.Cred{PID: pid, UID: uid}) {
		t.Errorf("%s: %+v, %v; want %d, %d", what, got, err, pid, uid)
	}
}

// listenBoth listens through the package, on both sorts of connections.
func listenBoth(t *testing.T) (list []net.Listener) {
	t.Helper()
	u := listenTest(t)
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"unix", "unixpacket"} {
		if network == "unixpacket" && runtime.GOOS == "darwin" {
			continue
		}
		ln, err := u.ListenWith(ecdysis.ListenConfig{Mode: 0o666}, network, filepath.Join(dir, network))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		list = append(list, ln)
	}
	return list
}

// peerProcess starts a process that connects to ln, asserts whom each of the
// two sees, and ends it.
func peerProcess(t *testing.T, ln net.Listener, path string, attr *syscall.SysProcAttr, uid int) {
	t.Helper()
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), roleVar+"=peer", roleArgVar+"="+ln.Addr().Network()+" "+ln.Addr().String())
	cmd.SysProcAttr, cmd.Dir = attr, "/"
	stderr := new(lockedBuffer)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	defer func() { <-ended }()
	if err := ln.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatalf("%v; the process says %s", err, stderr)
	}
	defer c.Close()
	limited(t, c)
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("%v; the process says %s", err, stderr)
	}
	checkPeer(t, "accepted from another process", c.(syscall.Conn), cmd.Process.Pid, uid)
	var pid, parent, owner int
	_, err = fmt.Sscan(string(b[:n]), &pid, &parent, &owner)
	if runtime.GOOS == "netbsd" { // which tells one that has connected of itself
		parent, owner = os.Getpid(), os.Geteuid()
	}
	if err != nil || pid != cmd.Process.Pid || owner != os.Geteuid() || parent != os.Getpid() && parent != 0 {
		t.Errorf("process %d sees %q, %v; want %d and %d", cmd.Process.Pid, b[:n], err, os.Getpid(), os.Geteuid())
	}
}

func TestPeerCred(t *testing.T) {
	t.Parallel()
	for _, ln := range listenBoth(t) {
		far, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		what := fmt.Sprintf("%T", c)
		checkPeer(t, what, c.(syscall.Conn), os.Getpid(), os.Geteuid())
		checkPeer(t, what+"'s peer", far.(*net.UnixConn), os.Getpid(), os.Geteuid())
		far.Close()
		switch runtime.GOOS { // it is still known who that was
		case "linux", "freebsd":
			checkPeer(t, what+", closed by its peer", c.(syscall.Conn), os.Getpid(), os.Geteuid())
		case "darwin":
			checkPeer(t, what+", closed by its peer", c.(syscall.Conn), 0, os.Geteuid())
		}
		c.Close()
		for _, c := range []net.Conn{c, far} {
			if cred, err := ecdysis.PeerCred(c.(syscall.Conn)); cred != (ecdysis.Cred{}) || !errors.Is(err, net.ErrClosed) {
				t.Errorf("a closed %T: %+v, %v", c, cred, err)
			}
		}
		peerProcess(t, ln, testBinary(t), nil, os.Geteuid())
	}
	for _, typ := range []int{syscall.SOCK_STREAM, syscall.SOCK_SEQPACKET, syscall.SOCK_DGRAM} {
		if typ != syscall.SOCK_STREAM && runtime.GOOS != "linux" {
			continue
		}
		a, b := socketPair(t, typ)
		if runtime.GOOS == "dragonfly" {
			if _, err := ecdysis.PeerCred(a); !errors.Is(err, syscall.ENOTCONN) {
				t.Errorf("a pair: %v", err)
			}
			continue
		}
		checkPeer(t, "a pair", a, os.Getpid(), os.Geteuid())
		checkPeer(t, "a pair", b, os.Getpid(), os.Geteuid())
	}
}

func TestPeerCredErrors(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	tcp, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	r, _ := pipeEnds(t)
	for _, c := range []syscall.Conn{tcp.(*net.TCPConn), udp.(*net.UDPConn)} {
		if cred, err := ecdysis.PeerCred(c); cred != (ecdysis.Cred{}) || !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), fmt.Sprintf("%T", c)) {
			t.Errorf("a %T: %+v, %v", c, cred, err)
		}
	}
	if cred, err := ecdysis.PeerCred(r); cred != (ecdysis.Cred{}) || !errors.Is(err, syscall.ENOTSOCK) {
		t.Errorf("a pipe: %+v, %v", cred, err)
	}
	if cred, err := ecdysis.PeerCred(new(net.UnixConn)); cred != (ecdysis.Cred{}) || err == nil {
		t.Errorf("a zero UnixConn: %+v, %v", cred, err)
	}
	u := listenTest(t)
	pc, err := u.ListenPacket("unixgram", filepath.Join(shortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	if cred, err := ecdysis.PeerCred(pc.(*ecdysis.UnixgramConn)); cred != (ecdysis.Cred{}) || !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("a socket that is not connected: %+v, %v", cred, err)
	}
}
