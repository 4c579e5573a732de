//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
)

// What AddFile hands on, sockets apart: see adopt_test.go for those.

// handFile adds p's file, hands it on, and closes it here when p is replaced.
func (p *proc) handFile(key string) *proc {
	p.t.Helper()
	p.thing("AddFile", "the name", key)
	s := p.succeed(func(s *proc) {
		s.gives("*os.File", "File", "the name", key)
		s.gives("nil", "File", "the name", "none")
	})
	s.unclaimed()
	p.thing("close", key)
	return s
}

func TestFileMoves(t *testing.T) {
	t.Parallel()
	start := func(t *testing.T) *proc {
		t.Parallel()
		return newHub(t, spec{}, holding()).serving()
	}
	t.Run("regular file", func(t *testing.T) { // with its offset
		p := start(t)
		path := filepath.Join(p.h.dir, "file")
		p.thing("open", "f", path)
		p.thing("write", "f", "0123456789")
		p.thing("seek", "f", "3")
		s := p.handFile("f")
		s.gives("34", "read", "f", "2")
		g := s.handFile("f")
		g.gives("56", "read", "f", "2")
		g.thing("write", "f", "X")
		if b, err := os.ReadFile(path); err != nil || string(b) != "0123456X89" {
			t.Errorf("the file: %q, %v", b, err)
		}
	})
	t.Run("both ends of a pipe", func(t *testing.T) {
		p := start(t)
		p.thing("pipe", "p", "blocking")
		p.thing("write", "p.w", "unread")
		p.thing("AddFile", "p", "p.r")
		p.thing("AddFile", "p", "p.w")
		p.thing("close", "p.r", "p.w")
		s := p.succeed(func(s *proc) {
			s.thing("File", "p", "p.r")
			s.thing("File", "p", "p.w")
		})
		s.gives("unread", "read", "p.r", "6")
		s.thing("write", "p.w", "more")
		s.gives("more", "read", "p.r", "4")
		s.thing("close", "p.w") // the only one, while the old process lives
		s.noThing("EOF", nil, "read", "p.r", "1")
		p.call("generation")
	})
	t.Run("one end of a pipe", func(t *testing.T) {
		p := start(t)
		p.thing("pipe", "p", "non-blocking")
		p.thing("AddFile", "r", "p.r")
		p.thing("close", "p.r")
		s := p.succeed(func(s *proc) { s.thing("File", "r", "r") })
		p.thing("write", "p.w", "from the old one")
		s.gives("from the old one", "read", "r", "16")
		p.thing("close", "p.w")
		s.noThing("EOF", nil, "read", "r", "1")
	})
	t.Run("device", func(t *testing.T) {
		p := start(t)
		p.thing("open", "f", os.DevNull)
		s := p.handFile("f")
		s.thing("write", "f", "anything")
		s.noThing("EOF", nil, "read", "f", "1")
	})
	t.Run("directory", func(t *testing.T) {
		p := start(t)
		dir := shortDir(t)
		for _, name := range []string{"a", "b"} {
			write(t, filepath.Join(dir, name), "", 0o600)
		}
		p.thing("open", "f", dir)
		s := p.handFile("f")
		got := s.thing("readdir", "f")
		slices.Sort(got)
		if !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("the directory has %q", got)
		}
	})
	t.Run("failed upgrade", func(t *testing.T) {
		p := start(t)
		p.thing("open", "f", filepath.Join(p.h.dir, "file"))
		p.thing("write", "f", "0123456789")
		p.thing("seek", "f", "0")
		p.thing("AddFile", "f", "f")
		p.perish(func(s *proc) {
			s.thing("File", "f", "f")
			s.gives("012", "read", "f", "3") // the offset is everybody's
		})
		p.gives("345", "read", "f", "3")
		p.thing("close", "f")
		p.perish(func(s *proc) {})
		s := p.succeed(func(s *proc) { s.gives("*os.File", "File", "f", "f") })
		s.gives("678", "read", "f", "3")
	})
	t.Run("taken back", func(t *testing.T) {
		p := start(t)
		p.thing("pipe", "p", "blocking")
		p.thing("AddFile", "w", "p.w")
		p.gives("*os.File", "File", "w", "copy")
		p.gives("nil", "File", "w", "none")
		p.thing("close", "p.w")
		p.thing("write", "copy", "x")
		p.thing("close", "copy")
		p.gives("x", "read", "p.r", "1")
		p.noThing("EOF", nil, "read", "p.r", "1") // no third one
		p.succeed(func(s *proc) { s.gives("nil", "File", "w", "none") }).unclaimed()
	})
}

