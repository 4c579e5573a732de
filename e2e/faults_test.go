package e2e

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Every step of the conversation × every fault × every way to start the
// successor. The rules here say what each cell allows, faults_run_test.go makes
// it happen, and faults_page_test.go writes docs/faults.md from the same rules.

// A mode is how the successor comes to be one.
type mode string

const (
	fork     mode = "fork"     // a child of the predecessor
	sibling  mode = "sibling"  // Command.Sibling: a child of the predecessor's parent
	takeover mode = "takeover" // another one's child, which takes over
)

var modes = []mode{fork, sibling, takeover}

// A moment is a step of the conversation at which the fault comes.
type moment int

const (
	inPrepare moment = iota
	started
	inTransfer
	made
	listened
	readied
	inHandover
	committed
	inProbation
	final
	resuming
)

var moments = []struct{ name, what string }{
	inPrepare:   {"prepare", "The predecessor calls `Options.Prepare`. No successor is started; one that takes over waits in `New`."},
	started:     {"start", "The successor is started and has not called `New`. What is handed on waits in the system's buffer."},
	inTransfer:  {"transfer", "More is handed on than the buffer takes, and the successor has not read it."},
	made:        {"new", "The successor's `New` has returned. It has everything, and has asked for nothing."},
	listened:    {"listened", "The successor has called `Listen` and not yet `Ready`."},
	readied:     {"ready", "READY has come. The predecessor calls `Options.Unclaimed`, and serves still."},
	inHandover:  {"handover", "The predecessor is paused and calls `Notify(EventHandover)`. COMMIT is not sent."},
	committed:   {"committed", "COMMIT has come. The successor calls `Notify(EventReady)`. DONE is not sent."},
	inProbation: {"probation", "The successor serves, and the predecessor stands by."},
	final:       {"final", "FINAL is sent and the predecessor serves its last client. (Of hooks, `Notify(EventUpgraded)` runs before that.)"},
	resuming:    {"resuming", "The successor was killed after COMMIT, and the predecessor calls `Notify(EventResumed)`."},
}

func (m moment) String() string { return moments[m].name }

// A cell is one case of the matrix.
type cell struct {
	at    moment
	fault *fault
	mode  mode
}

func (c cell) String() string { return c.at.String() + "/" + c.fault.name + "/" + string(c.mode) }

// Who serves after the fault.
type servant string

const (
	byPredecessor servant = "predecessor"
	bySuccessor   servant = "successor"
	byNobody      servant = "nobody"
	byFirst       servant = "taker, as a first process" // it starts as if nobody had served before
	byBoth        servant = "both"
)

// An outcome is what a cell allows.
type outcome struct {
	serves servant

	// The error of the predecessor's Upgrade, or of its EventUpgradeFailed: an
	// UpgradeError of one of these steps. None means that there is none: the
	// upgrade has succeeded, or nobody is left to return from it.
	steps []ecdysis.Step
	is    error
	says  string
	maybe bool // there may be none, because COMMIT can have been sent before

	// What the successor's New or Ready returns, if the predecessor has not
	// ended it before.
	told error

	killed int  // processes whose clients may be cut off
	gone   bool // clients may be refused, because nobody listens
	lost   bool // the successor's EventReady names the Unix socket as lost
	slow   bool // the cell waits for a bound of some seconds
	wait   string
}

// starts reports whether the attempt fails after it has started a successor.
func (o outcome) starts() bool {
	return len(o.steps) > 0 && o.steps[0] != ecdysis.StepPrepare && o.steps[0] != ecdysis.StepStart
}

// A fault is what goes wrong, or what is ordered.
type fault struct {
	name string
	what string // for the page

	// out says why the fault makes no sense at a step. An empty reason means
	// that it does.
	out func(c cell) string
	// want says what is allowed.
	want func(c cell) outcome
	// specs changes the specs of the two processes.
	specs func(c cell, p, s *proctest.Spec)
	// strike makes the fault happen while both processes are at the step, and
	// lets them go on.
	strike   func(x *faultRun)
	byWait   bool // a signal begins the upgrade, and not a call of Upgrade
	recovers bool // the program recovers from a panic of Upgrade

	setUp     func(x *faultRun)                // before any process is started
	launch    func(x *faultRun, cmd *exec.Cmd) // changes how one is
	begin     func(x *faultRun)                // before the upgrade begins
	files     int                              // that are handed on
	unreached func(c cell) bool                // nobody reaches the Unix socket until the next upgrade
}

// undisturbed is what follows if nothing goes wrong from the step on.
func undisturbed(c cell) outcome {
	if c.at == resuming {
		return outcome{serves: byPredecessor, steps: []ecdysis.Step{ecdysis.StepHandover}, is: io.ErrUnexpectedEOF}
	}
	return outcome{serves: bySuccessor}
}

