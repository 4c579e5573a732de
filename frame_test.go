//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFrames(t *testing.T) {
	t.Parallel()
	records := []record{{"a=1", "b="}, {}, {"long=" + strings.Repeat("x", 300), "bytes=\x00\xff\n="}}
	b := makeFrame(frameSockets, records)
	for i := range b {
		if _, n, err := parseFrame(b[:i]); n != 0 || err != nil {
			t.Fatalf("the first %d of %d bytes: %d, %v; want more to be asked for", i, len(b), n, err)
		}
	}
	f, n, err := parseFrame(append(slices.Clone(b), "after"...))
	if err != nil || n != len(b) || f.kind != frameSockets {
		t.Fatalf("parseFrame: %q, %d, %v", f.kind, n, err)
	}
	if len(f.records) != 3 || !slices.Equal(f.records[0], records[0]) || len(f.records[1]) != 0 || !slices.Equal(f.records[2], records[2]) {
		t.Fatalf("parseFrame: %q; want %q", f.records, records)
	}
	if v := f.records[2].get("bytes"); v != "\x00\xff\n=" {
		t.Errorf("get: %q", v)
	}
	if v := f.records[0].get("c"); v != "" {
		t.Errorf("get of a missing key: %q", v)
	}
}

func TestBadFrames(t *testing.T) {
	t.Parallel()
	for name, b := range map[string]string{
		"too long":       "R\xff\xff\xff\xff",
		"one too long":   "R\x00\x01\x00\x01",
		"field past end": "R\x00\x00\x00\x02\x05a",
		"no end":         "R\x00\x00\x00\x02\x01a",
		"bad varint":     "R\x00\x00\x00\x01\x80",
		"huge varint":    "R\x00\x00\x00\x0b\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		if f, n, err := parseFrame([]byte(b)); err == nil || n != 0 {
			t.Errorf("%s: %v, %d, no error", name, f, n)
		}
	}
}

// FuzzFrame: whatever another process sends is refused or understood, and
// what is understood reads the same after it was written again.
func FuzzFrame(f *testing.F) {
	f.Add(makeFrame(frameHello, []record{{"version=1", "pid=7"}}))
	f.Add(makeFrame(frameEnd, nil))
	f.Add([]byte("R\xff\xff\xff\xff"))
	f.Add([]byte("R\x00\x00\x00\x02\x05a"))
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, n, err := parseFrame(b)
		if err != nil || n == 0 {
			if n != 0 {
				t.Fatalf("%d bytes taken with error %v", n, err)
			}
			return
		}
		if n > len(b) || n > frameHeader+maxFrame {
			t.Fatalf("%d bytes taken of %d", n, len(b))
		}
		again, m, err := parseFrame(makeFrame(fr.kind, fr.records))
		if err != nil || m == 0 || !reflect.DeepEqual(fr, again) {
			t.Fatalf("%+v became %+v, %v", fr, again, err)
		}
	})
}

// FuzzEntry: what is said of a descriptor is refused or understood, reads the
// same after it was written again, and is not believed of a pipe.
func FuzzEntry(f *testing.F) {
	for _, w := range []wire{
		{kind: kindListener, network: "tcp", address: ":80", boundKey: "tcp [::]:80", keep: true},
		{kind: kindListener, network: "unix", address: "s", boundKey: "unix s", path: "/run/s", dev: 1, ino: 1<<64 - 1, foreign: true, renewed: true, gone: true},
		{kind: kindPacket, network: "udp", address: ":53", boundKey: "udp 0.0.0.0:53"},
		{kind: kindConn, name: "client"}, {kind: kindFile, name: "log"}, {kind: kindPair, name: "pair"},
		{kind: kindState, size: 5}, {kind: kindAncestor, name: "7"}, {kind: "of a later version"},
	} {
		f.Add(w.appendTo(nil))
	}
	f.Add(appendRecord(nil, record{"kind=listener", "path=/s", "dev=-1", "ino=x"}))
	f.Add(appendRecord(nil, record{"kind=state", "size=-1"}))
	f.Add(appendRecord(nil, record{"kind=state", "kind=file", "size=9223372036854775808", "nonsense", "="}))
	f.Fuzz(func(t *testing.T, b []byte) {
		size := len(b)
		fr, _, err := parseFrame(append([]byte{frameSockets, byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size)}, b...))
		if err != nil {
			return
		}
		for _, r := range fr.records {
			var w wire
			err := w.decode(r)
			if err == nil {
				b := w.appendTo(beginFrame(nil, frameSockets))
				if len(b) <= frameHeader+maxFrame {
					written, _, err := parseFrame(endFrame(b))
					if err != nil || len(written.records) != 1 {
						t.Fatalf("%+v became %q, %v", w, b, err)
					}
					var again wire
					if err := again.decode(written.records[0]); err != nil || again != w {
						t.Fatalf("%+v became %+v, %v", w, again, err)
					}
				}
			}
			in, out, perr := os.Pipe()
			if perr != nil {
				t.Fatal(perr)
			}
			out.Close()
			raw, perr := in.SyscallConn()
			if perr != nil {
				t.Fatal(perr)
			}
			var ierr error
			if perr := raw.Control(func(fd uintptr) { _, ierr = inheritAlone(r, int(fd)) }); perr != nil {
				t.Fatal(perr)
			}
			in.Close()
			switch w.kind {
			case kindListener, kindPacket, kindPair, kindConn:
				if ierr == nil {
					t.Fatalf("a pipe was taken for %+v", w)
				}
			}
			if (err != nil || w.kind == kindState && w.size > 0) && ierr == nil || ierr != nil && !strings.Contains(ierr.Error(), w.label()) {
				t.Fatalf("%q, %v: a pipe with it: %v", r, err, ierr)
			}
		}
	})
}

