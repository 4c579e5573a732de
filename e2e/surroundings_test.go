package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What surrounds a process: programs that it starts, its name and directories,
// wrappers, and the files of its sockets.

// worker is another program that uses the package.
var worker = proctest.DefineRole("worker", func() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		fmt.Print(err)
		return
	}
	sockets := 0
	for fd := 3; fd < 100; fd++ {
		if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil {
			sockets++
		}
	}
	fmt.Print(ecdysis.Successor(), " ", u.HasParent(), " ", sockets)
})

var runWorker = proctest.Define("run a worker", func(*proctest.Daemon, proctest.None) (string, error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), worker.Env())
	out, err := cmd.Output()
	return string(out), err
})

// A program that the successor starts before New does not become the successor.
func TestProgramStartedBeforeNew(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtStart, runWorker.Do()), proctest.TCP)
	s := p.Upgrade()
	out, err := runWorker.At(s, proctest.AtStart)
	if want := "false false 0"; out != want || err != nil {
		t.Errorf("the worker says %q, %v; want %q", out, err, want)
	}
	s.Inherits(p)
	s.Upgrade().Serves()
}

var isSuccessor = proctest.Define("Successor", func(*proctest.Daemon, proctest.None) (bool, error) {
	return ecdysis.Successor(), nil
})

func TestSuccessor(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	if isSuccessor.On(p) {
		t.Error("the first process says that it is a successor")
	}
	if s := p.Upgrade(); !isSuccessor.On(s) {
		t.Error("a successor says that it is none")
	}
}

// A start directory that is gone in any way does not end the upgrades.
func TestStartDirectoryIsGone(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.TCP)
	start, moved := c.Path("start"), c.Path("moved")
	if err := os.Mkdir(start, 0o755); err != nil {
		t.Fatal(err)
	}
	p := c.Start(func(cmd *exec.Cmd) { cmd.Dir = start })
	if err := os.Rename(start, moved); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(start, nil, 0o644); err != nil { // ENOTDIR from now on
		t.Fatal(err)
	}
	s := p.Upgrade()
	s.Serves()
	if wd, err := s.Getwd(); err != nil || wd != moved {
		t.Errorf("the successor runs in %q, %v; want %q, where its predecessor is", wd, err, moved)
	}
}

var setUID = proctest.Define("setuid", func(_ *proctest.Daemon, uid int) (proctest.None, error) {
	return proctest.None{}, syscall.Setuid(uid)
})

// A start directory that is closed to the user that the process has become
// since does not end the upgrades either.
func TestStartDirectoryIsClosed(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.TCP)
	asRoot := c.Users()(0)
	start := c.Path("start")
	if err := os.Mkdir(start, 0o700); err != nil {
		t.Fatal(err)
	}
	p := c.Start(asRoot, func(cmd *exec.Cmd) { cmd.Dir = start })
	setUID.On(p, 65534)
	p.Upgrade().Serves()
}

// The error of a directory that cannot be entered names the directory.
func TestDirectoryCannotBeEntered(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	dir := p.Chain.Path("none")
	f := p.FailUpgrade(ecdysis.StepStart, os.ErrNotExist, proctest.Successor{Dir: dir})
	proctest.Want(t, f, nil, "chdir "+dir)
	p.Upgrade().Serves()
}

var executable = proctest.Define("executable", func(*proctest.Daemon, proctest.None) (string, error) { return os.Executable() })