// failing is the step in an UpgradeError of what goes wrong at c's step.
func (c cell) failing() []ecdysis.Step {
	switch {
	case c.at == inPrepare && c.mode == takeover: // the taker is looked at when Prepare has returned
		return []ecdysis.Step{ecdysis.StepStart}
	case c.at == inPrepare:
		return []ecdysis.Step{ecdysis.StepPrepare}
	case c.at <= listened:
		return []ecdysis.Step{ecdysis.StepInit}
	case c.at == inProbation:
		return []ecdysis.Step{ecdysis.StepProbation}
	}
	return []ecdysis.Step{ecdysis.StepHandover}
}

// givenUp is an attempt that fails with this error, after which the predecessor
// serves.
func (c cell) givenUp(is error) outcome {
	return outcome{serves: byPredecessor, steps: c.failing(), is: is}
}

// predecessorEnds is what follows if the predecessor ends at c's step.
func predecessorEnds(c cell) outcome {
	switch {
	case c.at == resuming, c.at == inPrepare && c.mode != takeover:
		return outcome{serves: byNobody}
	case c.at == inPrepare:
		return outcome{serves: byFirst, gone: true, killed: 1}
	}
	return outcome{serves: bySuccessor, killed: 1}
}

// successorEnds is what follows if the successor ends at c's step.
func successorEnds(c cell) outcome {
	if c.at == final {
		return outcome{serves: byNobody}
	}
	o := c.givenUp(io.ErrUnexpectedEOF)
	if c.at == inProbation {
		o.killed = 1
	}
	return o
}

// Reasons to leave a cell out.

// unheld says why a process cannot be brought to c's step.
func unheld(c cell) string {
	if c.at == started && c.mode == takeover {
		return "A process that takes over says nothing before `New`, so that nothing has begun."
	}
	return ""
}

// needsSuccessor says why there is no successor for a fault.
func needsSuccessor(c cell) string {
	switch {
	case c.at == inPrepare && c.mode != takeover:
		return "No successor is started."
	case c.at == resuming:
		return "The successor has ended."
	}
	return ""
}

// needsHook says why no hook runs at c's step.
func needsHook(c cell) string {
	switch c.at {
	case inPrepare, readied, inHandover, committed, final, resuming:
		return ""
	}
	return "No hook runs at this step."
}

// hookPoint is the point in a daemon at which the hook of a step runs. It is
// empty if none does.
func (m moment) hookPoint() proctest.Point {
	switch m {
	case inPrepare:
		return proctest.AtPrepare
	case readied:
		return atUnclaimed
	case inHandover:
		return proctest.On(ecdysis.EventHandover)
	case committed:
		return proctest.On(ecdysis.EventReady)
	case final:
		return proctest.On(ecdysis.EventUpgraded)
	case resuming:
		return proctest.On(ecdysis.EventResumed)
	}
	return ""
}

// ofHalted reports whether the successor is at the step because it is halted.
func (c cell) ofHalted() bool { return c.at == inTransfer && c.mode == takeover }

// waitHook is a wait for a hook, which has no bound.
const waitHook = "the hook"

var faultTimeout = proctest.Patience / 10 // Options.UpgradeTimeout of cells that wait for it

// shortenTimeout is for cells that wait for UpgradeTimeout.
func shortenTimeout(_ cell, p, s *proctest.Spec) {
	p.Options.UpgradeTimeout, s.Options.UpgradeTimeout = faultTimeout, faultTimeout
}

// A stopping is one way to order a stop.
type stopping struct {
	name, what string
	signal     syscall.Signal // 0: a client of the socket
	socket     string
	kind       ecdysis.EventKind
}

// The program calls Stop when it gets SIGUSR2.
var stoppings = []stopping{
	{"a call of Stop", "The program calls `Stop`", syscall.SIGUSR2, "", ecdysis.EventStopping},
	{"a signal to stop", "One of `StopSignals` comes", syscall.SIGTERM, "", ecdysis.EventStopping},
	{"a signal to stop accepting", "One of `PartialStopSignals` comes", syscall.SIGUSR1, "", ecdysis.EventPartialStop},
	{"a client of StopSocket", "A client asks for a stop.", 0, "stop", ecdysis.EventStopping},
	{"a client of PartialStopSocket", "A client asks for the end of accepting.", 0, "partial", ecdysis.EventPartialStop},
}