// FuzzInheritance: a variable leads to the other end that it names, or is
// refused. Either way it is gone from the environment.
func FuzzInheritance(f *testing.F) {
	for _, s := range []string{
		"fd=FD pid=PID uid=UID", "uid=UID fd=FD later=1 pid=PID", "", "hello world", "fd=99 pid=PID uid=UID", "fd=-1 pid=PID uid=UID", "fd=0 pid=PID uid=UID",
		"pid=PID uid=UID", "fd=FD uid=UID", "fd=FD pid=PID", "fd=FD pid=1 uid=UID", "fd=FD pid=PID uid=4711", "fd=FD fd=0 pid=PID pid=1 uid=UID",
		"fd=99999999999999999999 pid=PID uid=UID", "fd=FD\tpid=PID\nuid=UID", "FD PID UID", "fd=+FD pid=0PID uid=UID",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		fds, err := socketpair(unix.SOCK_STREAM)
		if err != nil {
			t.Fatal(err)
		}
		told, terr := peerCred(fds[1])
		value = strings.NewReplacer("FD", strconv.Itoa(fds[1]), "PID", strconv.Itoa(os.Getpid()), "UID", strconv.Itoa(os.Geteuid())).Replace(value)
		if os.Setenv(envName, value) == nil { // it has no NUL
			if got, ok := takeInheritance(); !ok || got != value {
				t.Fatalf("%q was taken as %q, %v", value, got, ok)
			}
			if got, ok := os.LookupEnv(envName); ok {
				t.Fatalf("%q is still there", got)
			}
		}
		s, err := openStream(value)
		if err == nil {
			r := record(strings.Split(value, " "))
			pid, perr := strconv.Atoi(r.get("pid"))
			uid, uerr := strconv.Atoi(r.get("uid"))
			if perr != nil || uerr != nil || terr == nil && (told.UID != uid || told.PID != 0 && told.PID != pid) {
				t.Fatalf("%q was taken, and the other end is of %+v", value, told)
			}
			s.close()
		}
		for _, fd := range fds { // openStream takes the one that it accepts over
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				unix.Close(fd)
			}
		}
	})
}

// wholeConversation returns the frames of an upgrade, in order, that a successor
// receives, or that the predecessor of a taker receives.
func wholeConversation(successor bool) [][]byte {
	if successor {
		hello := record{"version=1", "generation=3", "pid=7", "network=0", "unit=a", "retired=b", "retired=c"}
		return [][]byte{
			makeFrame(frameHello, []record{hello}),
			makeFrame(frameSockets, []record{{"kind=file", "name=x"}, {"kind=state", "size=0"}, {"kind=generation", "name=2"}, {"kind=later"}}),
			makeFrame('z', []record{{"later=1"}}),
			makeFrame(frameEnd, nil),
			makeFrame(frameCommit, []record{{"probation=1000"}}),
			makeFrame(frameStop, []record{{"kind=partial stop", "socket=/run/s", "signal=15"}}),
			makeFrame(frameFinal, nil),
		}
	}
	return [][]byte{
		makeFrame(frameTake, []record{{"version=1", "unit=a"}}),
		makeFrame(frameAck, nil),
		makeFrame(frameReady, []record{{"pid=7", "unclaimed=/run/s", "label=unix /run/s"}}),
		makeFrame(frameDone, nil),
		makeFrame(frameBye, nil),
	}
}

