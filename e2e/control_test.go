package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Control sockets, and signals and calls beside them.

// A cause is what has told a process to do something: a signal, a client of the
// control socket at a path, or a call if both are zero.
type cause struct {
	signal os.Signal
	socket string
}

func signaled(s os.Signal) cause { return cause{signal: s} }

func asked(c *proctest.Chain, socket string) cause { return cause{socket: c.Path(socket)} }

// hasReturned fails the test unless p's Wait returns an event of this kind and
// cause.
func hasReturned(p *proctest.Proc, kind ecdysis.EventKind, by cause) {
	p.T.Helper()
	if e := p.WaitReturned(); e.Kind != kind || e.Signal != by.signal || e.Socket != by.socket {
		p.T.Fatalf("Wait returned %v; want %q by %v", e, kind, by)
	}
}

// hasRefused fails the test unless p's n-th EventUpgradeFailed, from 0, is about
// an upgrade that was refused, and has this cause and error.
func hasRefused(p *proctest.Proc, n int, by cause, text string) {
	p.T.Helper()
	line := "upgrade failed"
	if by.signal != nil {
		line += " by signal " + by.signal.String()
	}
	if by.socket != "" {
		line += " by socket " + by.socket
	}
	line += ": " + text
	if e := p.Event(ecdysis.EventUpgradeFailed, n); e.Signal != by.signal || e.Socket != by.socket || e.Err.Error() != text || e.String() != line {
		p.T.Fatalf("event %q; want %q", e, line)
	}
}

// controlled is proctest.Triggered without signals.
func controlled() proctest.Spec {
	s := proctest.Triggered
	s.Options.UpgradeSignals, s.Options.StopSignals, s.Options.PartialStopSignals = nil, nil, nil
	return s
}

func TestControlSockets(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, controlled())
	c := p.Chain
	l := p.Load(2)
	for generation := 1; generation <= 3; generation++ {
		l.More(50)
		wait := proctest.BeginRequest(t, c.Path("upgrade"))
		s := c.Next()
		if r, err := wait(); err != nil || r != s.Reply(generation) {
			t.Fatalf("upgrade: %v, %v; want %v", r, err, s.Reply(generation))
		}
		if e := p.Event(ecdysis.EventUpgraded, 0); e.Socket != c.Path("upgrade") {
			t.Fatalf("event %v; want one by the socket", e)
		}
		p.Ended()
		p = s
	}
	l.More(50)
	n := c.Start() // which takes over
	p.Ended()
	l.More(50)
	l.Check()
	proctest.Connect(t, c.Path("stop")).Wants(n.Reply(4))
	n.Ended()
	c.HasFiles()
}

// wait is Upgrader.Wait, for a daemon that does not call it by itself.
var wait = proctest.Define("Wait", func(d *proctest.Daemon, _ proctest.None) (ecdysis.Event, error) {
	return d.U.Wait(), nil
})

// An order is what a process can be told to do.
type order struct {
	name   string // of the socket
	signal syscall.Signal
	kind   ecdysis.EventKind // of the event that Wait returns
}

var (
	upgrade = order{"upgrade", syscall.SIGHUP, ecdysis.EventUpgraded}
	stop    = order{"stop", syscall.SIGTERM, ecdysis.EventStopping}
	partial = order{"partial", syscall.SIGUSR1, ecdysis.EventPartialStop}
)

// bySignal gives p the order. As bySocket and byCall do, it returns a function
// that waits for the answer, and what the cause is for p.
func (o order) bySignal(p *proctest.Proc) (answered func(), by cause) {
	p.T.Helper()
	p.Signal(o.signal)
	return func() {}, signaled(o.signal)
}