// predecessorStopped is what follows if the predecessor is ordered to stop.
func (s stopping) predecessorStopped(c cell) outcome {
	switch {
	case c.at == resuming:
		o := undisturbed(c)
		o.serves = byNobody
		return o
	case c.at == final:
		o := outcome{serves: bySuccessor}
		if c.mode != takeover && (s.signal == syscall.SIGTERM || s.signal == syscall.SIGUSR1) {
			o.killed = 1 // its last client is cut off, as by any second signal
		}
		return o
	case c.mode == takeover: // it is consent
		return outcome{serves: bySuccessor}
	case c.at >= committed: // it is passed on
		return outcome{serves: byNobody}
	}
	o := outcome{serves: byNobody, steps: c.failing(), is: ecdysis.ErrStopped, told: ecdysis.ErrAborted}
	if c.at == inPrepare {
		o.steps, o.told = []ecdysis.Step{ecdysis.StepStart}, nil
		if s.socket != "" { // no test sees when it is taken
			o.steps, o.maybe = []ecdysis.Step{ecdysis.StepStart, ecdysis.StepInit, ecdysis.StepHandover}, true
		}
	}
	return o
}

// successorStopped is what follows if the successor is ordered to stop.
func (s stopping) successorStopped(c cell) outcome {
	if c.at >= committed {
		return outcome{serves: byNobody}
	}
	switch { // the Upgrader does not catch signals yet
	case c.at <= listened && s.signal == syscall.SIGTERM:
		return successorEnds(c)
	case c.at <= listened && s.signal == syscall.SIGUSR1: // which a Go program ignores
		return undisturbed(c)
	}
	o := c.givenUp(nil)
	o.says, o.told = ecdysis.ErrStopped.Error(), ecdysis.ErrStopped
	return o
}

// socketAsked is what follows if a client of a stop socket comes.
func (s stopping) socketAsked(c cell) outcome {
	switch {
	case c.at <= readied: // the predecessor accepts there
		return s.predecessorStopped(c)
	case c.at == resuming:
		return s.predecessorStopped(c)
	}
	return outcome{serves: byNobody} // the client waits for the process that serves
}

// faults are all faults, in the order of the page.
var faults = slices.Concat([]*fault{
	{
		name:   "predecessor killed",
		what:   "SIGKILL, or a crash of the old process.",
		want:   predecessorEnds,
		strike: func(x *faultRun) { x.p.Kill(); x.release() },
	},
	{
		name:   "successor killed",
		what:   "SIGKILL, or a crash of the new process.",
		out:    needsSuccessor,
		want:   successorEnds,
		strike: func(x *faultRun) { x.s.Kill(); x.release() },
	},
	{
		name:   "predecessor paused",
		what:   "SIGSTOP, and SIGCONT after 300 ms. Clients wait.",
		want:   undisturbed,
		strike: func(x *faultRun) { x.pause(x.p, 300*time.Millisecond) },
	},
	{
		name:   "successor paused",
		what:   "SIGSTOP, and SIGCONT after 300 ms.",
		out:    needsSuccessor,
		want:   undisturbed,
		strike: func(x *faultRun) { x.pause(x.s, 300*time.Millisecond) },
	},
	{
		name: "successor hangs",
		what: "SIGSTOP, for longer than the predecessor waits.",
		out: func(c cell) string {
			if c.at == inProbation || c.at == final {
				return "A process that serves has not ended when it hangs. It is as if it were paused."
			}
			return needsSuccessor(c)
		},
		want: func(c cell) outcome {
			o := c.givenUp(os.ErrDeadlineExceeded)
			if o.slow, o.wait = true, "5 s"; c.at < readied {
				o.wait, o.told = "`UpgradeTimeout`", ecdysis.ErrAborted
				o.steps = []ecdysis.Step{ecdysis.StepInit}
			}
			return o
		},
		specs: func(c cell, p, s *proctest.Spec) {
			if c.at < readied {
				shortenTimeout(c, p, s)
			}
		},
		strike: func(x *faultRun) {
			x.s.Halt()
			if !x.c.ofHalted() {
				x.release()
			}
			x.p.Event(ecdysis.EventUpgradeFailed, 0)
			if x.c.mode == takeover && x.c.at < readied { // it is not ended
				x.signal(x.s, syscall.SIGCONT)
			}
		},
	},
	{
		name: "hook hangs",
		what: "The hook that runs at the step does not return.",
		out:  needsHook,
		want: func(c cell) outcome {
			switch c.at {
			case inPrepare:
				if c.mode == takeover { // the taker waits no longer than its own UpgradeTimeout
					o := c.givenUp(io.ErrUnexpectedEOF)
					o.told, o.slow, o.wait = os.ErrDeadlineExceeded, true, waitHook
					return o
				}
				return outcome{serves: bySuccessor, wait: waitHook}
			case readied:
				return outcome{serves: bySuccessor, wait: waitHook}
			case final:
				return outcome{serves: bySuccessor}
			case resuming:
				o := undisturbed(c)
				o.slow, o.wait = true, "5 s"
				return o
			}
			o := c.givenUp(os.ErrDeadlineExceeded)
			o.slow, o.wait = true, "5 s"
			if c.at == inHandover {
				o.told = ecdysis.ErrAborted
			}
			return o
		},
		specs: func(c cell, p, s *proctest.Spec) {
			if c.at == inPrepare && c.mode == takeover {
				s.Options.UpgradeTimeout = faultTimeout
			}
		},
		strike: func(x *faultRun) {
			switch x.c.at {
			case inPrepare, readied: // the predecessor serves meanwhile
				x.load.More(5)
				x.p.RefusesUpgrade(ecdysis.ErrInProgress)
				if x.c.at == inPrepare && x.c.mode == takeover {
					x.s.Ended()
				}
			case final:
				x.s.Serves()
			default:
				x.p.Event(ecdysis.EventUpgradeFailed, 0)
				x.p.Serves()
			}
			if x.c.at != committed { // there the successor is killed
				x.release()
			}
		},
	},
	{
		name: "hook panics",
		what: "The hook that runs at the step panics, in an upgrade by `Wait` or in `Ready`. No caller can recover, and the process ends.",
		out:  needsHook,
		want: func(c cell) outcome {
			if c.at == committed { // it says so before it ends
				o := c.givenUp(nil)
				o.says = "a hook did not return"
				return o
			}
			return predecessorEnds(c)
		},
		specs:  panicAtHook,
		byWait: true,
		strike: func(x *faultRun) { x.release() },
	},
	{
		name: "hook panics, and the program recovers",
		what: "The program has called `Upgrade`, and recovers from what that panics with.",
		out: func(c cell) string {
			if r := needsHook(c); r != "" {
				return r
			}
			if c.at == committed {
				return "`Ready` of the successor panics. A successor that recovers has failed, and ends as if it had not."
			}
			if c.mode == takeover {
				return "The hook runs on a goroutine of `Wait`, where no program can recover."
			}
			return ""
		},
		want: func(c cell) outcome {
			if c.at == final {
				return outcome{serves: bySuccessor}
			}
			return outcome{serves: byPredecessor, says: "planned"}
		},
		specs:    panicAtHook,
		recovers: true,
		strike:   func(x *faultRun) { x.release() },
	},
}, stopFaults(), systemFaults())