// FuzzConversation: whatever the other process sends, with descriptors or
// without, and wherever it ends, this one comes to an end, too, and has none of
// the descriptors. It is a successor or a predecessor.
func FuzzConversation(f *testing.F) {
	for _, successor := range []bool{true, false} {
		frames := wholeConversation(successor)
		for i := range frames {
			f.Add(successor, uint8(4), slices.Concat(frames[:i+1]...))
		}
		f.Add(successor, uint8(0), slices.Concat(frames...))
		f.Add(successor, uint8(1), slices.Concat(frames[0], makeFrame(frameFail, []record{{"reason=x", "inuse=1", "network=tcp", "address=:80"}})))
		f.Add(successor, uint8(1), slices.Concat(frames[0], makeFrame(frameAbort, []record{{"reason=x"}})))
		f.Add(successor, uint8(2), append(slices.Clone(frames[0]), frames[1][:len(frames[1])-1]...))
	}
	f.Add(true, uint8(1), makeFrame(frameHello, []record{{"version=2"}}))
	f.Add(true, uint8(1), makeFrame(frameHello, []record{{"version=1", "generation=-1"}}))
	f.Add(true, uint8(5), append(makeFrame(frameHello, []record{{"version=1", "generation=0"}}),
		makeFrame(frameSockets, []record{{"kind=file"}, {"kind=state", "size=x"}, {"kind=conn"}, {"kind=file"}})...))
	f.Fuzz(func(t *testing.T, successor bool, files uint8, b []byte) {
		if len(b) == 0 || len(b) > maxFrame {
			return
		}
		near, far := pairOf(t, unix.SOCK_STREAM)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			defer far.Close()
			if _, err := WriteFiles(far, b[:1], slices.Repeat([]*os.File{w}, int(files%8))...); err == nil {
				_, _ = far.Write(b[1:]) // an error means that the other side has ended
			}
		}()
		s, err := streamOn(near)
		if err != nil {
			t.Fatal(err)
		}
		u := &Upgrader{pred: newPredecessor(s)}
		if successor {
			s.inherits = true
			converseAsSuccessor(u)
		} else if _, err := s.awaitTake(); err == nil {
			a := &attempt{u: u, s: s, child: &child{}}
			for err == nil { // what comes after READY is read as standBy does
				if err = a.awaitReady(time.Time{}); err == nil {
					_ = a.unexpected(&frame{kind: frameFail})
					a.saidBye()
				}
			}
		}
		s.close()
		<-sent
		w.Close()
		if err := r.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("read %d, %v; want the end, because no descriptor is left", n, err)
		}
	})
}

// converseAsSuccessor does what New, Ready and WaitForParent do with frames, and
// closes what has come.
func converseAsSuccessor(u *Upgrader) {
	f, err := u.pred.hello()
	if err == nil {
		err = u.receiveInheritance(f, time.Time{})
	}
	if err != nil {
		return
	}
	orphan, err := u.pred.awaitCommit(nil, func() bool { return false })
	if err == nil && !orphan {
		for end := false; !end; {
			f, err := u.pred.s.read(time.Time{})
			u.handle(f, err)
			end = err != nil
		}
	}
	u.state.close()
	for _, e := range slices.Concat(u.reg.inherited, u.reg.ancestors) {
		if e.raw != u.pred.s.raw {
			e.closeBare()
		}
	}
}

// FuzzRequest: whatever a client of a control socket sends, and whatever the
// answer is, it gets one line of text, and then the end.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(nil), "ok pid=4711 generation=3")
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), "error: ecdysis: upgrade failed at init: no such colour:\n\tmauve")
	f.Add(makeFrame(frameTake, []record{{"version=1"}}), "error: \x00\x1b[2J\xff")
	f.Add(make([]byte, 4<<10), "")
	f.Fuzz(func(t *testing.T, sent []byte, text string) {
		if len(sent) > 4<<10 || len(text) > 1<<10 { // what every system takes without a reader
			return
		}
		c, client := pairOf(t, unix.SOCK_STREAM)
		if _, err := client.Write(sent); err != nil {
			t.Fatal(err)
		}
		answer(c, text)
		b, err := io.ReadAll(client)
		client.Close()
		line, ended := strings.CutSuffix(string(b), "\n")
		if err != nil || !ended || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) {
			t.Fatalf("the answer %q is sent as %q, %v; want a line of text, and the end", text, b, err)
		}
	})
}

