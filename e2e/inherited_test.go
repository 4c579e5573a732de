package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The system lets a child inherit descriptors and the environment. A successor
// gets the standard descriptors as they are and one variable, and other programs
// get nothing of an upgrade.

var closeFD = proctest.Define("close a descriptor", func(_ *proctest.Daemon, fd int) (proctest.None, error) {
	return proctest.None{}, syscall.Close(fd)
})

// listenAt listens with a socket that has the number fd, and returns its
// address.
var listenAt = proctest.Define("listen at", func(d *proctest.Daemon, fd int) (string, error) {
	lc := ecdysis.ListenConfig{Control: func(string, string, syscall.RawConn) error { return syscall.Close(fd) }}
	ln, err := d.U.ListenWith(lc, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	d.Keep(ln)
	d.Accept(ln)
	sa, err := syscall.Getsockname(fd)
	if in, ok := sa.(*syscall.SockaddrInet4); !ok || in.Port != ln.Addr().(*net.TCPAddr).Port {
		return "", fmt.Errorf("descriptor %d is not the socket: %v, %w", fd, sa, err)
	}
	return ln.Addr().String(), nil
})

// The successor gets /dev/null for a standard descriptor that is closed, and
// no socket that has the number of one.
func TestStandardDescriptorsClosed(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells this", "linux")
	for _, what := range []string{"free", "taken by listeners"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.TCP)
			next, addrs := proctest.TCP, p.Addrs()
			for fd := range 3 {
				if what == "free" {
					closeFD.On(p, fd)
					continue
				}
				addrs = append(addrs, proctest.Addr{Network: "tcp", Address: listenAt.On(p, fd)})
				next = next.And("tcp", "127.0.0.1:0")
			}
			p.Chain.Specs(next)
			// A script sees what it got before Go's runtime has begun, which
			// opens /dev/null itself.
			got := p.Chain.Path("got")
			s := p.Upgrade(wrapper(t, "got=$(for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done)\n"+
				"echo \"$got\" > "+quoted(got)+"\n"+becomeSelf(t)))
			if b, err := os.ReadFile(got); err != nil || string(b) != strings.Repeat("/dev/null\n", 3) {
				t.Errorf("the successor's standard descriptors: %q, %v; want /dev/null", b, err)
			}
			fds := s.FDs()
			for fd := range 3 {
				if !slices.Contains(fds, fmt.Sprint(fd, " /dev/null")) {
					t.Errorf("the successor has the descriptors %q; want that %d is /dev/null", fds, fd)
				}
			}
			s.Serves()
			for _, a := range addrs {
				s.ServesAt(a)
			}
			s.Upgrade().Serves()
		})
	}
}

// nonblocking reports which of the standard descriptors are.
var nonblocking = proctest.Define("O_NONBLOCK", func(*proctest.Daemon, proctest.None) (list []bool, err error) {
	for fd := range 3 {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return nil, err
		}
		list = append(list, flags&unix.O_NONBLOCK != 0)
	}
	return list, nil
})

// Others have the standard descriptors, too, and do not expect that these become
// non-blocking or blocking.
func TestNonblockUnchanged(t *testing.T) {
	t.Parallel()
	var in, out [2]int
	for _, p := range []*[2]int{&in, &out} {
		if err := syscall.Pipe(p[:]); err != nil {
			t.Fatal(err)
		}
		syscall.CloseOnExec(p[0])
		syscall.CloseOnExec(p[1])
	}
	files := make(map[int]*os.File)
	for _, fd := range append(in[:], out[:]...) {
		files[fd] = os.NewFile(uintptr(fd), "pipe")
		t.Cleanup(func() { files[fd].Close() })
	}
	c := proctest.New(t, proctest.TCP.Hold(proctest.AtStart), proctest.TCP.At(proctest.AtNew, proctest.Exit(3)), proctest.TCP)
	p := c.Launch(func(cmd *exec.Cmd) { cmd.Stdin, cmd.Stdout = files[in[0]], files[out[1]] })
	p.At(proctest.AtStart)
	if err := syscall.SetNonblock(in[0], true); err != nil {
		t.Fatal(err)
	}
	p.Resume()
	p.At(proctest.AtServing)
	unchanged := func(p *proctest.Proc) {
		t.Helper()
		if got := nonblocking.On(p); !slices.Equal(got, []bool{true, false, false}) {
			t.Fatalf("process %d: O_NONBLOCK of the standard descriptors is %v; want it of the first one", p.PID, got)
		}
	}
	unchanged(p)
	p.FailUpgrade(ecdysis.StepInit, nil)
	unchanged(p)
	s := p.Upgrade()
	unchanged(p)
	unchanged(s)
	s.Serves()
	unchanged(s.Upgrade())
}

