package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Takeovers between users, and between containers.

// A taker of another user gets nothing, is told why, and does not start as if
// nobody served. Nobody takes over from another user's process either, not even
// root.
func TestTakeoverStranger(t *testing.T) {
	t.Parallel()
	for name, u := range map[string]struct {
		server, taker int
		abstract      bool
		mode          os.FileMode // of the socket's file
		is            error
		says          string
	}{
		"by name":     {0, 65534, true, 0, nil, "refuses: permission denied: the peer is a process of user 65534, and this one runs as user 0"},
		"open to all": {0, 65534, false, 0o666, nil, "refuses: permission denied: the peer is a process of user 65534, and this one runs as user 0"},
		"by file":     {0, 65534, false, 0o600, os.ErrPermission, "connect: permission denied"},
		// The system's own number for users that a namespace does not map is a user
		// like any other where they are all mapped.
		"another's":           {65534, 65533, true, 0, os.ErrPermission, "the peer is a process of user 65534, and this one runs as user 65533"},
		"root from a user":    {65533, 0, true, 0, os.ErrPermission, "the peer is a process of user 65533, and this one runs as user 0"},
		"root from a file of": {65533, 0, false, 0o600, os.ErrPermission, "the peer is a process of user 65533, and this one runs as user 0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := proctest.TCP
			spec.Wait = true
			spec.Options.TakeoverSocket = "$DIR/take"
			if u.abstract {
				spec.Options.TakeoverSocket = "@$DIR/take"
			}
			c := proctest.New(t, spec)
			as := c.Users()
			p := c.Start(as(u.server))
			if u.mode != 0 {
				if fi, err := os.Lstat(c.Path("take")); err != nil || fi.Mode().Perm() != 0o600 {
					t.Fatalf("the socket's file: %v, %v; want mode 600", fi.Mode(), err)
				}
				if err := os.Chmod(c.Path("take"), u.mode); err != nil {
					t.Fatal(err)
				}
			}
			l := p.Load(1)
			for range 2 {
				n := c.Launch(as(u.taker))
				proctest.Want(t, n.ErrAt(proctest.AtNewFailed), u.is, strings.ReplaceAll(spec.Options.TakeoverSocket, "$DIR", c.Dir), u.says)
				n.Ended()
			}
			l.More(10)
			l.Check()
			p.HasEvents() // nothing was begun
			p.Serves()
			// A process of the same user takes over.
			s := c.Start(as(u.server))
			p.Ended()
			isGeneration(s, 1)
			s.Serves()
		})
	}
}

// A process that is too busy to accept does not hold up New for longer than
// UpgradeTimeout.
func TestTakeoverFullBacklog(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, taking().UpgradeTimeout(100*time.Millisecond))
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: c.Path("take")}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	dialTake(c, nil) // which fills it
	turnedAway(c, os.ErrDeadlineExceeded, c.Path("take"), "Options.UpgradeTimeout")
}

// inContainer lets a process run in PID and mount namespaces of its own. Its
// file system has nothing but programs and, as /shared, the chain's directory.
func inContainer(c *proctest.Chain, pid1 bool) func(*exec.Cmd) {
	c.T.Helper()
	root, err := os.MkdirTemp("", "root")
	if err != nil {
		c.T.Fatal(err)
	}
	c.T.Cleanup(func() { os.Remove(root) })
	self, err := os.Executable()
	if err != nil {
		c.T.Fatal(err)
	}
	run := `exec chroot "$1" /daemon -test.run=^$`
	if !pid1 {
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
		proctest.HubAt("/shared/hub")(cmd)
		cmd.Path = "/bin/sh"
		cmd.Args = []string{"sh", "-c", script, "sh", root, c.Dir, self}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	}
}

// outside lets a process run in the namespaces of the test.
func outside(*exec.Cmd) {}

// needNamespaces skips a test if no namespaces may be made. With $CI set it
// fails the test.
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

// servesAt fails the test unless p serves at these addresses, which p may know
// by other paths.
func servesAt(p *proctest.Proc, addrs []proctest.Addr) {
	p.T.Helper()
	for _, a := range addrs {
		p.ServesAt(a)
	}
}

// A service moves from one container to the next. Each knows the directory of
// the socket by a path of its own and sees only its own processes. PID 1 may be
// taken over.
func TestTakeoverNamespaces(t *testing.T) {
	t.Parallel()
	needNamespaces(t)
	for _, pid1 := range []bool{true, false} {
		t.Run(map[bool]string{true: "PID 1", false: "another PID"}[pid1], func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, taking())
			p := c.Start()
			addrs := p.Addrs()
			l := p.Load(2)

			// Into a container, into another one, out again, and into a third.
			for i, edit := range []func(*exec.Cmd){inContainer(c, pid1), inContainer(c, pid1), outside, inContainer(c, pid1)} {
				l.More(20)
				s := c.Start(edit)
				isGeneration(s, i+1)
				s.HasUnclaimed()
				if (s.PID == 1) != (pid1 && i != 2) {
					t.Errorf("generation %d is process %d in its namespace", i+1, s.PID)
				}
				e := p.Event(ecdysis.EventUpgraded, 0)
				if !strings.HasSuffix(e.Socket, "/take") {
					t.Errorf("event %v; want one by the socket", e)
				}
				// From within a container the system does not name the taker.
				if within := i == 1 || i == 2; within && e.PID != s.PID {
					t.Errorf("event %v; want the process ID %d that the taker has sent", e, s.PID)
				}
				p.Ended()
				l.More(20)
				servesAt(s, addrs)
				s.HasPIDFile()
				c.HasFiles("pid", "sock", "take")
				p = s
			}
			l.Check()
			p.Stop()
			p.Ended()
			c.HasFiles() // though others have made them
		})
	}
}

// A taker in another namespace dies at each step, be it in a container or the
// old process.
func TestTakerDiesInNamespace(t *testing.T) {
	t.Parallel()
	needNamespaces(t)
	for _, inside := range []bool{true, false} { // the taker; the old process is on the other side
		for point, step := range map[proctest.Point]ecdysis.Step{
			proctest.AtNew:                  ecdysis.StepInit,
			proctest.AtListened:             ecdysis.StepInit,
			proctest.On(ecdysis.EventReady): ecdysis.StepHandover,
			proctest.AtServing:              ecdysis.StepProbation,
		} {
			t.Run(fmt.Sprint(point, " ", map[bool]string{true: "inside", false: "outside"}[inside]), func(t *testing.T) {
				t.Parallel()
				c := proctest.New(t, taking().Probation(time.Hour), taking().Hold(point))
				old, taker := outside, inContainer(c, false)
				if !inside {
					old, taker = taker, old
				}
				p := c.Start(old)
				unchanged := keeps(p)
				n := c.Launch(taker)
				n.At(point)
				n.Kill()
				if e := p.Event(ecdysis.EventUpgradeFailed, 0); stepOf(e) != step {
					t.Errorf("event %v; want a failure at %s", e, step)
				}
				servesAt(p, []proctest.Addr{p.Addr(0), {Network: "unix", Address: c.Path("sock")}})
				p.HasPIDFile()
				c.HasFiles("pid", "sock", "take")
				unchanged()
			})
		}
	}
}