func (o order) bySocket(p *proctest.Proc) (answered func(), by cause) {
	p.T.Helper()
	path := p.Chain.Path(o.name)
	if o == upgrade {
		wait := proctest.BeginRequest(p.T, path)
		return func() {
			p.T.Helper()
			if r, err := wait(); err != nil {
				p.T.Fatalf("upgrade: %v, %v", r, err)
			}
		}, asked(p.Chain, o.name)
	}
	client := proctest.Connect(p.T, path)
	return func() { p.T.Helper(); client.Wants(p.Reply(0)) }, asked(p.Chain, o.name)
}

func (o order) byCall(p *proctest.Proc) (answered func(), by cause) {
	p.T.Helper()
	if o == upgrade {
		return p.BeginUpgrade().OK, cause{}
	}
	call := proctest.CallStop.Begin(p)
	return func() {
		p.T.Helper()
		if err := call.Err(); err != nil {
			p.T.Fatal(err)
		}
	}, cause{}
}

// Each trigger works in a process that has all of them, and Wait tells which one
// it was.
func TestTriggersUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered)
	for _, give := range []func(order, *proctest.Proc) (func(), cause){order.bySignal, order.bySocket, order.byCall, order.bySocket, order.bySignal} {
		answered, by := give(upgrade, p)
		s := p.Chain.Next()
		s.At(proctest.AtServing)
		hasReturned(p, ecdysis.EventUpgraded, by)
		answered()
		p.Ended()
		s.Serves()
		p = s
	}
	p.Chain.None()
}

// A listener with KeepOnStop accepts after either stop.
func TestTriggersStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		give func(order, *proctest.Proc) (func(), cause)
		what order
	}{
		{"stop by signal", order.bySignal, stop},
		{"stop by socket", order.bySocket, stop},
		{"stop by call", order.byCall, stop},
		{"partial by signal", order.bySignal, partial},
		{"partial by socket", order.bySocket, partial},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			spec := proctest.Triggered
			spec.Wait = false
			spec.Listen = []proctest.Listen{
				{Network: "tcp", Address: "127.0.0.1:0"},
				{Network: "tcp", Address: "127.0.0.1:0", Config: ecdysis.ListenConfig{KeepOnStop: true}},
			}
			spec.Options.PIDFile = "$DIR/pid"
			p := proctest.Start(t, spec)
			waiting := wait.Begin(p)
			p.InWait()
			answered, by := c.give(c.what, p)
			if e, err := waiting.Wait(); err != nil || e.Kind != c.what.kind || e.Signal != by.signal || e.Socket != by.socket {
				t.Fatalf("Wait returned %v, %v; want %q by %v", e, err, c.what.kind, by)
			}
			answered()
			p.ServesAt(p.Addr(1))
			if _, err := p.Addr(0).Dial(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("the other listener: %v", err)
			}
			want := []ecdysis.EventKind{ecdysis.EventStopping}
			if c.what == partial {
				p.Chain.HasFiles("pid")
				p.Stop()
				want = []ecdysis.EventKind{ecdysis.EventPartialStop, ecdysis.EventStopping}
			}
			p.AwaitExit()
			p.Chain.HasFiles()
			p.HasEvents(want...)
		})
	}
}

// A client that connects before Ready waits for it.
func TestSocketBeforeReady(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what order
		want []ecdysis.EventKind
	}{
		{upgrade, []ecdysis.EventKind{ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded}},
		{stop, []ecdysis.EventKind{ecdysis.EventStopping}},
		{partial, []ecdysis.EventKind{ecdysis.EventPartialStop}},
	} {
		for _, point := range []proctest.Point{proctest.AtNew, proctest.On(ecdysis.EventReady)} { // Wait runs from AtListened on
			t.Run(c.what.name+"/"+string(point), func(t *testing.T) {
				t.Parallel()
				chain := proctest.New(t, proctest.Triggered.Hold(point), proctest.Triggered)
				p := chain.Launch()
				p.At(point)
				client := proctest.Connect(t, chain.Path(c.what.name))
				if point != proctest.AtNew {
					p.InWait()
				}
				p.Resume()
				want := p.Reply(0)
				if c.what == upgrade {
					want = chain.Next().Reply(1)
				}
				client.Wants(want)
				p.Ended()
				p.HasEvents(c.want...)
				chain.None()
			})
		}
	}
}

