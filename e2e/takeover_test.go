package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A process that no other one has started takes over all that the process has
// which serves. The test starts each of these processes.

// taking is proctest.Both, takes over at $DIR/take, and exits when it is
// replaced.
func taking() proctest.Spec {
	s := proctest.Both
	s.Wait = true
	s.Options.TakeoverSocket = "$DIR/take"
	return s
}

// takeoverFailed fails the test unless p's n-th EventUpgradeFailed, from 0, is
// about a takeover that failed at this step, and its error says all of this. An
// empty step is that of a takeover that was refused.
func takeoverFailed(p *proctest.Proc, n int, step ecdysis.Step, says ...string) {
	p.T.Helper()
	e := p.Event(ecdysis.EventUpgradeFailed, n)
	if e.Socket != p.Chain.Path("take") {
		p.T.Errorf("event %v; want one by the socket", e)
	}
	if at := stepOf(e); at != step {
		p.T.Errorf("event %v at step %q; want %q", e, at, step)
	}
	proctest.Want(p.T, e.Err, nil, says...)
}

// stepOf is the step at which the upgrade has failed, if it had begun.
func stepOf(e ecdysis.Event) ecdysis.Step {
	var ue *ecdysis.UpgradeError
	if !errors.As(e.Err, &ue) {
		return ""
	}
	return ue.Step
}

// turnedAway starts a process whose New must fail with this error, which says
// all of this.
func turnedAway(c *proctest.Chain, target error, says ...string) {
	c.T.Helper()
	p := c.Launch()
	proctest.Want(c.T, p.ErrAt(proctest.AtNewFailed), target, says...)
	p.Ended()
}

// isGeneration fails the test unless p is of this generation, and has inherited
// unless it is the first.
func isGeneration(p *proctest.Proc, n int) {
	p.T.Helper()
	if g, inherited := p.Generation(), p.HasPredecessor(); g != n || inherited != (n > 0) {
		p.T.Fatalf("process %d: generation %d, HasParent %v; want %d, %v", p.PID, g, inherited, n, n > 0)
	}
}

// takenOver fails the test unless s has replaced p, and p knows it. It returns
// when p has exited.
func takenOver(p, s *proctest.Proc, generation int) {
	p.T.Helper()
	p.Ended()
	if e := p.Event(ecdysis.EventUpgraded, 0); e.PID != s.PID || e.Generation != generation || e.Socket != p.Chain.Path("take") || e.Err != nil {
		p.T.Errorf("event %v; want one of process %d, generation %d, by the socket", e, s.PID, generation)
	}
	hasReturned(p, ecdysis.EventUpgraded, asked(p.Chain, "take"))
}

// keeps is Proc.KeepsWithClients for a process that waits to be taken over.
func keeps(p *proctest.Proc) (check func()) {
	p.T.Helper()
	p.InWait()
	return p.KeepsWithClients()
}

// take is the first frame of a taker.
var take = proctest.Frame('T', proctest.Record{"version=1"})

// dialTake connects to the takeover socket and sends bytes.
func dialTake(c *proctest.Chain, b []byte) *proctest.Peer {
	c.T.Helper()
	q := proctest.DialPeer(c.T, c.Path("take"))
	if len(b) > 0 {
		q.Send(b)
	}
	return q
}

// rawTaker starts a process that takes over frame by frame, as the test says.
func rawTaker(c *proctest.Chain) *proctest.Proc {
	c.T.Helper()
	p := c.Launch(proctest.As(proctest.Raw))
	p.At(proctest.AtStart)
	p.RawDial("$DIR/take")
	return p
}

// rawWrite lets a Raw process send a frame.
func rawWrite(p *proctest.Proc, kind byte, records ...proctest.Record) {
	p.T.Helper()
	if err := p.RawWrite(proctest.Frame(kind, records...)); err != nil {
		p.T.Fatalf("process %d sends a frame %q: %v", p.PID, kind, err)
	}
}

// firstNew calls New, which must fail, before the daemon's own call of it.
var firstNew = proctest.Define("first New", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	_, err := ecdysis.New(*d.Options)
	if err == nil {
		d.Fatal(errors.New("the first New has succeeded"))
	}
	return proctest.None{}, err
})