// A program that was started by a relative path runs the same file in every
// generation, whatever the directory.
func TestRelativeProgramInAnotherDirectory(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.TCP)
	one, other := c.Path("one"), c.Path("other")
	for _, dir := range []string{one, other} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copySelf(t, one+"/d")
	if err := os.WriteFile(other+"/d", []byte("#!/bin/sh\nexit 7\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := c.Start(func(cmd *exec.Cmd) { cmd.Path, cmd.Args[0], cmd.Dir = "./d", "./d", one })
	for range 3 {
		p = p.Upgrade(proctest.Successor{Dir: other})
		p.Serves()
		if got := executable.On(p); got != one+"/d" {
			t.Fatalf("it runs %s; want %s", got, one+"/d")
		}
	}
}

// A name that a supervisor has chosen is not taken for the program.
func TestNameThatIsNotTheProgram(t *testing.T) {
	t.Parallel()
	proctest.SkipOn(t, "it does not tell which file a process runs", "openbsd")
	c := proctest.New(t, proctest.TCP)
	p := c.Start(func(cmd *exec.Cmd) { cmd.Args[0] = "true" }) // which is another program
	want := executable.On(p)
	for range 2 {
		p = p.Upgrade()
		p.Serves()
		if got := executable.On(p); got != want {
			t.Errorf("it runs %s; want %s", got, want)
		}
	}
}

// setTitle writes a title over the command line, where ps(1) finds it. The
// strings of os.Args lie there, too.
var setTitle = proctest.Define("set the title", func(*proctest.Daemon, struct{}) (struct{}, error) {
	for _, arg := range os.Args {
		b := unsafe.Slice(unsafe.StringData(arg), len(arg))
		copy(b, strings.Repeat("title ", 1+len(b)/6))
	}
	return struct{}{}, nil
})

var commandLine = proctest.Define("the command line", func(*proctest.Daemon, struct{}) ([]string, error) {
	return os.Args, nil
})

// A title that the program writes over its command line is not taken for the
// program's name or its arguments.
func TestTitleOverTheCommandLine(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.TCP)
	p := c.Start(func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "-config", "/etc/d.conf") })
	want := commandLine.On(p)
	for range 2 {
		setTitle.On(p)
		if got := commandLine.On(p); !strings.HasPrefix(got[0], "title ") {
			t.Fatalf("the title is %q", got)
		}
		p = p.Upgrade()
		p.Serves()
		if got := commandLine.On(p); !slices.Equal(got, want) {
			t.Errorf("the successor's command line is %q; want %q", got, want)
		}
	}
}

// An address that changes its width is in its predecessor's way. Both sides say
// so.
func TestAddressChangesItsWidth(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "a narrower address may be bound beside a wider one", "linux")
	c := proctest.New(t, proctest.Spec{Listen: []proctest.Listen{{Network: "tcp", Address: ":0"}}})
	p := c.Start()
	_, port, err := net.SplitHostPort(p.Addr(0).Address)
	if err != nil {
		t.Fatal(err)
	}
	c.Specs(proctest.Spec{Listen: []proctest.Listen{{Network: "tcp", Address: "127.0.0.1:" + port}}})
	f := p.FailUpgrade(ecdysis.StepInit, nil)
	proctest.Want(t, f, nil, "the predecessor hands on tcp :0", "in the way", "stop and a start")
	proctest.Want(t, f.Successor.ErrAt(proctest.AtListenFailed), syscall.EADDRINUSE, "the predecessor hands on tcp :0")
	p.Serves()
}

// A Unix socket's file that was deleted is there again after an upgrade.
func TestDeletedSocketFile(t *testing.T) {
	t.Parallel()
	spec := proctest.Both
	spec.Listen = slices.Clone(spec.Listen)
	spec.Listen[1].Config.Mode = 0o640
	spec.Options.StopSocket = "$DIR/stop"
	spec.Wait = true
	p := proctest.Start(t, spec, spec.At(proctest.AtListened, proctest.Exit(3)), spec)
	path, stop := p.Chain.Path("sock"), p.Chain.Path("stop")
	for _, f := range []string{path, stop} {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
	p.Chain.HasFiles("pid") // a successor that fails leaves nothing
	s := p.Upgrade()
	s.Serves()
	p.Chain.HasFiles("pid", "sock", "stop")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("the new file: %v, %v; want mode 0640", fi, err)
	}
	if e := s.Event(ecdysis.EventReady, 0); !slices.Contains(e.Rebound, path) || !slices.Contains(e.Rebound, stop) {
		t.Errorf("event %v; want that %s and %s were made anew", e, path, stop)
	}
	n := s.Upgrade()
	n.Serves()
	if e := n.Event(ecdysis.EventReady, 0); len(e.Rebound)+len(e.Lost) > 0 {
		t.Errorf("event %v of the next upgrade; want that nothing was made anew", e)
	}
	if _, err := ecdysis.Request(t.Context(), stop); err != nil {
		t.Errorf("the stop socket: %v", err)
	}
	n.Closed()
	p.Chain.HasFiles()
}