// As soon as a successor serves its sockets it does what their clients ask for,
// however long it takes to close what it has inherited and nobody has asked for.
func TestSocketAtReady(t *testing.T) {
	t.Parallel()
	plain := proctest.Triggered
	many := sendingState(plain, sending{Size: 64 << 20}) // memory that takes time to free
	many.Listen = slices.Repeat(plain.Listen, 200)
	p := proctest.Start(t, many, plain.Hold(proctest.On(ecdysis.EventReady)), plain)
	c := p.Chain
	first := proctest.Connect(t, c.Path("upgrade"))
	s := c.Next()
	s.At(proctest.On(ecdysis.EventReady))
	s.Resume()
	// The predecessor answers until it knows that the successor serves.
	line := ""
	fromPredecessor := []string{"", "error: " + ecdysis.ErrInProgress.Error() + "\n", "error: " + ecdysis.ErrUpgraded.Error() + "\n"}
	for end := time.Now().Add(proctest.Patience); slices.Contains(fromPredecessor, line) && time.Now().Before(end); {
		line = readAll(proctest.Connect(t, c.Path("upgrade")))
	}
	if strings.HasPrefix(line, "error") {
		t.Fatalf("the answer is %q", line)
	}
	if want := "ok " + c.Next().Reply(2).String() + "\n"; line != want {
		t.Fatalf("the answer is %q; want %q", line, want)
	}
	first.Wants(s.Reply(1))
	p.Ended()
	s.Ended()
}

// readAll returns all that c receives before the other end closes.
func readAll(c *proctest.Client) string {
	c.T.Helper()
	b, err := io.ReadAll(c)
	if err != nil {
		c.T.Fatalf("after %q: %v", b, err)
	}
	return string(b)
}

// Each trigger that comes during an upgrade is answered, and begins no other
// upgrade.
func TestTriggersDuringUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered)
	c := p.Chain
	first := proctest.Connect(t, c.Path("upgrade"))
	s := c.Next()
	s.At(proctest.AtNew)
	busy := ecdysis.ErrInProgress.Error()
	for i := range 3 {
		proctest.Connect(t, c.Path("upgrade")).WantsLine("error: " + busy)
		hasRefused(p, 2*i, asked(c, "upgrade"), busy)
		p.Signal(syscall.SIGHUP)
		hasRefused(p, 2*i+1, signaled(syscall.SIGHUP), busy)
		p.RefusesUpgrade(ecdysis.ErrInProgress)
	}
	p.Serves()
	s.Resume()
	first.Wants(s.Reply(1))
	hasReturned(p, ecdysis.EventUpgraded, asked(c, "upgrade"))
	p.Ended()
	s.At(proctest.AtServing)
	s.Serves()
	s.HasEvents()
	c.None()
}

// The same is true after COMMIT, and during the probation.
func TestTriggersDuringHandover(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered.Probation(time.Minute), proctest.Triggered.Hold(proctest.On(ecdysis.EventReady)), proctest.Triggered)
	c := p.Chain
	first := proctest.Connect(t, c.Path("upgrade"))
	s := c.Next()
	s.At(proctest.On(ecdysis.EventReady))
	busy := ecdysis.ErrInProgress.Error()
	refused := func() { t.Helper(); proctest.Connect(t, c.Path("upgrade")).WantsLine("error: " + busy) }
	refused()
	hasRefused(p, 0, asked(c, "upgrade"), busy)
	s.Resume()
	s.At(proctest.AtServing)
	s.Signal(syscall.SIGHUP)
	hasRefused(s, 0, signaled(syscall.SIGHUP), busy)
	// The predecessor may not know at once that the successor serves, and
	// answer for a moment. Then only the successor answers.
	failures := func(p *proctest.Proc) (n int) {
		for _, kind := range p.Kinds() {
			if kind == ecdysis.EventUpgradeFailed {
				n++
			}
		}
		return n
	}
	const many = 50
	for round := 0; ; round++ {
		old, all := failures(p), failures(p)+failures(s)
		for range many {
			refused()
		}
		for end := time.Now().Add(proctest.Patience); failures(p)+failures(s) < all+many; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d events tell of %d refusals", failures(p)+failures(s)-all, many)
			}
		}
		if failures(p) == old {
			break
		}
		if round == 5 {
			t.Fatal("the predecessor answers while the successor serves")
		}
	}
	hasRefused(s, 1, asked(c, "upgrade"), busy)
	// The successor's stop makes the upgrade final.
	proctest.Connect(t, c.Path("stop")).Wants(s.Reply(1))
	first.Wants(s.Reply(1))
	hasReturned(s, ecdysis.EventStopping, asked(c, "stop"))
	hasReturned(p, ecdysis.EventUpgraded, asked(c, "upgrade"))
	s.Ended()
	p.Ended()
	c.HasFiles()
	c.None()
}

