package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/skewtest"
)

// Programs with versions of the package that are still to come.

// program gives a process that Launch starts another program.
func program(path string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Path, cmd.Args[0] = path, path }
}

// carrying is a daemon of every kind of socket, which hands all else on, too.
func carrying() proctest.Spec {
	s := proctest.Both.And("udp", "127.0.0.1:0").And("unixgram", "$DIR/gram").At(proctest.AtStart, skewtest.Sends.Do()).At(proctest.AtNew, skewtest.Carries.Do())
	s.Options.UpgradeSocket = "$DIR/upgrade"
	return s
}

// A program upgrades to one with a later minor version, and back, and neither
// clients nor what is handed on are lost on the way.
func TestNewerVersion(t *testing.T) {
	t.Parallel()
	newer := skewtest.Build(t, skewtest.Newer())
	type step struct {
		path    string
		version string
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	now, later := step{self, skewtest.ThisVersion}, step{newer, "newer"}
	way := []step{now, later, now, later, later, now}
	// follows fails the test unless s is the right version and has all that p had.
	follows := func(t *testing.T, p, s *proctest.Proc, i int) {
		t.Helper()
		if v := skewtest.Version.On(s); v != way[i].version {
			t.Fatalf("generation %d is %q; want %q", i, v, way[i].version)
		}
		if err := skewtest.Carries.ErrAt(s, proctest.AtNew); err != nil {
			t.Fatalf("generation %d: %v", i, err)
		}
		isGeneration(s, i)
		s.Inherits(p)
		s.Serves()
		s.HasPIDFile()
		if way[i-1] == later {
			s.HasUnclaimed(skewtest.Hologram)
		} else {
			s.HasUnclaimed()
		}
	}
	for _, probation := range []time.Duration{0, 20 * time.Millisecond} {
		t.Run("upgrades with a probation of "+probation.String(), func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, carrying().Probation(probation))
			p := c.Start(program(way[0].path))
			l := p.Load(1)
			for i := 1; i < len(way); i++ {
				l.More(20)
				p.Prepare(proctest.Successor{Path: way[i].path})
				n := p.Upgrade()
				follows(t, p, n, i)
				if text := skewtest.Hears.On(p); text != skewtest.Text {
					t.Errorf("generation %d hears %q", i-1, text)
				}
				p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
				p.Exit(0)
				p = n
			}
			l.More(20)
			l.Check()
			p.Stop()
			c.HasFiles()
		})
	}
	t.Run("takeovers", func(t *testing.T) {
		t.Parallel()
		spec := carrying()
		spec.Wait = true
		spec.Options.TakeoverSocket = "$DIR/take"
		c := proctest.New(t, spec)
		p := c.Start(program(way[0].path))
		l := p.Load(1)
		for i := 1; i < len(way); i++ {
			l.More(20)
			n := c.Start(program(way[i].path))
			p.Ended()
			follows(t, p, n, i)
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
			p = n
		}
		l.More(20)
		l.Check()
		p.Stop()
		p.Ended()
		c.HasFiles()
	})
	for name, pair := range map[string][2]step{"to the later one": {now, later}, "to the older one": {later, now}} {
		t.Run("a stop that is passed on "+name, func(t *testing.T) {
			t.Parallel()
			spec := carrying().Probation(time.Hour)
			spec.Wait = true
			c := proctest.New(t, spec)
			p := c.Start(program(pair[0].path))
			a := p.BeginUpgrade(proctest.Successor{Path: pair[1].path})
			n := a.Successor()
			n.At(proctest.AtServing)
			proctest.CallStop.Begin(p)
			if e := n.WaitReturned(); e.Kind != ecdysis.EventStopping || !e.PassedOn {
				t.Errorf("Wait returned %v; want a stop that was passed on", e)
			}
			n.Ended()
			p.Ended()
			c.HasFiles()
		})
		t.Run("a failed upgrade "+name, func(t *testing.T) {
			t.Parallel()
			good := carrying().Probation(time.Hour)
			c := proctest.New(t, good, good.At(proctest.AtListened, proctest.Fail("no paper")), good)
			p := c.Start(program(pair[0].path))
			l := p.Load(1)
			f := p.FailUpgrade(ecdysis.StepInit, nil, proctest.Successor{Path: pair[1].path})
			proctest.Want(t, f, nil, "it says: no paper")
			p.Serves()
			// The next one is killed in its probation.
			a := p.BeginUpgrade(proctest.Successor{Path: pair[1].path})
			n := a.Successor()
			n.At(proctest.AtServing)
			l.Check() // before it dies with a client in its hands
			n.Kill()
			a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
			p.Serves()
			p.HasPIDFile()
		})
	}
	t.Run("requests", func(t *testing.T) {
		t.Parallel()
		spec := carrying()
		spec.Wait = true
		c := proctest.New(t, spec)
		p := c.Start(program(later.path))
		for generation, path := range []string{later.path, now.path} {
			p.Prepare(proctest.Successor{Path: path})
			wait := proctest.BeginRequest(t, c.Path("upgrade"))
			n := c.Next()
			if r, err := wait(); err != nil || r != n.Reply(generation+1) {
				t.Fatalf("upgrade: %v, %v; want %v", r, err, n.Reply(generation+1))
			}
			p.Ended()
			n.At(proctest.AtServing)
			n.Serves()
			p = n
		}
	})
}

// A program with another version of the protocol is refused, with both versions
// in the error, and what serves goes on.
func TestOtherMajorVersion(t *testing.T) {
	t.Parallel()
	other := skewtest.Build(t, skewtest.OtherMajor())
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uses := func(peer, own string) string {
		return fmt.Sprintf("the other process uses version %q of the protocol, this one %s", peer, own)
	}
	for name, way := range map[string]struct{ serves, comes, servesUses, comesUses string }{
		"from this version": {self, other, "1", "2"},
		"to this version":   {other, self, "2", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, taking())
			p := c.Start(program(way.serves))
			p.InWait()
			l := p.Load(1)
			unchanged := p.KeepsFiles()
			for range 2 {
				f := p.FailUpgrade(ecdysis.StepInit, nil, proctest.Successor{Path: way.comes})
				proctest.Want(t, f, nil, uses(way.servesUses, way.comesUses))
				p.Serves()
			}
			n := c.Launch(program(way.comes))
			proctest.Want(t, n.ErrAt(proctest.AtNewFailed), nil, c.Path("take"), "refuses: "+uses(way.comesUses, way.servesUses)) // TAKE comes first
			n.Ended()
			l.More(20)
			p.HasPIDFile()
			c.HasFiles("pid", "sock", "take")
			unchanged()
			// Its own version takes over.
			s := c.Start(program(way.serves))
			takenOver(p, s, 1)
			isGeneration(s, 1)
			s.Serves()
			l.More(20)
			l.Check()
		})
	}
}
