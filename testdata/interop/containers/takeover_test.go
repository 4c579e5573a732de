package containers

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// daemon takes over from the one before it in the chain's directory, which all
// containers of a chain have. It serves TCP of the host's network, a Unix
// socket in that directory, and UDP.
var daemon = proctest.Spec{
	Listen: []proctest.Listen{{Network: "tcp", Address: "127.0.0.1:0"}, {Network: "unix", Address: "$DIR/sock"}, {Network: "udp", Address: "127.0.0.1:0"}},
	Options: ecdysis.Options{
		TakeoverSocket: "$DIR/takeover",
		PIDFile:        "/run/daemon.pid",
		StopSignals:    []os.Signal{syscall.SIGTERM},
	},
	Wait: true,
}

// A proc is a daemon in a container.
type proc struct {
	*proctest.Proc
	*container
}

// launch starts the next daemon of a chain in a container, and returns when it
// has connected to the test, before it does anything else.
func launch(ch *proctest.Chain, changes ...change) *proc {
	ch.T.Helper()
	c := newContainer(ch.T, program(ch.T, ""), "-test.run=^$")
	c.Process.Env = append(c.Process.Env, ch.Env()...)
	c.bind(ch.Dir, ch.Dir)
	for _, f := range changes {
		f(c)
	}
	// The directory and the socket to the test belong to the daemons' user.
	uid, gid := int(c.Process.User.UID), int(c.Process.User.GID)
	for _, m := range c.Linux.UIDMappings {
		uid += int(m.HostID)
		gid += int(m.HostID)
	}
	for _, path := range []string{ch.Dir, ch.Hub()} {
		if err := os.Chown(path, uid, gid); err != nil {
			ch.T.Fatal(err)
		}
	}
	p := &proc{container: c}
	p.Proc = ch.Launch(func(cmd *exec.Cmd) {
		stderr := cmd.Stderr
		*cmd = *c.command()
		cmd.Stderr = stderr
	})
	c.deleted()
	return p
}

// serving is launch, and returns when the daemon serves.
func serving(ch *proctest.Chain, changes ...change) *proc {
	ch.T.Helper()
	p := launch(ch, changes...)
	p.At(proctest.AtServing)
	return p
}

// ends fails the test unless the container ends with this status.
func (p *proc) ends(status int) {
	p.T.Helper()
	want := fmt.Sprintf("exit status %d", status)
	if got := p.ExitStatus(); got != want {
		p.T.Fatalf("the container: %s; want %s", got, want)
	}
}

// answers fails the test unless it is this generation that answers, since each
// container has a process 1.
func answers(p *proctest.Proc, generation int) {
	p.T.Helper()
	for _, a := range p.Addrs() {
		if _, g, err := a.Ask(); err != nil || g != generation {
			p.T.Fatalf("%v: generation %d answers, %v; want %d", a, g, err, generation)
		}
	}
}

// mapped has a user namespace in which root is the host's user with this ID.
func mapped(id uint32) change {
	return func(c *container) {
		c.Linux.Namespaces = append(c.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		c.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: id, Size: 1000}}
		c.Linux.GIDMappings = c.Linux.UIDMappings
		// On the host's network these may not be mounted.
		c.Mounts = slices.DeleteFunc(c.Mounts, func(m specs.Mount) bool { return m.Type == "sysfs" || m.Type == "cgroup" })
	}
}

// Twenty takeovers from container to container, under load.
func TestTakeover(t *testing.T) {
	for name, changes := range map[string][]change{
		"plain":              {},
		"hardened":           {hardened},
		"not root, hardened": {notRoot, hardened},
		"user namespace":     {mapped(200000)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ch := proctest.New(t, daemon)
			old := serving(ch, changes...)
			l := old.Load(2)
			for i := 1; i <= 20; i++ {
				l.More(20)
				p := serving(ch, changes...)
				p.Inherits(old.Proc)
				answers(p.Proc, i)
				old.ends(0)
				old = p
			}
			// One that fails, so that the last daemon is known to act on signals.
			ch.Specs(daemon.At(proctest.AtNew, proctest.Exit(3)))
			launch(ch, changes...).ends(3)
			old.Event(ecdysis.EventUpgradeFailed, 0)
			l.More(20)
			l.Check()
			t.Logf("%d requests were answered", l.Answered())
			old.kill("TERM")
			old.ends(0)
			old.Refuses()
			ch.HasFiles()
		})
	}
}