// If the socket's path leaves no room for a name beside it, the upgrade fails and
// makes nothing.
func TestDeletedSocketFileCannotBeRenewed(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.TCP)
	name := strings.Repeat("x", len(syscall.RawSockaddrUnix{}.Path)-1-len(c.Dir+"/"))
	c.Specs(proctest.TCP.And("unix", "$DIR/"+name))
	p := c.Start()
	p.Serves()
	if err := os.Remove(c.Path(name)); err != nil {
		t.Fatal(err)
	}
	f := p.FailUpgrade(ecdysis.StepInit, nil)
	proctest.Want(t, f, nil, c.Path(name)+" is gone, and a new socket cannot take its place")
	c.HasFiles()
	p.ServesAt(p.Addr(0))
}

// A file that is no socket is nothing that a killed successor has left beside
// a socket's file.
func TestFileBesideASocketFile(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both, proctest.Both.Hold(proctest.AtNew), proctest.Both)
	var beside string
	p.KillHolding(func(s *proctest.Proc) {
		beside = fmt.Sprint("sock.", s.PID)
		if err := os.WriteFile(p.Chain.Path(beside), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	p.Chain.HasFiles("pid", "sock", beside)
	p.Serves()
	p.Upgrade().Serves()
}

// A successor that was given up removes what it has made in the place of a
// deleted file, even if its predecessor does not.
func TestDeletedSocketFileOfARefusedSuccessor(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Spec{}.And("unix", "$DIR/sock").Hold(proctest.AtReadyFailed))
	path := c.Path("sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	p, peer := c.LaunchUnder()
	peer.Send(proctest.Frame('H', proctest.Record{"version=1", "generation=0"}))
	peer.Send(proctest.Frame('S', proctest.Record{"kind=listener", "network=unix", "address=" + path, "at=unix " + path,
		"path=" + path, "dev=1", "ino=1", "gone=1"}), int(f.Fd()))
	peer.Send(proctest.Frame('E'))
	peer.ReadUntil('R')
	c.HasFiles(fmt.Sprint("sock.", p.PID))
	peer.Send(proctest.Frame('A'))
	proctest.Want(t, p.ErrAt(proctest.AtReadyFailed), ecdysis.ErrAborted)
	c.HasFiles()
}

// The file of another process that is alive stays.
func TestReplacedSocketFile(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	path := p.Chain.Path("sock")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	same := proctest.SameFile(t, path)
	s := p.Upgrade()
	if e := s.Event(ecdysis.EventReady, 0); !slices.Equal(e.Lost, []string{path}) || len(e.Rebound) > 0 {
		t.Errorf("event %v; want that %s is another process's", e, path)
	}
	same()
	p.Chain.HasFiles("pid", "sock")
}

// The process that has said READY is watched, whatever its wrapper does: it is
// killed in its probation while the wrapper and a process of it hold the stream.
func TestWrapperThatStays(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "the system does not name the process that has said READY", "linux", "freebsd")
	c := proctest.New(t, proctest.Both.Probation(time.Minute))
	p := c.Start()
	script := c.Path("wrapper")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nsleep 30 &\nhelper=$!\n\"$PROGRAM\"\nwait $helper\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := p.BeginUpgrade(proctest.Successor{Path: script, SetEnv: []string{"PROGRAM=" + self}})
	s := c.Next()
	s.At(proctest.AtServing)
	s.Serves()
	s.Kill()
	a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
	p.Serves()
	p.HasPIDFile()
}

// A taker whose New fails gives up what it has inherited: clients of the old
// process's address are refused when that ends, and do not hang.
func TestNewThatFailsGivesUp(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP
	spec.Wait = true
	spec.Options.TakeoverSocket = "$DIR/take"
	taker := spec.At(proctest.AtNewFailed, proctest.Hold)
	taker.Options.StopSocket = "$DIR/occupied"
	c := proctest.New(t, spec, taker)
	occupied, err := net.Listen("unix", c.Path("occupied"))
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	p := c.Start()
	n := c.Launch()
	n.At(proctest.AtNewFailed)
	p.Serves()
	addrs := p.Addrs()
	p.Kill()
	for _, a := range addrs {
		if conn, err := a.Dial(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, %v; want that it is refused", a, conn, err)
		}
	}
}

// Another process that holds the lock of the directory costs a second.
func TestLockedDirectory(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Both)
	old, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: c.Path("sock")})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close() // stale from now on
	dir, err := os.Open(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	c.Start().Serves()
}

