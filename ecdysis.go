// Package ecdysis replaces a running daemon by its next version without a
// client noticing.
//
// The old process starts the new one, hands it the listening sockets
// themselves, and goes on serving until the new one says that it is ready.
// Then it stops accepting, gives its word for that, and the new one starts:
// no connection is refused, reset or left unanswered on the way. Whatever the
// new process does before it is ready (crash, hang, refuse, be the wrong
// program), the old one goes on serving and reports why.
//
// The smallest correct daemon is the package example. Its order matters:
//
//   - New takes over what an older process hands on, and nothing else.
//   - Listen returns the inherited socket if there is one for that address,
//     and makes a new one otherwise. The program does not tell the two apart.
//   - Ready returns when this process is the one that serves. Until then its
//     listeners are quiet: Accept waits.
//   - Upgrade (or Wait, on a signal) starts the next process and returns when
//     that one has taken over, or with the reason why it did not.
//   - Once it has, Exit is closed, Accept fails with net.ErrClosed, and the
//     program ends as soon as its last client is served.
//
// Sockets for packets (ListenPacket), connections (AddConn), files (AddFile)
// and what is in memory (Options.SendState) are handed on likewise.
//
// Upgrades and stops are asked for by calls, by signals, or by control sockets
// (Request), which tell the client how it went. At Options.TakeoverSocket a
// process that nobody forked, such as one in a new container, takes over.
//
// Two generations never accept at once. If the old process dies during an
// upgrade, the new one completes its start and serves. If the new one dies
// within [Options.Probation], the old one takes the sockets back.
//
// The package never exits the process, never logs, and starts no goroutine
// that outlives the call that it was started in. Blocking calls run on the
// goroutine that called them. All methods of an Upgrader may be called from
// several goroutines at once, and from the hooks in Options.
//
// It runs on Linux, macOS, FreeBSD, NetBSD, OpenBSD and DragonFly BSD.
package ecdysis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultUpgradeTimeout is the time from start to ready that a successor has
// if Options.UpgradeTimeout is zero.
const DefaultUpgradeTimeout = time.Minute

// handoverTimeout bounds what a successor does between the old process's word
// and its own: a rename and the caller's hook for EventReady.
const handoverTimeout = 5 * time.Second

// Errors that the package's calls return, wrapped or not: compare with
// errors.Is.
var (
	// ErrNotReady: Upgrade or WaitForParent was called before Ready has
	// succeeded.
	ErrNotReady = errors.New("ecdysis: this process is not ready yet")
	// ErrInProgress: an upgrade is running, or this process is still within
	// the probation that its parent gives it.
	ErrInProgress = errors.New("ecdysis: an upgrade is in progress")
	// ErrUpgraded: this process has been replaced.
	ErrUpgraded = errors.New("ecdysis: this process has been replaced")
	// ErrDraining: more older generations still serve their clients than
	// Options.MaxDraining allows.
	ErrDraining = errors.New("ecdysis: too many older generations are still draining")
	// ErrStopped: Stop was called.
	ErrStopped = errors.New("ecdysis: this process has been stopped")
	// ErrInit: this process is PID 1, whose exit ends the container or the
	// system with it; it cannot be replaced by a child.
	ErrInit = errors.New("ecdysis: PID 1 cannot be replaced by its child")
	// ErrAborted: the old process has given this successor up and goes on
	// serving, or Fail was called. The listeners stay quiet for good.
	ErrAborted = errors.New("ecdysis: this upgrade has been given up, and the old process goes on serving")
)

// An UpgradeError says why an attempt to upgrade failed. Unless Err is
// ErrStopped, the process that returned it goes on serving and can upgrade
// again at once.
type UpgradeError struct {
	// Step is how far the attempt came: "prepare" (before anything was
	// started), "start" (the program could not be run), "init" (it did not
	// become ready), "handover" (it was ready and did not take over) or
	// "probation" (it served and ended too early).
	Step string
	// PID is the successor's process ID; 0: none was started.
	PID int
	// State is how the successor ended; nil if that cannot be known, because
	// none was started, it is not a child of this process (Command.Sibling),
	// or it could not be ended.
	State *os.ProcessState
	// Err is the reason. It wraps Prepare's own error, the system's,
	// os.ErrDeadlineExceeded (not ready within UpgradeTimeout, or, at
	// "handover", 5 s for EventReady), io.ErrUnexpectedEOF (it ended without a
	// word) or ErrStopped. What a successor has said to Fail is there as text.
	Err error
}

