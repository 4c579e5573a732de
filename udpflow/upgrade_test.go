package udpflow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// These tests have real processes. A process answers each packet with its process
// ID and generation.

// setup is planned for AtStart.
var setup = proctest.Define("Setup", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	Setup(d.Options)
	return proctest.None{}, nil
})

// A socketSpec has the arguments of ListenPacket, and the number of calls.
type socketSpec struct {
	Network, Address string
	Key, Generation  string // the names of functions below, or "" for none
	IdleTimeout      time.Duration
	MaxFlows, Buffer int
	ReusePort        bool
	Sockets          int  // 0 means 1
	Layout           bool // know another layout of the table
}

var testKeys = map[string]func([]byte, netip.AddrPort) []byte{
	"first byte": func(b []byte, _ netip.AddrPort) []byte { return b[:min(1, len(b))] },
	"two bytes":  func(b []byte, _ netip.AddrPort) []byte { return b[:min(2, len(b))] },
}

var testGenerations = map[string]func([]byte) (byte, bool){
	// "g" and a number.
	"named": func(b []byte) (byte, bool) {
		var n int
		if _, err := fmt.Sscanf(string(b), "g%d", &n); err != nil {
			return 0, false
		}
		return byte(n), true
	},
}

// flowSockets makes d's sockets, or ends d if that fails.
var flowSockets = proctest.Define("ListenPacket", func(d *proctest.Daemon, s socketSpec) (proctest.None, error) {
	if s.Layout {
		layout++
	}
	config := Config{IdleTimeout: s.IdleTimeout, MaxFlows: s.MaxFlows, Buffer: s.Buffer, Key: testKeys[s.Key], Generation: testGenerations[s.Generation]}
	config.Listen.ReusePort = s.ReusePort
	for range max(1, s.Sockets) {
		c, err := ListenPacket(d.U, s.Network, s.Address, config)
		if err != nil {
			d.Fatal(d.U.Fail(err))
		}
		if s.ReusePort {
			s.Address = c.LocalAddr().String()
		}
		d.Keep(c)
	}
	return proctest.None{}, nil
})

var drained = proctest.Define("Drained", func(d *proctest.Daemon, limit time.Duration) (proctest.None, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return proctest.None{}, d.PacketConn(0).(*Conn).Drained(ctx)
})

var stats = proctest.Define("Stats", func(d *proctest.Daemon, i int) (Stats, error) {
	return d.PacketConn(i).(*Conn).Stats(), nil
})

var claim = proctest.Define("Claim", func(d *proctest.Daemon, key []byte) (proctest.None, error) {
	d.PacketConn(0).(*Conn).Claim(key)
	return proctest.None{}, nil
})

// daemon is a process with these sockets.
func daemon(s socketSpec) proctest.Spec {
	return proctest.Spec{}.At(proctest.AtStart, setup.Do()).At(proctest.AtNew, flowSockets.Do(s))
}

var anyPort = socketSpec{Network: "udp4", Address: "127.0.0.1:0"}

// say sends text and returns the process that answers.
func say(t testing.TB, c net.Conn, text string) (pid int) {
	t.Helper()
	mustWrite(t, c, text)
	return hear(t, c)
}

func hear(t testing.TB, c net.Conn) (pid int) {
	t.Helper()
	b := make([]byte, 100)
	if err := c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	var generation int
	if _, err := fmt.Sscan(string(b[:n]), &pid, &generation); err != nil {
		t.Fatal(err)
	}
	return pid
}