// A stop during an upgrade ends it, and all clients are answered.
func TestStopSocketDuringUpgrade(t *testing.T) {
	t.Parallel()
	for _, what := range []order{stop, partial} {
		t.Run(what.name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew))
			c := p.Chain
			upgrading := proctest.Connect(t, c.Path("upgrade"))
			s := c.Next()
			s.At(proctest.AtNew)
			proctest.Connect(t, c.Path(what.name)).Wants(p.Reply(0))
			line, start := readAll(upgrading), fmt.Sprintf("error: ecdysis: upgrade failed at init: successor %d ", s.PID)
			if !strings.HasPrefix(line, start) || !strings.HasSuffix(line, ": "+ecdysis.ErrStopped.Error()+"\n") {
				t.Errorf("the client of the upgrade gets %q; want that it was stopped", line)
			}
			hasReturned(p, what.kind, asked(c, what.name))
			p.Ended()
			s.Ended()
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, what.kind)
		})
	}
}

// linger is what a process may do between Fail and its exit.
var linger = proctest.Define("linger", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	time.Sleep(20 * time.Millisecond)
	return proctest.None{}, nil
})

// The line of a failure names the step, how the successor ended, and what it
// has given to Fail. It is the event's error, on one line.
func TestFailureLine(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered)
	c := p.Chain
	for i, f := range []struct {
		point proctest.Point
		do    proctest.Action
		want  string
	}{
		{proctest.AtStart, proctest.Exit(3), "init: successor PID (exit status 3): it ended without a call of Ready or Fail: unexpected EOF"},
		{proctest.AtNew, proctest.Fail("no such colour:\n\tmauve"), "init: successor PID (exit status 1): it says: no such colour:\n\tmauve"},
		{proctest.AtNew, proctest.Seq(proctest.CallFail.Do("no paper"), linger.Do(), proctest.Exit(5)), "init: successor PID (exit status 5): it says: no paper"},
		{proctest.AtListened, proctest.Kill, "init: successor PID (signal: killed): it ended without a call of Ready or Fail: unexpected EOF"},
		{proctest.On(ecdysis.EventReady), proctest.Exit(4), "handover: successor PID (exit status 4): unexpected EOF"},
	} {
		c.Specs(proctest.Triggered.At(f.point, f.do))
		wait := proctest.BeginRequest(t, c.Path("upgrade"))
		s := c.Next()
		want := "ecdysis: upgrade failed at " + strings.Replace(f.want, "PID", fmt.Sprint(s.PID), 1)
		_, err := wait()
		text := fmt.Sprintf("ecdysis: request at %q: %s", c.Path("upgrade"), strings.NewReplacer("\n", " ", "\t", " ").Replace(want))
		if err == nil || err.Error() != text {
			t.Errorf("Request: %v; want %s", err, text)
		}
		if e := p.Event(ecdysis.EventUpgradeFailed, i); e.Err.Error() != want || e.PID != s.PID || e.Socket != c.Path("upgrade") {
			t.Errorf("event %v; want the error %s", e, want)
		}
		p.Serves()
	}
	c.Specs(proctest.Triggered)
	wait := proctest.BeginRequest(t, c.Path("upgrade"))
	s := c.Next()
	if r, err := wait(); err != nil || r != s.Reply(1) {
		t.Fatalf("then: %v, %v; want %v", r, err, s.Reply(1))
	}
}