func (e *UpgradeError) Error() string {
	s := "ecdysis: upgrade failed at " + e.Step
	if e.PID != 0 {
		s += ": successor " + strconv.Itoa(e.PID)
		if e.State != nil {
			s += " (" + e.State.String() + ")"
		}
	}
	return s + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *UpgradeError) Unwrap() error { return e.Err }

// Options configures an Upgrader. The zero value works: an upgrade has a minute,
// no probation, no PID file, and is begun by calls alone. New refuses durations
// below zero.
type Options struct {
	// UpgradeTimeout is the time that a successor has from its start until it
	// is ready. After it the successor is killed and this process serves on.
	// 0: DefaultUpgradeTimeout.
	UpgradeTimeout time.Duration

	// Probation is how long this process stands by after its successor has
	// become ready: if the successor ends within it, this process takes the
	// sockets back and resumes. Upgrade returns after it. 0: none.
	Probation time.Duration

	// PIDFile is a file that Ready writes, by a rename, and that Stop removes
	// if it still names this process. Empty: none. A relative path is taken
	// from the working directory at the time of New.
	PIDFile string

	// UpgradeSignals are caught from New until the process exits, so that an
	// early or late one kills nobody; Wait acts on them.
	UpgradeSignals []os.Signal
	// StopSignals are caught while Wait runs and make it stop this process. A
	// second one, after Wait has returned, kills as usual.
	StopSignals []os.Signal
	// PartialStopSignals are caught while Wait runs and end accepting: the
	// caller finishes what is in flight, then calls Stop.
	PartialStopSignals []os.Signal

	// UpgradeSocket, StopSocket and PartialStopSocket are the paths of control
	// sockets, Unix sockets by which programs of the same user, and root's, ask
	// for what the signals ask for; see Request. New makes them, with mode
	// 0600, or inherits them; Wait serves them. They are handed on in an
	// upgrade, and their files are removed on a stop. Empty: none. A relative
	// path is taken from the working directory at the time of New; on Linux
	// a name that begins with "@" is abstract.
	UpgradeSocket, StopSocket, PartialStopSocket string

	// TakeoverSocket is the path of a Unix socket by which a process that was
	// not started by this one takes everything over from it, as a successor
	// would: for a new container, unit, environment or list of arguments. New
	// connects to it, unless an older process has started this one, and
	// inherits from the process that serves there; if there is none, this is
	// the first process of a chain. From then on it is a control socket like
	// the others, and serves whoever comes next.
	TakeoverSocket string

	// MaxDraining is how many older generations may still be alive, serving
	// the clients that they have, when an upgrade begins; with more of them it
	// is refused with ErrDraining. 0: any number.
	MaxDraining int

	// Prepare has the last word before a successor is started. It may change
	// the command, and may still call Listen, AddConn or AddFile. Its error
	// ends the attempt. In a takeover nothing is started: the Command is zero,
	// and changing it has no effect.
	Prepare func(*Command) error

	// SendState writes what the successor reads from State, as much of it as
	// there is memory for: on Linux it is kept in memory, which counts as this
	// process's, on other systems in an unlinked file in the temporary
	// directory. It is called for each attempt, after Prepare, while this
	// process serves: what changes after it has returned is not in it. Its
	// error, and one of the writer's, ends the attempt.
	SendState func(io.Writer) error

	// Notify is called with every Event, on the goroutine that caused it and
	// with no lock held. Calls may overlap, and may call any method. The step
	// that an event tells of waits for Notify, so it must be quick: if that of
	// a successor takes more than 5 s for EventReady, the upgrade fails.
	Notify func(Event)
}

