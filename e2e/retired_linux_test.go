package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Takeovers between units, such as containers: who may not take back, and where
// clients could not follow.

// unit is a daemon of this unit that can be taken over.
func unit(name string) proctest.Spec {
	s := proctest.Both
	s.Wait = true
	s.Options.Unit = name
	s.Options.TakeoverSocket = "$DIR/take"
	s.Options.StopSignals = []os.Signal{syscall.SIGTERM}
	return s
}

var waitAgain = proctest.Define("Wait again", func(d *proctest.Daemon, _ proctest.None) (string, error) {
	e := d.U.Wait()
	return e.String(), nil
})

// A process that was taken over serves its clients, is not cut by a stop signal,
// and Wait, called again, returns at it.
func TestTakenOverStaysUntilItIsStopped(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, unit("one"), unit("two"))
	p := c.Start()
	client := p.Dial(0)
	n := c.Launch()
	n.At(proctest.AtServing)
	if e := p.WaitReturned(); e.Kind != ecdysis.EventUpgraded || !e.Takeover {
		t.Errorf("Wait returned %v, takeover: %v; want %v by a takeover", e, e.Takeover, ecdysis.EventUpgraded)
	}
	p.Signal(syscall.SIGTERM)
	p.Answers(client)
	if got := waitAgain.On(p); !strings.HasPrefix(got, "stopping by signal terminated") {
		t.Errorf("Wait returned %q; want the stop by SIGTERM", got)
	}
	p.Answers(client)
	n.Serves()
}

// A unit that was taken over does not take back what it had, and the process
// that serves does not notice it.
func TestRetiredUnit(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, unit("one"), unit("two"))
	p := c.Start()
	n := c.Launch()
	n.At(proctest.AtServing)
	p.Ended()
	l := n.Load(1)
	l.More(5)
	for range 3 { // restarts
		c.Specs(unit("one"))
		r := c.Launch()
		if err := r.ErrAt(proctest.AtNewFailed); !errors.Is(err, ecdysis.ErrRetired) {
			t.Fatalf("New of the retired unit returned %v; want ErrRetired", err)
		}
	}
	n.HasEvents()
	// Also after an upgrade of the unit that serves, and after another takeover.
	c.Specs(unit("two"))
	s := n.Upgrade()
	n.Ended()
	c.Specs(unit("three"))
	third := c.Launch()
	third.At(proctest.AtServing)
	s.Ended()
	for _, name := range []string{"one", "two"} {
		c.Specs(unit(name))
		if err := c.Launch().ErrAt(proctest.AtNewFailed); !errors.Is(err, ecdysis.ErrRetired) {
			t.Fatalf("New of unit %s returned %v; want ErrRetired", name, err)
		}
	}
	l.More(5)
	l.Check()
	third.Serves()
	// If no process serves, a retired unit is the first of a new chain.
	third.Kill()
	c.Specs(unit("one"))
	again := c.Start()
	again.Serves()
	if again.Generation() != 0 {
		t.Errorf("generation %d; want 0", again.Generation())
	}
}

// Within one unit, as when its supervisor restarts it after an upgrade, a
// takeover retires nobody.
func TestTakeoverWithinAUnit(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, unit("one"))
	p := c.Start()
	for range 3 {
		s := p.Upgrade()
		p.Ended()
		p = c.Launch()
		p.At(proctest.AtServing)
		s.Ended()
		p.Serves()
	}
}

// A takeover that fails retires nobody.
func TestFailedTakeoverRetiresNobody(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, unit("one"), unit("two").At(proctest.AtListened, proctest.Exit(3)), unit("one"))
	p := c.Start()
	c.Launch().Ended()
	p.Event(ecdysis.EventUpgradeFailed, 0)
	p.Upgrade().Serves()
}

var waitRetired = proctest.DefineRole("wait retired", func() {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM) // an early one kills nobody
	fmt.Println("waits")
	fmt.Println(ecdysis.WaitRetired(syscall.SIGTERM, syscall.SIGINT))
})