func panicAtHook(c cell, p, s *proctest.Spec) {
	panics := proctest.Once(proctest.Hold, proctest.Panic)
	if c.at == committed {
		*s = s.At(c.at.hookPoint(), panics)
	} else {
		*p = p.At(c.at.hookPoint(), panics)
	}
}

// stopFaults are the stops.
func stopFaults() (list []*fault) {
	for _, s := range stoppings {
		if s.socket != "" {
			list = append(list, &fault{
				name:   s.name,
				what:   s.what,
				want:   s.socketAsked,
				strike: func(x *faultRun) { x.ask(s) },
			})
			continue
		}
		list = append(list, &fault{
			name:   "predecessor: " + s.name,
			what:   s.what + " in the old process.",
			want:   s.predecessorStopped,
			strike: func(x *faultRun) { x.stopPredecessor(s) },
		}, &fault{
			name: "successor: " + s.name,
			what: s.what + " in the new process.",
			out: func(c cell) string {
				if s.signal == syscall.SIGUSR2 && (c.at <= inTransfer) {
					return "The successor has no Upgrader yet."
				}
				return needsSuccessor(c)
			},
			want: s.successorStopped,
			specs: func(c cell, _, next *proctest.Spec) {
				if s.signal == syscall.SIGUSR1 && c.at <= listened {
					*next = next.At(proctest.AtStart, watchSignals.Do([]os.Signal{s.signal}), next.Plan[proctest.AtStart])
				}
			},
			strike: func(x *faultRun) { x.stopSuccessor(s) },
		})
	}
	return list
}

// leftOut says why a cell is not there. It returns "" for one that is.
func (c cell) leftOut() string {
	if r := unheld(c); r != "" {
		return r
	}
	if c.fault.out != nil {
		return c.fault.out(c)
	}
	return ""
}

// cells lists the cells, those that are left out with the reason.
func cells() (list []cell, left map[cell]string) {
	left = make(map[cell]string)
	for at := range moments {
		for _, f := range faults {
			for _, m := range modes {
				c := cell{moment(at), f, m}
				if r := c.leftOut(); r != "" {
					left[c] = r
				} else {
					list = append(list, c)
				}
			}
		}
	}
	return list, left
}

// allows reports whether an error of the predecessor is what o allows.
func (o outcome) allows(err error) bool {
	if err == nil {
		return len(o.steps) == 0 || o.maybe
	}
	var ue *ecdysis.UpgradeError
	if !errors.As(err, &ue) {
		return false
	}
	return slices.Contains(o.steps, ue.Step) && (o.is == nil || errors.Is(err, o.is)) && strings.Contains(err.Error(), o.says)
}