// A Command is what a successor is started with.
type Command struct {
	// Path is the program: os.Args[0] as it was at the start of this process,
	// made absolute if it has a slash, looked up in this process's $PATH when
	// the successor is started if it has none. A file that was replaced and a
	// symbolic link that was flipped are picked up. A relative path from
	// Prepare is taken from Dir.
	Path string
	// Args are the arguments without the program's name. Initially those of
	// this process.
	Args []string
	// Env is the environment, initially the one of this process at this
	// moment. The variable by which a successor finds its inheritance is
	// added later and replaces any other of that name.
	Env []string
	// Dir is the working directory: initially the one in which this process
	// was started or, if that has been deleted, empty: the one of this
	// process.
	Dir string
	// Sibling makes the successor a child of this process's own parent, as a
	// supervisor wants it that watches its children. Linux only; elsewhere
	// the upgrade fails with errors.ErrUnsupported.
	Sibling bool
}

// An EventKind says what an Event is about.
type EventKind string

const (
	// EventReady: from the return of this call on, this process is the one
	// that serves. Locks that only one process may hold are taken here. Err
	// is set if the PID file could not be put in its place.
	EventReady EventKind = "ready"
	// EventUpgrading: an upgrade begins. EventUpgraded or EventUpgradeFailed
	// follows.
	EventUpgrading EventKind = "upgrading"
	// EventHandover: every listener of this process is quiet and the
	// successor waits. Locks are released here.
	EventHandover EventKind = "handover"
	// EventResumed: the successor has ended after EventHandover. Locks are
	// taken back here; then this process accepts again, and
	// EventUpgradeFailed follows.
	EventResumed EventKind = "resumed"
	// EventUpgradeFailed: the attempt has failed, Err says why. It also tells
	// of a trigger that was refused, with ErrInProgress, ErrDraining or
	// ErrInit.
	EventUpgradeFailed EventKind = "upgrade failed"
	// EventUpgraded: the successor serves, and its probation is over.
	EventUpgraded EventKind = "upgraded"
	// EventPartialStop: this process has ended accepting.
	EventPartialStop EventKind = "partial stop"
	// EventStopping: this process ends.
	EventStopping EventKind = "stopping"
)

// An Event tells what an Upgrader does.
type Event struct {
	Kind       EventKind
	Signal     os.Signal // what caused it; nil: a control socket or a call
	Socket     string    // the path of the control socket that caused it; "": a signal or a call
	PID        int       // of the process that the event is about; 0: none yet
	Generation int       // of that process: in an upgrade, the successor's
	Unclaimed  []string  // EventReady: what was inherited and closed, for nobody had asked for it: "tcp :80", "conn name", "file name", "pair name", "state"
	Err        error     // EventUpgradeFailed, EventReady: what went wrong
}

