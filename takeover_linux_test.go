package ecdysis_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// open lets processes of other users into the hub's directory, and returns how
// to start one of a user.
func (h *hub) open() (as func(uid int) func(*exec.Cmd)) {
	h.t.Helper()
	if os.Getuid() != 0 {
		h.t.Skip("a process of another user takes root to start")
	}
	binary := filepath.Join(h.dir, "binary")
	if out, err := exec.Command("cp", os.Args[0], binary).CombinedOutput(); err != nil {
		h.t.Fatalf("%v: %s", err, out)
	}
	for _, err := range []error{os.Chmod(h.dir, 0o777), os.Chmod(h.path, 0o777), os.Chmod(binary, 0o755)} {
		if err != nil {
			h.t.Fatal(err)
		}
	}
	return func(uid int) func(*exec.Cmd) {
		return func(cmd *exec.Cmd) {
			cmd.Path, cmd.Args[0], cmd.Dir = binary, binary, h.dir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		}
	}
}

// A stranger gets nothing, is told why, and is no cold start; nor does anybody
// take from a stranger, root neither.
func TestTakeoverStranger(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		server, taker int
		abstract      bool
		mode          os.FileMode // of the socket's file
		is, says      string
		told          bool // by the one that serves
	}{
		"by name":             {0, 65534, true, 0, "", "refuses: permission denied: the peer is a process of user 65534, and this one runs as user 0", true},
		"open to all":         {0, 65534, false, 0o666, "", "refuses: permission denied: the peer is a process of user 65534, and this one runs as user 0", true},
		"by file":             {0, 65534, false, 0o600, "permission", "connect: permission denied", false},
		"another's":           {65533, 65534, true, 0, "permission", "the peer is a process of user 65533, and this one runs as user 65534", false},
		"root from a user":    {65533, 0, true, 0, "permission", "the peer is a process of user 65533, and this one runs as user 0", false},
		"root from a file of": {65533, 0, false, 0o600, "permission", "the peer is a process of user 65533, and this one runs as user 0", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			as := h.open()
			s := tcp()
			s.Wait = true
			s.Options.TakeoverSocket = h.take()
			if c.abstract {
				s.Options.TakeoverSocket = fmt.Sprintf("@%s/take", h.dir)
			}
			h.next(s)
			p := h.serving(as(c.server))
			if c.mode != 0 {
				if fi, err := os.Lstat(h.take()); err != nil || fi.Mode().Perm() != 0o600 {
					t.Fatalf("the socket's file: %v, %v; want mode 600", fi.Mode(), err)
				}
				if err := os.Chmod(h.take(), c.mode); err != nil {
					t.Fatal(err)
				}
			}
			l := startLoad(t, 1, false, p.list()...)
			for range 2 {
				n := h.start(as(c.taker))
				n.at("new failed").Err.says(t, c.is, s.Options.TakeoverSocket, c.says)
				n.ended()
			}
			l.more(10)
			l.check()
			p.hasEvents() // nothing was begun
			p.serves()
			// Its own user takes over.
			n := h.serving(as(c.server))
			p.ended()
			n.is(1)
			n.serves()
		})
	}
}

// A process that is just too busy to accept keeps no New for longer than
// UpgradeTimeout.
func TestTakeoverFullBacklog(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: h.take()}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	dials(t, h.take()) // which fills it
	s := h.taking()
	s.Options.UpgradeTimeout = 100 * time.Millisecond
	h.next(s)
	h.turnedAway("deadline", h.take(), "Options.UpgradeTimeout")
}

// inContainer lets a process run in PID and mount namespaces of its own, in
// which nothing is there of the file system but programs and, as /shared, the
// hub's directory.
func (h *hub) inContainer(init bool) func(*exec.Cmd) {
	h.t.Helper()
	root, err := os.MkdirTemp("", "root")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.Remove(root) })
	run := `exec chroot "$1" /daemon -test.run=^$`
	if !init {
		run = `chroot "$1" /daemon -test.run=^$ & wait`
	}
	script := `set -e
		mount --make-rprivate /
		mount -t tmpfs tmpfs "$1"
		mkdir "$1/shared" "$1/proc" "$1/dev"
		cp "$3" "$1/daemon"
		mount --bind "$2" "$1/shared"
		mount --rbind /dev "$1/dev"
		for d in bin lib lib64 usr; do
			if [ -d /$d ]; then mkdir "$1/$d"; mount --bind /$d "$1/$d"; fi
		done
		mount -t proc proc "$1/proc"
		` + run
	return func(cmd *exec.Cmd) {
		cmd.Path = "/bin/sh"
		cmd.Args = []string{"sh", "-c", script, "sh", root, h.dir, os.Args[0]}
		cmd.Env = append(cmd.Env, hubVar+"=/shared/hub")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	}
}