// newTwice returns s, which calls New a second time when the test resumes it.
func newTwice(s proctest.Spec) proctest.Spec {
	return s.At(proctest.AtStart, firstNew.Do(), proctest.Hold)
}

// A start is a cold one if no process listens: there is no file, or one that a
// killed process has left.
func TestTakeoverColdStart(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, taking())
	for range 2 {
		p := c.Start()
		isGeneration(p, 0)
		p.Serves()
		p.HasEvents()
		p.Kill()
		c.HasFiles("pid", "sock", "take")
	}
	p := c.Start()
	isGeneration(p, 0)
	s := c.Start()
	isGeneration(s, 1)
	takenOver(p, s, 1)
	s.Serves()
}

// A taker that does not keep to the protocol, or that Prepare rejects, is told
// why, and hinders nobody.
func TestTakeoverRefused(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking())
	c := p.Chain
	unchanged := keeps(p)
	dialTake(c, proctest.Frame('T', proctest.Record{"version=2"})).Refused(`version "2"`)
	dialTake(c, proctest.Frame('T')).Refused(`version ""`)
	dialTake(c, proctest.Frame('H', proctest.Record{"version=1"})).Refused(`a frame 'H'`)
	dialTake(c, []byte("GET / HTTP/1.1\r\n\r\n")).Refused("does not use this protocol")
	dialTake(c, []byte("T\x00\x00\x00\x02\x05a")).Refused("does not use this protocol")
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	q := dialTake(c, nil)
	q.Send(take, int(f.Fd()))
	q.Refused("descriptors")
	for _, part := range [][]byte{nil, take[:1], take[:len(take)-1]} {
		dialTake(c, part).Conn.Close()
	}
	p.HasEvents() // none of these has begun anything
	unchanged()

	p.Prepare(proctest.Successor{Veto: "not now"})
	turnedAway(c, nil, c.Path("take"), "refuses", "not now")
	takeoverFailed(p, 0, ecdysis.StepPrepare, "not now")
	unchanged()
	p.Serves()
	p.HasPIDFile()
	s := c.Start()
	takenOver(p, s, 1)
	s.Serves()
}

// goexit ends the goroutine of a hook.
var goexit = proctest.Define("Goexit", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	runtime.Goexit()
	return proctest.None{}, nil
})

// A hook that ends its goroutine leaves nobody waiting.
func TestTakeoverHookGone(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking().At(proctest.On(ecdysis.EventUpgrading), goexit.Do()), taking())
	turnedAway(p.Chain, nil, "refuses", "a hook did not return")
	p.Serves()
}

// Silent clients do not come before those that send something, and cost the
// process no more than a few descriptors.
func TestTakeoverSilentClients(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking())
	c := p.Chain
	before := len(p.FDs())
	unchanged := keeps(p)
	var list []*proctest.Peer
	many := 300
	if runtime.GOOS != "linux" {
		many = 150 // the queue of a Unix socket has room for 193
	}
	for range many {
		list = append(list, dialTake(c, nil))
	}
	const most = 32
	for _, q := range list[:len(list)-most] {
		q.HungUp() // because a later one has its place
	}
	if n := len(p.FDs()); n > before+most+1 {
		t.Errorf("%d descriptors with %d silent clients, %d before", n, many, before)
	}
	p.HasEvents()
	p.Serves()
	q := dialTake(c, take) // in the place of another one
	q.ReadUntil('E')
	q.Conn.Close()
	takeoverFailed(p, 0, ecdysis.StepInit, "ended without")
	for _, q := range list {
		q.Conn.Close()
	}
	unchanged()
	// And they do not keep the process from ending.
	list = nil
	for range 3 {
		list = append(list, dialTake(c, nil))
	}
	s := c.Start()
	takenOver(p, s, 1)
	for _, q := range list {
		q.HungUp()
	}
	s.Serves()
}