// The connection is the request, so that a client that hangs up early has made
// it, too.
func TestClientHangsUp(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered)
	c := p.Chain
	early := proctest.Connect(t, c.Path("upgrade"))
	s := c.Next()
	s.At(proctest.AtNew)
	early.Close()
	proctest.Connect(t, c.Path("upgrade")).Close() // and its answer has nowhere to go
	hasRefused(p, 0, asked(c, "upgrade"), ecdysis.ErrInProgress.Error())
	s.Resume()
	hasReturned(p, ecdysis.EventUpgraded, asked(c, "upgrade"))
	p.Ended()
	s.At(proctest.AtServing)
	s.Serves()
	proctest.Connect(t, c.Path("partial")).Close()
	hasReturned(s, ecdysis.EventPartialStop, asked(c, "partial"))
	s.Ended()
}

// What a client sends does not matter, and does not cost it the answer.
func TestClientSendsGarbage(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered)
	c := p.Chain
	times := 1000
	if runtime.GOOS != "linux" {
		times = 200 // NetBSD keeps 4096 bytes until they are read
	}
	garbage := bytes.Repeat([]byte("GET / HTTP/1.1\r\n\x00\xff"), times)
	send := func(socket string) *proctest.Client {
		t.Helper()
		client := proctest.Connect(t, c.Path(socket))
		if _, err := client.Write(garbage); err != nil {
			t.Fatal(err)
		}
		return client
	}
	// The client of the takeover socket gets a FAIL of that protocol, or a
	// reset because of what it has sent and nobody reads.
	if b, err := io.ReadAll(send("take")); len(b) > 0 && b[0] != 'F' || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("garbage is answered with %q, %v", b, err)
	}
	first := send("upgrade")
	s := c.Next()
	s.At(proctest.AtNew)
	s.Resume()
	first.Wants(s.Reply(1))
	p.Ended()
	s.At(proctest.AtServing)
	s.Serves()
	proctest.Connect(t, c.Path("stop")).Wants(s.Reply(1))
	s.Ended()

	// It is sent before the process looks, which may end before a later write.
	c.Specs(proctest.Triggered.Hold(proctest.AtNew))
	p = c.Launch()
	p.At(proctest.AtNew)
	client := send("stop")
	p.Resume()
	client.Wants(p.Reply(0))
	p.Ended()
}