// connect returns a client that has sent nothing.
func connect(t testing.TB, p *proctest.Proc) net.Conn {
	t.Helper()
	c, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestFlowsSurvive(t *testing.T) {
	t.Parallel()
	for _, a := range []socketSpec{anyPort, {Network: "udp6", Address: "[::1]:0"}, {Network: "udp", Address: "127.0.0.1:0"}} {
		t.Run(a.Network, func(t *testing.T) {
			t.Parallel()
			if a.Network == "udp6" {
				c, err := net.ListenPacket("udp6", "[::1]:0")
				if err != nil {
					t.Skipf("no IPv6 here: %v", err)
				}
				c.Close()
			}
			p := proctest.Start(t, daemon(a))
			first := p.Dial(0)
			s := p.Upgrade()
			p.Answers(first)
			second := s.Dial(0)
			n := s.Upgrade()
			third := n.Dial(0)
			for range 3 {
				p.Answers(first)
				s.Answers(second)
				n.Answers(third)
			}
			n.Serves()
			if got := stats.On(n); got.Own != 5 || got.Forwarded != 6 || got.Dropped+got.Received+got.TakenOver+got.Untracked != 0 {
				t.Errorf("%+v", got)
			}
			if got := stats.On(p); got.Received != 4 || got.Own != 1 {
				t.Errorf("the first process: %+v", got)
			}
			// A process that has ended, or has closed its socket, has no flows.
			p.Kill()
			n.Answers(first)
			if err := s.Close(0); err != nil {
				t.Fatal(err)
			}
			n.Answers(second)
			n.Answers(first)
			if got := stats.On(n); got.TakenOver != 2 {
				t.Errorf("%+v; want two flows taken over", got)
			}
			n.Upgrade().Serves()
		})
	}
}

// A wildcard address serves IPv4 and IPv6.
func TestWildcard(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, daemon(socketSpec{Network: "udp", Address: ":0"}))
	_, port, err := net.SplitHostPort(p.Addr(0).Address)
	if err != nil {
		t.Fatal(err)
	}
	var clients []net.Conn
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := net.Dial("udp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Logf("no way to %s: %v", host, err)
			continue
		}
		if hear(t, c) != p.PID {
			t.Fatal("another process answers")
		}
		clients = append(clients, c)
	}
	s := p.Upgrade()
	for _, c := range clients {
		p.Answers(c)
	}
	s.Upgrade()
	for _, c := range clients {
		p.Answers(c)
	}
}

// Twenty generations live at once, each with a flow. None is affected by what
// happens to another.
func TestChain(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, daemon(anyPort))
	var procs []*proctest.Proc
	var clients []net.Conn
	for range 20 {
		procs, clients = append(procs, p), append(clients, p.Dial(0))
		p = p.Upgrade()
	}
	procs, clients = append(procs, p), append(clients, p.Dial(0))
	all := func() {
		t.Helper()
		for i, c := range clients {
			procs[i].Answers(c)
		}
	}
	all()
	for _, i := range []int{7, 0, 15} {
		procs[i].Kill()
		procs[i] = p
		all()
	}
	// A process that is stopped answers when it goes on.
	procs[10].Signal(syscall.SIGSTOP)
	for range 20 {
		mustWrite(t, clients[10], "while it is stopped")
	}
	for i, c := range clients {
		if i != 10 {
			procs[i].Answers(c)
		}
	}
	p = p.Upgrade()
	procs, clients = append(procs, p), append(clients, p.Dial(0))
	procs[10].Signal(syscall.SIGCONT)
	for range 20 {
		if pid := hear(t, clients[10]); pid != procs[10].PID {
			t.Fatalf("process %d answers; want %d", pid, procs[10].PID)
		}
	}
	all()
	// The inboxes of processes that have ended are not handed on for ever.
	if got := inboxes.On(p); got != 22-3 {
		t.Errorf("%d inboxes; want those of the living, 19", got)
	}
}

var inboxes = proctest.Define("inboxes", func(d *proctest.Daemon, _ proctest.None) (int, error) {
	return len(d.U.FileNames("udpflow ")) - 1, nil
})

// A process that reads no more loses the packets that do not fit its inbox. Other
// processes lose none.
func TestStuck(t *testing.T) {
	t.Parallel()
	a := anyPort
	a.Buffer = 16 << 10
	p := proctest.Start(t, daemon(a))
	stuck := p.Dial(0)
	p.Signal(syscall.SIGSTOP)
	p.Signal(syscall.SIGCONT)
	s := p.Upgrade()
	fine := s.Dial(0)
	p.Signal(syscall.SIGSTOP)
	const packets = 300
	for range packets {
		mustWrite(t, stuck, "into the void")
		s.Answers(fine)
	}
	n := s.Upgrade()
	s.Answers(fine)
	n.Serves()
	got := stats.On(s)
	if got.Dropped == 0 || got.Dropped+got.Forwarded != packets {
		t.Errorf("%+v; want %d packets forwarded or dropped", got, packets)
	}
	p.Signal(syscall.SIGCONT)
	for range got.Forwarded {
		if pid := hear(t, stuck); pid != p.PID {
			t.Fatalf("process %d answers", pid)
		}
	}
	p.Answers(stuck)
}