// Of two takers at once, one takes over. The other one is told, and may call New
// again.
func TestTwoTakers(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, taking(), taking().Hold(proctest.AtNew), newTwice(taking()), taking())
	p := c.Start()
	l := p.Load(1)
	s := c.Launch()
	s.At(proctest.AtNew)
	late := c.Launch()
	proctest.Want(t, firstNew.ErrAt(late, proctest.AtStart), nil, c.Path("take"), "refuses", ecdysis.ErrInProgress.Error())
	takeoverFailed(p, 0, "", ecdysis.ErrInProgress.Error())
	turnedAway(c, nil, ecdysis.ErrInProgress.Error())
	l.More(10)
	p.Serves()
	s.Resume()
	s.At(proctest.AtServing)
	takenOver(p, s, 1)
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventUpgradeFailed, ecdysis.EventHandover, ecdysis.EventUpgraded)
	late.Resume()
	late.At(proctest.AtServing)
	isGeneration(late, 2)
	takenOver(s, late, 2)
	late.Serves()
	l.Check()
}

// A taker that comes during an upgrade is told, too, up to the end of the
// probation.
func TestTakerDuringUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking().Probation(time.Hour), taking().Hold(proctest.AtNew), taking())
	c := p.Chain
	l := p.Load(1)
	s := p.BeginUpgrade().Successor()
	s.At(proctest.AtNew)
	turnedAway(c, nil, "refuses", ecdysis.ErrInProgress.Error())
	takeoverFailed(p, 0, "", ecdysis.ErrInProgress.Error())
	s.Resume()
	s.At(proctest.AtServing)
	l.Check() // the predecessor has answered all that it has accepted
	l = p.Load(1)
	// From now on nobody but the successor accepts.
	p.Halt()
	turnedAway(c, nil, "refuses", ecdysis.ErrInProgress.Error())
	takeoverFailed(s, 0, "", ecdysis.ErrInProgress.Error())
	s.Serves()
	p.Kill() // which ends the probation
	n := c.Start()
	isGeneration(n, 2)
	takenOver(s, n, 2)
	n.Serves()
	l.Check()
}

// A process whose options cannot be meant does not begin to take over.
func TestTakerWithBadOptions(t *testing.T) {
	t.Parallel()
	bad := taking()
	bad.Options.StopSocket = "$DIR/" + strings.Repeat("x", 200)
	p := proctest.Start(t, taking(), bad)
	n := p.Chain.Launch()
	proctest.Want(t, n.ErrAt(proctest.AtNewFailed), nil, "StopSocket", "at most")
	n.Ended()
	p.Chain.Specs(taking())
	takenOver(p, p.Chain.Start(), 1)
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
}

// A taker that comes between COMMIT and the moment at which the successor serves
// is told, too, and is not the first client that the successor accepts.
func TestTakerDuringHandover(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking(), taking().Hold(proctest.On(ecdysis.EventReady)))
	s := p.BeginUpgrade().Successor()
	s.At(proctest.On(ecdysis.EventReady))
	dialTake(p.Chain, take).Refused(ecdysis.ErrInProgress.Error())
	takeoverFailed(p, 0, "", ecdysis.ErrInProgress.Error())
	s.Resume()
	s.At(proctest.AtServing)
	p.Ended()
	s.HasEvents()
	s.Serves()
}

// A taker that comes before Ready waits until it has returned. That takes a
// while if there is much to close that nobody has claimed.
func TestTakerBeforeReady(t *testing.T) {
	t.Parallel()
	many := taking()
	many.Listen = append(slices.Clone(many.Listen), slices.Repeat(proctest.TCP.Listen, 300)...)
	c := proctest.New(t, many, taking().Hold(proctest.AtListened))
	p := c.Start()
	s := c.Launch()
	s.At(proctest.AtListened)
	p.Kill()
	q := dialTake(c, take)
	s.Resume()
	q.ReadUntil('E')
	s.At(proctest.AtServing)
	q.Conn.Close()
	takeoverFailed(s, 0, ecdysis.StepInit, "ended without")
	s.Serves()
}