// Two users do not hand sockets to each other. The old process serves on, and
// the next one of its own user takes over.
func TestTakeoverRefused(t *testing.T) {
	for _, c := range []struct {
		name       string
		old, taker []change
	}{
		{"root by another", nil, []change{notRoot}},
		{"another by another", []change{notRoot}, []change{func(c *container) { c.Process.User = specs.User{UID: user + 1, GID: user} }}},
		{"other mappings", []change{mapped(200000)}, []change{mapped(300000)}},
		{"host by user namespace", nil, []change{mapped(200000)}},
		{"not root by user namespace", []change{notRoot}, []change{mapped(200000)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ch := proctest.New(t, daemon)
			old := serving(ch, c.old...)
			l := old.Load(2)
			l.More(10)
			taker := launch(ch, c.taker...)
			if err := taker.ErrAt(proctest.AtNewFailed); !errors.Is(err, fs.ErrPermission) {
				t.Fatalf("New: %v; want that the socket is another user's", err)
			}
			taker.ends(1)
			l.More(10)
			answers(old.Proc, 0)
			p := serving(ch, c.old...)
			answers(p.Proc, 1)
			old.ends(0)
			l.More(10)
			l.Check()
		})
	}
}

// A step of a takeover is a point at which one of the two processes holds.
type step struct {
	name       string
	old, taker proctest.Point
	probation  time.Duration
}

var steps = []step{
	{name: "start", taker: proctest.AtStart},
	{name: "new", taker: proctest.AtNew},
	{name: "listened", taker: proctest.AtListened},
	{name: "handover", old: proctest.On(ecdysis.EventHandover)},
	{name: "committed", taker: proctest.On(ecdysis.EventReady)},
	{name: "probation", probation: time.Minute},
	{name: "final"},
}

// at starts a chain under load, and a takeover that has come to the step.
func (s step) at(t *testing.T, changes ...change) (old, taker *proc, l *proctest.Load) {
	t.Helper()
	old = serving(s.chain(t), changes...)
	l = proctest.StartLoad(t, proctest.Clients{N: 2, Killed: 1}, old.Addrs()...)
	l.More(10)
	old.Dial(0) // a client that keeps it
	return old, s.begin(old, changes...), l
}

// chain is of two daemons that hold at the step, and of one that does not.
func (s step) chain(t *testing.T) *proctest.Chain {
	t.Helper()
	return proctest.New(t, daemon.Probation(s.probation).At(s.old, proctest.Once(proctest.Hold)), daemon.At(s.taker, proctest.Hold), daemon)
}

// begin starts the takeover.
func (s step) begin(old *proc, changes ...change) (taker *proc) {
	old.T.Helper()
	taker = launch(old.Chain, changes...)
	switch {
	case s.old != "":
		old.At(s.old)
	case s.taker != "":
		taker.At(s.taker)
	default:
		taker.At(proctest.AtServing)
		if s.probation == 0 {
			old.WaitReturned()
		}
	}
	return taker
}

// The container of the old process is killed at each step.
func TestTakeoverOldKilled(t *testing.T) {
	for _, s := range steps[1:] { // before that it would be no takeover
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			old, taker, l := s.at(t, hardened)
			old.kill("KILL")
			old.ends(137)
			if s.taker != "" {
				taker.Resume()
			}
			taker.At(proctest.AtServing)
			answers(taker.Proc, 1)
			l.More(10)
			p := serving(taker.Chain, hardened)
			taker.ends(0)
			answers(p.Proc, 2)
			l.More(10)
			l.Check()
		})
	}
}

