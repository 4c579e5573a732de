package e2e

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// AddFile hands on files of all kinds. Sockets are in adopt_test.go.

// A position is an offset in a file.
type position struct {
	Key    string
	Offset int64
}

var seek = proctest.Define("seek", func(d *proctest.Daemon, a position) (proctest.None, error) {
	_, err := proctest.Get[io.Seeker](d, a.Key).Seek(a.Offset, io.SeekStart)
	return proctest.None{}, err
})

func seeks(p *proctest.Proc, key string, offset int64) {
	p.T.Helper()
	seek.On(p, position{key, offset})
}

// handFile adds p's file, hands it on, and closes it here when p is replaced.
func handFile(p *proctest.Proc, key string) *proctest.Proc {
	p.T.Helper()
	addFile.On(p, named{"the name", key})
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		finds(s, claimFile, "the name", key, "*os.File")
		findsNothing(s, claimFile, "the name")
	})
	s.HasUnclaimed()
	closes(p, key)
	return s
}

var readDir = proctest.Define("Readdirnames", func(d *proctest.Daemon, key string) ([]string, error) {
	return proctest.Get[*os.File](d, key).Readdirnames(-1)
})

func TestFileMoves(t *testing.T) {
	t.Parallel()
	start := func(t *testing.T) *proctest.Proc {
		t.Parallel()
		return proctest.Start(t, proctest.Spec{}, proctest.Holding)
	}
	t.Run("regular file", func(t *testing.T) { // with its offset
		p := start(t)
		path := p.Chain.Path("file")
		opens(p, "f", path)
		writes(p, "f", "0123456789")
		seeks(p, "f", 3)
		s := handFile(p, "f")
		reads(s, "f", "34")
		g := handFile(s, "f")
		reads(g, "f", "56")
		writes(g, "f", "X")
		if b, err := os.ReadFile(path); err != nil || string(b) != "0123456X89" {
			t.Errorf("the file: %q, %v", b, err)
		}
	})
	t.Run("both ends of a pipe", func(t *testing.T) {
		p := start(t)
		openPipe.On(p, "p")
		writes(p, "p.w", "unread")
		addFile.On(p, named{"p", "p.r"})
		addFile.On(p, named{"p", "p.w"})
		closes(p, "p.r", "p.w")
		s := p.UpgradeHolding(func(s *proctest.Proc) {
			claimFile.On(s, named{"p", "p.r"})
			claimFile.On(s, named{"p", "p.w"})
		})
		reads(s, "p.r", "unread")
		writes(s, "p.w", "more")
		reads(s, "p.r", "more")
		closes(s, "p.w") // the only one, while the old process lives
		readsEnd(s, "p.r")
		p.Generation()
	})
	t.Run("one end of a pipe", func(t *testing.T) {
		p := start(t)
		openPollablePipe.On(p, "p")
		addFile.On(p, named{"r", "p.r"})
		closes(p, "p.r")
		s := p.UpgradeHolding(func(s *proctest.Proc) { claimFile.On(s, named{"r", "r"}) })
		writes(p, "p.w", "from the old one")
		reads(s, "r", "from the old one")
		closes(p, "p.w")
		readsEnd(s, "r")
	})
	t.Run("device", func(t *testing.T) {
		p := start(t)
		opens(p, "f", os.DevNull)
		s := handFile(p, "f")
		writes(s, "f", "anything")
		readsEnd(s, "f")
	})
	t.Run("directory", func(t *testing.T) {
		p := start(t)
		dir := proctest.ShortDir(t)
		for _, name := range []string{"a", "b"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		opens(p, "f", dir)
		s := handFile(p, "f")
		got := readDir.On(s, "f")
		slices.Sort(got)
		if !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("the directory has %q", got)
		}
	})
	t.Run("failed upgrade", func(t *testing.T) {
		p := start(t)
		opens(p, "f", p.Chain.Path("file"))
		writes(p, "f", "0123456789")
		seeks(p, "f", 0)
		addFile.On(p, named{"f", "f"})
		p.KillHolding(func(s *proctest.Proc) {
			claimFile.On(s, named{"f", "f"})
			reads(s, "f", "012") // the offset is everybody's
		})
		reads(p, "f", "345")
		closes(p, "f")
		p.KillHolding(func(s *proctest.Proc) {})
		s := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimFile, "f", "f", "*os.File") })
		reads(s, "f", "678")
	})
	t.Run("taken back", func(t *testing.T) {
		p := start(t)
		openPipe.On(p, "p")
		addFile.On(p, named{"w", "p.w"})
		finds(p, claimFile, "w", "copy", "*os.File")
		findsNothing(p, claimFile, "w")
		closes(p, "p.w")
		writes(p, "copy", "x")
		closes(p, "copy")
		reads(p, "p.r", "x")
		readsEnd(p, "p.r") // no third one
		p.UpgradeHolding(func(s *proctest.Proc) { findsNothing(s, claimFile, "w") }).HasUnclaimed()
	})
}