// The taker dies at each step: the old process serves on, says why the attempt
// failed, and is taken over by the next taker.
func TestTakerDies(t *testing.T) {
	t.Parallel()
	const gone = "ended without a call of Ready or Fail"
	// sends lets n send a frame that is right whatever its kind is.
	sends := func(n *proctest.Proc, kind byte) {
		n.T.Helper()
		rawWrite(n, kind, proctest.Record{"version=1", fmt.Sprint("pid=", n.PID)})
	}
	for name, d := range map[string]struct {
		step  ecdysis.Step // of the failed attempt; empty if none has begun
		early bool         // the old process may not yet have sent all: StepStart is right, too
		says  string
		old   proctest.Point         // at which the old process holds
		taker proctest.Point         // at which the taker holds
		raw   func(n *proctest.Proc) // the taker is Raw, and does this
	}{
		"silent":              {raw: func(n *proctest.Proc) {}},
		"before HELLO":        {step: ecdysis.StepStart, old: proctest.On(ecdysis.EventUpgrading), raw: func(n *proctest.Proc) { sends(n, 'T') }},
		"in Prepare":          {step: ecdysis.StepStart, old: proctest.AtPrepare, raw: func(n *proctest.Proc) { sends(n, 'T') }},
		"after HELLO":         {step: ecdysis.StepInit, early: true, raw: func(n *proctest.Proc) { sends(n, 'T'); n.RawReadUntil('H') }},
		"during the transfer": {step: ecdysis.StepInit, early: true, raw: func(n *proctest.Proc) { sends(n, 'T'); n.RawReadUntil('S') }},
		"after END":           {step: ecdysis.StepInit, says: gone, raw: func(n *proctest.Proc) { sends(n, 'T'); n.RawReadUntil('E') }},
		"after ACK":           {step: ecdysis.StepInit, says: gone, raw: func(n *proctest.Proc) { sends(n, 'T'); n.RawReadUntil('E'); sends(n, 'K') }},
		"after New":           {step: ecdysis.StepInit, says: gone, taker: proctest.AtNew},
		"before READY":        {step: ecdysis.StepInit, says: gone, taker: proctest.AtListened},
		"before COMMIT":       {step: ecdysis.StepHandover, old: proctest.On(ecdysis.EventHandover)},
		"after COMMIT":        {step: ecdysis.StepHandover, taker: proctest.On(ecdysis.EventReady)},
		"before DONE": {step: ecdysis.StepHandover, raw: func(n *proctest.Proc) {
			sends(n, 'T')
			n.RawReadUntil('E')
			sends(n, 'K')
			sends(n, 'R')
			n.RawReadUntil('C')
		}},
		"in probation": {step: ecdysis.StepProbation, taker: proctest.AtServing},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, clients := taking().At(d.old, proctest.Once(proctest.Hold)), proctest.Clients{}
			if d.step == ecdysis.StepProbation {
				first, clients.Killed = first.Probation(time.Hour), 1
			}
			p := proctest.Start(t, first, taking().Hold(d.taker))
			c := p.Chain
			unchanged := keeps(p)
			l := proctest.StartLoad(t, clients, p.Addrs()...)
			var n *proctest.Proc
			if d.raw != nil {
				n = rawTaker(c)
				d.raw(n)
			} else {
				n = c.Launch()
			}
			if d.taker != "" {
				n.At(d.taker)
			}
			if d.old != "" {
				p.At(d.old)
			}
			n.Kill()
			if d.old != "" {
				p.Resume()
			}
			want := []ecdysis.EventKind{ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed, ecdysis.EventUpgradeFailed}
			step := d.step
			switch step {
			case "":
				want = nil
			case ecdysis.StepStart, ecdysis.StepInit:
				want = []ecdysis.EventKind{ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed}
				if d.early && stepOf(p.Event(ecdysis.EventUpgradeFailed, 0)) == ecdysis.StepStart {
					step = ecdysis.StepStart
				}
			}
			if step != "" {
				says := fmt.Sprint("successor ", n.PID, ": ")
				if slices.Contains([]string{"freebsd", "dragonfly"}, runtime.GOOS) && (step == ecdysis.StepStart || step == ecdysis.StepInit) {
					says = "" // they do not name it, and it has not said READY
				}
				takeoverFailed(p, 0, step, d.says, says)
			}
			p.HasEvents(want...)
			l.More(10)
			l.Check()
			p.Serves()
			p.HasPIDFile()
			c.HasFiles("pid", "sock", "take")
			unchanged()

			c.Specs(taking())
			again := p.Load(1)
			again.More(10)
			s := c.Start()
			again.More(10)
			again.Check()
			isGeneration(s, 1)
			s.Inherits(p)
			s.HasPIDFile()
			if d.step == ecdysis.StepProbation {
				s.Stop() // which ends it
			}
			takenOver(p, s, 1)
		})
	}
}