// needNamespaces skips a test where namespaces may not be made, which $CI makes
// a failure.
func needNamespaces(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /proc")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err == nil {
		return
	}
	msg := fmt.Sprintf("a PID and a mount namespace are not permitted: %v %s", err, out)
	if os.Getenv("CI") != "" {
		t.Fatal(msg)
	}
	t.Skip(msg)
}

// contained is what taking returns, with the hub's directory by another name.
func (h *hub) contained() spec {
	s := h.taking()
	s.Options.TakeoverSocket, s.Options.PIDFile = "/shared/take", "/shared/pid"
	s.Listen = [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", "/shared/sock"}}
	return s
}

// serveAt asserts that p, whose paths may be others, serves old's clients.
func (p *proc) serveAt(addrs [][2]string) {
	p.t.Helper()
	for _, a := range addrs {
		if pid, _, err := ask(a[0], a[1]); err != nil || pid != p.pid {
			p.t.Fatalf("%v: process %d answers, %v; want %d", a, pid, err, p.pid)
		}
	}
}

// From one container to the next, of which each knows the socket's directory
// by its own name and sees only its own processes, and PID 1 may be taken over.
func TestTakeoverNamespaces(t *testing.T) {
	t.Parallel()
	needNamespaces(t)
	for _, init := range []bool{true, false} {
		t.Run(map[bool]string{true: "PID 1", false: "another PID"}[init], func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.next(h.taking())
			p := h.serving()
			first := p
			l := startLoad(t, 2, false, p.list()...)
			hasEvent := func(p *proc, kind ecdysis.EventKind) {
				t.Helper()
				if e := p.event(kind, 0); !strings.HasSuffix(e.Socket, "/take") {
					t.Errorf("event %+v", e)
				}
			}

			// Into a container, into another one, out again, and to end in one.
			for generation, edit := range []func(*exec.Cmd){h.inContainer(init), h.inContainer(init), func(*exec.Cmd) {}, h.inContainer(init)} {
				s := h.contained()
				if generation == 2 {
					s = h.taking()
				}
				l.more(20)
				h.next(s)
				n := h.serving(edit)
				n.is(generation + 1)
				n.unclaimed()
				if (n.pid == 1) != (init && generation != 2) {
					t.Errorf("generation %d is process %d in its namespace", generation+1, n.pid)
				}
				hasEvent(p, ecdysis.EventUpgraded)
				p.ended()
				l.more(20)
				n.serveAt(first.list())
				n.hasPIDFile()
				h.hasFiles("pid", "sock", "take")
				p = n
			}
			l.check()
			p.begin(command{Verb: "stop"})
			p.ended()
			h.hasFiles() // though others have made them
		})
	}
}

// A taker in another namespace dies at each step, and so does one that the
// process that serves cannot even name.
func TestTakerDiesInNamespace(t *testing.T) {
	t.Parallel()
	needNamespaces(t)
	for _, inside := range []bool{true, false} { // the taker; the other one is not
		for point, step := range map[string]string{"new": "init", "listened": "init", "event ready": "handover", "serving": "probation"} {
			t.Run(fmt.Sprint(point, " ", map[bool]string{true: "inside", false: "outside"}[inside]), func(t *testing.T) {
				t.Parallel()
				h := newHub(t)
				in, out := h.inContainer(false), func(*exec.Cmd) {}
				first, next, before, after := h.taking(), h.contained(), out, in
				if !inside {
					first, next, before, after = h.contained(), h.taking(), in, out
				}
				h.next(first.probation(time.Hour), next.do(point, "hold"))
				p := h.serving(before)
				unchanged := p.settles((*proc).holdings)
				n := h.start(after)
				n.at(point)
				n.kill()
				e := p.event(ecdysis.EventUpgradeFailed, 0)
				if !strings.Contains(e.Err, "failed at "+step) {
					t.Errorf("event %+v; want a failure at %s", e, step)
				}
				network, address := p.addr(0)
				p.serveAt([][2]string{{network, address}, {"unix", h.sock()}})
				p.hasPIDFile()
				h.hasFiles("pid", "sock", "take")
				unchanged()
			})
		}
	}
}
