package containers

import (
	"fmt"
	"os/exec"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// initProcess makes a program of the host PID 1, with the daemon as its child,
// as docker run --init does.
func initProcess(name string, args ...string) change {
	return func(c *container) {
		c.t.Helper()
		path, err := exec.LookPath(name)
		if err != nil {
			missing(c.t, err)
		}
		c.Process.Args = append(append([]string{path}, args...), c.Process.Args...)
		userland(c)
	}
}

var inits = map[string]change{
	"tini":               initProcess("tini", "--"),
	"tini -g":            initProcess("tini", "-g", "--"), // signals its child's process group
	"dumb-init":          initProcess("dumb-init", "--"),  // does so, too
	"dumb-init one only": initProcess("dumb-init", "--single-child", "--"),
}

// The keeper works as the child of an init process.
func TestInit(t *testing.T) {
	for name, as := range inits {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := keep(t, hardened, as)
			e := startEchoes(t, k.dial, 4)
			for i := 1; i <= 3; i++ {
				e.more(20)
				install(t, program(t, "kept"), k.c.file("vol/kept"))
				k.upgrade(i)
			}
			e.more(20)
			e.check()
			client := k.client()
			k.waits()
			k.c.kill("TERM")
			k.Await("stopping by signal terminated")
			k.answers(client)
			client.Close()
			ended(t, k.Program, 0)
		})
		t.Run(name+", killed", func(t *testing.T) {
			t.Parallel()
			k := keep(t, hardened, as)
			k.upgrade(1)
			k.generation().Kill()
			ended(t, k.Program, 137)
		})
	}
}

// Without a keeper the first upgrade ends the container, because an init process
// ends with its first child, even if it has another one.
func TestInitWithoutKeeper(t *testing.T) {
	for name, as := range inits {
		for _, sibling := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", sibling ", sibling), func(t *testing.T) {
				t.Parallel()
				p := serving(proctest.New(t, daemon), hardened, as)
				a := p.BeginUpgrade(proctest.Successor{Sibling: sibling})
				next := a.Successor()
				a.OK()
				p.ends(0)
				next.Ended()
				next.Refuses()
			})
		}
	}
}

// PID 1 without a keeper refuses to be replaced, and serves on.
func TestInitRefused(t *testing.T) {
	t.Parallel()
	p := serving(proctest.New(t, daemon), hardened)
	l := p.Load(1)
	for range 3 {
		p.RefusesUpgrade(ecdysis.ErrInit)
		l.More(10)
	}
	l.Check()
	answers(p.Proc, 0)
}