var flock = proctest.Define("flock", func(d *proctest.Daemon, key string) (_ proctest.None, err error) {
	cerr := onFD(d, key, func(fd uintptr) { err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) })
	return proctest.None{}, errors.Join(cerr, err)
})

// A lock of flock(2) is held without a gap until the last process that it was
// handed on to has closed the file.
func TestFileLockMoves(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	path := p.Chain.Path("lock")
	opens(p, "f", path)
	flock.On(p, "f")
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
	addFile.On(p, named{"f", "f"})
	p.KillHolding(func(s *proctest.Proc) { claimFile.On(s, named{"f", "f"}) })
	locked("after a failed upgrade")
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		claimFile.On(s, named{"f", "f"})
		locked("during the upgrade")
	})
	locked("after the upgrade")
	closes(p, "f")
	locked("after the old process's close")
	p.Kill()
	locked("after the old process's end")
	g := handFile(s, "f")
	locked("in the second successor")
	s.Kill()
	locked("in the second successor alone")
	closes(g, "f")
	if err := try(); err != nil {
		t.Fatalf("after the last process's close: %v", err)
	}
}

// flags are those of a descriptor.
type flags struct{ Nonblocking, CloseOnExec bool }

var fdFlags = proctest.Define("fcntl", func(d *proctest.Daemon, key string) (f flags, err error) {
	cerr := onFD(d, key, func(fd uintptr) {
		status, serr := unix.FcntlInt(fd, unix.F_GETFL, 0)
		own, oerr := unix.FcntlInt(fd, unix.F_GETFD, 0)
		f, err = flags{status&unix.O_NONBLOCK != 0, own&unix.FD_CLOEXEC != 0}, errors.Join(serr, oerr)
	})
	return f, errors.Join(cerr, err)
})

// leaksNothing fails the test if a program that p runs has descriptors that a
// program which the test runs has not, where the system tells.
func leaksNothing(p *proctest.Proc) {
	p.T.Helper()
	if runtime.GOOS != "linux" {
		return
	}
	want, err := exec.Command("ls", "/proc/self/fd").Output()
	if err != nil {
		p.T.Fatal(err)
	}
	if got, err := p.Run("ls", "/proc/self/fd"); err != nil || got != string(want) {
		p.T.Errorf("a program of process %d has the descriptors %q, %v; want %q", p.PID, got, err, want)
	}
}

// Whether a file blocks is shared by all who have it, and is not changed.
// What is handed on is close-on-exec.
func TestFileFlags(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	keys := []string{"b.r", "b.w", "n.r", "n.w"}
	openPipe.On(p, "b")
	openPollablePipe.On(p, "n")
	check := func(p *proctest.Proc) {
		t.Helper()
		for _, key := range keys {
			got := fdFlags.On(p, key)
			if want := (flags{Nonblocking: key[:1] == "n", CloseOnExec: true}); got != want {
				t.Fatalf("process %d: %s has the flags %+v; want %+v", p.PID, key, got, want)
			}
		}
	}
	check(p)
	old := []*proctest.Proc{p}
	for range 2 {
		for _, key := range keys {
			addFile.On(p, named{key, key})
		}
		check(p)
		s := p.UpgradeHolding(func(s *proctest.Proc) {
			for _, key := range keys {
				finds(s, claimFile, key, key, "*os.File")
			}
			check(s)
			leaksNothing(s)
		})
		p, old = s, append(old, s)
		for _, p := range old {
			check(p)
			leaksNothing(p)
		}
	}
	writes(p, "n.w", "x")
	reads(p, "n.r", "x")
	writes(p, "b.w", "x")
	reads(p, "b.r", "x")
}