// String returns e as a line for a log.
func (e Event) String() string {
	var b strings.Builder
	b.WriteString(string(e.Kind))
	if e.Signal != nil {
		b.WriteString(" by signal " + e.Signal.String())
	}
	if e.Socket != "" {
		b.WriteString(" by socket " + e.Socket)
	}
	if e.PID != 0 {
		b.WriteString(": pid=" + strconv.Itoa(e.PID) + " generation=" + strconv.Itoa(e.Generation))
	}
	if len(e.Unclaimed) > 0 {
		b.WriteString(" unclaimed=" + strings.Join(e.Unclaimed, ","))
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

type phase int

const (
	starting  phase = iota // Listen may be called, listeners are quiet
	readying               // Ready runs
	serving                // this process serves, as far as it knows
	preparing              // Upgrade runs, nothing is started: Listen may be called
	upgrading              // Upgrade runs, the successor has or gets its copies
	upgraded               // replaced, for good
	partial                // accepting has ended by a signal
	stopped                // for good
	refused                // a successor that was given up, for good
)

// An Upgrader is this process's part in the chain of generations. There is at
// most one in a process, made by New. Its methods may be called from several
// goroutines at once.
type Upgrader struct {
	opts       Options
	generation int
	parent     *stream      // to the old process; nil in the first one
	state      *stateReader // what the old process has written; nil: nothing
	signals    chan os.Signal
	controls   []*control // made by New

	ready   chan struct{} // closed when Ready has succeeded
	settled chan struct{} // closed when the old process has no say any more: the socket files are ours
	exit    chan struct{} // what Exit returns
	over    chan struct{} // closed when Wait is to return last

	// mu guards what follows. It is held neither over a hook nor over a call
	// that can block.
	mu        sync.Mutex
	phase     phase
	pending   EventKind       // a stop that came while Ready or Upgrade ran, which ends by it
	cause     trigger         // of that stop
	asked     []*net.UnixConn // clients of control sockets that wait for this process's end
	last      Event           // what Wait returns
	standby   bool            // the old process stands by for its Probation
	reg       registry
	pidFile   pidFile  // as this process has written it last
	successor *stream  // after an upgrade; only the kernel closes it
	zombies   []*child // given up while they could not be ended
}

// process is the Upgrader of this process: the inheritance can be taken only
// once, and the streams to the older and the newer process must stay open
// until this process exits, however the caller treats its Upgrader.
var process atomic.Pointer[Upgrader]

// New returns this process's Upgrader. If an older process has started this
// one, or serves at Options.TakeoverSocket, New takes everything that it hands
// on; otherwise this is the first process of a chain.
//
// There is one Upgrader in a process: after New has succeeded, or has failed
// to take an inheritance, another call fails. The older process is told why a
// call has failed. If that one refuses to be taken over, because an upgrade is
// in progress or its Prepare says no, the error has its reason; if it does not
// answer within Options.UpgradeTimeout, the error wraps
// os.ErrDeadlineExceeded. In both cases New may be called again. A control
// socket that another process serves is an error that wraps EADDRINUSE.
func New(opts Options) (*Upgrader, error) {
	u := &Upgrader{
		signals: make(chan os.Signal, 1), // several that wait are one
		ready:   make(chan struct{}),
		settled: make(chan struct{}),
		exit:    make(chan struct{}),
		over:    make(chan struct{}),
	}
	if !process.CompareAndSwap(nil, u) {
		return nil, errors.New("ecdysis: New was called before; a process has one Upgrader")
	}
	var err error
	if u.parent, err = openInheritance(); err != nil {
		return nil, fmt.Errorf("ecdysis: new: %w", err)
	}
	if u.opts, err = opts.check(); err == nil {
		if len(u.opts.UpgradeSignals) > 0 {
			signal.Notify(u.signals, u.opts.UpgradeSignals...)
		}
		if err = u.begin(); err == nil {
			return u, nil
		}
		signal.Stop(u.signals)
	}
	if u.parent == nil {
		process.Store(nil) // nothing was taken: the caller may try again
	} else {
		_ = u.Fail(err)
	}
	return nil, fmt.Errorf("ecdysis: new: %w", err)
}

// begin takes what there is to inherit, and opens the control sockets.
func (u *Upgrader) begin() (err error) {
	var hello frame
	var deadline time.Time // a successor's is its parent's affair
	if u.parent != nil {
		if hello, err = u.parent.read(deadline); err != nil {
			return fmt.Errorf("the older process said nothing: %w", err)
		}
		if err = checkHello(hello); err != nil {
			return err
		}
	} else if path := u.opts.TakeoverSocket; path != "" {
		deadline = time.Now().Add(u.opts.UpgradeTimeout)
		if u.parent, hello, err = takeOverAt(path, deadline); err != nil {
			return fmt.Errorf("TakeoverSocket %s: %w", path, err)
		}
	}
	if u.parent == nil {
		close(u.settled)
		return u.openControls()
	}
	err = u.inherit(hello, deadline)
	if err == os.ErrDeadlineExceeded {
		err = errLate
	}
	if err != nil && !deadline.IsZero() {
		err = fmt.Errorf("TakeoverSocket %s: %w", u.opts.TakeoverSocket, err)
	}
	if err != nil {
		return err
	}
	return u.openControls()
}

// check returns o with its defaults filled in.
func (o Options) check() (Options, error) {
	if o.UpgradeTimeout < 0 {
		return o, fmt.Errorf("UpgradeTimeout is %v; want 0 (for %v) or more", o.UpgradeTimeout, DefaultUpgradeTimeout)
	}
	if o.UpgradeTimeout == 0 {
		o.UpgradeTimeout = DefaultUpgradeTimeout
	}
	if o.Probation < 0 {
		return o, fmt.Errorf("the Probation is %v; want 0 (for none) or more", o.Probation)
	}
	if o.PIDFile != "" {
		if strings.HasSuffix(o.PIDFile, "/") {
			return o, fmt.Errorf("PIDFile is %q; want the path of a file", o.PIDFile)
		}
		path, err := absolute(o.PIDFile)
		if err != nil {
			return o, fmt.Errorf("PIDFile: %w", err)
		}
		o.PIDFile = path
	}
	if o.MaxDraining < 0 {
		return o, fmt.Errorf("MaxDraining is %d; want 0 (for any number) or more", o.MaxDraining)
	}
	paths := map[string]string{}
	if o.PIDFile != "" {
		paths[o.PIDFile] = "PIDFile"
	}
	for _, s := range o.sockets() {
		path, err := controlPath(*s.path)
		if err != nil {
			return o, fmt.Errorf("%s: %w", s.name, err)
		}
		if other := paths[path]; other != "" && path != "" {
			return o, fmt.Errorf("%s and %s are both %q; want a path for each", other, s.name, path)
		}
		*s.path, paths[path] = path, s.name
	}
	var seen []os.Signal
	for i, list := range [][]os.Signal{o.UpgradeSignals, o.StopSignals, o.PartialStopSignals} {
		name := []string{"UpgradeSignals", "StopSignals", "PartialStopSignals"}[i]
		for _, s := range list {
			switch {
			case s == nil:
				return o, errors.New(name + " holds nil; want a signal")
			case s == syscall.SIGKILL || s == syscall.SIGSTOP:
				return o, errors.New(name + " holds SIGKILL or SIGSTOP, which no process can catch")
			case slices.Contains(seen, s):
				return o, fmt.Errorf("%v is in %s and was named before; want it in one list, once", s, name)
			}
			seen = append(seen, s)
		}
	}
	return o, nil
}

// HasParent reports whether an older process has started this one to be its
// successor, or was taken over. It does not change when that process exits.
func (u *Upgrader) HasParent() bool { return u.parent != nil }

// Generation returns 0 in the first process of a chain, 1 in its successor,
// and so on.
func (u *Upgrader) Generation() int { return u.generation }

// Exit returns a channel that is closed when this process has been replaced
// or stopped: the program should finish what is in flight and exit.
func (u *Upgrader) Exit() <-chan struct{} { return u.exit }

// Ready tells the older process that this one can serve, and returns nil when
// it does: the older one accepts no more, and the listeners here do. In the
// first process that is at once. It also returns nil if the older process has
// died meanwhile, and if this process serves already.
//
// It returns ErrAborted if the older process has given this one up, or Fail was
// called: the listeners stay quiet for good. It returns ErrStopped if Stop was
// called, ErrUpgraded if this process has been replaced, and ErrInProgress
// while another call of Ready runs. Any other error means that the PID file
// could not be written, or that the older process talks nonsense. It has been
// told and serves on; a first process may call Ready again.
func (u *Upgrader) Ready() error {
	u.mu.Lock()
	p := u.phase
	if p == starting {
		u.phase = readying
	}
	u.mu.Unlock()
	switch p {
	case starting:
		return u.becomeReady()
	case serving, preparing, upgrading:
		return nil
	default:
		return p.refusal()
	}
}

// refusal is the error for a call that the phase forbids.
func (p phase) refusal() error {
	switch p {
	case starting:
		return ErrNotReady
	case readying, preparing, upgrading:
		return ErrInProgress
	case upgraded:
		return ErrUpgraded
	case partial, stopped:
		return ErrStopped
	case refused:
		return ErrAborted
	}
	return nil
}

func (u *Upgrader) becomeReady() (err error) {
	over := false
	defer func() {
		if !over { // a hook has panicked or ended the goroutine
			_ = u.notReady(errors.New("a hook did not return"))
		}
	}()
	err = u.takeOver()
	over = true
	if err != nil {
		return u.notReady(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return nil
}

// takeOver brings this process from readying to serving.
func (u *Upgrader) takeOver() error {
	pidFile, err := writePIDFile(u.opts.PIDFile)
	if err != nil {
		return fmt.Errorf("ecdysis: ready: %w", err)
	}
	orphan := false
	if u.parent != nil {
		if orphan, err = u.awaitCommit(); err != nil {
			pidFile.discard()
			return err
		}
	}
	u.mu.Lock()
	u.pidFile = pidFile
	u.mu.Unlock()
	event := Event{Kind: EventReady, PID: os.Getpid(), Generation: u.generation, Unclaimed: u.unclaimed()}
	if err := pidFile.commit(); err != nil {
		if u.parent == nil {
			return fmt.Errorf("ecdysis: ready: %w", err)
		}
		event.Err = err // too late to refuse: nobody else serves
	}
	u.notify(event)
	if u.mustStop() {
		return ErrStopped
	}
	switch {
	case orphan:
		u.hear(frame{}, io.EOF)
	case u.parent != nil:
		_ = u.parent.send(frameDone, nil, nil) // fails only if nobody waits for it
	}

	u.mu.Lock()
	u.phase = serving
	close(u.ready) // before a control socket accepts: who waits there for Ready must find it done
	dropped := u.reg.takeInherited()
	for _, e := range u.reg.entries {
		e.resume()
	}
	u.mu.Unlock()
	u.drop(dropped)
	u.state.close()
	return nil
}

// notReady ends a call of Ready that has failed.
func (u *Upgrader) notReady(err error) error {
	u.mu.Lock()
	u.phase = starting
	if u.parent != nil {
		u.phase = refused
	}
	u.mu.Unlock()
	if u.parent != nil {
		u.parent.sendFail(err)
	}
	if u.stopPending() {
		return ErrStopped
	}
	return err
}

// Fail tells the older process that this one cannot become ready, and why: the
// text of reason is in the error of its Upgrade. The listeners here stay quiet
// for good, and the caller should exit. In the first process, and after Ready,
// it does nothing. Fail returns reason.
func (u *Upgrader) Fail(reason error) error {
	if u.parent == nil {
		return reason
	}
	u.mu.Lock()
	failed := u.phase == starting
	if failed {
		u.phase = refused
	}
	u.mu.Unlock()
	if failed {
		u.parent.sendFail(reason)
	}
	return reason
}

// Stop ends this process's service: EventStopping, then the listeners, and what
// AddConn, AddFile and DatagramPair keep, are closed (but for those with
// KeepOnStop), reading packets ends, the files of Unix sockets and the PID
// file are removed as far as they are this process's own, and Exit is closed.
// Connections are the caller's to finish. Just after Ready it may wait some
// seconds for the older process to step aside.
//
// A Stop during an upgrade ends the upgrade, unless the successor is about to
// serve: then this process is replaced. Stop does not wait for that: the
// call of Upgrade or Ready that runs does the rest before it returns.
// During the probation that the older process gives this one, Stop tells the
// older one not to come back. A second Stop, and one after a successful
// Upgrade, does nothing.
func (u *Upgrader) Stop() { u.stop(trigger{}) }

func (u *Upgrader) stop(t trigger) {
	u.mu.Lock()
	p := u.phase
	switch p {
	case upgraded, stopped:
		u.mu.Unlock()
		return
	case readying, preparing, upgrading:
		u.pending, u.cause = EventStopping, t
		u.mu.Unlock()
		return
	}
	u.phase = stopped
	u.mu.Unlock()

	e := u.ownEvent(t, EventStopping)
	u.notify(e)
	owner := u.parent == nil || p != refused && p != starting && u.settle()
	switch {
	case owner || p == refused:
	case p == starting:
		u.parent.sendFail(ErrStopped)
	default:
		// The old process reads what is sent before it looks whether this
		// one lives: once this is sent, it does not come back.
		owner = u.parent.send(frameBye, nil, nil) == nil || u.settle()
	}
	shut := u.takeListeners(owner)
	if owner {
		u.removeDropped()
	}
	if u.ownsPIDFile() {
		_ = os.Remove(u.opts.PIDFile)
	}
	u.reap()
	u.end(e)
	close(u.exit)
	// Last of all: a program may exit as soon as its accept loop ends.
	shut()
}

// partialStop ends accepting and leaves all else to the caller.
func (u *Upgrader) partialStop(t trigger) {
	u.mu.Lock()
	switch u.phase {
	case serving:
		u.phase = partial
		u.mu.Unlock()
		e := u.ownEvent(t, EventPartialStop)
		u.notify(e)
		shut := u.takeListeners(u.settle())
		u.end(e)
		shut()
	case readying, preparing, upgrading:
		if u.pending == "" {
			u.pending, u.cause = EventPartialStop, t
		}
		u.mu.Unlock()
	case partial: // another trigger's
		u.mu.Unlock()
	default: // there is nothing to drain
		u.mu.Unlock()
		u.stop(t)
	}
}

// ownEvent returns an event about this process.
func (u *Upgrader) ownEvent(t trigger, kind EventKind) Event {
	e := t.event(kind)
	e.PID, e.Generation = os.Getpid(), u.generation
	return e
}

// mustStop reports whether a stop waits for the running Ready or Upgrade.
func (u *Upgrader) mustStop() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.pending != ""
}

// stopPending does what a stop has left to the call that was running, and
// reports whether there was one.
func (u *Upgrader) stopPending() bool {
	u.mu.Lock()
	kind, t := u.pending, u.cause
	u.pending, u.cause = "", trigger{}
	u.mu.Unlock()
	switch kind {
	case EventStopping:
		u.stop(t)
	case EventPartialStop:
		u.partialStop(t)
	}
	return kind != ""
}

// end closes the control sockets, answers who has asked for this process's end
// by them, and makes Wait return e, unless something else has ended it.
func (u *Upgrader) end(e Event) {
	for _, c := range u.controls {
		c.finish()
	}
	u.mu.Lock()
	asked, first := u.asked, u.last.Kind == ""
	u.asked = nil
	if first {
		u.last = e
	}
	u.mu.Unlock()
	for _, c := range asked {
		answer(c, outcome(e))
	}
	if first {
		close(u.over)
	}
}

// takeListeners ends accepting, but for the listeners that are to be kept on
// a stop, and removes what files are this process's own. Accept fails once
// shut is called.
func (u *Upgrader) takeListeners(owner bool) (shut func()) {
	u.mu.Lock()
	dropped := u.reg.takeInherited()
	var kept, taken []*entry
	for _, e := range u.reg.entries {
		if e.keep && e.sock != nil {
			kept = append(kept, e)
		} else {
			taken = append(taken, e)
		}
	}
	u.reg.entries, u.reg.adopted = kept, nil
	u.mu.Unlock()
	for _, e := range taken {
		e.quiet()
		if owner || !e.inherited {
			e.removeFile()
		} else {
			dropped = append(dropped, e)
		}
	}
	u.drop(dropped)
	u.state.close()
	return func() {
		for _, e := range taken {
			e.shut()
		}
	}
}

// WaitForParent waits until the older process has exited, or until ctx is
// done, with an error that wraps ctx's. In the first process it returns nil at
// once; before Ready has succeeded it returns ErrNotReady.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.parent == nil {
		return nil
	}
	select {
	case <-u.ready:
	default:
		return ErrNotReady
	}
	err := u.parent.wait(ctx, nil, func(f frame, err error) bool {
		u.hear(f, err)
		return err != nil
	})
	if err != nil {
		return fmt.Errorf("ecdysis: wait for parent: %w", err)
	}
	return nil
}

// hear takes a frame, or the end of the stream, that came from the old
// process after this one was ready. It reports whether the old process has no
// say any more.
func (u *Upgrader) hear(f frame, err error) bool {
	if err == nil && f.kind != frameFinal {
		return false
	}
	u.mu.Lock()
	select {
	case <-u.settled:
		u.mu.Unlock()
		return true
	default:
	}
	close(u.settled)
	u.mu.Unlock()
	u.parent.wakeReader()
	u.removeDropped()
	return true
}

// settle reports whether this process is on its own: whether the old one has
// made the upgrade final or has died. If the old one does not stand by, its
// word is on its way, and settle waits for it.
func (u *Upgrader) settle() bool {
	select {
	case <-u.settled:
		return true
	default:
	}
	u.mu.Lock()
	p, standby := u.phase, u.standby
	u.mu.Unlock()
	if p == starting || p == readying || p == refused {
		return false // what the stream says now is for Ready to hear
	}
	if f, err := u.parent.next(); err != errAgain && u.hear(f, err) {
		return true
	}
	if standby {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), handoverTimeout)
	defer cancel()
	_ = u.parent.wait(ctx, u.settled, u.hear)
	select {
	case <-u.settled:
		return true
	default:
		return false
	}
}