// The old process dies at each step: until it has handed all on, the new one is
// a first process; from then on it is the successor, and serves.
func TestTakenDies(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]struct {
		old       proctest.Point // at which the old process kills itself
		taker     proctest.Point // at which the new one holds until the old one is killed
		probation time.Duration
		cold      bool
	}{
		"before HELLO":  {old: proctest.On(ecdysis.EventUpgrading), cold: true},
		"in Prepare":    {old: proctest.AtPrepare, cold: true},
		"after New":     {taker: proctest.AtNew},
		"before READY":  {taker: proctest.AtListened},
		"before COMMIT": {old: proctest.On(ecdysis.EventHandover)},
		"before DONE":   {taker: proctest.On(ecdysis.EventReady)},
		"in probation":  {taker: proctest.AtServing, probation: time.Hour},
		"after FINAL":   {old: proctest.On(ecdysis.EventUpgraded)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, taking().Probation(d.probation).At(d.old, proctest.Kill), taking().Hold(d.taker), taking())
			c := p.Chain
			var l *proctest.Load
			if !d.cold { // in a cold start nobody listens for a moment
				l = proctest.StartLoad(t, proctest.Clients{Killed: 1}, p.Addrs()...)
				l.More(10)
			}
			s := c.Launch()
			if d.taker != "" {
				s.At(d.taker)
				p.Kill()
				s.Resume()
			}
			s.At(proctest.AtServing)
			p.Ended()
			generation := 1
			if d.cold {
				generation = 0
			} else {
				s.Inherits(p)
				l.More(10)
				l.Check()
			}
			isGeneration(s, generation)
			s.Serves()
			s.HasEvents()
			s.HasPIDFile()
			c.HasFiles("pid", "sock", "take")
			n := c.Start()
			takenOver(s, n, generation+1)
			n.Serves()
			n.Stop()
			n.Ended()
			c.HasFiles()
		})
	}
}

// hello is the first frame of a process of generation 4 that is taken over.
var hello = proctest.Frame('H', proctest.Record{"version=1", "generation=4", "pid=1"})

// listenTake listens in the place of a process that is taken over.
func listenTake(c *proctest.Chain) *net.UnixListener {
	c.T.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: c.Path("take")})
	if err != nil {
		c.T.Fatal(err)
	}
	c.T.Cleanup(func() { ln.Close() })
	return ln
}

// unlisten closes ln when no process that is being started has a copy of it.
func unlisten(ln net.Listener) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	ln.Close()
}

