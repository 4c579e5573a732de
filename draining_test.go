//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// keep connects to p, which then cannot end before the client does.
func (p *proc) keep() net.Conn {
	p.t.Helper()
	network, address := p.addr(0)
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	p.stillOn(c)
	return c
}

// stillOn asserts that p serves a client that it has.
func (p *proc) stillOn(c net.Conn) {
	p.t.Helper()
	if pid, _, err := askOn(c); err != nil || pid != p.pid {
		p.t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
	}
}

// dead returns when a process has closed all that it had. Its connection to
// the hub may be closed before its stream to a newer generation is.
func (p *proc) dead() {
	p.t.Helper()
	p.ended()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s := proctest.State(p.t, p.pid)
		if s == "" || proctest.IsZombie(p.pid) {
			return
		}
		if time.Now().After(end) {
			p.t.Fatalf("process %d is in state %s", p.pid, s)
		}
	}
}

// chain starts a process and upgrades it n times. Each but the last drains,
// for a client's sake.
func (h *hub) chain(n int) (procs []*proc, clients []net.Conn) {
	h.t.Helper()
	procs = []*proc{h.serving()}
	for i := range n {
		p := procs[i]
		clients = append(clients, p.keep())
		procs = append(procs, p.upgrade())
		p.at("wait returned")
	}
	return procs, clients
}

// A process whose parent still drains is upgraded, and so on, without bound
// if none is set. Each serves the clients that it has, and ends with them.
func TestSeveralDrain(t *testing.T) {
	t.Parallel()
	h := newHub(t, triggered(&hub{dir: shortDir(t)}))
	procs, clients := h.chain(5)
	last := procs[5]
	last.serves()
	for _, i := range []int{2, 0, 4, 1, 3} {
		for j, c := range clients {
			if c != nil {
				procs[j].stillOn(c)
			}
		}
		clients[i].Close()
		clients[i] = nil
		procs[i].ended()
	}
	last.serves()
	if m := last.call("generation"); m.Text[0] != "5" {
		t.Errorf("generation %s; want 5", m.Text[0])
	}
	last.upgrade().serves()
}

// The bound holds for each trigger, however far the older generations are
// away, and opens as soon as one of them has ended.
func TestMaxDraining(t *testing.T) {
	t.Parallel()
	const limit = 2
	s := triggered(&hub{dir: shortDir(t)})
	s.Options.MaxDraining = limit
	h := newHub(t, s)
	procs, clients := h.chain(limit + 1) // with two draining it is allowed
	p := procs[limit+1]
	h.none()
	text := fmt.Sprintf("%v: %d are alive, and Options.MaxDraining is %d", ecdysis.ErrDraining, limit+1, limit)
	for i := range 2 {
		if e := p.failUpgrade(command{}, "", "ErrDraining"); e.Text != text {
			t.Errorf("Upgrade: %s; want %s", e.Text, text)
		}
		connect(t, s.Options.UpgradeSocket).wants("error: " + text)
		p.failed(2*i, bySocket(s.Options.UpgradeSocket), text)
		p.signal(syscall.SIGHUP)
		p.failed(2*i+1, " by signal hangup", text)
	}
	p.serves()
	for i, c := range clients {
		procs[i].stillOn(c)
	}
	p.hasEvents(slices.Repeat([]ecdysis.EventKind{ecdysis.EventUpgradeFailed}, 4)...)
	h.none()

	// One that is neither the first nor the parent ends.
	clients[1].Close()
	procs[1].dead()
	client := p.keep()
	answer := request(t, s.Options.UpgradeSocket)
	n := h.proc()
	if line, err := answer(); err != nil || line != n.line(limit+2) {
		t.Fatalf("with a place free: %q, %v; want %q", line, err, n.line(limit+2))
	}
	n.at("serving")
	// And the place is taken.
	n.failUpgrade(command{}, "", "ErrDraining")
	p.stillOn(client)
}

// One that was killed and that nobody has waited for has a PID, and no place.
// Nor do its descriptors stay in those that come after it.
func TestMaxDrainingKilled(t *testing.T) {
	t.Parallel()
	s := triggered(&hub{dir: shortDir(t)})
	s.Options.MaxDraining = 1
	h := newHub(t, s)
	procs, clients := h.chain(2)
	p := procs[2]
	streams := func(p *proc) (n int) {
		for _, s := range p.call("fds").Text {
			if strings.Contains(s, "socket:") {
				n++
			}
		}
		return n
	}
	before := streams(p)
	p.failUpgrade(command{}, "", "ErrDraining")
	if err := procs[1].os.Kill(); err != nil {
		t.Fatal(err)
	}
	zombie(t, procs[1].pid) // the first one is its parent
	procs[0].stillOn(clients[0])
	client := p.keep()
	n := p.upgrade() // n sees the first one and p
	zombie(t, procs[1].pid)
	n.failUpgrade(command{}, "", "ErrDraining")
	if after := streams(n); after != before {
		t.Errorf("%d sockets in the last one, %d in the one before, each with two older ones alive", after, before)
	}
	p.stillOn(client)
	if err := procs[0].os.Kill(); err != nil {
		t.Fatal(err)
	}
	procs[0].dead()
	before = streams(n)
	n.failUpgrade(command{Args: []string{"veto"}}, "prepare", "")
	if after := streams(n); after != before-1 {
		t.Errorf("%d sockets after it has ended, %d before; want one less", after, before)
	}
	n.upgrade().serves()
}