func (u *Upgrader) notify(e Event) {
	if u.opts.Notify != nil {
		u.opts.Notify(e)
	}
}

// A pidFile is a file with this process's ID, written beside its place.
type pidFile struct {
	temp, path string
	dev, ino   uint64
}

// writePIDFile returns the zero pidFile, which does nothing, for no path.
func writePIDFile(path string) (pidFile, error) {
	if path == "" {
		return pidFile{}, nil
	}
	p := pidFile{temp: tempPIDFile(path, os.Getpid()), path: path}
	_ = os.Remove(p.temp) // of an earlier process with this ID
	f, err := os.OpenFile(p.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return pidFile{}, fmt.Errorf("PID file: %w", err)
	}
	_, err = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	var st unix.Stat_t
	if err == nil {
		err = os.NewSyscallError("lstat", unix.Lstat(p.temp, &st))
	}
	if err != nil {
		p.discard()
		return pidFile{}, fmt.Errorf("PID file: %w", err)
	}
	p.dev, p.ino = uint64(st.Dev), uint64(st.Ino)
	return p, nil
}

func tempPIDFile(path string, pid int) string { return path + "." + strconv.Itoa(pid) }

// restorePIDFile makes the file name this process again.
func (u *Upgrader) restorePIDFile() error {
	if u.ownsPIDFile() {
		return nil
	}
	p, err := writePIDFile(u.opts.PIDFile)
	if err != nil {
		return err
	}
	u.mu.Lock()
	u.pidFile = p
	u.mu.Unlock()
	return p.commit()
}

// ownsPIDFile reports whether the PID file is there and names this process.
func (u *Upgrader) ownsPIDFile() bool {
	if u.opts.PIDFile == "" {
		return false
	}
	b, err := os.ReadFile(u.opts.PIDFile)
	if err == nil {
		return strings.TrimSpace(string(b)) == strconv.Itoa(os.Getpid())
	}
	// A process that has no descriptor left cannot read it, and still has to
	// clear it away.
	u.mu.Lock()
	p := u.pidFile
	u.mu.Unlock()
	var st unix.Stat_t
	return !errors.Is(err, os.ErrNotExist) && unix.Lstat(u.opts.PIDFile, &st) == nil &&
		p.ino != 0 && uint64(st.Dev) == p.dev && uint64(st.Ino) == p.ino
}

func (p pidFile) commit() error {
	if p.path == "" {
		return nil
	}
	if err := os.Rename(p.temp, p.path); err != nil {
		p.discard()
		return fmt.Errorf("PID file: %w", err)
	}
	return nil
}

func (p pidFile) discard() {
	if p.path != "" {
		_ = os.Remove(p.temp)
	}
}
