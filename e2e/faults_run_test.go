package e2e

import (
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The cells of the matrix, with real processes.

var (
	allFaults = flag.Bool("faults.all", false, "run all cells of the matrix of faults")
	faultSeed = flag.Int64("faults.seed", time.Now().Unix()/(24*60*60), "which part of the matrix runs without -faults.all; the day, if it is not given")
)

// atUnclaimed is the point at which Options.Unclaimed is called, atStopped that
// at which the program's own call of Stop has returned, and atSignal that at
// which the program has got a signal.
const (
	atUnclaimed proctest.Point = "unclaimed"
	atStopped   proctest.Point = "stopped"
	atSignal    proctest.Point = "signal"
)

// faultProgram makes the daemon a program that stops when it gets SIGUSR2, and
// has a hook for what is unclaimed.
var faultProgram = proctest.Define("faults: program", func(d *proctest.Daemon, hook bool) (proctest.None, error) {
	if hook {
		d.Options.Unclaimed = func([]string) error { d.Point(atUnclaimed); return nil }
	}
	c := make(chan os.Signal, 10)
	signal.Notify(c, syscall.SIGUSR2)
	go func() {
		for range c {
			d.U.Stop()
			d.Point(atStopped)
		}
	}()
	return proctest.None{}, nil
})

// watchSignals tells the test of signals that are for the Upgrader, too.
var watchSignals = proctest.Define("faults: watch signals", func(d *proctest.Daemon, list []os.Signal) (proctest.None, error) {
	c := make(chan os.Signal, 10)
	signal.Notify(c, list...)
	go func() {
		for range c {
			d.Point(atSignal)
		}
	}()
	return proctest.None{}, nil
})

// signalsDelivered returns when os/signal waits for the next signal, so that
// every channel has got the last one. Nothing but its goroutine's stack tells
// that.
var signalsDelivered = proctest.Define("faults: signals delivered", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	waits := regexp.MustCompile(`\[syscall[^\n]*\n[^\n]*os/signal\.signal_recv\(`)
	for stacks := make([]byte, 1<<20); !waits.Match(stacks[:runtime.Stack(stacks, true)]); {
		time.Sleep(time.Millisecond)
	}
	return proctest.None{}, nil
})

// addMany adds files, whose names make more than a stream's buffer takes, or
// one.
var addMany = proctest.Define("faults: add files", func(d *proctest.Daemon, n int) (proctest.None, error) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		return proctest.None{}, err
	}
	defer f.Close()
	for i := range n {
		if err := d.U.AddFile(fmt.Sprintf("%01000d", i), f); err != nil {
			return proctest.None{}, err
		}
	}
	return proctest.None{}, nil
})

// handsOn returns when Upgrade waits for the successor to read. Nothing but its
// goroutine's stack tells that.
var handsOn = proctest.Define("faults: hands on", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	for stacks := make([]byte, 1<<20); ; time.Sleep(time.Millisecond) {
		if n := runtime.Stack(stacks, true); strings.Contains(string(stacks[:n]), "(*attempt).handOn(") {
			return proctest.None{}, nil
		}
	}
})

// A faultRun is a cell that runs.
type faultRun struct {
	*testing.T
	c     cell
	want  outcome
	chain *proctest.Chain
	p, s  *proctest.Proc
	load  *proctest.Load

	unchanged func()                        // the predecessor's descriptors, children and goroutines
	upgrade   *proctest.Attempt             // nil in a takeover
	recovered *proctest.Pending[string]     // in the place of upgrade
	client    interface{ Close() error }    // of the predecessor, which serves it to the end
	as        func(uid int) func(*exec.Cmd) // starts a process of another user
	mounted   bool                          // $DIR/run is a file system that the test does not see
	log       *os.File
	logRead   chan struct{} // closed when nobody reads the log any more

	asked *proctest.Client // of a stop socket
}