// The newest process is killed while its successor starts. The successor serves
// the flows of all processes that live.
func TestNewestKilled(t *testing.T) {
	t.Parallel()
	for _, point := range []proctest.Point{proctest.AtListened, proctest.On(ecdysis.EventReady)} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			spec := daemon(anyPort)
			p := proctest.Start(t, spec, spec, spec.Hold(point), spec)
			first := p.Dial(0)
			s := p.Upgrade()
			second := s.Dial(0)
			n := s.BeginUpgrade().Successor()
			n.At(point)
			s.Kill()
			mustWrite(t, first, "in the socket")
			mustWrite(t, second, "in the socket")
			n.Resume()
			n.At(proctest.AtServing)
			if pid := hear(t, first); pid != p.PID {
				t.Errorf("process %d answers; want %d", pid, p.PID)
			}
			if pid := hear(t, second); pid != n.PID {
				t.Errorf("process %d answers; want %d", pid, n.PID)
			}
			n.Serves()
			n = n.Upgrade()
			p.Answers(first)
			n.Serves()
		})
	}
}

// Upgrades that fail at any step do not affect flows.
func TestFailedUpgrades(t *testing.T) {
	t.Parallel()
	good := daemon(anyPort)
	for _, c := range []struct {
		name      string
		step      ecdysis.Step
		target    error
		successor proctest.Spec
	}{
		{"new", "init", io.ErrUnexpectedEOF, good.At(proctest.AtNew, proctest.Exit(3))},
		{"listened", "init", io.ErrUnexpectedEOF, good.At(proctest.AtListened, proctest.Exit(3))},
		{"claimed", "init", io.ErrUnexpectedEOF, good.At(proctest.AtListened, claim.Do([]byte("x")), proctest.Kill)},
		{"committed", "handover", io.ErrUnexpectedEOF, good.At(proctest.On(ecdysis.EventReady), proctest.Kill)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, good, good, c.successor, c.successor, good)
			first := p.Dial(0)
			s := p.Upgrade()
			second := s.Dial(0)
			for range 2 {
				a := s.BeginUpgrade()
				mustWrite(t, first, "meanwhile")
				mustWrite(t, second, "meanwhile")
				a.Fails(c.step, c.target)
				if pid := hear(t, first); pid != p.PID {
					t.Fatalf("process %d answers; want %d", pid, p.PID)
				}
				if pid := hear(t, second); pid != s.PID {
					t.Fatalf("process %d answers; want %d", pid, s.PID)
				}
				s.Serves()
			}
			n := s.Upgrade()
			p.Answers(first)
			s.Answers(second)
			n.Serves()
		})
	}
}

// A successor ends in its probation. Its flows go to the process that takes the
// socket back. Other flows stay where they are.
func TestProbation(t *testing.T) {
	t.Parallel()
	good := daemon(anyPort)
	standing := good.Probation(time.Minute)
	p := proctest.Start(t, good, standing, good)
	first := p.Dial(0)
	s := p.Upgrade()
	second := s.Dial(0)
	for range 2 {
		a := s.BeginUpgrade()
		n := a.Successor()
		n.At(proctest.AtServing)
		third := n.Dial(0)
		for range 3 {
			p.Answers(first)
			s.Answers(second)
			n.Answers(third)
		}
		// Packets that the successor has forwarded come before those in the socket.
		if err := n.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		a.Fails("probation", io.ErrUnexpectedEOF)
		p.Answers(first)
		s.Answers(second)
		s.Answers(third)
		s.Serves()
	}
	if got := stats.On(s); got.TakenOver != 2 {
		t.Errorf("%+v; want two flows taken over", got)
	}
	a := s.BeginUpgrade()
	n := a.Successor()
	n.At(proctest.AtServing)
	p.Answers(first)
	s.Answers(second)
	n.Stop()
	a.OK()
}