// Some other program may listen at the takeover socket. Whatever it sends, New
// waits for no longer than UpgradeTimeout.
func TestTakeoverFromOthers(t *testing.T) {
	t.Parallel()
	reads := func(q *proctest.Peer) { q.T.Helper(); q.ReadUntil('T') }
	sends := func(b ...[]byte) func(q *proctest.Peer) {
		return func(q *proctest.Peer) { reads(q); q.Send(slices.Concat(b...)) }
	}
	// isTold is for bytes whose sender is told why they are wrong.
	isTold := func(why string, b ...[]byte) func(q *proctest.Peer) {
		return func(q *proctest.Peer) {
			sends(b...)(q)
			if r := q.ReadUntil('F'); len(r) != 1 || !strings.Contains(strings.Join(r[0], " "), why) {
				q.T.Errorf("a FAIL with %q; want that it says %q", r, why)
			}
		}
	}
	const late, foreign = "Options.UpgradeTimeout", "does not use this protocol"
	mail := []byte("220 mail.example ESMTP\r\n")
	for name, o := range map[string]struct {
		talk  func(q *proctest.Peer) // nil if it does not even accept
		is    error
		says  string
		final bool // New may not be called again, because something was inherited
	}{
		"nothing":                 {is: os.ErrDeadlineExceeded, says: late},
		"nothing, having heard":   {talk: reads, is: os.ErrDeadlineExceeded, says: late},
		"a line":                  {talk: sends(mail), says: foreign},
		"another version":         {talk: isTold(`version "2"`, proctest.Frame('H', proctest.Record{"version=2", "generation=4"})), says: `version "2"`},
		"no version":              {talk: isTold(`version ""`, proctest.Frame('H')), says: `version ""`},
		"another frame":           {talk: isTold(foreign, proctest.Frame('E')), says: foreign},
		"no":                      {talk: sends(proctest.Frame('F', proctest.Record{"reason=not today"})), says: "refuses: not today"},
		"no reason":               {talk: sends(proctest.Frame('F')), says: "refuses"},
		"a bad generation":        {talk: isTold(`generation is "x"`, proctest.Frame('H', proctest.Record{"version=1", "generation=x"})), says: `generation is "x"`, final: true},
		"HELLO and nothing":       {talk: isTold(late, hello), is: os.ErrDeadlineExceeded, says: late, final: true},
		"HELLO and a line":        {talk: sends(hello, mail), says: foreign, final: true},
		"descriptors without any": {talk: isTold("1 descriptors were announced and 0 came", hello, proctest.Frame('S', proctest.Record{"kind=file", "name=x"})), says: "descriptors", final: true},
		"HELLO and ABORT":         {talk: sends(hello, proctest.Frame('A')), is: ecdysis.ErrAborted, final: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := taking().UpgradeTimeout(proctest.Patience)
			if o.is == os.ErrDeadlineExceeded {
				spec = spec.UpgradeTimeout(proctest.Patience / 100)
			}
			c := proctest.New(t, newTwice(spec))
			ln := listenTake(c)
			p := c.Launch()
			var q *proctest.Peer
			if o.talk != nil {
				q = proctest.AcceptPeer(t, ln)
				o.talk(q)
			}
			proctest.Want(t, firstNew.ErrAt(p, proctest.AtStart), o.is, c.Path("take"), o.says)
			if q != nil && !o.final {
				q.HungUp()
			}
			c.HasFiles("take")
			unlisten(ln)
			p.Resume()
			if o.final {
				proctest.Want(t, p.ErrAt(proctest.AtNewFailed), nil, "called before")
				p.Ended()
				return
			}
			p.At(proctest.AtServing)
			isGeneration(p, 0)
			p.Serves()
		})
	}
}

// A process that closes the connection without a frame has ended, or was just
// being replaced: New looks again, and gives up in the end.
func TestTakeoverHungUp(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"and is gone", "and is another", "again and again"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, taking())
			ln := listenTake(c)
			p := c.Launch()
			switch name {
			case "and is gone":
				for range 3 {
					proctest.AcceptPeer(t, ln).Conn.Close()
				}
				q := proctest.AcceptPeer(t, ln)
				unlisten(ln)
				q.Conn.Close()
				p.At(proctest.AtServing)
				isGeneration(p, 0)
			case "and is another":
				proctest.AcceptPeer(t, ln).Conn.Close()
				q := proctest.AcceptPeer(t, ln)
				q.ReadUntil('T')
				q.Conn.Close()
				q = proctest.AcceptPeer(t, ln)
				q.ReadUntil('T')
				unlisten(ln)
				q.Send(slices.Concat(hello, proctest.Frame('E')))
				q.ReadUntil('R')
				q.Send(proctest.Frame('C', proctest.Record{"probation=0"}))
				q.ReadUntil('D')
				q.Send(proctest.Frame('L'))
				p.At(proctest.AtServing)
				isGeneration(p, 5)
			case "again and again":
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						c.Close()
					}
				}()
				proctest.Want(t, p.ErrAt(proctest.AtNewFailed), io.ErrUnexpectedEOF, c.Path("take"), "closes the connection")
				return
			}
			p.Serves()
		})
	}
}

// A process that ends while it hands on leaves a successor, which makes anew
// what it has not got.
func TestTakeoverCutShort(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"after HELLO":     hello,
		"within a frame":  slices.Concat(hello, []byte("S\x00")),
		"after END":       slices.Concat(hello, proctest.Frame('E')),
		"an unknown word": slices.Concat(hello, proctest.Frame('?', proctest.Record{"later=1"})),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, taking())
			ln := listenTake(c)
			p := c.Launch()
			q := proctest.AcceptPeer(t, ln)
			q.ReadUntil('T')
			unlisten(ln)
			q.Send(b)
			q.Conn.Close()
			p.At(proctest.AtServing)
			isGeneration(p, 5)
			p.Serves()
			p.HasPIDFile()
			s := c.Start()
			takenOver(p, s, 6)
			s.Serves()
		})
	}
}