// specs returns those of the cell's processes.
func (x *faultRun) specs() (p, s, next proctest.Spec) {
	next = proctest.Both
	next.Listen = []proctest.Listen{{Network: "tcp", Address: "127.0.0.1:0"}, {Network: "unix", Address: "$DIR/in/sock"}}
	next.Wait = true
	next.Options = proctest.Triggered.Options
	next.Options.PIDFile = "$DIR/run/pid"
	next = next.At(proctest.AtWaitReturned, proctest.CallStop.Do()).At(proctest.AtReadyFailed, proctest.CallStop.Do()).At(proctest.AtStart, faultProgram.Do(x.c.at == readied))
	p, s = next, next
	hold := proctest.Once(proctest.Hold)
	switch x.c.at {
	case inPrepare, readied, inHandover, resuming:
		p = p.At(x.c.at.hookPoint(), hold)
	case started:
		s = s.At(proctest.AtStart, faultProgram.Do(false), proctest.Hold)
	case inTransfer:
		if x.c.mode == takeover {
			p = p.At(proctest.AtPrepare, hold)
		} else {
			s = s.At(proctest.AtStart, faultProgram.Do(false), proctest.Hold)
		}
	case made:
		s = s.Hold(proctest.AtNew)
	case listened:
		s = s.Hold(proctest.AtListened)
	case committed:
		s = s.Hold(proctest.On(ecdysis.EventReady))
	case inProbation:
		p = p.Probation(time.Minute)
	case final:
		if strings.HasPrefix(x.c.fault.name, "hook ") {
			p = p.At(x.c.at.hookPoint(), hold)
		}
	}
	if x.c.at == resuming {
		s = s.At(proctest.On(ecdysis.EventReady), proctest.Kill)
	}
	if x.c.fault.specs != nil {
		x.c.fault.specs(x.c, &p, &s)
	}
	// The program's own look at signals comes last, so that they are not caught
	// before the Upgrader catches them.
	watch := watchSignals.Do([]os.Signal{syscall.SIGTERM, syscall.SIGUSR1})
	p = p.At(proctest.AtServing, watch)
	if x.c.at == committed {
		point := proctest.On(ecdysis.EventReady)
		s = s.At(point, proctest.Seq(watch, s.Plan[point]))
	}
	return p, s, next
}

