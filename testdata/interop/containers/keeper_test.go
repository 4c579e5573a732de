package containers

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A kept is examples/kept as PID 1 of a container.
type kept struct {
	*proctest.Program
	c       *container
	address string
}

// keep starts it, with its program on a volume, and returns when it serves.
func keep(t *testing.T, changes ...change) *kept {
	t.Helper()
	k := newKept(t, changes...)
	k.start()
	k.serves()
	return k
}

func newKept(t *testing.T, changes ...change) *kept {
	t.Helper()
	k := &kept{c: newContainer(t, program(t, "kept"))}
	if err := os.Mkdir(k.c.file("vol"), 0o755); err != nil {
		t.Fatal(err)
	}
	install(t, program(t, "kept"), k.c.file("vol/kept"))
	k.c.bind(k.c.file("vol"), "/vol")
	k.c.Process.Args = []string{"/vol/kept", "-tcp", "127.0.0.1:0", "-pidfile", "/run/kept.pid"}
	for _, f := range changes {
		f(k.c)
	}
	return k
}

func (k *kept) start() {
	k.c.t.Helper()
	k.Program = proctest.Run(k.c.t, k.c.command())
	k.c.deleted()
}

func (k *kept) serves() {
	k.T.Helper()
	k.address = k.Await(`listening on (\S+)`)[1]
	k.Await(`ready: .*generation=0$`)
}

// pidFile gives the PID file another path.
func pidFile(path string) change {
	return func(c *container) { c.Process.Args[len(c.Process.Args)-1] = path }
}

// upgrade returns when the generation serves.
func (k *kept) upgrade(generation int) {
	k.T.Helper()
	k.c.kill("HUP")
	k.Await(fmt.Sprintf(`upgraded by signal hangup: pid=\d+ generation=%d$`, generation))
}

// Ten upgrades under load, half of them to a program that has been replaced.
// PID 1 stays, becomes the new program, and ends with status 0.
func TestKeeper(t *testing.T) {
	for name, changes := range map[string][]change{
		"plain":              {pidFile("/kept.pid")},
		"read-only":          {readOnly},
		"hardened":           {hardened},
		"not root":           {notRoot},
		"not root, hardened": {notRoot, hardened},
		"64 descriptors":     {few, hardened},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := keep(t, changes...)
			pid := k.c.pid()
			e := startEchoes(t, k.dial, 4)
			for i := 1; i <= 10; i++ {
				e.more(20)
				if i%2 == 0 {
					install(t, program(t, "kept"), k.c.file("vol/kept"))
				}
				k.upgrade(i)
			}
			e.more(20)
			k.runs(pid)
			e.check()
			if now := k.c.pid(); now != pid {
				t.Errorf("PID 1 was process %d, and is %d", pid, now)
			}
			k.waits()
			k.c.kill("TERM")
			ended(t, k.Program, 0)
		})
	}
}

// waits returns when the generation that serves acts on signals: an upgrade to
// a program that is missing has failed.
func (k *kept) waits() {
	k.T.Helper()
	if err := os.Rename(k.c.file("vol/kept"), k.c.file("vol/away")); err != nil {
		k.T.Fatal(err)
	}
	k.c.kill("HUP")
	k.Await("upgrade failed by signal hangup: .*no such file or directory")
	if err := os.Rename(k.c.file("vol/away"), k.c.file("vol/kept")); err != nil {
		k.T.Fatal(err)
	}
}

// runs waits until PID 1 runs the program that is on the volume.
func (k *kept) runs(pid int) {
	k.T.Helper()
	want, err := os.Stat(k.c.file("vol/kept"))
	if err != nil {
		k.T.Fatal(err)
	}
	for end := time.Now().Add(proctest.Patience); ; time.Sleep(time.Millisecond) {
		if got, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && os.SameFile(got, want) {
			return
		}
		if time.Now().After(end) {
			k.T.Fatal("PID 1 does not run the new program")
		}
	}
}

// generation returns the process that the PID file names.
func (k *kept) generation() *os.Process {
	k.T.Helper()
	proc := fmt.Sprintf("/proc/%d/", k.c.pid())
	named, err := os.ReadFile(proc + "root/run/kept.pid")
	if err != nil {
		k.T.Fatal(err)
	}
	for _, child := range descendants(k.c.pid()) {
		status, _ := os.ReadFile("/proc/" + child + "/status")
		if strings.Contains(string(status), "\nNSpid:\t"+child+"\t"+strings.TrimSpace(string(named))+"\n") {
			pid, _ := strconv.Atoi(child)
			p, err := os.FindProcess(pid)
			if err != nil {
				k.T.Fatal(err)
			}
			return p
		}
	}
	k.T.Fatalf("no descendant of PID 1 is process %s", named)
	return nil
}

