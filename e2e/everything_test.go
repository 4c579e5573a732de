package e2e

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A takeover of all that can be handed on, and takeovers and upgrades in turn.

// Everything is handed on, in use and under load, and no client sees it.
func TestTakeoverOfEverything(t *testing.T) {
	t.Parallel()
	const stateSize = 300_000
	proctest.SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
	spec := taking().And("udp", "127.0.0.1:0").And("unixgram", "$DIR/gram").And("unixpacket", "$DIR/seq")
	spec = sendingState(spec, sending{Size: stateSize})
	spec.Options.UpgradeSocket = "$DIR/upgrade"
	spec.Options.StopSocket = "$DIR/stop"
	spec.Options.PartialStopSocket = "$DIR/partial"
	c := proctest.New(t, spec, spec.Hold(proctest.AtNew))
	p := c.Start()
	isGeneration(p, 0)

	peer := dialled(p, "conn", "tcp")
	addConn.On(p, named{"conn", "conn"})
	opens(p, "file", c.Path("file"))
	writes(p, "file", "0123456789")
	seeks(p, "file", 4)
	addFile.On(p, named{"file", "file"})
	closes(p, "conn", "file")
	isFirst(p, "pair", "pair")
	sockets := p.Inodes()
	client := p.Dial(0)
	l := p.Load(2)
	l.More(100)

	s := c.Launch()
	s.At(proctest.AtNew)
	l.More(50) // p serves while s begins
	p.HasPIDFile()
	finds(s, claimConn, "conn", "conn", "*net.TCPConn")
	finds(s, claimFile, "file", "file", "*os.File")
	reads(s, "file", "456789")
	readsEnd(s, "file")
	readsRest(s, stateSize, 10_000)
	isPaired(s, "pair", "pair")
	writes(s, "pair.up", "hello")
	reads(p, "pair.down", "hello")
	s.Resume()
	s.At(proctest.AtServing)
	s.Inherits(p)
	isGeneration(s, 1)
	s.HasUnclaimed()
	s.HasPIDFile()
	if got := s.Inodes(); !slices.Equal(got, sockets) {
		t.Errorf("sockets %d; want %d", got, sockets)
	}
	talk(s, "conn", peer)
	closes(s, "conn")
	ends(t, peer) // and p has no copy
	l.More(50)
	s.Serves()

	// The predecessor drains, and exits when its last client has gone.
	if pid, generation, err := proctest.Ask(client); err != nil || pid != p.PID || generation != 0 {
		t.Errorf("the predecessor's client: process %d, generation %d, %v", pid, generation, err)
	}
	proctest.Want(t, s.WaitForPredecessor(time.Millisecond), context.DeadlineExceeded)
	client.Close()
	if err := s.WaitForPredecessor(); err != nil {
		t.Errorf("WaitForParent: %v", err)
	}
	takenOver(p, s, 1)
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	s.HasEvents()
	l.Check()

	// Its control sockets are the successor's.
	c.Specs(spec)
	wait := proctest.BeginRequest(t, c.Path("upgrade"))
	last := c.Next()
	if r, err := wait(); err != nil || r != last.Reply(2) {
		t.Fatalf("upgrade: %v, %v; want %v", r, err, last.Reply(2))
	}
	isGeneration(last, 2)
	last.Inherits(p)
	proctest.Connect(t, c.Path("stop")).Wants(last.Reply(2))
	last.Ended()
	c.HasFiles("file")
}

// A process that has taken over is taken over, and upgrades, and so does the
// next one.
func TestTakeoverAgain(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking())
	first, c := p, p.Chain
	l := p.Load(1)
	for generation := 1; generation <= 6; generation++ {
		l.More(20)
		var s *proctest.Proc
		if generation%3 == 0 {
			s = p.BeginUpgrade().Successor()
			s.At(proctest.AtServing)
			p.Ended()
		} else {
			s = c.Start()
			takenOver(p, s, generation)
		}
		isGeneration(s, generation)
		s.Inherits(first)
		s.HasPIDFile()
		p = s
	}
	l.More(20)
	l.Check()
	p.Stop()
	p.Ended()
	c.HasFiles()
}