func TestIdleFlows(t *testing.T) {
	t.Parallel()
	a := anyPort
	a.IdleTimeout = proctest.Patience / 30
	p := proctest.Start(t, daemon(a))
	last := time.Now()
	c := p.Dial(0)
	s := p.Upgrade()
	for begun := time.Now(); time.Since(begun) < 2*a.IdleTimeout; time.Sleep(20 * time.Millisecond) {
		pid := say(t, c, "a flow that is used stays")
		if time.Since(last) >= a.IdleTimeout {
			t.Skip("this machine is too slow to use a flow in time")
		}
		last = time.Now()
		if pid != p.PID {
			t.Fatalf("process %d answers; want %d", pid, p.PID)
		}
	}
	if err := drained.Err(p, proctest.Patience); err != nil {
		t.Errorf("Drained: %v", err)
	}
	s.Answers(c)
	s.Answers(c)
	if err := drained.Err(s, time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drained of a process with a flow: %v", err)
	}
}

func TestPlainPredecessor(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}.And("udp4", "127.0.0.1:0"), daemon(anyPort))
	c := p.Dial(0)
	s := p.Upgrade()
	s.Answers(c) // its flow is in no table
	n := s.Upgrade()
	s.Answers(c)
	n.Serves()
}

func TestPlainSuccessor(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, daemon(anyPort), proctest.Spec{}.And("udp4", "127.0.0.1:0"), daemon(anyPort))
	c := p.Dial(0)
	address := p.Addr(0).Address
	s := p.Upgrade()
	s.Answers(c)
	unclaimed := s.Event(ecdysis.EventReady, 0).Unclaimed
	for _, what := range []string{"table", "inbox"} {
		if !slices.ContainsFunc(unclaimed, func(u string) bool { return strings.HasPrefix(u, "file udpflow "+address+" "+what) }) {
			t.Errorf("unclaimed: %q; want the %s", unclaimed, what)
		}
	}
	n := s.Upgrade()
	n.Answers(c)
	n.Upgrade()
	n.Answers(c)
}

// A successor that does not understand the table does not become ready.
func TestOtherTable(t *testing.T) {
	t.Parallel()
	a := anyPort
	a.Key, a.Generation = "first byte", "named"
	for name, c := range map[string]struct {
		change func(*socketSpec)
		want   string
	}{
		"layout":        {func(a *socketSpec) { a.Layout = true }, "the table of flows has layout 1, but this program knows only layout 2"},
		"key":           {func(a *socketSpec) { a.Key = "two bytes" }, "Config.Key is another function than in the predecessor"},
		"no key":        {func(a *socketSpec) { a.Key = "" }, "Config.Key is another function than in the predecessor"},
		"no generation": {func(a *socketSpec) { a.Generation = "" }, "Config.Generation is another function than in the predecessor"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := a
			c.change(&b)
			p := proctest.Start(t, daemon(a), daemon(b), daemon(a))
			client := connect(t, p)
			if pid := say(t, client, "xy"); pid != p.PID {
				t.Fatal(pid)
			}
			f := p.FailUpgrade("init", nil)
			if !strings.Contains(f.Error(), c.want) || !strings.Contains(f.Error(), "udpflow: listen udp4 127.0.0.1:0: ") {
				t.Errorf("%v; want %q", f, c.want)
			}
			if pid := say(t, client, "xy"); pid != p.PID {
				t.Errorf("process %d answers; want %d", pid, p.PID)
			}
			s := p.Upgrade()
			if pid := say(t, client, "x and the rest"); pid != p.PID {
				t.Errorf("process %d answers; want %d", pid, p.PID)
			}
			if pid := say(t, client, "another flow"); pid != s.PID {
				t.Errorf("process %d answers; want %d", pid, s.PID)
			}
		})
	}
}

// Several sockets of one address have one table, and their number may grow.
func TestReusePort(t *testing.T) {
	t.Parallel()
	group := func(n int) proctest.Spec {
		a := anyPort
		a.ReusePort, a.Sockets = true, n
		return daemon(a)
	}
	p := proctest.Start(t, group(3), group(3), group(5))
	var clients []net.Conn
	var owners []*proctest.Proc
	more := func(p *proctest.Proc) {
		for range 10 {
			clients, owners = append(clients, p.Dial(0)), append(owners, p)
		}
	}
	all := func() {
		t.Helper()
		for range 2 {
			for i, c := range clients {
				owners[i].Answers(c)
			}
		}
	}
	more(p)
	for range 3 {
		p = p.Upgrade()
		all()
		more(p)
		all()
	}
	if runtime.GOOS == "linux" { // Linux spreads clients over the sockets
		got := []Stats{stats.On(owners[0], 0), stats.On(owners[0], 1), stats.On(owners[0], 2)}
		for i, s := range got {
			if s.Own > 0 && s.Received == 0 {
				t.Errorf("socket %d of the first process has read packets and received none: %+v", i, got)
			}
		}
	}
}

