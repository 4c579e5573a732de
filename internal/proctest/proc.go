package proctest

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// A Proc is a process of a Chain, as the test sees it. Its methods fail the
// test if what they wait for does not happen.
type Proc struct {
	T       testing.TB
	Chain   *Chain
	PID     int         // as the process itself sees it; see Process if it has a PID namespace of its own
	Process *os.Process // for signals

	conn   *conn
	cmd    *exec.Cmd     // of a process that Launch has started
	waited chan struct{} // closed when cmd.Wait has returned
	gone   chan struct{} // closed when the process has ended

	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, at each message
	log     []message
	addrs   []Addr
	answers map[int]chan message
	lastID  int
}

// An Addr is an address of a daemon.
type Addr struct{ Network, Address string }

func (p *Proc) receive(m message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.Event != nil && m.Err != nil {
		m.Event.Err = m.Err.error()
	}
	switch {
	case m.ID != 0:
		if answer, ok := p.answers[m.ID]; ok {
			answer <- m
			delete(p.answers, m.ID)
		}
	case m.Addrs != nil:
		p.addrs = m.Addrs
	default:
		p.log = append(p.log, m)
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

// wait calls f with p locked until it returns true.
func (p *Proc) wait(what string, f func() bool) {
	p.T.Helper()
	limit := time.After(Patience)
	gone := p.gone
	for {
		p.mu.Lock()
		ok, changed := f(), p.changed
		p.mu.Unlock()
		if ok {
			return
		}
		if gone == nil {
			p.T.Fatalf("process %d ended before %s; %v", p.PID, what, p.history())
		}
		select {
		case <-changed:
		case <-gone:
			gone = nil // call f once more
		case <-limit:
			p.T.Fatalf("process %d: no %s; %v", p.PID, what, p.history())
		}
	}
}

// history is what p has done, for messages.
func (p *Proc) history() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	b.WriteString("it came to")
	for _, m := range p.log {
		switch {
		case m.Call != "":
			fmt.Fprintf(&b, " [%s called %s: %v]", m.At, m.Call, m.Err.error())
		case m.Event != nil:
			fmt.Fprintf(&b, " [%s]", m.Event)
		default:
			fmt.Fprintf(&b, " [%s]", m.At)
		}
	}
	return b.String()
}

// message returns the n-th message, from 0, for which f returns true.
func (p *Proc) message(what string, n int, f func(message) bool) (m message) {
	p.T.Helper()
	p.wait(what, func() bool {
		left := n
		for _, m = range p.log {
			if f(m) {
				if left--; left < 0 {
					return true
				}
			}
		}
		return false
	})
	return m
}

func (p *Proc) atN(point Point, n int) message {
	p.T.Helper()
	return p.message(fmt.Sprintf("point %q", point), n, func(m message) bool { return m.At == point && m.Call == "" })
}

// At returns when p has come to the point.
func (p *Proc) At(point Point) {
	p.T.Helper()
	p.atN(point, 0)
}

// AtAgain returns when p has come to the point for the n-th time, counted from
// 0.
func (p *Proc) AtAgain(point Point, n int) {
	p.T.Helper()
	p.atN(point, n)
}

// AtAny returns when p has come to one of the points. It returns that point.
func (p *Proc) AtAny(points ...Point) Point {
	p.T.Helper()
	return p.message(fmt.Sprintf("point of %q", points), 0, func(m message) bool { return slices.Contains(points, m.At) && m.Call == "" }).At
}

// ErrAt returns the error with which p has come to a point such as
// AtNewFailed.
func (p *Proc) ErrAt(point Point) error {
	p.T.Helper()
	return p.atN(point, 0).Err.error()
}

// Points lists the points to which p has come so far.
func (p *Proc) Points() (list []Point) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.log {
		if m.Call == "" {
			list = append(list, m.At)
		}
	}
	return list
}

// Resume lets p go on, if p holds or is about to hold.
func (p *Proc) Resume() {
	p.T.Helper()
	if err := p.conn.send(command{Resume: true}); err != nil {
		p.T.Fatalf("process %d: %v", p.PID, err)
	}
}

// Event returns the n-th event of this kind, counted from 0.
func (p *Proc) Event(kind ecdysis.EventKind, n int) ecdysis.Event {
	p.T.Helper()
	return *p.atN(On(kind), n).Event
}

// EventWhere returns the first event for which f returns true.
func (p *Proc) EventWhere(what string, f func(ecdysis.Event) bool) ecdysis.Event {
	p.T.Helper()
	return *p.message("event "+what, 0, func(m message) bool { return isEvent(m) && f(*m.Event) }).Event
}

// WaitReturned returns the result of Upgrader.Wait.
func (p *Proc) WaitReturned() ecdysis.Event {
	p.T.Helper()
	return *p.atN(AtWaitReturned, 0).Event
}