// A taker that takes too long is given up, and not ended, because it is no child
// of the old process.
func TestTakerLate(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, taking().UpgradeTimeout(100*time.Millisecond), taking())
	unchanged := keeps(p)
	l := p.Load(1)
	n := rawTaker(p.Chain)
	rawWrite(n, 'T', proctest.Record{"version=1"})
	n.RawReadUntil('A')
	takeoverFailed(p, 0, ecdysis.StepInit, "not ready within 100ms (Options.UpgradeTimeout)")
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	n.Goroutines() // which it can tell, because it lives
	l.More(10)
	l.Check()
	unchanged()
	p.Serves()
}

// A taker that has got COMMIT and does not keep to the protocol may serve at any
// moment, and is ended before the old process resumes.
func TestTakerEnded(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "only a child can be ended", "linux")
	p := proctest.Start(t, taking())
	unchanged := keeps(p)
	l := p.Load(1)
	n := rawTaker(p.Chain)
	rawWrite(n, 'T', proctest.Record{"version=1"})
	n.RawReadUntil('E')
	rawWrite(n, 'K')
	rawWrite(n, 'R', proctest.Record{fmt.Sprint("pid=", os.Getpid())}) // which is not ended
	n.RawReadUntil('C')
	p.Event(ecdysis.EventHandover, 0)
	proctest.CallWrite.Begin(n, proctest.Frame('?'))
	n.Ended()
	takeoverFailed(p, 0, ecdysis.StepHandover, "a frame '?'")
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed, ecdysis.EventUpgradeFailed)
	l.More(10)
	l.Check()
	unchanged()
	p.Serves()
	if list := p.Children(); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
}

// Before COMMIT, a taker that does not keep to the protocol is told, and left
// alone.
func TestTakerTalksNonsense(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]struct {
		frame []byte
		says  string
	}{
		"early DONE":   {proctest.Frame('D'), "a frame 'D'"},
		"another TAKE": {take, "a frame 'T'"},
		"no PID":       {proctest.Frame('R', proctest.Record{"pid=x"}), `process ID is "x"`},
		"a bad PID":    {proctest.Frame('R', proctest.Record{"pid=-1"}), `process ID is "-1"`},
		"FAIL":         {proctest.Frame('F', proctest.Record{"reason=my disk is full"}), "it says: my disk is full"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, taking())
			unchanged := keeps(p)
			n := rawTaker(p.Chain)
			rawWrite(n, 'T', proctest.Record{"version=1"})
			n.RawReadUntil('E')
			if err := n.RawWrite(f.frame); err != nil {
				t.Fatal(err)
			}
			n.RawReadUntil('A')
			takeoverFailed(p, 0, ecdysis.StepInit, f.says)
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
			n.Goroutines() // which it can tell, because it lives
			p.Serves()
			unchanged()
		})
	}
}

// A second stop of the old process ends a takeover. The first one is consent.
func TestTakenStops(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, taking(), taking().Hold(proctest.AtNew))
	p := c.Start()
	n := c.Launch()
	n.At(proctest.AtNew)
	p.Stop()
	p.Event(ecdysis.EventStopDeferred, 0)
	p.Serves()
	proctest.CallStop.Begin(p)
	p.Ended()
	takeoverFailed(p, 0, ecdysis.StepInit, "stopped")
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventStopDeferred, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)
	c.HasFiles()
	n.Resume()
	proctest.Want(t, n.ErrAt(proctest.AtReadyFailed), ecdysis.ErrAborted)
	n.Ended()
	c.HasFiles()
}

