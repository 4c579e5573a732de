package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
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

// Descriptors that travel over Unix connections, and who is at their other end.

// fileKinds are the connections that files travel over: a to b, and back if
// both is set.
var fileKinds = []struct {
	name   string
	packet bool // keeps boundaries
	open   func(t *testing.T) (a, b fileConn)
}{
	{"stream", false, func(t *testing.T) (a, b fileConn) { return proctest.SocketPair(t, syscall.SOCK_STREAM) }},
	{"SeqpacketConn", true, func(t *testing.T) (a, b fileConn) { return proctest.SeqpacketPair(t) }},
	{"seqpacket", true, func(t *testing.T) (a, b fileConn) {
		needSeqpacket(t)
		return proctest.SocketPair(t, syscall.SOCK_SEQPACKET)
	}},
	{"datagrams", true, func(t *testing.T) (a, b fileConn) { return proctest.SocketPair(t, syscall.SOCK_DGRAM) }},
	{"UnixgramConn", true, func(t *testing.T) (a, b fileConn) {
		dir := proctest.ShortDir(t)
		u := proctest.Ours(t)
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
	if err := c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
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
		if err := b.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
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
	a, b := proctest.SocketPair(t, syscall.SOCK_STREAM)
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
	a, b = proctest.SocketPair(t, syscall.SOCK_STREAM)
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
		if err := b.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
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
	near, far := proctest.SeqpacketPair(t)
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

// connectingPeer connects, says whom it has found there, and stays until the
// other end closes.
var connectingPeer = proctest.DefineRole("connecting peer", func() {
	c, err := net.Dial(proctest.Args()[0], proctest.Args()[1])
	if err != nil {
		log.Fatal(err)
	}
	cred, err := ecdysis.PeerCred(c.(*net.UnixConn))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintf(c, "%d %d %d", os.Getpid(), cred.PID, cred.UID)
	_, _ = c.Read(make([]byte, 1))
})

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

// listenConnections listens through the package, on both sorts of connections.
func listenConnections(t *testing.T) (list []net.Listener) {
	t.Helper()
	u := proctest.Ours(t)
	dir := proctest.ShortDir(t)
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

// seesPeer starts a process that connects to ln, asserts whom each of the two
// sees, and ends it.
func seesPeer(t *testing.T, ln net.Listener, uid int, edit ...func(*exec.Cmd)) {
	t.Helper()
	cmd := connectingPeer.Command(ln.Addr().Network(), ln.Addr().String())
	cmd.Dir = "/"
	for _, f := range edit {
		f(cmd)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	defer func() {
		if <-ended; t.Failed() {
			t.Logf("the process says %s", &stderr)
		}
	}()
	if err := ln.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	limited(t, c)
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
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
	for _, ln := range listenConnections(t) {
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
		seesPeer(t, ln, os.Geteuid())
	}
	for _, typ := range []int{syscall.SOCK_STREAM, syscall.SOCK_SEQPACKET, syscall.SOCK_DGRAM} {
		if typ != syscall.SOCK_STREAM && runtime.GOOS != "linux" {
			continue
		}
		a, b := proctest.SocketPair(t, typ)
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
	u := proctest.Ours(t)
	pc, err := u.ListenPacket("unixgram", filepath.Join(proctest.ShortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	if cred, err := ecdysis.PeerCred(pc.(*ecdysis.UnixgramConn)); cred != (ecdysis.Cred{}) || !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("a socket that is not connected: %+v, %v", cred, err)
	}
}