// Twenty upgrades that hand on one of each kind leave nothing behind.
func TestFilesLeakNothing(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells what a descriptor is", "linux")
	p := proctest.New(t, sendingState(proctest.Holding, sending{Size: 5000})).Launch()
	p.At(proctest.AtNew)
	p.Resume()
	p.At(proctest.AtServing)
	bare := append(fdKinds(p), "socket:[N]", "socket:[N]") // of the streams in both directions
	slices.Sort(bare)
	peer := dialled(p, "conn", "tcp")
	openPipe.On(p, "pipe")
	listenElsewhere.On(p, socketAt{"made", "tcp", "127.0.0.1:0"})
	fileOf.On(p, copyOf{"made file", "made"})
	addFile.On(p, named{"ln", "made file"})
	closes(p, "made", "made file")
	claimListener.On(p, named{"ln", "ln"})
	pair.On(p, named{"pair", "pair"})
	var early []string
	for n := 1; n <= 20; n++ {
		addConn.On(p, named{"conn", "conn"})
		addFile.On(p, named{"r", "pipe.r"})
		addFile.On(p, named{"w", "pipe.w"})
		if n%5 == 0 {
			before := p.FDs()
			p.KillHolding(func(s *proctest.Proc) {
				claimConn.On(s, named{"conn", "conn"})
				claimListener.On(s, named{"ln", "ln"})
				readsPart(s, 100, 7)
			})
			if now := p.FDs(); !slices.Equal(now, before) {
				t.Errorf("generation %d: descriptors after a failed upgrade: %q; before: %q", n-1, now, before)
			}
		}
		s := p.UpgradeHolding(func(s *proctest.Proc) {
			finds(s, claimConn, "conn", "conn", "*net.TCPConn")
			finds(s, claimFile, "r", "pipe.r", "*os.File")
			finds(s, claimFile, "w", "pipe.w", "*os.File")
			finds(s, claimListener, "ln", "ln", "*ecdysis.listener")
			finds(s, pair, "pair", "pair", "*net.UnixConn")
			readsRest(s, 5000, 512)
		})
		s.HasUnclaimed()
		if n == 10 { // the caller's gone, too
			closes(p, "conn", "pipe.r", "pipe.w", "pair.up", "pair.down", "ln")
			if now := fdKinds(p); !slices.Equal(now, bare) {
				t.Errorf("descriptors of a process that was replaced: %q; want %q", now, bare)
			}
		}
		p.Kill()
		p = s
		switch n {
		case 3:
			early = fdKinds(p)
		case 20:
			if late := fdKinds(p); !slices.Equal(early, late) {
				t.Errorf("descriptors of generation 3: %q, of generation 20: %q", early, late)
			}
		}
	}
	talk(p, "conn", peer)
}

var addMemoryFile = proctest.Define("add memory file", func(d *proctest.Daemon, name string) (proctest.None, error) {
	f, err := ecdysis.MemoryFile()
	if err != nil {
		return proctest.None{}, err
	}
	defer f.Close()
	return proctest.None{}, d.U.AddFile(name, f)
})

var fileNames = proctest.Define("FileNames", func(d *proctest.Daemon, prefix string) ([]string, error) {
	return d.U.FileNames(prefix), nil
})

func TestFileNames(t *testing.T) {
	t.Parallel()
	names := func(p *proctest.Proc, prefix string, want ...string) {
		t.Helper()
		if got := fileNames.On(p, prefix); !slices.Equal(got, want) {
			t.Errorf("FileNames(%q): %q; want %q", prefix, got, want)
		}
	}
	take := func(p *proctest.Proc, name string) {
		t.Helper()
		finds(p, claimFile, name, "file", "*os.File")
		closes(p, "file")
	}
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	names(p, "")
	for _, name := range []string{"b/2", "a/1", "b/1", "b/1"} {
		addMemoryFile.On(p, name)
	}
	names(p, "", "b/2", "a/1", "b/1", "b/1")
	names(p, "b/", "b/2", "b/1", "b/1")
	names(p, "b/1", "b/1", "b/1")
	names(p, "c")
	take(p, "b/1")
	names(p, "b/", "b/2", "b/1")
	pair.On(p, named{"b/pair", "pair"})

	// In a successor what was inherited comes first, as long as it can be had.
	p.UpgradeHolding(func(s *proctest.Proc) {
		addMemoryFile.On(s, "b/0")
		names(s, "b/", "b/2", "b/1", "b/0")
		take(s, "b/2")
		names(s, "b/", "b/1", "b/0")
		for _, name := range fileNames.On(s, "") {
			take(s, name)
		}
		names(s, "")
	}).HasUnclaimed("pair b/pair")
}

func TestMemoryFile(t *testing.T) {
	t.Parallel()
	f, err := ecdysis.MemoryFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := os.Lstat(f.Name()); !os.IsNotExist(err) {
		t.Errorf("it has the name %s: %v", f.Name(), err)
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %#x, %v; want close-on-exec", flags, err)
	}
	if _, err := f.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	var mem [2][]byte
	for i := range mem {
		if mem[i], err = unix.Mmap(int(f.Fd()), 0, 100, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem[i])
	}
	f.Close()
	mem[0][99] = 7
	if mem[1][99] != 7 {
		t.Error("what one mapping writes the other does not show")
	}
}