// A thousand clients send nothing, at each socket.
func TestSilentClients(t *testing.T) {
	t.Parallel()
	many := 1000
	if runtime.GOOS != "linux" {
		many = 100 // the queue of a Unix socket has room for 193
	}
	crowd := func(t *testing.T, path string) []*proctest.Client {
		t.Helper()
		list := make([]*proctest.Client, many)
		for i := range list {
			list[i] = proctest.Connect(t, path)
		}
		return list
	}
	t.Run("upgrade", func(t *testing.T) {
		t.Parallel()
		p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered)
		c := p.Chain
		first := proctest.Connect(t, c.Path("upgrade"))
		s := c.Next()
		s.At(proctest.AtNew)
		for _, client := range crowd(t, c.Path("upgrade")) {
			client.WantsLine("error: " + ecdysis.ErrInProgress.Error())
		}
		hasRefused(p, many-1, asked(c, "upgrade"), ecdysis.ErrInProgress.Error())
		p.Serves()
		s.Resume()
		first.Wants(s.Reply(1))
		s.At(proctest.AtServing)
		s.Serves()
		c.None()
	})
	t.Run("stop", func(t *testing.T) {
		t.Parallel()
		c := proctest.New(t, proctest.Triggered.Hold(proctest.AtNew))
		p := c.Launch()
		p.At(proctest.AtNew)
		list := crowd(t, c.Path("stop"))
		p.Resume()
		list[0].Wants(p.Reply(0))
		// The others are answered, or not accepted before the process ends.
		var all sync.WaitGroup
		for _, client := range list[1:] {
			all.Go(func() {
				b, err := io.ReadAll(client)
				if errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 && string(b) != "ok "+p.Reply(0).String()+"\n" {
					t.Errorf("after %q: %v", b, err)
				}
			})
		}
		all.Wait()
		p.Ended()
		p.HasEvents(ecdysis.EventStopping)
		c.HasFiles()
	})
	t.Run("takeover", func(t *testing.T) {
		t.Parallel()
		p := proctest.Start(t, proctest.Triggered)
		c := p.Chain
		before := len(p.FDs())
		list := crowd(t, c.Path("take"))
		const kept = 32 // the last ones; each of the others makes room for a later one
		for _, client := range list[:many-kept] {
			if line := readAll(client); strings.HasPrefix(line, "H") {
				t.Fatalf("a client that has sent nothing gets %q", line)
			}
		}
		if n := len(p.FDs()); n > before+kept {
			t.Errorf("%d descriptors with %d silent clients, %d before", n, many, before)
		}
		p.Serves()
		wait := proctest.BeginRequest(t, c.Path("upgrade"))
		s := c.Next()
		if r, err := wait(); err != nil || r != s.Reply(1) {
			t.Fatalf("upgrade: %v, %v; want %v", r, err, s.Reply(1))
		}
		p.Ended()
		s.At(proctest.AtServing)
		s.Serves()
	})
}

// requester is a program that calls Request.
var requester = proctest.DefineRole("requester", func() {
	r, err := ecdysis.Request(context.Background(), proctest.Args()[0])
	if err != nil {
		fmt.Println(err, errors.Is(err, os.ErrPermission))
		os.Exit(1)
	}
	fmt.Println(r)
})

// Only root and the process's own user are served.
func TestControlSocketUsers(t *testing.T) {
	t.Parallel()
	const nobody = 65534
	c := proctest.New(t, controlled())
	as := c.Users()
	request := func(uid int, socket string) string {
		t.Helper()
		cmd := requester.Command(c.Path(socket))
		as(uid)(cmd)
		out, err := cmd.Output()
		if err != nil && cmd.ProcessState.ExitCode() != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	p := c.Start()
	for _, socket := range []string{"upgrade", "stop", "partial"} {
		if fi, err := os.Lstat(c.Path(socket)); err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Fatalf("%s: %v, %v; want mode 0600", socket, fi.Mode(), err)
		}
		if text := request(nobody, socket); !strings.HasSuffix(text, "permission denied true") {
			t.Errorf("a user that may not connect gets %q", text)
		}
		// The mode is not all that protects the socket.
		if err := os.Chmod(c.Path(socket), 0o666); err != nil {
			t.Fatal(err)
		}
		if text, want := request(nobody, socket), "the peer is a process of user 65534, and this one runs as user 0; want the same user, or root false"; !strings.HasSuffix(text, want) {
			t.Errorf("another user gets %q; want %q", text, want)
		}
		p.Serves()
	}
	p.HasEvents()
	if text := request(0, "stop"); text != p.Reply(0).String() {
		t.Errorf("root gets %q; want %v", text, p.Reply(0))
	}
	p.Ended()

	// A process of another user serves this user, and root.
	for _, uid := range []int{nobody, 0} {
		p := c.Start(as(nobody))
		if text := request(uid, "stop"); text != p.Reply(0).String() {
			t.Errorf("user %d gets %q; want %v", uid, text, p.Reply(0))
		}
		p.Ended()
	}
}

// A slowContext calls f before it tells its error.
type slowContext struct {
	context.Context
	f func()
}

