package e2e

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Replaced processes drain, and Options.MaxDraining limits how many.

// drain starts a process and upgrades it n times. Each process but the last
// drains, because the test is a client of it.
func drain(t *testing.T, spec proctest.Spec, n int) (procs []*proctest.Proc, clients []net.Conn) {
	t.Helper()
	procs = []*proctest.Proc{proctest.Start(t, spec)}
	for i := range n {
		p := procs[i]
		clients = append(clients, p.Dial(0))
		procs = append(procs, p.Upgrade())
		p.At(proctest.AtWaitReturned)
	}
	return procs, clients
}

// A process whose predecessor drains is upgraded, and so on, without a limit if
// none is set. Each serves the clients that it has, and ends with them.
func TestSeveralDrain(t *testing.T) {
	t.Parallel()
	procs, clients := drain(t, proctest.Triggered, 5)
	last := procs[5]
	last.Serves()
	for _, i := range []int{2, 0, 4, 1, 3} {
		for j, c := range clients {
			if c != nil {
				procs[j].Answers(c)
			}
		}
		clients[i].Close()
		clients[i] = nil
		procs[i].Ended()
	}
	last.Serves()
	if n := last.Generation(); n != 5 {
		t.Errorf("generation %d; want 5", n)
	}
	last.Upgrade().Serves()
}

// The limit holds for each trigger, however many generations lie between, and
// an upgrade is allowed again as soon as one process has ended.
func TestMaxDraining(t *testing.T) {
	t.Parallel()
	const limit = 2
	spec := proctest.Triggered
	spec.Options.MaxDraining = limit
	procs, clients := drain(t, spec, limit+1) // with two draining it is allowed
	p := procs[limit+1]
	c := p.Chain
	c.None()
	text := fmt.Sprintf("%v: %d are alive, and Options.MaxDraining is %d", ecdysis.ErrDraining, limit+1, limit)
	for i := range 2 {
		if f := p.FailUpgrade("", ecdysis.ErrDraining); f.Error() != text {
			t.Errorf("Upgrade: %v; want %s", f, text)
		}
		proctest.Connect(t, c.Path("upgrade")).WantsLine("error: " + text)
		hasRefused(p, 2*i, asked(c, "upgrade"), text)
		p.Signal(syscall.SIGHUP)
		hasRefused(p, 2*i+1, signaled(syscall.SIGHUP), text)
	}
	p.Serves()
	for i, client := range clients {
		procs[i].Answers(client)
	}
	p.HasEvents(slices.Repeat([]ecdysis.EventKind{ecdysis.EventUpgradeFailed}, 4)...)
	c.None()

	// A process ends that is neither the first one nor the predecessor.
	clients[1].Close()
	procs[1].Closed()
	client := p.Dial(0)
	wait := proctest.BeginRequest(t, c.Path("upgrade"))
	s := c.Next()
	if r, err := wait(); err != nil || r != s.Reply(limit+2) {
		t.Fatalf("with one process less: %v, %v; want %v", r, err, s.Reply(limit+2))
	}
	s.At(proctest.AtServing)
	// And p has taken its place.
	s.RefusesUpgrade(ecdysis.ErrDraining)
	p.Answers(client)
}

// A process that was killed and not reaped has a PID, and is not counted. Its
// descriptors do not stay in the processes that come after it.
func TestMaxDrainingKilled(t *testing.T) {
	t.Parallel()
	spec := proctest.Triggered
	spec.Options.MaxDraining = 1
	procs, clients := drain(t, spec, 2)
	p := procs[2]
	sockets := func(p *proctest.Proc) (n int) {
		t.Helper()
		for _, s := range p.FDs() {
			if strings.Contains(s, "socket:") {
				n++
			}
		}
		return n
	}
	before := sockets(p)
	p.RefusesUpgrade(ecdysis.ErrDraining)
	procs[1].Kill()
	procs[1].Zombie() // the first one is its parent
	procs[0].Answers(clients[0])
	client := p.Dial(0)
	s := p.Upgrade() // which counts the first process and p
	procs[1].Zombie()
	s.RefusesUpgrade(ecdysis.ErrDraining)
	if after := sockets(s); after != before {
		t.Errorf("%d sockets in the last process, %d in the one before, with two older ones alive in each case", after, before)
	}
	p.Answers(client)
	procs[0].Kill()
	before = sockets(s)
	s.FailUpgrade(ecdysis.StepPrepare, nil, proctest.Successor{Veto: "not now"})
	if after := sockets(s); after != before-1 {
		t.Errorf("%d sockets after a process has ended, %d before; want one less", after, before)
	}
	s.Upgrade().Serves()
}