func isEvent(m message) bool { return m.Event != nil && m.At == On(m.Event.Kind) && m.Call == "" }

// Events lists the events so far.
func (p *Proc) Events() (list []ecdysis.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.log {
		if isEvent(m) {
			list = append(list, *m.Event)
		}
	}
	return list
}

// Kinds lists the kinds of the events so far.
func (p *Proc) Kinds() (list []ecdysis.EventKind) {
	for _, e := range p.Events() {
		list = append(list, e.Kind)
	}
	return list
}

// HasEvents fails the test unless p's events so far are EventReady and these.
func (p *Proc) HasEvents(want ...ecdysis.EventKind) {
	p.T.Helper()
	if got := p.Kinds(); !slices.Equal(got, append([]ecdysis.EventKind{ecdysis.EventReady}, want...)) {
		p.T.Fatalf("events %q; want ready and %q", got, want)
	}
}

// begin sends a command.
func (p *Proc) begin(call string, arg []byte) chan message {
	p.T.Helper()
	answer := make(chan message, 1)
	p.mu.Lock()
	p.lastID++
	id := p.lastID
	p.answers[id] = answer
	p.mu.Unlock()
	if err := p.conn.send(command{ID: id, Call: call, Arg: arg}); err != nil {
		p.T.Fatalf("process %d: %s: %v", p.PID, call, err)
	}
	return answer
}

// A Successor says how the next process is started. A field that is zero changes
// nothing.
type Successor struct {
	Path, Dir string
	Args, Env []string // all of them
	SetEnv    []string // added to the environment, in place of variables with the same names
	Role      Role     // Raw, or one of the test's own
	Sibling   bool
	Veto      string // the text of Prepare's error
}

func (s Successor) zero() bool {
	return s.Path == "" && s.Dir == "" && s.Args == nil && s.Env == nil && s.SetEnv == nil && s.Role.name == "" && !s.Sibling && s.Veto == ""
}

// GobEncode makes it possible to send a Role to a daemon.
func (r Role) GobEncode() ([]byte, error) { return []byte(r.name), nil }

// GobDecode is the reverse of GobEncode.
func (r *Role) GobDecode(b []byte) error { r.name = string(b); return nil }

// An Attempt is an upgrade that has begun.
type Attempt struct {
	p         *Proc
	call      *Pending[None]
	successor *Proc
}

// BeginUpgrade calls Upgrade and does not wait for its end.
func (p *Proc) BeginUpgrade(s ...Successor) *Attempt {
	p.T.Helper()
	return &Attempt{p: p, call: CallUpgrade.Begin(p, s...)}
}

// Successor returns the process that the upgrade has started, as Launch does.
func (a *Attempt) Successor() *Proc {
	a.p.T.Helper()
	for limit := time.After(Patience); a.successor == nil; {
		p, changed := a.p.Chain.pop()
		if a.successor = p; p != nil {
			break
		}
		select {
		case <-changed:
		case a.call.m = <-a.call.answer:
			a.call.done = true
			if a.successor, _ = a.p.Chain.pop(); a.successor == nil && a.call.m.Err != nil {
				a.p.T.Fatalf("process %d: upgrade: %s; and no process has connected", a.p.PID, a.call.m.Err.Text)
			}
		case <-limit:
			a.p.T.Fatal("no process has connected")
		}
	}
	return a.successor
}

// Err returns the result of Upgrade.
func (a *Attempt) Err() error {
	a.p.T.Helper()
	return a.call.Err()
}

// OK fails the test unless Upgrade has returned nil.
func (a *Attempt) OK() {
	a.p.T.Helper()
	if err := a.Err(); err != nil {
		a.p.T.Fatalf("process %d: upgrade: %v", a.p.PID, err)
	}
}

// Fails is WantFailure for the result of Upgrade.
func (a *Attempt) Fails(step ecdysis.Step, target error) *Failure {
	a.p.T.Helper()
	f := WantFailure(a.p.T, a.Err(), step, target)
	if f.Successor = a.successor; f.Successor == nil {
		f.Successor = a.p.Chain.take(f.PID)
	}
	return f
}

// Upgrade upgrades p and returns its successor, which serves.
func (p *Proc) Upgrade(s ...Successor) *Proc {
	p.T.Helper()
	a := p.BeginUpgrade(s...)
	n := a.Successor()
	a.OK()
	n.At(AtServing)
	return n
}

// UpgradeHolding upgrades p to a process that holds at AtNew, such as Holding.
// It calls f there, lets the process go on, and returns it when it serves.
func (p *Proc) UpgradeHolding(f func(s *Proc)) *Proc {
	p.T.Helper()
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(AtNew)
	f(s)
	s.Resume()
	a.OK()
	s.At(AtServing)
	return s
}