// FuzzReply: an answer of a control socket is a Reply, which is written the same
// again, or an error.
func FuzzReply(f *testing.F) {
	for _, s := range []string{
		"ok pid=4711 generation=3\n", "ok pid=4711 generation=3 colour=blue\n", "error: ecdysis: an upgrade is in progress\n", "",
		"ok pid=4711 generation=3", "ok\n", "ok pid=x generation=3\n", "pid=1 generation=1\n", "220 mail.example ESMTP\r\n", "\n", "error: \nok pid=1 generation=1\n",
	} {
		f.Add([]byte(s))
	}
	dir, err := os.MkdirTemp("", "ecd")
	if err != nil {
		f.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	defer ln.Close()
	f.Fuzz(func(t *testing.T, b []byte) {
		answered := make(chan error, 1)
		go func() {
			c, err := ln.Accept()
			if err == nil {
				_, _ = c.Write(b) // an error means that the client has read enough
				err = c.Close()
			}
			answered <- err
		}()
		r, err := Request(t.Context(), path)
		if aerr := <-answered; aerr != nil {
			t.Fatal(aerr)
		}
		line, _, whole := strings.Cut(string(b[:min(len(b), maxFrame)]), "\n")
		text, refused := strings.CutPrefix(line, "error: ")
		again, ok := parseReply("ok " + r.String())
		switch {
		case err == nil && (!whole || refused || !strings.HasPrefix(line+" ", "ok ") || !ok || again != r):
			t.Fatalf("%q is the reply %v, which is read as %v, %v", b, r, again, ok)
		case err != nil && r != Reply{}:
			t.Fatalf("%q is the reply %v, and %v", b, r, err)
		case !whole && !errors.Is(err, io.ErrUnexpectedEOF), whole && refused && (err == nil || !strings.HasSuffix(err.Error(), text)):
			t.Fatalf("%q is the reply %v, %v", b, r, err)
		}
	})
}

// A descriptor that is not what the older process says is refused, whatever
// else it is.
func TestInheritedDescriptors(t *testing.T) {
	t.Parallel()
	socket := func(family, typ int, sa syscall.Sockaddr, listen bool) int {
		t.Helper()
		fd, err := newSocket(family, typ)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Bind(fd, sa); err != nil {
			t.Fatal(err)
		}
		if listen {
			if err := unix.Listen(fd, 1); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	loopback := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	good := socket(unix.AF_INET, unix.SOCK_STREAM, loopback, true)
	sa, err := syscall.Getsockname(good)
	if err != nil {
		t.Fatal(err)
	}
	at := boundKey(unix.SOCK_STREAM, sa, false)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r := record{"kind=listener", "network=tcp", "address=:0", "at=" + at, "later=key"}
	c, err := net.Dial("tcp", strings.TrimPrefix(at, "tcp "))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	connection, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	u := new(Upgrader)
	defer u.reg.spare.close()
	claim := func(r record, fd int) error { // of a copy, because a listener takes its descriptor over
		dup, err := unix.Dup(fd)
		if err != nil {
			dup = fd
		}
		e, err := inheritAlone(r, dup)
		if err != nil {
			e.closeBare()
			return err
		}
		_, err = u.register(nil, newListener, e)
		if err == nil {
			e.detach()
		}
		return err
	}
	if err := claim(r, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		fd         int
		record     record
	}{
		{"a file", "it is no socket", int(file.Fd()), r},
		{"a closed one", "it is no socket", 1 << 20, r},
		{"UDP", "not listen", socket(unix.AF_INET, unix.SOCK_DGRAM, loopback, false), r},
		{"a connection", "not listen", int(connection.Fd()), r},
		{"another address", "is bound to", socket(unix.AF_INET, unix.SOCK_STREAM, loopback, true), r},
		{"a bad inode", `inode "x"`, good, append(slices.Clone(r), "path=/x", "dev=1", "ino=x")},
		{"a Unix socket", "is bound to", socket(unix.AF_UNIX, unix.SOCK_STREAM, &syscall.SockaddrUnix{Name: t.TempDir() + "/s"}, true), r},
		{"a TCP socket as a Unix one", "is bound to", good, record{"kind=listener", "network=unix", "address=tcp :0", "at=" + at}},
	} {
		err := claim(c.record, c.fd)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), ":0") {
			t.Errorf("%s: %v; want an error that names :0 and says %q", c.name, err, c.want)
		}
	}
	deaf := socket(unix.AF_INET, unix.SOCK_STREAM, loopback, false)
	sa, err = syscall.Getsockname(deaf)
	if err != nil {
		t.Fatal(err)
	}
	if _, lerr := isListening(deaf); lerr == nil { // where the system tells
		err := claim(record{"kind=listener", "network=tcp", "address=:0", "at=" + boundKey(unix.SOCK_STREAM, sa, false)}, deaf)
		if err == nil || !strings.Contains(err.Error(), "does not listen") {
			t.Errorf("a socket that does not listen: %v", err)
		}
	}
}

// A listener that is handed on takes one allocation more than net's. It is not
// parallel to other tests, because theirs would be counted.
func TestListenerAllocations(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const n = 100
	var kept [n + 1]syscall.RawConn // one run more is not counted
	i := 0
	nets := testing.AllocsPerRun(n, func() {
		c, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		kept[i], err = c.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		i++
		c.Close()
	})
	u := new(Upgrader)
	defer u.reg.spare.close()
	entries := make([]entry, n+1) // as a batch comes
	i = 0
	ours := testing.AllocsPerRun(n, func() {
		fd, err := syscall.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		e := &entries[i]
		i++
		e.wire = wire{kind: kindListener, network: "tcp", address: ":0", boundKey: "tcp " + ln.Addr().String()}
		e.inherited = true
		e.setBare(fd)
		if _, err := u.register(nil, newListener, e); err != nil {
			t.Fatal(err)
		}
		e.detach()
	})
	// The test's own key and words take some.
	words := testing.AllocsPerRun(n, func() { sink = "tcp " + ln.Addr().String() })
	if ours-words > nets+1 {
		t.Errorf("a listener that is handed on takes %v allocations, and net's %v; want one more", ours-words, nets)
	}
}

var sink string

// A stream that breaks in the middle of a batch leaves no descriptor behind.
func TestStreamDescriptors(t *testing.T) {
	fds, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newStream(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	b, err := newStream(fds[1])
	if err != nil {
		t.Fatal(err)
	}
	b.inherits = true
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.sendFrames(makeFrame(frameSockets, []record{{"one"}, {"two"}}), []int{int(w.Fd())}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := b.next(); err == nil || !strings.Contains(err.Error(), "2 descriptors were announced and 1 came") {
		t.Fatalf("a batch with a descriptor too few: %v", err)
	}
	// The old process's end takes no descriptors at all.
	if err := b.sendFrames(makeFrame(frameSockets, []record{{"one"}}), []int{int(r.Fd())}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.next(); err == nil || !strings.Contains(err.Error(), "the successor sent descriptors") || len(a.fds) != 0 {
		t.Fatalf("descriptors for the old process: %v, %v", err, a.fds)
	}
	b.close()
	a.close()
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil { // the end: no copy of w is left
		t.Fatalf("read %d, %v", n, err)
	}
	r.Close()
}

// Below are the tests of what differs between systems. They take the part of one
// that answers otherwise, by variables of the package, so none of them is
// parallel.

// become gives a variable another value for the time of a test.
func become[T any](t *testing.T, p *T, value T) {
	old := *p
	*p = value
	t.Cleanup(func() { *p = old })
}

// pairOf returns both ends of a Unix connection, as net has them.
func pairOf(t *testing.T, typ int) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := socketpair(typ)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Skip("this system has no such sockets: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		if ends[i], err = unixConn(fd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
		if err := ends[i].SetDeadline(time.Now().Add(20 * time.Second)); err != nil { // rather than hang
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

// on calls f with c's descriptor.
func on(t *testing.T, c syscall.Conn, f func(fd int)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Where a message takes few descriptors, and one message alone may be unread,
// all is handed on in several, each after the last was taken.
func TestSmallBatches(t *testing.T) {
	become(t, &maxBatchFDs, 3)
	become(t, &dropsDescriptors, true)
	s, peer := streamPair(t)
	a := &attempt{u: &Upgrader{}, s: s, child: &child{}}
	const n = 10
	for i := range n {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		on(t, w, func(fd int) {
			fd, err = duplicate(fd)
			e := &entry{wire: wire{kind: kindFile, name: strconv.Itoa(i)}}
			e.setBare(fd)
			a.rest = append(a.rest, e)
		})
		if w.Close(); err != nil {
			t.Fatal(err)
		}
		defer a.rest[i].closeBare()
	}
	deadline := time.Now().Add(20 * time.Second)
	if err := a.fill(0); err != nil || a.sent != 1 {
		t.Fatalf("before the start %d batches are sent, %v; want 1", a.sent, err)
	}
	u := &Upgrader{pred: newPredecessor(peer)}
	inherited := make(chan error)
	go func() {
		f, err := peer.read(deadline)
		if err == nil {
			err = u.receiveInheritance(f, deadline)
		}
		inherited <- err
	}()
	if err := a.handOn(deadline); err != nil {
		t.Fatal(err)
	}
	if err := <-inherited; err != nil {
		t.Fatal(err)
	}
	if a.sent != (n+2)/3 {
		t.Errorf("%d batches; want %d", a.sent, (n+2)/3)
	}
	if len(u.reg.inherited) != n {
		t.Fatalf("%d entries have come; want %d", len(u.reg.inherited), n)
	}
	for i, e := range u.reg.inherited {
		if e.name != strconv.Itoa(i) {
			t.Errorf("entry %d is %q", i, e.name)
		}
		e.closeBare()
	}
}

// streamPair returns a predecessor's end of a stream and its successor's.
func streamPair(t *testing.T) (s, peer *stream) {
	t.Helper()
	near, far := pairOf(t, unix.SOCK_STREAM)
	s, err := streamOn(near)
	if err != nil {
		t.Fatal(err)
	}
	if peer, err = streamOn(far); err != nil {
		t.Fatal(err)
	}
	peer.inherits = true
	return s, peer
}

// A socket that the program closes while it is sent arrives as what is said of
// it, or not at all: never as another one that has got its number.
func TestClosedWhileSent(t *testing.T) {
	for _, kind := range []string{kindListener, kindPacket} {
		t.Run(kind, func(t *testing.T) {
			for range 50 {
				closeWhileSent(t, kind)
			}
		})
	}
}

func closeWhileSent(t *testing.T, kind string) {
	s, peer := streamPair(t)
	u := &Upgrader{}
	a := &attempt{u: u, s: s, child: &child{}}
	var sockets []io.Closer
	for range 40 {
		network, open := "tcp", newListener
		if kind == kindPacket {
			network, open = "udp", newPacketConn
		}
		b, err := resolve(network, "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		e, err := b.open(kind, ListenConfig{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := u.register(&socketRequest{askedAddr: askedAddr{network, "127.0.0.1:0"}}, open, e)
		if err != nil {
			t.Fatal(err)
		}
		switch c := c.(type) {
		case *listener:
			sockets = append(sockets, c)
		case *packetConn:
			sockets = append(sockets, c.c) // which is embedded in what the program has
		}
		e.state = inTransit
		a.rest = append(a.rest, e)
	}
	u.withdraw(a.rest[len(a.rest)-1]) // and its Close has not closed it yet
	withdrawn := a.rest[len(a.rest)-1].boundKey
	closing, closed := make(chan bool), make(chan error, 1)
	go func() {
		var others []int
		close(closing)
		for _, c := range sockets {
			if err := c.Close(); err != nil {
				closed <- err
				return
			}
			fd, err := newSocket(syscall.AF_UNIX, syscall.SOCK_DGRAM) // gets the number
			if err != nil {
				closed <- err
				return
			}
			others = append(others, fd)
		}
		closeAll(others)
		closed <- nil
	}()
	<-closing
	if err := a.fill(0); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := peer.read(time.Now().Add(20 * time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if f.kind == frameEnd {
			break
		}
		for i, fd := range f.fds {
			sa, err := syscall.Getsockname(fd)
			if err != nil {
				t.Fatal(err)
			}
			if at, want := boundKey(socketTypeOf(fd), sa, false), f.records[i].get("at"); at != want {
				t.Errorf("a socket at %q comes; want %q", at, want)
			} else if at == withdrawn {
				t.Errorf("a socket at %q comes, which was withdrawn", at)
			}
		}
		closeAll(f.fds)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
}

// WriteFiles states how many descriptors the system takes, and keeps to it.
func TestWriteFilesLimit(t *testing.T) {
	become(t, &maxBatchFDs, 40)
	c, peer := pairOf(t, unix.SOCK_STREAM)
	files := make([]*os.File, 41)
	for i := range files {
		files[i] = os.Stdin
	}
	if n, err := WriteFiles(c, []byte("x"), files...); n != 0 || err == nil || !strings.Contains(err.Error(), "at most 40") {
		t.Errorf("41 files: %d, %v", n, err)
	}
	if n, err := WriteFiles(c, []byte("x"), files[:40]...); n != 1 || err != nil {
		t.Fatalf("40 files: %d, %v", n, err)
	}
	_, got, err := ReadFiles(peer, make([]byte, 1))
	for _, f := range got {
		f.Close()
	}
	if len(got) != 40 || err != nil {
		t.Errorf("%d files come, %v; want 40", len(got), err)
	}
}

// Where descriptors are dropped for want of room, and what comes with them, the
// first byte of a stream takes them along alone.
func TestDescriptorsWithOneByte(t *testing.T) {
	become(t, &dropsDescriptors, true)
	send, sizes := systemSend, []int(nil)
	become(t, &systemSend, func(fd int, p, oob []byte, to syscall.Sockaddr, flags int) (int, error) {
		if len(oob) > 0 {
			sizes = append(sizes, len(p))
		}
		return send(fd, p, oob, to, flags)
	})
	c, peer := pairOf(t, unix.SOCK_STREAM)
	if n, err := WriteFiles(c, []byte("text"), os.Stdin); n != 4 || err != nil {
		t.Fatalf("WriteFiles: %d, %v", n, err)
	}
	s, err := streamOn(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.sendFrames(makeFrame(frameSockets, []record{{"kind=file"}}), []int{0}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(sizes, []int{1, 1}) {
		t.Errorf("descriptors went with %d bytes; want one and one", sizes)
	}
	c.Close()
	if b, err := io.ReadAll(peer); err != nil || string(b) != "text"+string(makeFrame(frameSockets, []record{{"kind=file"}})) {
		t.Errorf("%q has come, %v", b, err)
	}
}

// The end of a stream is seen, and nothing is taken from it.
func TestStreamEnded(t *testing.T) {
	c, peer := pairOf(t, unix.SOCK_STREAM)
	ended := func() (yes bool) {
		on(t, c, func(fd int) { yes = streamEnded(fd) })
		return yes
	}
	if ended() {
		t.Error("ended with a peer")
	}
	if _, err := peer.Write([]byte("ab")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if ended() {
			t.Error("ended with a peer, and with unread data")
		}
	}
	if n, err := c.Read(make([]byte, 3)); n != 2 || err != nil {
		t.Errorf("%d bytes are left, %v; want 2", n, err)
	}
	peer.Close()
	for range 2 {
		if !ended() {
			t.Error("not ended when the peer has closed")
		}
	}
}

// Without sockets for both versions of IP, one on [::] is of version 6 alone,
// whatever the words that it was asked for with, and is handed on as that.
func TestNoDualStack(t *testing.T) {
	become(t, &dualStack, false)
	p, err := resolve("tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	e, err := p.open(kindListener, ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error // as the system has it from birth
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) })
		return errors.Join(cerr, err)
	}})
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Skip("no IPv6 here: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer e.closeBare()
	e.network, e.address = "tcp", "[::]:0"
	if _, err := inheritAlone(recordOf(t, e), int(e.bare)); err != nil {
		t.Error(err)
	}
	four, err := resolve("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	six, err := resolve("tcp6", ":80")
	if err != nil {
		t.Fatal(err)
	}
	both, err := resolve("tcp", "[::]:80")
	if err != nil {
		t.Fatal(err)
	}
	if four.family != unix.AF_INET || both.key() != six.key() {
		t.Errorf("family %d; keys %q and %q, which should be one", four.family, both.key(), six.key())
	}
}

// A system that calls a packet too long while the queue is not empty is
// waited for, unless the packet is longer than an empty queue takes.
func TestQueueNotEmpty(t *testing.T) {
	become(t, &shrinkingBuffers, true)
	send := systemSend
	become(t, &systemSend, send)
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET} {
		c, peer := pairOf(t, typ)
		if _, err := WriteFiles(c, []byte("first"), os.Stdin); err != nil {
			t.Fatal(err)
		}
		refused := make(chan bool, 100)
		systemSend = func(fd int, p, oob []byte, to syscall.Sockaddr, flags int) (int, error) {
			select {
			case refused <- true:
			default:
			}
			var unread [1]byte
			var n int
			on(t, peer, func(fd int) { n, _, _ = unix.Recvfrom(fd, unread[:], unix.MSG_PEEK|unix.MSG_DONTWAIT) })
			if n > 0 {
				return -1, unix.EMSGSIZE
			}
			return send(fd, p, oob, to, flags)
		}
		sent := make(chan error)
		go func() {
			_, err := WriteFiles(c, []byte("second"), os.Stdin)
			sent <- err
		}()
		<-refused
		for _, want := range []string{"first", "second"} {
			b := make([]byte, 10)
			n, files, err := ReadFiles(peer, b)
			for _, f := range files {
				f.Close()
			}
			if string(b[:n]) != want || len(files) != 1 || err != nil {
				t.Errorf("type %d: %q with %d files, %v; want %q with 1", typ, b[:n], len(files), err, want)
			}
		}
		if err := <-sent; err != nil {
			t.Errorf("type %d: %v", typ, err)
		}
		systemSend = func(int, []byte, []byte, syscall.Sockaddr, int) (int, error) { return -1, unix.EMSGSIZE }
		if typ == unix.SOCK_SEQPACKET {
			if _, err := WriteFiles(c, make([]byte, 1<<20)); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("a packet of 1 MiB: %v; want EMSGSIZE", err)
			}
		}
		systemSend = send
	}
}

// A peer that is just closing, of a connection, is one that has gone.
func TestPeerIsClosing(t *testing.T) {
	become(t, &lateNotConnected, true)
	become(t, &systemSend, func(int, []byte, []byte, syscall.Sockaddr, int) (int, error) { return -1, unix.ENOTCONN })
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET, unix.SOCK_DGRAM} {
		c, _ := pairOf(t, typ)
		want := unix.EPIPE
		if typ == unix.SOCK_DGRAM {
			want = unix.ENOTCONN
		}
		if _, err := WriteFiles(c, []byte("x")); !errors.Is(err, want) {
			t.Errorf("type %d: %v; want %v", typ, err, want)
		}
	}
	c, _ := pairOf(t, unix.SOCK_STREAM)
	s, err := streamOn(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.send(frameEnd); err != io.EOF {
		t.Errorf("a frame: %v; want EOF", err)
	}
}

// Without room in the table of descriptors some systems refuse the message as
// if it were too long.
func TestNoRoomForDescriptors(t *testing.T) {
	become(t, &systemReceive, func(int, []byte, []byte, int) (int, int, int, syscall.Sockaddr, error) {
		return -1, 0, 0, nil, unix.EMSGSIZE
	})
	c, _ := pairOf(t, unix.SOCK_STREAM)
	_, _, err := ReadFiles(c, make([]byte, 1))
	if !errors.Is(err, unix.EMFILE) || errors.Is(err, unix.EMSGSIZE) || !strings.Contains(err.Error(), "RLIMIT_NOFILE") {
		t.Errorf("ReadFiles: %v; want EMFILE and the limit's name", err)
	}
	s, err := streamOn(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.next(); err != errTruncated {
		t.Errorf("a stream: %v; want %v", err, errTruncated)
	}
}

// Descriptors are close-on-exec where the system does not make them so.
func TestMarkedLate(t *testing.T) {
	become(t, &marksLate, true)
	become(t, &systemReceive, func(fd int, p, oob []byte, _ int) (int, int, int, syscall.Sockaddr, error) {
		return syscall.Recvmsg(fd, p, oob, 0)
	})
	c, peer := pairOf(t, unix.SOCK_STREAM)
	if _, err := WriteFiles(c, []byte("x"), os.Stdin, os.Stdout); err != nil {
		t.Fatal(err)
	}
	_, files, err := ReadFiles(peer, make([]byte, 1))
	if err != nil || len(files) != 2 {
		t.Fatalf("%d files, %v; want 2", len(files), err)
	}
	for _, f := range files {
		on(t, f, func(fd int) {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("descriptor %d has flags %d, %v; want close-on-exec", fd, flags, err)
			}
		})
		f.Close()
	}
}

// Where the system does not tell what listens, a connection is not taken for a
// listener, even when its peer has gone.
func TestMaybeListening(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(t.TempDir(), "s")
		}
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		ask := func(what string, c any, want error) {
			t.Helper()
			on(t, c.(syscall.Conn), func(fd int) {
				if yes, err := maybeListening(fd); yes || err != want {
					t.Errorf("%s, %s: %v, %v; want false, %v", network, what, yes, err, want)
				}
			})
		}
		ask("a listener", ln, errors.ErrUnsupported)
		c, err := net.Dial(network, ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ask("a listener with a client", ln, errors.ErrUnsupported)
		peer, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ask("a connection", c, nil)
		peer.Close()
		ask("a connection without a peer", c, nil)
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Fatal(err)
		}
		ask("a connection whose end was read", c, nil)
	}
	fd, err := newSocket(unix.AF_INET, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if yes, err := maybeListening(fd); yes || err != errors.ErrUnsupported {
		t.Errorf("a bound socket: %v, %v; want that it is not known", yes, err)
	}
}

// Unregistered names the socket that listens, and no connection, whether or not
// the system tells what listens.
func TestUnregisteredConnections(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 2 { // whose peers go
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		peer, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if err := errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("%v; want that the connection is reset", err)
		}
	}
	for _, told := range []bool{true, false} {
		if !told {
			become(t, &systemOption, func(int, int, int) (int, error) { return 0, unix.ENOPROTOOPT })
		}
		list, err := (&Upgrader{}).unregistered()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range list {
			if _, port, _ := net.SplitHostPort(e.address); e.network == "tcp" && strings.HasSuffix(ln.Addr().String(), ":"+port) {
				got = append(got, e.label())
			}
		}
		if want := []string{"tcp " + ln.Addr().String()}; !slices.Equal(got, want) {
			t.Errorf("told: %v: unregistered: %q; want %q", told, got, want)
		}
	}
}

// A reason that is longer than the stream's buffer is sent whole.
func TestLongReason(t *testing.T) {
	fds, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
	s, err := newStream(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	peer, err := newStream(fds[1])
	if err != nil {
		t.Fatal(err)
	}
	defer peer.close()
	reason := strings.Repeat("x", 30<<10)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		s.sendFail(errors.New(reason))
	}()
	f, err := peer.read(time.Now().Add(20 * time.Second))
	if err != nil || f.first("reason") != reason {
		t.Errorf("%d bytes of the reason have come, %v; want %d", len(f.first("reason")), err, len(reason))
	}
	<-sent
	if len(s.out) > 0 {
		t.Errorf("%d bytes were not sent when sendFail returned", len(s.out))
	}
}

// The system names the process that has sent READY, where it can.
func TestSenderOfReady(t *testing.T) {
	near, far := pairOf(t, unix.SOCK_STREAM)
	on(t, near, wantSender)
	s, err := streamOn(near)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := streamOn(far)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []byte{frameAck, frameReady} {
		if err := peer.send(kind); err != nil {
			t.Fatal(err)
		}
		if f, err := s.read(time.Now().Add(20 * time.Second)); err != nil || f.kind != kind {
			t.Fatalf("frame %q, %v; want %q", f.kind, err, kind)
		}
	}
	want := 0
	if senderSpace > 0 {
		want = os.Getpid()
	}
	if s.sender != want {
		t.Errorf("the sender is %d; want %d", s.sender, want)
	}
}

// inheritAlone makes an entry as a batch of one does.
func inheritAlone(r record, fd int) (*entry, error) {
	list := make([]entry, 1)
	err := list[0].inherit(r, fd)
	if err == nil {
		err = checkListening(list)
	}
	return &list[0], err
}

// recordOf returns e as its successor gets it.
func recordOf(t *testing.T, e *entry) record {
	t.Helper()
	f, _, err := parseFrame(endFrame(e.appendTo(beginFrame(nil, frameSockets))))
	if err != nil {
		t.Fatal(err)
	}
	return f.records[0]
}

// A frame that is larger than the system's buffer arrives while its sender
// waits for the answer. No other process can make the buffer of a predecessor
// small.
func TestRestIsSent(t *testing.T) {
	t.Parallel()
	ends, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	var s [2]*stream
	for i, fd := range ends {
		if s[i], err = newStream(fd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s[i].close)
	}
	old, successor := s[0], s[1]
	successor.inherits = true
	_ = old.raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096) })
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var records []record
	var fds []int
	for range 15 {
		records = append(records, record{"kind=file", "name=" + strings.Repeat("x", maxName)})
		fds = append(fds, int(null.Fd()))
	}
	if err := old.sendFrames(makeFrame(frameSockets, records), fds); err != nil {
		t.Fatal(err)
	}
	if len(old.out) == 0 {
		t.Skip("the system has taken the whole frame")
	}
	patience := time.Now().Add(30 * time.Second)
	answer := make(chan error, 1)
	go func() {
		_, err := old.read(patience)
		answer <- err
	}()
	f, err := successor.read(patience)
	if err != nil {
		t.Fatal(err)
	}
	closeAll(f.fds)
	if f.kind != frameSockets || len(f.records) != len(records) || len(f.fds) != len(fds) {
		t.Errorf("a frame %q with %d records and %d descriptors; want %d of each", f.kind, len(f.records), len(f.fds), len(fds))
	}
	if err := successor.send(frameAck); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Error(err)
	}
}