// inventory is a program that tells which descriptors it has inherited.
var inventory = proctest.DefineRole("inventory", func() {
	for _, fd := range proctest.OpenFDs() {
		fmt.Println(fd)
	}
})

var runInventory = proctest.Define("run inventory", func(*proctest.Daemon, proctest.None) (string, error) {
	out, err := inventory.Command().Output()
	return string(out), err
})

// hasVariable reports whether an environment has the variable that a successor
// gets.
func hasVariable(env []string) bool {
	return slices.ContainsFunc(env, func(s string) bool { return strings.HasPrefix(s, "ECDYSIS_PARENT") })
}

// passesNothing fails the test unless a program that p runs inherits no more
// than one that the test runs, which are the standard descriptors and those with
// which the test itself was started.
func passesNothing(name string, p *proctest.Proc) {
	p.T.Helper()
	if env := p.Environ(); len(env) < 2 || hasVariable(env) {
		p.T.Errorf("%s has the environment %q", name, env)
	}
	out, err := p.Run("/usr/bin/env")
	if env := strings.Split(out, "\n"); err != nil || len(env) < 2 || hasVariable(env) {
		p.T.Errorf("a program of %s has the environment %q, %v", name, env, err)
	}
	numbers := func(fds string) (list []string) {
		for line := range strings.Lines(fds) {
			n, _, _ := strings.Cut(line, " ")
			list = append(list, n)
		}
		return list
	}
	want, err := inventory.Command().Output()
	if err != nil || len(numbers(string(want))) < 3 {
		p.T.Fatalf("descriptors %q, %v", want, err)
	}
	if got := runInventory.On(p); !slices.Equal(numbers(got), numbers(string(want))) {
		p.T.Errorf("a program of %s inherits the descriptors %q; want those of %q", name, got, want)
	}
}

func TestNothingIsInherited(t *testing.T) {
	t.Parallel()
	v := survive(proctest.New(t, proctest.TCP, proctest.TCP.Hold(proctest.AtNew), proctest.TCP))
	passesNothing("the first process", v.Proc)
	a := v.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	passesNothing("the process that upgrades", v.Proc)
	passesNothing("the process that starts", s)
	s.Resume()
	a.OK()
	s.At(proctest.AtServing)
	v.sameFiles()
	passesNothing("the predecessor", v.Proc)
	passesNothing("the successor", s)
	passesNothing("the newest process", s.Upgrade())
	v.load.More(10)
	v.load.Check()
}

func TestVariableIsReplaced(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells this", "linux")
	p := proctest.Start(t, proctest.TCP)
	env := slices.Concat(os.Environ(), p.Chain.Env(), []string{"ECDYSIS_PARENT=fd=99 pid=1 uid=0", "ECDYSIS_PARENT=", "ECDYSIS_PARENTS=3"})
	s := p.Upgrade(proctest.Successor{Env: env})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.PID))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for e := range strings.SplitSeq(string(b), "\x00") {
		if strings.HasPrefix(e, "ECDYSIS_PARENT") {
			found = append(found, e)
		}
	}
	if len(found) != 2 || found[0] != "ECDYSIS_PARENTS=3" || !strings.Contains(found[1], fmt.Sprintf(" pid=%d ", p.PID)) {
		t.Errorf("the successor was started with %q", found)
	}
	isGeneration(s, 1)
	s.Serves()
	s.Upgrade().Serves()
}