// WaitRetired returns at one of the signals.
func TestWaitRetired(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), waitRetired.Env())
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "waits" {
		t.Fatalf("it prints %q, %v", lines.Text(), lines.Err())
	}
	done := make(chan struct{})
	go func() { // nothing tells when it waits
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
				_ = cmd.Process.Signal(syscall.SIGTERM)
			}
		}
	}()
	if lines.Scan(); lines.Text() != "terminated" {
		t.Errorf("it prints %q, %v; want terminated", lines.Text(), lines.Err())
	}
	close(done)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// inNamespace starts a process in a new namespace.
func inNamespace(flag uintptr) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flag} }
}

// A taker in another network namespace, whose clients could not reach the
// sockets, fails. Both sides say why, and the old process serves on.
func TestTakerInAnotherNetwork(t *testing.T) {
	t.Parallel()
	spec := unit("")
	c := proctest.New(t, spec)
	p := c.Start()
	l := p.Load(1)
	l.More(5)
	n := c.Launch(inNamespace(syscall.CLONE_NEWNET))
	proctest.Want(t, n.ErrAt(proctest.AtNewFailed), nil, "tcp 127.0.0.1:0", "network namespace", "AcrossNetworks")
	proctest.Want(t, p.Event(ecdysis.EventUpgradeFailed, 0).Err, nil, "tcp 127.0.0.1:0", "network namespace")
	p.Serves()
	l.More(5)
	l.Check()

	across := spec
	across.Options.AcrossNetworks = true
	c.Specs(across)
	s := c.Launch(inNamespace(syscall.CLONE_NEWNET))
	s.At(proctest.AtServing)
	s.ServesAt(p.Addr(0)) // its clients are those of the first network
	// What this process has got from another network is handed on in its own.
	s.Upgrade().ServesAt(p.Addr(0))
}

// Unix sockets have no network.
func TestUnixTakerInAnotherNetwork(t *testing.T) {
	t.Parallel()
	spec := unit("")
	spec.Listen = spec.Listen[1:]
	c := proctest.New(t, spec)
	c.Start()
	n := c.Launch(inNamespace(syscall.CLONE_NEWNET))
	n.At(proctest.AtServing)
	n.Serves()
}

// inside starts a further process of the chain as this process's child.
var inside = proctest.Define("start inside", func(_ *proctest.Daemon, env []string) (proctest.None, error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return proctest.None{}, err
	}
	go func() { _ = cmd.Wait() }()
	return proctest.None{}, nil
})

// PID 1 is not taken over from inside its own namespace, where its exit would
// end the taker, too.
func TestInitTakenOverFromInside(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, unit("one"))
	p := c.Start(inNamespace(syscall.CLONE_NEWPID))
	inside.On(p, c.Env())
	n := c.Next()
	proctest.Want(t, n.ErrAt(proctest.AtNewFailed), nil, ecdysis.ErrInit.Error())
	if err := p.Event(ecdysis.EventUpgradeFailed, 0).Err; !errors.Is(err, ecdysis.ErrInit) {
		t.Errorf("the event says %v; want ErrInit", err)
	}
	p.Serves()
	// From outside it may be.
	c.Specs(unit("two"))
	s := c.Launch()
	s.At(proctest.AtServing)
	s.Serves()
}

// A process whose user ID stands for every unknown user does not take strangers
// for itself.
func TestUserThatStandsForOthers(t *testing.T) {
	t.Parallel()
	c := proctest.New(t)
	spec := proctest.TCP
	spec.Wait = true
	spec.Options.UpgradeSocket = "@" + c.Path("upgrade")
	c.Specs(spec)
	p := c.Start(inNamespace(syscall.CLONE_NEWUSER)) // which maps nobody
	_, err := ecdysis.Request(t.Context(), spec.Options.UpgradeSocket)
	proctest.Want(t, err, nil, "stands for every user")
	p.HasEvents()
	p.Serves()
}
