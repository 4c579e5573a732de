//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFrames(t *testing.T) {
	t.Parallel()
	records := []record{{"a=1", "b="}, {}, {"long=" + strings.Repeat("x", 300), "bytes=\x00\xff\n="}}
	b := appendFrame([]byte("before"), frameSockets, records)[len("before"):]
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
	f.Add(appendFrame(nil, frameHello, []record{{"version=1", "pid=7"}}))
	f.Add(appendFrame(nil, frameEnd, nil))
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
		again, m, err := parseFrame(appendFrame(nil, fr.kind, fr.records))
		if err != nil || m == 0 || !reflect.DeepEqual(fr, again) {
			t.Fatalf("%+v became %+v, %v", fr, again, err)
		}
	})
}

// A descriptor that is not what the older process says is refused, whatever
// else it is.
func TestInheritedDescriptors(t *testing.T) {
	t.Parallel()
	socket := func(family, typ int, sa unix.Sockaddr, listen bool) int {
		t.Helper()
		fd, err := newSocket(family, typ)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, sa); err != nil {
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
	loopback := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	good := socket(unix.AF_INET, unix.SOCK_STREAM, loopback, true)
	sa, err := unix.Getsockname(good)
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
	if _, err := inheritedEntry(r, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		fd         int
		record     record
	}{
		{"a file", "it is no socket", int(file.Fd()), r},
		{"a closed one", "it is no socket", 1 << 20, r},
		{"UDP", "type 2; want 1", socket(unix.AF_INET, unix.SOCK_DGRAM, loopback, false), r},
		{"another address", "it is bound to", socket(unix.AF_INET, unix.SOCK_STREAM, loopback, true), r},
		{"a bad inode", `inode "x"`, good, append(slices.Clone(r), "path=/x", "dev=1", "ino=x")},
		{"a Unix socket", "it is bound to", socket(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: t.TempDir() + "/s"}, true), r},
		{"a TCP socket as a Unix one", "it is bound to", good, record{"kind=listener", "network=unix", "address=tcp :0", "at=" + at}},
	} {
		_, err := inheritedEntry(c.record, c.fd)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "tcp :0") {
			t.Errorf("%s: %v; want an error that names tcp :0 and says %q", c.name, err, c.want)
		}
	}
	deaf := socket(unix.AF_INET, unix.SOCK_STREAM, loopback, false)
	sa, err = unix.Getsockname(deaf)
	if err != nil {
		t.Fatal(err)
	}
	if _, lerr := isListening(deaf); lerr == nil { // where the system tells
		_, err := inheritedEntry(record{"kind=listener", "network=tcp", "address=:0", "at=" + boundKey(unix.SOCK_STREAM, sa, false)}, deaf)
		if err == nil || !strings.Contains(err.Error(), "does not listen") {
			t.Errorf("a socket that does not listen: %v", err)
		}
	}
}

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
	if err := a.send(frameSockets, []record{{"one"}, {"two"}}, []int{int(w.Fd())}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := b.next(); err == nil || !strings.Contains(err.Error(), "2 descriptors were announced and 1 came") {
		t.Fatalf("a batch with a descriptor too few: %v", err)
	}
	// The old process's end takes no descriptors at all.
	if err := b.send(frameSockets, []record{{"one"}}, []int{int(r.Fd())}); err != nil {
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