// KillHolding is UpgradeHolding, but kills the successor after f, so that the
// attempt must fail.
func (p *Proc) KillHolding(f func(s *Proc)) {
	p.T.Helper()
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(AtNew)
	f(s)
	s.Kill()
	a.Fails(ecdysis.StepInit, io.ErrUnexpectedEOF)
}

// HasUnclaimed fails the test unless p's EventReady names these as unclaimed,
// in this order.
func (p *Proc) HasUnclaimed(want ...string) {
	p.T.Helper()
	if got := p.Event(ecdysis.EventReady, 0).Unclaimed; !slices.Equal(got, want) {
		p.T.Errorf("process %d has left %q unclaimed; want %q", p.PID, got, want)
	}
}

// FailUpgrade makes an attempt that must fail at this step; see WantFailure.
func (p *Proc) FailUpgrade(step ecdysis.Step, target error, s ...Successor) *Failure {
	p.T.Helper()
	return p.BeginUpgrade(s...).Fails(step, target)
}

// RefusesUpgrade fails the test unless Upgrade fails with this error before it
// begins.
func (p *Proc) RefusesUpgrade(target error) {
	p.T.Helper()
	p.FailUpgrade("", target)
}

// Prepare says how the successor of the next attempt is started, whatever triggers
// that attempt. In a takeover only a Veto has an effect.
func (p *Proc) Prepare(s Successor) {
	p.T.Helper()
	callPrepare.On(p, s)
}

// Ready calls Ready.
func (p *Proc) Ready() error { p.T.Helper(); return CallReady.Err(p) }

// Stop calls Stop and returns when that has returned.
func (p *Proc) Stop() { p.T.Helper(); CallStop.On(p) }

// Fail calls Fail, and returns its error.
func (p *Proc) Fail(text string) error { p.T.Helper(); return CallFail.Err(p, text) }

// Listen makes a further socket and serves it.
func (p *Proc) Listen(network, address string) (string, error) {
	p.T.Helper()
	return CallListen.Try(p, Listen{Network: network, Address: address})
}

// ListenWith is Listen with a ListenConfig.
func (p *Proc) ListenWith(c ecdysis.ListenConfig, network, address string) (string, error) {
	p.T.Helper()
	return CallListen.Try(p, Listen{Network: network, Address: address, Config: c})
}

// Close closes the i-th socket.
func (p *Proc) Close(i int) error { p.T.Helper(); return CallClose.Err(p, i) }

// Accept serves all sockets of a daemon that was told not to.
func (p *Proc) Accept() { p.T.Helper(); CallAccept.On(p) }

// WaitForPredecessor calls WaitForParent, which fails with
// context.DeadlineExceeded after limit, or after Patience if limit is 0.
func (p *Proc) WaitForPredecessor(limit ...time.Duration) error {
	p.T.Helper()
	if len(limit) == 0 {
		limit = []time.Duration{Patience}
	}
	return CallWaitForPredecessor.Err(p, limit[0])
}

// Exited reports whether the channel Exit is closed.
func (p *Proc) Exited() bool { p.T.Helper(); return callExited.On(p) }

// AwaitExit returns when the channel Exit is closed.
func (p *Proc) AwaitExit() { p.T.Helper(); callAwaitExit.On(p) }

// FDs lists p's descriptors, each with its number and the system's description.
func (p *Proc) FDs() []string { p.T.Helper(); return callFDs.On(p) }

// Environ lists p's environment.
func (p *Proc) Environ() []string { p.T.Helper(); return callEnviron.On(p) }

// Args lists p's arguments, the program's name first.
func (p *Proc) Args() []string { p.T.Helper(); return callArgs.On(p) }

// Getwd returns p's working directory.
func (p *Proc) Getwd() (string, error) { p.T.Helper(); return callGetwd.Try(p) }

// Chdir changes p's working directory.
func (p *Proc) Chdir(dir string) error { p.T.Helper(); return callChdir.Err(p, dir) }

// Run makes p run a program, and returns the program's output.
func (p *Proc) Run(words ...string) (string, error) { p.T.Helper(); return callRun.Try(p, words) }

// Generation returns p's generation.
func (p *Proc) Generation() int { p.T.Helper(); return callGeneration.On(p).Number }

// HasPredecessor reports whether p has inherited from another process.
func (p *Proc) HasPredecessor() bool { p.T.Helper(); return callGeneration.On(p).HasPredecessor }

// Exit makes p exit with this status when its clients have gone. It returns when
// Closed does.
func (p *Proc) Exit(status int) {
	p.T.Helper()
	_ = callExit.Begin(p, status)
	p.Closed()
}

// Signal sends a signal.
func (p *Proc) Signal(s os.Signal) {
	p.T.Helper()
	if err := p.Process.Signal(s); err != nil {
		p.T.Fatalf("process %d: %v", p.PID, err)
	}
}

