package ecdysis_test

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// Takeover: a process that nobody forked gets everything from the one that
// serves. Each of these processes is started by the test, which is no part of
// the chain.

// taking is a daemon that takes over in the hub's directory, has all that
// bothSpec has, and waits to be taken over.
func (h *hub) taking() spec {
	s := bothSpec(h)
	s.Wait = true
	s.Options.TakeoverSocket = h.take()
	return s
}

func (h *hub) take() string { return filepath.Join(h.dir, "take") }

func (s spec) hold(points ...string) spec {
	do := map[string]string{}
	for k, v := range s.Do {
		do[k] = v
	}
	for _, p := range points {
		do[p] = "hold"
	}
	s.Do = do
	return s
}

// is asserts that p is of this generation, and whether it has a parent.
func (p *proc) is(generation int) {
	p.t.Helper()
	want := []string{fmt.Sprint(generation), fmt.Sprint(generation > 0)}
	if m := p.call("generation"); !slices.Equal(m.Text, want) {
		p.t.Fatalf("process %d: generation, HasParent %q; want %q", p.pid, m.Text, want)
	}
}

// replaced asserts that p has been replaced by s at the takeover socket, and
// knows it, and returns when p has exited.
func (p *proc) replaced(s *proc, generation int) {
	p.t.Helper()
	p.ended()
	e := p.event(ecdysis.EventUpgraded, 0)
	if e.PID != s.pid || e.Generation != generation || e.Socket != p.h.take() || e.Err != "" {
		p.t.Errorf("event %+v; want one of process %d, generation %d, by %s", e, s.pid, generation, p.h.take())
	}
	if m := p.at("wait returned"); m.Text[0] != string(ecdysis.EventUpgraded) || m.Text[2] != p.h.take() {
		p.t.Errorf("Wait returned %q; want that it was replaced by %s", m.Text, p.h.take())
	}
}

// Everything is handed on, in use and under load, and no client sees it.
func TestTakeoverOfEverything(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	h := newHub(t)
	s := h.taking()
	s.Options.UpgradeSocket = filepath.Join(h.dir, "upgrade")
	s.Options.StopSocket = filepath.Join(h.dir, "stop")
	s.Options.PartialStopSocket = filepath.Join(h.dir, "partial")
	d := dgrams(1, dgramSpec{Network: "udp", Address: "127.0.0.1:0"}, dgramSpec{Network: "unixgram", Address: filepath.Join(h.dir, "gram")})
	s.Extra = d.Extra
	s.Extra["seqpacket"] = filepath.Join(h.dir, "seq")
	s.Extra["state"] = "all 100000"
	h.next(s, s.hold("new"))
	p := h.serving()
	p.is(0)

	conn := dialled(p, "c", "tcp")
	p.thing("AddConn", "conn", "c")
	p.thing("close", "c")
	p.thing("open", "f", filepath.Join(h.dir, "file"))
	p.thing("write", "f", "0123456789")
	p.thing("seek", "f", "4")
	p.thing("AddFile", "file", "f")
	p.thing("close", "f")
	p.thing("DatagramPair", "pair", "pair")
	sockets := p.dgram("inodes")
	network, address := p.addr(0)
	client, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if pid, _, err := askOn(client); err != nil || pid != p.pid {
		t.Fatalf("%d, %v", pid, err)
	}
	l := startLoad(t, 2, false, p.list()...)
	dl := startDgrams(p, 1, 4)
	l.more(100)

	n := h.start()
	n.at("new")
	l.more(50) // the old one serves while the new one begins
	p.hasPIDFile()
	n.gives("*net.TCPConn", "Conn", "conn", "c")
	n.gives("*os.File", "File", "file", "f")
	n.gives("456789", "read", "f", "6")
	n.gives("100000|EOF", "state read", "-1", "4096")
	n.gives("*net.UnixConn", "DatagramPair", "pair", "pair")
	n.thing("write", "pair.up", "hello")
	p.gives("hello", "read", "pair.down", "5")
	n.resume()
	n.at("serving")
	n.inherits(p)
	n.is(1)
	n.unclaimed()
	n.hasPIDFile()
	if got := n.dgram("inodes"); !slices.Equal(got, sockets) {
		t.Errorf("packet sockets %q; want %q", got, sockets)
	}
	converse(n, "c", conn)
	n.thing("close", "c")
	ends(t, conn)
	l.more(50)
	dl.answered(n, 20)
	n.serves()

	// The old one drains, and exits when its last client has gone.
	if pid, generation, err := askOn(client); err != nil || pid != p.pid || generation != 0 {
		t.Errorf("the old one's client: %d %d, %v", pid, generation, err)
	}
	if m := n.call("waitparent", "1ms"); m.Err == nil || !slices.Contains(m.Err.Is, "context deadline") {
		t.Errorf("WaitForParent: %+v; want that its time is over", m.Err)
	}
	dl.end()
	client.Close()
	if m := n.call("waitparent"); m.Err != nil {
		t.Errorf("WaitForParent: %+v", m.Err)
	}
	p.replaced(n, 1)
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	n.hasEvents()
	dl.check(n)
	l.check()

	// Its control sockets are the new one's.
	h.next(s)
	answer := request(t, s.Options.UpgradeSocket)
	g := h.proc()
	if line, err := answer(); err != nil || line != g.line(2) {
		t.Fatalf("upgrade: %q, %v", line, err)
	}
	g.is(2)
	g.inherits(p)
	asked(t, s.Options.StopSocket, g.line(2))
	g.ended()
	h.hasFiles("file")
}

// The one that took over is taken over, and upgrades, and so does the next.
func TestTakeoverAgain(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	p := h.serving()
	first := p
	l := startLoad(t, 1, false, p.list()...)
	for generation := 1; generation <= 6; generation++ {
		l.more(20)
		var n *proc
		if generation%3 == 0 {
			n = p.upgrade()
			p.ended()
		} else {
			n = h.serving()
			p.replaced(n, generation)
		}
		n.is(generation)
		n.inherits(first)
		n.hasPIDFile()
		p = n
	}
	l.more(20)
	l.check()
	p.begin(command{Verb: "stop"})
	p.ended()
	h.hasFiles()
}

// Nobody there is a cold start: no file, or one that a process has left that
// was killed.
func TestTakeoverColdStart(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	for range 2 {
		p := h.serving()
		p.is(0)
		p.serves()
		p.hasEvents()
		p.kill()
		h.hasFiles("pid", "sock", "take")
	}
	p := h.serving()
	p.is(0)
	n := h.serving()
	n.is(1)
	p.replaced(n, 1)
	n.serves()
}