// A process that was started by none of the chain takes over.
func TestTakeover(t *testing.T) {
	t.Parallel()
	spec := daemon(anyPort)
	spec.Options.TakeoverSocket = "$DIR/takeover"
	spec.Wait = true
	chain := proctest.New(t, spec)
	p := chain.Start()
	c := p.Dial(0)
	// The first process closes its socket when Wait returns. The flow then goes to
	// the newest process.
	s := chain.Start()
	p.WaitReturned()
	p.Ended()
	s.Answers(c)

	spec.Wait = false
	spec.Options.TakeoverSocket = "$DIR/takeover"
	serving := spec.At(proctest.AtServing, waits.Do())
	chain = proctest.New(t, serving)
	p = chain.Start()
	c = p.Dial(0)
	s = chain.Start()
	p.AwaitExit()
	p.Answers(c)
	s.Serves()
	n := chain.Start()
	s.AwaitExit()
	p.Answers(c)
	n.Serves()
}

// waits lets d serve its takeover socket.
var waits = proctest.Define("begin Wait", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	go d.U.Wait()
	return proctest.None{}, nil
})

// A packet names its generation, whose number has one byte.
func TestGenerationByte(t *testing.T) {
	if testing.Short() || raceEnabled() {
		t.Skip("257 upgrades take too long")
	}
	t.Parallel()
	a := anyPort
	a.Generation = "named"
	p := proctest.Start(t, daemon(a))
	procs := []*proctest.Proc{p}
	c := connect(t, p)
	for g := 1; g <= 257; g++ {
		p = p.Upgrade()
		procs = append(procs, p)
		if g >= 3 && g != 254 { // all but a few processes end
			procs[g-2].Kill()
		}
		if g < 250 {
			continue
		}
		for _, back := range []int{0, 1} {
			if pid := say(t, c, fmt.Sprintf("g%d", byte(g-back))); pid != procs[g-back].PID {
				t.Fatalf("at generation %d process %d answers for the one %d before it; want %d", g, pid, back, procs[g-back].PID)
			}
		}
	}
	for name, want := range map[string]*proctest.Proc{"g1": procs[257], "g0": procs[256], "g252": procs[252], "g100": procs[257]} {
		if pid := say(t, c, name); pid != want.PID {
			t.Errorf("%s: process %d answers; want %d", name, pid, want.PID)
		}
	}
}

// A function given to SyscallConn().Read has returned before a successor serves.
func TestHandoverWaitsForRawRead(t *testing.T) {
	t.Parallel()
	plain := proctest.Spec{NoAccept: true}.And("udp4", "127.0.0.1:0")
	p := proctest.Start(t, plain.At(proctest.On(ecdysis.EventHandover), hasReturned.Do()), plain)
	raw := rawRead.Begin(p, 300*time.Millisecond)
	mustWrite(t, connect(t, p), "x")
	inRawRead.On(p)
	a := p.BeginUpgrade()
	a.Successor()
	a.OK()
	if returned, err := hasReturned.At(p, proctest.On(ecdysis.EventHandover)); !returned || err != nil {
		t.Errorf("the function had returned when the handover came: %v, %v; want true", returned, err)
	}
	if err := raw.Err(); err != nil {
		t.Error(err)
	}
}

var rawState struct {
	begun    chan struct{}
	returned chan struct{}
}

func init() { rawState.begun, rawState.returned = make(chan struct{}), make(chan struct{}) }

var rawRead = proctest.Define("raw read", func(d *proctest.Daemon, takes time.Duration) (proctest.None, error) {
	raw, err := d.PacketConn(0).(*ecdysis.UDPConn).SyscallConn()
	if err != nil {
		return proctest.None{}, err
	}
	return proctest.None{}, raw.Read(func(uintptr) bool {
		close(rawState.begun)
		time.Sleep(takes)
		close(rawState.returned)
		return true
	})
})

var inRawRead = proctest.Define("await raw read", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	<-rawState.begun
	return proctest.None{}, nil
})

var hasReturned = proctest.Define("has returned", func(*proctest.Daemon, proctest.None) (bool, error) {
	select {
	case <-rawState.returned:
		return true, nil
	default:
		return false, nil
	}
})