// descendants lists the children of a process, and theirs.
func descendants(pid int) (list []string) {
	for _, child := range children(pid) {
		n, _ := strconv.Atoi(child)
		list = append(append(list, child), descendants(n)...)
	}
	return list
}

// children lists the children of a process.
func children(pid int) (list []string) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		list = append(list, strings.Fields(string(b))...)
	}
	return list
}

func (k *kept) dial() (net.Conn, error) {
	return net.DialTimeout("tcp", k.address, proctest.Patience)
}

// client connects, and is served.
func (k *kept) client() net.Conn {
	k.T.Helper()
	c, err := k.dial()
	if err != nil {
		k.T.Fatal(err)
	}
	k.T.Cleanup(func() { c.Close() })
	k.answers(c)
	return c
}

func (k *kept) answers(c net.Conn) {
	k.T.Helper()
	if err := echoOn(c); err != nil {
		k.T.Fatal(err)
	}
}

// refuses fails the test if anybody listens.
func (k *kept) refuses() {
	k.T.Helper()
	if err := echo(k.dial); !errors.Is(err, syscall.ECONNREFUSED) {
		k.T.Fatalf("a new client: %v; want that it is refused", err)
	}
}

// cut fails the test unless the connection has been cut.
func (k *kept) cut(c net.Conn) {
	k.T.Helper()
	if err := echoOn(c); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		k.T.Fatalf("the client of a killed container: %v; want that its connection is cut", err)
	}
}

// A stop with clients of two generations: docker stop sends SIGTERM, and
// SIGKILL when the time is over.
func TestKeeperStop(t *testing.T) {
	stopping := func(t *testing.T) (k *kept, first, second net.Conn) {
		t.Parallel()
		k = keep(t, hardened)
		first = k.client()
		k.upgrade(1)
		second = k.client()
		k.upgrade(2)
		k.waits()
		k.c.kill("TERM")
		k.Await("stopping by signal terminated: .*generation=2$")
		return k, first, second
	}
	t.Run("clients end", func(t *testing.T) {
		k, first, second := stopping(t)
		k.answers(second)
		k.answers(first)
		k.refuses()
		second.Close()
		k.answers(first)
		first.Close()
		ended(t, k.Program, 0)
	})
	t.Run("time is over", func(t *testing.T) {
		k, first, second := stopping(t)
		second.Close()
		k.answers(first)
		k.c.kill("KILL")
		ended(t, k.Program, 137)
		k.cut(first)
	})
}

// The container ends as its last generation has.
func TestKeeperStatus(t *testing.T) {
	for _, c := range []struct {
		name   string
		end    func(*kept)
		status int
	}{
		{"killed", func(k *kept) { k.generation().Kill() }, 137},
		{"stack traces", func(k *kept) { k.c.kill("QUIT") }, 2}, // a crash of a Go program
		{"second stop", func(k *kept) {
			k.client()
			k.waits()
			k.c.kill("TERM")
			k.Await("stopping by signal terminated")
			for runc("kill", k.c.id, "TERM").Run() == nil { // until it comes after Wait has returned
			}
		}, 143},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			k := keep(t, hardened)
			k.upgrade(1)
			c.end(k)
			ended(t, k.Program, c.status)
		})
	}
}

// A signal that comes before the first generation serves does not end the
// container.
func TestKeeperSignalAtStart(t *testing.T) {
	t.Parallel()
	for range 20 {
		k := newKept(t, hardened)
		k.start()
		pid := 0
		for end := time.Now().Add(proctest.Patience); pid == 0 || len(children(pid)) == 0; { // without a pause, so as not to be late
			if time.Now().After(end) {
				t.Fatal("the keeper has no child")
			}
			b, _ := os.ReadFile(k.c.file("pid"))
			pid, _ = strconv.Atoi(string(b))
		}
		if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		k.serves()
		k.c.kill("HUP") // if the other one was a moment too early to be kept
		k.Await("upgraded by signal hangup")
	}
}

// A container that was killed leaves its PID file in a volume. The number that
// it holds is that of a process of the next container, too.
func TestKeeperStalePIDFile(t *testing.T) {
	t.Parallel()
	k := keep(t, hardened, pidFile("/vol/kept.pid"))
	k.upgrade(1)
	for range 3 {
		k.c.kill("KILL")
		ended(t, k.Program, 137)
		if !exists(k.c.file("vol/kept.pid")) {
			t.Fatal("the PID file is gone")
		}
		k.start()
		k.serves()
		e := startEchoes(t, k.dial, 2)
		for i := 1; i <= 3; i++ {
			e.more(5)
			k.upgrade(i)
		}
		e.check()
	}
}