func (c slowContext) Err() error {
	c.f()
	return c.Context.Err()
}

// An answer that comes when ctx has just ended is returned with ctx's error.
func TestRequestAnsweredAtTheEnd(t *testing.T) {
	t.Parallel()
	path := proctest.ShortDir(t) + "/s"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithCancel(t.Context())
	accepted := make(chan net.Conn, 1)
	go func() {
		defer cancel() // which ends the wait for the answer
		c, err := ln.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- c
	}()
	answer := sync.OnceFunc(func() {
		c := <-accepted
		t.Cleanup(func() { c.Close() })
		fmt.Fprintln(c, "ok pid=7 generation=3")
	})
	r, err := ecdysis.Request(slowContext{ctx, answer}, path)
	if want := (ecdysis.Reply{PID: 7, Generation: 3}); r != want || !errors.Is(err, context.Canceled) {
		t.Errorf("Request returned %v, %v; want %v and context.Canceled", r, err, want)
	}
}

func TestRequestErrors(t *testing.T) {
	t.Parallel()
	dir := proctest.ShortDir(t)
	// serve listens at a path, and calls f with each client.
	serve := func(name string, f func(c *net.UnixConn)) (path string) {
		t.Helper()
		path = filepath.Join(dir, name)
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				f(c.(*net.UnixConn))
			}
		}()
		return path
	}
	sends := func(name, text string) (path string) {
		return serve(name, func(c *net.UnixConn) { _, _ = io.WriteString(c, text); c.Close() })
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "stale")})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	var held []net.Conn // so that no finalizer closes them
	holds := serve("holds", func(c *net.UnixConn) { held = append(held, c) })
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	background := context.Background()
	for _, c := range []struct {
		name, path string
		ctx        context.Context
		is         error
		text       string
	}{
		{"no file", filepath.Join(dir, "none"), background, syscall.ENOENT, "none"},
		{"refused", filepath.Join(dir, "stale"), background, syscall.ECONNREFUSED, "stale"},
		{"empty path", "", background, nil, `""`},
		{"long path", strings.Repeat("x", 200), background, nil, "200 bytes"},
		{"no word", sends("nothing", ""), background, io.ErrUnexpectedEOF, "without an answer"},
		{"half a line", sends("half", "ok pid=1 gener"), background, io.ErrUnexpectedEOF, "without an answer"},
		{"garbage", sends("garbage", "220 mail.example ESMTP\r\n"), background, nil, `"220 mail.example ESMTP\r"`},
		{"endless", serve("endless", func(c *net.UnixConn) {
			for {
				if _, err := c.Write(make([]byte, 4096)); err != nil {
					c.Close()
					return
				}
			}
		}), background, io.ErrUnexpectedEOF, ""},
		{"failure", sends("failure", "error: no paper\n"), background, nil, "failure\": no paper"},
		{"ctx done", holds, canceled, context.Canceled, "holds"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := ecdysis.Request(c.ctx, c.path)
			if r != (ecdysis.Reply{}) || err == nil || !strings.HasPrefix(err.Error(), fmt.Sprintf("ecdysis: request at %q: ", c.path)) ||
				!strings.Contains(err.Error(), c.text) || c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("%v, %v; want an error with %q that is %v", r, err, c.text, c.is)
			}
			var oe *net.OpError
			if _, isErrno := c.is.(syscall.Errno); isErrno && !errors.As(err, &oe) {
				t.Errorf("%v is no *net.OpError", err)
			}
		})
	}
	t.Run("ctx ends", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(background, 20*time.Millisecond)
		defer cancel()
		if _, err := ecdysis.Request(ctx, holds); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%v; want the context's", err)
		}
	})
}