// Halt stops p by SIGSTOP and returns when each of its threads stands still.
// SIGCONT lets p go on.
func (p *Proc) Halt() {
	p.T.Helper()
	p.Signal(syscall.SIGSTOP)
	for end := time.Now().Add(Patience); !standsStill(p.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.T.Fatalf("process %d goes on in spite of SIGSTOP", p.PID)
		}
	}
}

// Kill kills p. It returns when Closed does.
func (p *Proc) Kill() {
	p.T.Helper()
	if err := p.Process.Kill(); err != nil {
		p.T.Fatalf("process %d: %v", p.PID, err)
	}
	p.Closed()
}

// Ended returns when p's connection to the test is closed, so that p has ended or
// is about to end. See Closed.
func (p *Proc) Ended() {
	p.T.Helper()
	select {
	case <-p.gone:
	case <-time.After(Patience):
		p.T.Fatalf("process %d has not ended; %v", p.PID, p.history())
	}
}

// Living reports whether p has not ended.
func (p *Proc) Living() bool {
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// ExitStatus returns how p ended, in the words of os.ProcessState.String. Launch
// must have started p.
func (p *Proc) ExitStatus() string {
	p.T.Helper()
	p.Ended()
	<-p.waited
	return p.cmd.ProcessState.String()
}

// Addrs are p's addresses, in the order of its sockets.
func (p *Proc) Addrs() (list []Addr) {
	p.T.Helper()
	p.wait("addresses", func() bool {
		list = p.addrs
		return list != nil
	})
	return list
}

// Addr is the address of p's i-th socket.
func (p *Proc) Addr(i int) Addr { p.T.Helper(); return p.Addrs()[i] }

// Inodes returns the inodes of p's sockets. They show whether two processes have the
// same sockets. A process that was replaced has closed its listeners.
func (p *Proc) Inodes() []uint64 { p.T.Helper(); return callInodes.On(p) }

// Inherits fails the test unless p listens where the older process does.
func (p *Proc) Inherits(old *Proc) {
	p.T.Helper()
	if a, b := p.Addrs(), old.Addrs(); !slices.Equal(a, b) {
		p.T.Fatalf("process %d listens at %v, the one before it at %v", p.PID, a, b)
	}
}

// Serves fails the test unless p answers at each of its addresses.
func (p *Proc) Serves() {
	p.T.Helper()
	for _, a := range p.Addrs() {
		p.ServesAt(a)
	}
}

// ServesAt fails the test unless p answers at this address.
func (p *Proc) ServesAt(a Addr) {
	p.T.Helper()
	if pid, _, err := a.Ask(); err != nil || pid != p.PID {
		p.T.Fatalf("%v: process %d answers, %v; want %d", a, pid, err, p.PID)
	}
}

// Dial connects to p's i-th address, and fails the test unless p answers. The
// connection is closed at the end of the test.
func (p *Proc) Dial(i int) net.Conn {
	p.T.Helper()
	c, err := p.Addr(i).Dial()
	if err != nil {
		p.T.Fatal(err)
	}
	p.T.Cleanup(func() { c.Close() })
	p.Answers(c)
	return c
}

// Answers fails the test unless p answers on the connection.
func (p *Proc) Answers(c net.Conn) {
	p.T.Helper()
	if pid, _, err := Ask(c); err != nil || pid != p.PID {
		p.T.Fatalf("process %d answers, %v; want %d", pid, err, p.PID)
	}
}

// Refuses fails the test if a process of the chain, or one that does not answer,
// accepts connections at p's addresses.
func (p *Proc) Refuses() {
	p.T.Helper()
	for _, a := range p.Addrs() {
		if a.packets() {
			continue
		}
		c, err := a.Dial()
		if err == nil {
			// The system may have given the port to another test.
			pid, _, aerr := Ask(c)
			c.Close()
			if aerr == nil && strings.HasPrefix(a.Network, "tcp") && !p.Chain.has(pid) {
				continue
			}
			p.T.Fatalf("%v takes connections", a)
		}
		if !refused(err) {
			p.T.Fatalf("%v: %v; want that it is refused", a, err)
		}
	}
}

// HasPIDFile fails the test unless $DIR/pid names p.
func (p *Proc) HasPIDFile() {
	p.T.Helper()
	b, err := os.ReadFile(p.Chain.Path("pid"))
	if err != nil || string(b) != strconv.Itoa(p.PID)+"\n" {
		p.T.Fatalf("the PID file holds %q, %v; want %d", b, err, p.PID)
	}
}

// HasFailed waits until p has reported the failed upgrade whose successor was s.
func (p *Proc) HasFailed(s *Proc) ecdysis.Event {
	p.T.Helper()
	return p.EventWhere("of a failed upgrade", func(e ecdysis.Event) bool {
		return e.Kind == ecdysis.EventUpgradeFailed && e.PID == s.PID
	})
}