var refuseUnclaimed = proctest.Define("refuse what is unclaimed", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	d.Options.Unclaimed = func(names []string) error {
		return fmt.Errorf("it does not want %s", strings.Join(names, " and "))
	}
	return proctest.None{}, nil
})

// Options.Unclaimed refuses a successor that does not want everything.
func TestUnclaimedRefused(t *testing.T) {
	t.Parallel()
	both := proctest.Both.At(proctest.AtStart, refuseUnclaimed.Do())
	wrong := proctest.Spec{Listen: []proctest.Listen{proctest.Both.Listen[0]}, Options: proctest.Both.Options}
	p := proctest.Start(t, both, wrong, both)
	l := p.Load(1)
	l.More(5)
	f := p.FailUpgrade(ecdysis.StepHandover, nil)
	proctest.Want(t, f, nil, "Options.Unclaimed: it does not want unix "+p.Chain.Path("sock"))
	p.Serves()
	s := p.Upgrade() // which wants everything
	s.Serves()
	l.More(5)
	l.Check()
}

// MaxDraining -1 allows no older process.
func TestMaxDrainingNone(t *testing.T) {
	t.Parallel()
	spec := proctest.Both
	spec.Options.MaxDraining = -1
	p := proctest.Start(t, spec)
	s := p.Upgrade()
	s.RefusesUpgrade(ecdysis.ErrDraining)
	p.Kill()
	s.Upgrade().Serves()
}

// The events of an upgrade name what was started.
func TestEventNamesTheProgram(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	want := executable.On(p)
	p.Upgrade()
	e := p.Event(ecdysis.EventUpgraded, 0)
	if filepath.Base(e.Program) != filepath.Base(want) || e.Dir == "" || e.Elapsed <= 0 {
		t.Errorf("program %q, directory %q, after %v; want %s", e.Program, e.Dir, e.Elapsed, want)
	}
}

// A working directory that is a symbolic link is followed anew if $PWD names it,
// as a shell sets it and a unit of systemd can. Otherwise the link is not known.
func TestWorkingDirectoryIsALink(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprint(known), func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, proctest.TCP)
			one, two, link := c.Path("1"), c.Path("2"), c.Path("current")
			for _, dir := range []string{one, two} {
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				copySelf(t, dir+"/d")
			}
			flip := func(to string) {
				t.Helper()
				if err := os.Symlink(to, link+".new"); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(link+".new", link); err != nil {
					t.Fatal(err)
				}
			}
			flip(one)
			p := c.Start(func(cmd *exec.Cmd) {
				cmd.Path, cmd.Args[0], cmd.Dir = "./d", "./d", link
				pwd := "PWD=/"
				if known {
					pwd = "PWD=" + link
				}
				cmd.Env = append(slices.DeleteFunc(cmd.Env, func(s string) bool { return strings.HasPrefix(s, "PWD=") }), pwd)
			})
			flip(two)
			s := p.Upgrade()
			want := one
			if known {
				want = two
			}
			if got := executable.On(s); got != want+"/d" {
				t.Errorf("the successor runs %s; want %s", got, want+"/d")
			}
			if e := p.Event(ecdysis.EventUpgraded, 0); known && (e.Dir != link || e.Program != link+"/d") || !known && (e.Dir != one || e.Program != one+"/d") {
				t.Errorf("the event names program %s and directory %s", e.Program, e.Dir)
			}
		})
	}
}

// A log in JSON has an event's reason.
func TestEventInJSON(t *testing.T) {
	b, err := json.Marshal(map[string]any{"event": ecdysis.Event{Kind: ecdysis.EventUpgradeFailed, Err: errors.New("no disk")}})
	if want := `{"event":"upgrade failed: no disk"}`; string(b) != want || err != nil {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
}