// The container of the new process is killed at each step: the old one serves
// on, and the next one takes over.
func TestTakeoverTakerKilled(t *testing.T) {
	for _, s := range steps[:len(steps)-1] { // after that there is nobody
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			old, taker, l := s.at(t, hardened)
			taker.kill("KILL")
			taker.ends(137)
			if s.old != "" {
				old.Resume()
			}
			l.More(10)
			answers(old.Proc, 0)
			p := serving(old.Chain, hardened)
			answers(p.Proc, 1)
			l.More(10)
			l.Check()
		})
	}
}

// The container of the old process is stopped at each step of a takeover, as
// kubelet does to a pod. That is consent: the new one serves, and no client is
// lost.
func TestTakeoverOldStopped(t *testing.T) {
	for _, s := range steps[1 : len(steps)-1] {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			old, taker, l := s.at(t, hardened)
			old.kill("TERM")
			if s.old != "" {
				old.Resume()
			} else if s.name != "probation" {
				old.Event(ecdysis.EventStopDeferred, 0)
			}
			if s.taker != "" {
				taker.Resume()
			}
			taker.At(proctest.AtServing)
			old.WaitReturned()
			answers(taker.Proc, 1)
			l.More(10)
			l.Check()
		})
	}
}

// The container of the taker is stopped at each step of a takeover. Before the
// handover the old one serves on, and the next one takes over. From then on the
// stop is the service's, and both end in order.
func TestTakeoverTakerStopped(t *testing.T) {
	for i, s := range steps {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			if i >= slices.IndexFunc(steps, func(s step) bool { return s.name == "handover" }) {
				old := serving(s.chain(t), hardened)
				taker := s.begin(old, hardened)
				taker.kill("TERM")
				if s.old != "" {
					old.Resume()
				}
				if s.taker != "" {
					taker.Resume()
				}
				taker.Closed()
				old.WaitReturned()
				old.Refuses()
				return
			}
			old, taker, l := s.at(t, hardened)
			taker.kill("TERM")
			taker.Closed()
			l.More(10)
			answers(old.Proc, 0)
			p := serving(old.Chain, hardened)
			answers(p.Proc, 1)
			l.More(10)
			l.Check()
		})
	}
}

// ownNetwork is a network namespace of the container's own.
func ownNetwork(c *container) {
	c.Linux.Namespaces = append(c.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
}

// A taker on a network of its own is refused: no client would reach the
// sockets that it inherits.
func TestTakeoverNetworks(t *testing.T) {
	t.Parallel()
	ch := proctest.New(t, daemon)
	old := serving(ch, hardened)
	l := old.Load(2)
	l.More(10)
	taker := launch(ch, hardened, ownNetwork)
	for side, err := range map[string]error{
		"taker": taker.ErrAt(proctest.AtNewFailed),
		"old":   old.Event(ecdysis.EventUpgradeFailed, 0).Err,
	} {
		if !strings.Contains(fmt.Sprint(err), "AcrossNetworks") {
			t.Errorf("the %s one's error: %v; want that it says how to allow this", side, err)
		}
	}
	taker.ends(1)
	answers(old.Proc, 0)
	l.More(10)
	ch.Specs(daemon)
	p := serving(ch, hardened)
	answers(p.Proc, 1)
	old.ends(0)
	l.Check()
}

// The new version, run inside the container of the old one, would end with its
// PID 1.
func TestTakeoverFromInside(t *testing.T) {
	t.Parallel()
	ch := proctest.New(t, daemon)
	old := serving(ch, hardened)
	taker := ch.Launch(func(cmd *exec.Cmd) {
		stderr := cmd.Stderr
		args := []string{"exec"}
		for _, v := range ch.Env() {
			args = append(args, "--env", v)
		}
		*cmd = *runc(append(args, old.id, "/daemon", "-test.run=^$")...)
		cmd.Stderr = stderr
	})
	if err := taker.ErrAt(proctest.AtNewFailed); !strings.Contains(err.Error(), ecdysis.ErrInit.Error()) {
		t.Fatalf("New: %v; want ErrInit", err)
	}
	answers(old.Proc, 0)
	p := serving(ch, hardened)
	answers(p.Proc, 1)
	old.ends(0)
}