// A lock of flock(2) is held without a gap until the last process that it was
// handed to has closed the file.
func TestFileLockMoves(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	path := filepath.Join(p.h.dir, "lock")
	p.thing("open", "f", path)
	p.thing("flock", "f")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	try := func() error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
	locked := func(when string) {
		t.Helper()
		if err := try(); !errors.Is(err, syscall.EWOULDBLOCK) {
			t.Fatalf("%s: a third party's flock: %v", when, err)
		}
	}
	locked("before")
	p.thing("AddFile", "f", "f")
	p.perish(func(s *proc) { s.thing("File", "f", "f") })
	locked("after a failed upgrade")
	s := p.succeed(func(s *proc) {
		s.thing("File", "f", "f")
		locked("during the upgrade")
	})
	locked("after the upgrade")
	p.thing("close", "f")
	locked("after the old process's close")
	p.kill()
	locked("after the old process's end")
	g := s.handFile("f")
	locked("in the second successor")
	s.kill()
	locked("in the second successor alone")
	g.thing("close", "f")
	// A process that was killed may just be closing its files.
	for end := time.Now().Add(patience); try() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is locked though the last one has closed it")
		}
	}
}

// Whether a file blocks is shared by all who have it, and is not changed.
// What is handed on is close-on-exec.
func TestFileFlags(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	p := newHub(t, spec{}, holding()).serving()
	keys := []string{"b.r", "b.w", "n.r", "n.w"}
	p.thing("pipe", "b", "blocking")
	p.thing("pipe", "n", "non-blocking")
	check := func(p *proc) {
		t.Helper()
		for _, key := range keys {
			p.gives(map[string]string{"b": "false|true", "n": "true|true"}[key[:1]], "flags", key)
		}
	}
	check(p)
	old := []*proc{p}
	for range 2 {
		for _, key := range keys {
			p.thing("AddFile", key, key)
		}
		check(p)
		s := p.succeed(func(s *proc) {
			for _, key := range keys {
				s.gives("*os.File", "File", key, key)
			}
			check(s)
			checkPrograms(t, "the starting process", s)
		})
		p, old = s, append(old, s)
		for _, p := range old {
			check(p)
			checkPrograms(t, "a process of the chain", p)
		}
	}
	p.thing("write", "n.w", "x")
	p.gives("x", "read", "n.r", "1")
	p.thing("write", "b.w", "x")
	p.gives("x", "read", "b.r", "1")
}

// Twenty upgrades that hand on one of each kind leave nothing behind.
func TestFilesLeakNothing(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	sp := holding()
	sp.Extra = map[string]string{"state": "size 5000"}
	h := newHub(t, sp)
	p := h.start()
	p.at("new")
	p.resume()
	p.at("serving")
	bare := append(kindsOf(p.call("fds").Text), "socket:[N]", "socket:[N]") // of the streams in both directions
	slices.Sort(bare)
	peer := dialled(p, "conn", "tcp")
	p.thing("pipe", "pipe", "blocking")
	p.thing("listen", "made", "tcp", "127.0.0.1:0")
	p.thing("file of", "made file", "made")
	p.thing("AddFile", "ln", "made file")
	p.thing("close", "made", "made file")
	p.thing("Listener", "ln", "ln")
	p.thing("DatagramPair", "pair", "pair")
	var early []string
	for n := 1; n <= 20; n++ {
		p.thing("AddConn", "conn", "conn")
		p.thing("AddFile", "r", "pipe.r")
		p.thing("AddFile", "w", "pipe.w")
		if n%5 == 0 {
			before := p.call("fds").Text
			p.perish(func(s *proc) {
				s.thing("Conn", "conn", "conn")
				s.thing("Listener", "ln", "ln")
				s.thing("state read", "100", "7")
			})
			if now := p.call("fds").Text; !slices.Equal(now, before) {
				t.Errorf("generation %d: descriptors after a failed upgrade: %q; before: %q", n-1, now, before)
			}
		}
		s := p.succeed(func(s *proc) {
			s.gives("*net.TCPConn", "Conn", "conn", "conn")
			s.gives("*os.File", "File", "r", "pipe.r")
			s.gives("*os.File", "File", "w", "pipe.w")
			if s.thing("Listener", "ln", "ln")[0] == "nil" {
				t.Fatal("no listener")
			}
			s.gives("*net.UnixConn", "DatagramPair", "pair", "pair")
			s.gives("5000|EOF", "state read", "-1", "512")
		})
		s.unclaimed()
		if n == 10 { // the caller's gone, too
			p.thing("close", "conn", "pipe.r", "pipe.w", "pair.up", "pair.down")
			p.thing("close", "ln")
			if now := kindsOf(p.call("fds").Text); !slices.Equal(now, bare) {
				t.Errorf("descriptors of a process that was replaced: %q; want %q", now, bare)
			}
		}
		p.kill()
		p = s
		switch n {
		case 3:
			early = kindsOf(p.call("fds").Text)
		case 20:
			if late := kindsOf(p.call("fds").Text); !slices.Equal(early, late) {
				t.Errorf("descriptors of generation 3: %q, of generation 20: %q", early, late)
			}
		}
	}
	converse(p, "conn", peer)
}