// After a probation that was not passed, the PID file and the control sockets
// are the old process's. It upgrades and is taken over as before.
func TestTakeoverProbation(t *testing.T) {
	t.Parallel()
	spec := taking()
	spec.Options.UpgradeSocket = "$DIR/upgrade"
	c := proctest.New(t, spec.Probation(time.Hour), spec)
	p := c.Start()
	n := c.Start()
	n.HasPIDFile()
	n.RefusesUpgrade(ecdysis.ErrInProgress)
	n.Kill()
	takeoverFailed(p, 0, ecdysis.StepProbation)
	p.HasPIDFile()
	c.HasFiles("pid", "sock", "take", "upgrade")
	p.Serves()

	c.Start().Kill()
	takeoverFailed(p, 1, ecdysis.StepProbation)
	wait := proctest.BeginRequest(t, c.Path("upgrade"))
	s := c.Next()
	s.At(proctest.AtServing)
	s.Stop() // within its probation, which makes the upgrade final
	s.Ended()
	if r, err := wait(); err != nil || r != s.Reply(1) {
		t.Errorf("upgrade: %v, %v; want %v", r, err, s.Reply(1))
	}
	p.Ended()
	c.HasFiles()
}

// Older generations drain while the newest is taken over, upgrades, or may not
// because there are too many.
func TestTakeoverDraining(t *testing.T) {
	t.Parallel()
	spec := taking()
	spec.Options.MaxDraining = 1
	c := proctest.New(t, spec)
	const unixSocket = 1
	p0 := c.Start()
	c0 := p0.Dial(unixSocket)
	p1 := p0.BeginUpgrade().Successor()
	p1.At(proctest.AtServing)
	c1 := p1.Dial(unixSocket)
	p2 := c.Start() // while p0 drains
	isGeneration(p2, 2)
	c2 := p2.Dial(unixSocket)
	turnedAway(c, nil, "refuses", ecdysis.ErrDraining.Error(), "2 are alive", "MaxDraining is 1")
	takeoverFailed(p2, 0, "", ecdysis.ErrDraining.Error())
	p2.Serves()
	p0.Answers(c0)
	p1.Answers(c1)
	c0.Close()
	p0.Ended()
	p3 := c.Start()
	isGeneration(p3, 3)
	p3.Serves()
	turnedAway(c, nil, ecdysis.ErrDraining.Error())
	c1.Close()
	p1.Ended()
	p4 := p3.BeginUpgrade().Successor() // while p2 drains
	p4.At(proctest.AtServing)
	isGeneration(p4, 4)
	p3.Ended()
	p2.Answers(c2)
	c2.Close()
	takenOver(p2, p3, 3)
	p4.Serves()
}

// Nothing is left of takeovers, successful or not, in any process.
func TestTakeoverLeaks(t *testing.T) {
	t.Parallel()
	const many = 50
	spec := taking()
	spec.NoAccept = true
	p := proctest.Start(t, spec)
	c := p.Chain
	q := dialTake(c, take)
	q.ReadUntil('E')
	q.Conn.Close()
	takeoverFailed(p, 0, ecdysis.StepInit)
	unchanged := keeps(p)
	for n := range many {
		q := dialTake(c, take)
		switch n % 4 {
		case 0:
			q.ReadUntil('H')
		case 1:
			q.ReadUntil('E')
			q.Send(proctest.Frame('F', proctest.Record{"reason=planned"}))
			q.ReadUntil('A')
		case 2:
			q.ReadUntil('E')
			q.Send([]byte("garbage\r\n"))
			q.ReadUntil('A')
		case 3:
			q.ReadUntil('H') // else nothing might have begun
			q.Send(proctest.Frame('K'))
		}
		q.Conn.Close()
		p.Event(ecdysis.EventUpgradeFailed, n+1)
	}
	unchanged()
	if list := p.Children(); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
	var first []string
	for n := range many {
		s := c.Start()
		takenOver(p, s, n+1)
		if p = s; n == 0 {
			first = fdKinds(p)
		}
	}
	if last := fdKinds(p); !slices.Equal(last, first) {
		t.Errorf("after %d takeovers: %q; after one: %q", many, last, first)
	}
	if list := p.Children(); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
	c.HasFiles("pid", "sock", "take")
}

var number = regexp.MustCompile("[0-9]+")

// fdKinds lists what p's descriptors are, without any number.
func fdKinds(p *proctest.Proc) (list []string) {
	p.T.Helper()
	for _, fd := range p.FDs() {
		_, what, _ := strings.Cut(fd, " ")
		list = append(list, number.ReplaceAllString(what, "N"))
	}
	slices.Sort(list)
	return list
}