// Request waits while the queue of the socket is full, until ctx ends.
func TestRequestQueue(t *testing.T) {
	t.Parallel()
	path := filepath.Join(proctest.ShortDir(t), "full")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	proctest.Connect(t, path) // which fills it
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := ecdysis.Request(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		if runtime.GOOS != "linux" {
			t.Skipf("a full queue refuses here: %v", err)
		}
		t.Fatalf("%v; want the context's", err)
	}
	wait := proctest.BeginRequest(t, path)
	for range 2 {
		nfd, _, err := syscall.Accept(fd)
		if err != nil {
			t.Fatal(err)
		}
		c := os.NewFile(uintptr(nfd), path)
		_, _ = io.WriteString(c, "ok pid=1 generation=0\n")
		c.Close()
	}
	if r, err := wait(); err != nil || r != (ecdysis.Reply{PID: 1}) {
		t.Fatalf("%v, %v", r, err)
	}
}

// The end of ctx undoes nothing, and the end of the process is an error.
func TestRequestGivenUp(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Triggered, proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered.Hold(proctest.AtNew), proctest.Triggered)
	c := p.Chain
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	given := make(chan error, 1)
	go func() {
		_, err := ecdysis.Request(ctx, c.Path("upgrade"))
		given <- err
	}()
	s := c.Next()
	s.At(proctest.AtNew)
	cancel()
	if err := <-given; !errors.Is(err, context.Canceled) {
		t.Fatalf("%v; want the context's", err)
	}
	s.Resume()
	hasReturned(p, ecdysis.EventUpgraded, asked(c, "upgrade"))
	s.At(proctest.AtServing)

	wait := proctest.BeginRequest(t, c.Path("upgrade"))
	last := c.Next()
	last.At(proctest.AtNew)
	s.Kill()
	if _, err := wait(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%v; want io.ErrUnexpectedEOF", err)
	}
	last.Resume()
	last.At(proctest.AtServing)
	last.Serves()
	proctest.Connect(t, c.Path("stop")).Wants(last.Reply(2))
	last.Ended()
	c.HasFiles()
}

// accepts returns a function that waits until p has n clients more than now that
// wait for an answer. A client that is not accepted before p ends gets none.
func accepts(p *proctest.Proc, n int) (accepted func()) {
	p.T.Helper()
	sockets := func() (list []string) {
		p.T.Helper()
		for _, s := range p.FDs() {
			if _, what, _ := strings.Cut(s, " "); strings.HasPrefix(what, "socket:") {
				list = append(list, what)
			}
		}
		return list
	}
	before := sockets()
	return func() {
		p.T.Helper()
		more := 0
		for end := time.Now().Add(proctest.Patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			list := slices.DeleteFunc(sockets(), func(s string) bool { return slices.Contains(before, s) })
			if more = len(list); more >= n {
				return
			}
		}
		p.T.Fatalf("process %d has accepted %d; want %d", p.PID, more, n)
	}
}

// Two clients that ask at once for the end of accepting get no more than that.
func TestPartialStopTwice(t *testing.T) {
	t.Parallel()
	spec := proctest.Triggered.At(proctest.On(ecdysis.EventPartialStop), proctest.Once(proctest.Hold))
	spec.Wait = false
	spec.Options.PIDFile = "$DIR/pid"
	p := proctest.Start(t, spec)
	c := p.Chain
	waiting := wait.Begin(p)
	accepted := accepts(p, 2)
	first := proctest.Connect(t, c.Path("partial"))
	p.At(proctest.On(ecdysis.EventPartialStop))
	second := proctest.Connect(t, c.Path("partial"))
	accepted()
	p.Resume()
	first.Wants(p.Reply(0))
	second.Wants(p.Reply(0))
	if e, err := waiting.Wait(); err != nil || e.Kind != ecdysis.EventPartialStop {
		t.Errorf("Wait returned %v, %v", e, err)
	}
	p.HasEvents(ecdysis.EventPartialStop)
	if p.Exited() {
		t.Error("Exit is closed after a partial stop")
	}
	p.HasPIDFile()
	p.Stop()
	p.HasEvents(ecdysis.EventPartialStop, ecdysis.EventStopping)
	c.HasFiles()
}