// run is the test of the cell.
func (c cell) run(t *testing.T) {
	x := &faultRun{T: t, c: c, want: c.fault.want(c)}
	p, s, next := x.specs()
	x.chain = proctest.New(t, p, s, next)
	for _, dir := range []string{"in", "run"} {
		if err := os.Mkdir(x.chain.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if c.fault.setUp != nil {
		c.fault.setUp(x)
	}
	x.reach()
	if x.want.serves == byNobody || x.want.gone {
		x.load.Check() // before there is nobody to answer
	}
	c.fault.strike(x)
	x.check()
}

// launch starts a process of the cell that no other one has started.
func (x *faultRun) launch() *proctest.Proc {
	x.Helper()
	return x.chain.Launch(func(cmd *exec.Cmd) {
		if f := x.c.fault.launch; f != nil {
			f(x, cmd)
		}
	})
}

// begin begins an upgrade of p in the cell's mode.
func (x *faultRun) begin(p *proctest.Proc) (a *proctest.Attempt, s *proctest.Proc) {
	x.Helper()
	switch x.c.mode {
	case takeover:
		return nil, x.launch()
	case sibling:
		return p.BeginUpgrade(proctest.Successor{Sibling: true}), nil
	}
	return p.BeginUpgrade(), nil
}

// successor waits for the process that an upgrade has started.
func (x *faultRun) successor() *proctest.Proc {
	x.Helper()
	s := x.chain.Next()
	if x.c.mode == sibling {
		x.Cleanup(func() { _ = s.Process.Kill(); _, _ = s.Process.Wait() })
	}
	return s
}

// reach brings the processes to the cell's step.
func (x *faultRun) reach() {
	x.Helper()
	x.p = x.launch()
	x.watches(x.p, proctest.AtServing)
	x.p.InWait()
	switch x.c.at {
	case inTransfer:
		addMany.On(x.p, 2500)
	case readied:
		addMany.On(x.p, 1)
	case final:
		x.client = x.p.Dial(0)
	}
	if n := x.c.fault.files; n > 0 {
		addMany.On(x.p, n)
	}
	x.unchanged = x.p.KeepsWithClients()
	addrs := x.p.Addrs()
	if x.c.fault.begin != nil {
		x.c.fault.begin(x)
	}
	if x.c.fault.unreached != nil { // the file is gone
		addrs = addrs[:1]
	}
	x.load = proctest.StartLoad(x.T, proctest.Clients{Killed: x.want.killed}, addrs...)
	x.load.More(5)
	if x.want.serves == byNobody && (x.c.at == inHandover || x.c.at == committed || x.c.at == resuming) {
		x.load.Check() // before clients wait for the service that ends
	}
	switch f := x.c.fault; {
	case f.recovers:
		x.p.Prepare(proctest.Successor{Sibling: x.c.mode == sibling})
		x.recovered = upgradeRecovers.Begin(x.p)
	case f.byWait && x.c.mode != takeover:
		x.p.Prepare(proctest.Successor{Sibling: x.c.mode == sibling})
		x.p.Signal(syscall.SIGHUP)
	default:
		x.upgrade, x.s = x.begin(x.p)
	}
	if x.s == nil && x.c.at != inPrepare {
		x.s = x.successor()
	}
	switch x.c.at {
	case inPrepare, readied, inHandover, resuming:
		x.p.At(x.c.at.hookPoint())
	case started:
		x.s.At(proctest.AtStart)
	case inTransfer:
		if x.c.mode == takeover {
			x.p.At(proctest.AtPrepare)
			x.s.Halt()
			x.p.Resume()
		} else {
			x.s.At(proctest.AtStart)
		}
		handsOn.On(x.p)
	case made:
		x.s.At(proctest.AtNew)
	case listened:
		x.s.At(proctest.AtListened)
	case committed:
		x.watches(x.s, proctest.On(ecdysis.EventReady))
	case inProbation:
		x.s.At(proctest.AtServing)
	case final:
		x.s.At(proctest.AtServing)
		x.p.At(proctest.On(ecdysis.EventUpgraded))
		if !strings.HasPrefix(x.c.fault.name, "hook ") {
			x.p.At(proctest.AtWaitReturned)
		}
	}
}

// watches returns when p watches signals, as planned for the point.
func (x *faultRun) watches(p *proctest.Proc, point proctest.Point) {
	x.Helper()
	if err := watchSignals.ErrAt(p, point); err != nil {
		x.Fatal(err)
	}
}

// release lets the process go on that holds at the step.
func (x *faultRun) release() {
	x.Helper()
	switch p := x.p; x.c.at {
	case inTransfer, started, made, listened, committed:
		if x.c.ofHalted() {
			if x.s.Living() {
				x.signal(x.s, syscall.SIGCONT)
			}
			return
		}
		p = x.s
		fallthrough
	case inPrepare, readied, inHandover, resuming:
		if p.Living() {
			p.Resume()
		}
	case final:
		if p.Living() && strings.HasPrefix(x.c.fault.name, "hook ") {
			p.Resume()
		}
	}
}

// signal sends a signal to a process that may have ended.
func (x *faultRun) signal(p *proctest.Proc, s syscall.Signal) {
	x.Helper()
	if err := p.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		x.Fatalf("process %d: %v", p.PID, err)
	}
}

// pause halts a process for some time, while the other one goes on.
func (x *faultRun) pause(p *proctest.Proc, d time.Duration) {
	x.Helper()
	p.Halt()
	if !x.c.ofHalted() || p == x.p {
		x.release()
	}
	time.Sleep(d) // as the scenario wants it
	x.signal(p, syscall.SIGCONT)
}

// stopPredecessor gives the predecessor a stop, and lets the processes go on
// when it has taken it.
func (x *faultRun) stopPredecessor(s stopping) {
	x.Helper()
	x.signal(x.p, s.signal)
	switch {
	case x.c.at == final:
		if x.want.killed == 0 && s.signal != syscall.SIGUSR2 { // a takeover's: it is caught
			x.p.At(atSignal)
		}
		return
	case s.signal == syscall.SIGUSR2:
		x.p.At(atStopped)
	default:
		x.p.At(atSignal)
		if x.c.at == inPrepare || x.c.at == readied || x.c.at == committed {
			// The processes are let go on, and must not be before it has acted
			// on the signal.
			signalsDelivered.On(x.p)
			x.p.InWait()
		}
	}
	x.goOnStopped()
}

// goOnStopped lets the processes go on when the predecessor has taken a stop,
// as far as a test can see that.
func (x *faultRun) goOnStopped() {
	x.Helper()
	switch {
	case x.c.at > inHandover || x.c.at == inPrepare && x.c.mode != takeover:
	case x.c.mode == takeover: // it is consent
		x.p.Event(ecdysis.EventStopDeferred, 0)
	case x.c.at >= readied: // the successor is told at once
		x.s.At(proctest.AtReadyFailed)
	default: // the successor holds, so that the predecessor ends it
		x.p.Event(ecdysis.EventUpgradeFailed, 0)
		return
	}
	x.release()
}

// stopSuccessor gives the successor a stop, and lets the processes go on.
func (x *faultRun) stopSuccessor(s stopping) {
	x.Helper()
	early := x.c.at <= listened && s.signal == syscall.SIGUSR1
	if early {
		x.watches(x.s, proctest.AtStart)
	}
	x.signal(x.s, s.signal)
	switch {
	case x.c.at == readied || x.c.at == inHandover:
		x.s.At(proctest.AtReadyFailed)
	case x.c.at == committed && s.signal != syscall.SIGUSR2, early && !x.c.ofHalted():
		x.s.At(atSignal)
	case s.signal == syscall.SIGUSR2 && x.c.at < inProbation:
		x.s.At(atStopped)
	}
	if x.c.at <= listened && s.signal == syscall.SIGTERM {
		if x.c.ofHalted() {
			x.signal(x.s, syscall.SIGCONT)
		}
		x.s.Ended()
	}
	x.release()
}

// ask sends a client to a stop socket.
func (x *faultRun) ask(s stopping) {
	x.Helper()
	x.asked = proctest.Connect(x.T, x.chain.Path(s.socket))
	if x.c.at == inHandover { // the client waits for the process that serves
		x.release()
		return
	}
	x.goOnStopped()
}

// check fails the test unless everything is as the cell wants it.
func (x *faultRun) check() {
	x.Helper()
	if x.s == nil && (x.want.serves == bySuccessor || x.want.starts()) {
		x.s = x.successor()
	}
	x.checkError()
	x.checkTold()
	switch x.want.serves {
	case byPredecessor:
		x.servesOn(x.p, false)
		x.load.Check()
		x.unchanged()
		x.load = proctest.StartLoad(x.T, proctest.Clients{}, x.load.Addrs()...)
		x.goesOn(x.p)
	case bySuccessor, byFirst:
		x.s.At(proctest.AtServing)
		x.servesOn(x.s, false)
		if lost := x.s.Event(ecdysis.EventReady, 0).Lost; (len(lost) > 0) != x.want.lost {
			x.Errorf("the successor has lost %q; want %v", lost, x.want.lost)
		}
		x.checkAsked(x.s)
		if x.client != nil {
			x.client.Close()
		}
		if x.c.at == inProbation {
			_ = x.p.Process.Kill() // which ends the probation, unless a stop has
		}
		x.p.Ended()
		if want := map[servant]int{bySuccessor: 1}[x.want.serves]; x.s.Generation() != want {
			x.Errorf("the process that serves is generation %d; want %d", x.s.Generation(), want)
		}
		x.goesOn(x.s)
	case byNobody:
		x.checkNobody()
	case byBoth:
		x.load.End()
		x.s.At(proctest.AtServing)
		if !x.p.Living() {
			x.Errorf("process %d has ended", x.p.PID)
		}
	}
}

// checkError fails the test unless the predecessor says what the cell wants.
func (x *faultRun) checkError() {
	x.Helper()
	if x.recovered != nil {
		if got, err := x.recovered.Wait(); got != "planned" || err != nil {
			x.Fatalf("Upgrade panicked with %q and returned %v; want the hook's panic", got, err)
		}
		return
	}
	var err error
	switch {
	case x.upgrade != nil && (len(x.want.steps) > 0 || x.want.serves == byNobody && x.want.maybe):
		err = x.upgrade.Err()
	case len(x.want.steps) > 0 && !x.want.maybe:
		err = x.p.Event(ecdysis.EventUpgradeFailed, 0).Err
	default:
		return // checkNobody and the end of the predecessor tell
	}
	if !x.want.allows(err) {
		x.Fatalf("the upgrade's error is %v; want one at step %q that is %v and says %q", err, x.want.steps, x.want.is, x.want.says)
	}
}

// checkTold fails the test unless a successor that was given up has been told
// what the cell wants, or was ended before that, and has never served.
func (x *faultRun) checkTold() {
	x.Helper()
	if x.s == nil || x.want.serves == byBoth || x.want.serves != byPredecessor && x.want.told == nil {
		return
	}
	x.s.Ended()
	served := false
	for _, at := range x.s.Points() {
		switch at {
		case proctest.AtServing:
			served = true
		case proctest.AtNewFailed, proctest.AtListenFailed, proctest.AtReadyFailed:
			if x.want.told != nil {
				proctest.Want(x, x.s.ErrAt(at), x.want.told)
				return
			}
		}
	}
	if served && x.want.killed == 0 && !x.want.maybe {
		x.Errorf("the successor, process %d, has served", x.s.PID)
	}
	if x.want.told != nil && x.c.mode == takeover {
		x.Errorf("the successor, process %d, has not been told that it was given up", x.s.PID)
	}
}

// checkAsked reads the answer of a stop socket that did not stop the process
// that serves: the takeover that the stop was consent to has succeeded.
func (x *faultRun) checkAsked(s *proctest.Proc) {
	x.Helper()
	if x.asked != nil {
		x.asked.WantsLine(fmt.Sprintf("error: %v: %v serves", ecdysis.ErrUpgraded, s.Reply(1)))
	}
}

// servesOn fails the test unless p serves, and the PID file names it.
func (x *faultRun) servesOn(p *proctest.Proc, healed bool) {
	x.Helper()
	files := []string{"in/sock", "log", "partial", "run/pid", "stop", "take", "upgrade"}
	if f := x.c.fault.unreached; f != nil && f(x.c) && !healed {
		p.ServesAt(p.Addr(0))
	} else {
		p.Serves()
	}
	if !x.want.gone {
		x.load.More(5)
	}
	if b, err := os.ReadFile(x.inRun(p, "pid")); err != nil || string(b) != strconv.Itoa(p.PID)+"\n" {
		x.Errorf("the PID file holds %q, %v; want %d", b, err, p.PID)
	}
	x.hasFiles(slices.DeleteFunc(files, func(name string) bool {
		return name == "log" && x.log == nil || name == "run/pid" && x.mounted ||
			name == "in/sock" && x.c.fault.unreached != nil
	})...)
}

// goesOn fails the test unless p's next upgrade works, and no request has
// failed that may not.
func (x *faultRun) goesOn(p *proctest.Proc) {
	x.Helper()
	a, n := x.begin(p)
	if n == nil {
		n = x.successor()
	}
	x.Cleanup(func() {
		if a != nil && x.Failed() {
			x.Log("the next upgrade: ", a.Err())
		}
	})
	n.At(proctest.AtServing)
	x.servesOn(n, true)
	if !(p == x.p && x.c.at == inProbation) { // else it stands by for a minute
		p.Ended()
	}
	x.load.Check()
}

// checkNobody fails the test unless nothing is left, and nothing but a killed
// process's files.
func (x *faultRun) checkNobody() {
	x.Helper()
	if x.client != nil {
		x.client.Close()
	}
	if x.asked != nil {
		answers, generation := x.p, 0
		if x.c.at >= inHandover && x.c.at != resuming {
			answers, generation = x.s, 1
		}
		_ = generation
		x.asked.Wants(answers.Reply(generation))
	}
	x.p.Ended()
	if x.s == nil && x.want.maybe {
		x.chain.Discard()
	}
	if x.s != nil {
		x.s.Ended()
	}
	// Another test may have the TCP address by now.
	if c, err := x.p.Addr(1).Dial(); err == nil {
		c.Close()
		x.Errorf("%v takes connections", x.p.Addr(1))
	}
	if !strings.Contains(x.c.fault.name, "killed") && !strings.Contains(x.c.fault.name, "panics") {
		x.hasFiles()
	}
}

// hasFiles fails the test unless these files are there, and no others.
func (x *faultRun) hasFiles(want ...string) {
	x.Helper()
	var got []string
	err := filepath.WalkDir(x.chain.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || path == x.chain.Hub() {
			return err
		}
		name, err := filepath.Rel(x.chain.Dir, path)
		if strings.HasPrefix(name, "in/") && x.c.fault.unreached != nil {
			return err // what could not be removed may be there
		}
		got = append(got, name)
		return err
	})
	if err != nil || !slices.Equal(got, want) {
		x.Errorf("files %q are there, %v; want %q", got, err, want)
	}
}

// TestFaults runs a part of the matrix that changes from day to day, or all of
// it. It is not parallel to other tests, because its cells are to each other.
func TestFaults(t *testing.T) {
	proctest.OnlyOn(t, "siblings, and ending a process that takes over", "linux")
	list, _ := cells()
	if !*allFaults {
		t.Logf("the part of -faults.seed %d", *faultSeed)
		list = rotating(list, *faultSeed)
	}
	// Cells that wait for a bound take little of the machine.
	quick, slow := make(chan struct{}, 2*runtime.GOMAXPROCS(0)), make(chan struct{}, 12)
	var all sync.WaitGroup
	for _, c := range list {
		turn := quick
		if c.fault.want(c).slow {
			turn = slow
		}
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			t.Run(strings.ReplaceAll(c.String(), " ", "_"), c.run)
		})
	}
	all.Wait()
}

// part is the share of the cells that run without -faults.all.
const part = 4

// rotating returns the cells of a seed. Consecutive seeds have all cells.
func rotating(list []cell, seed int64) (some []cell) {
	for _, c := range list {
		h := fnv.New32a()
		h.Write([]byte(c.String()))
		if (int64(h.Sum32()%part)+seed)%part == 0 {
			some = append(some, c)
		}
	}
	return some
}
