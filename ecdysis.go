//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

// Package ecdysis replaces a running daemon by its next version without a
// client noticing.
//
// The old process, the predecessor, starts the new one, its successor, and
// hands it the listening sockets themselves. It goes on serving until the
// successor says that it is ready. Then it stops accepting, confirms this to
// the successor, and the successor starts accepting. No connection is
// refused, reset or left unanswered on the way. Whatever the successor does
// before it is ready (crash, hang, fail, be the wrong program), the
// predecessor goes on serving and reports why.
//
// The smallest correct daemon is the package example. Its order matters:
//
//   - New takes over what a predecessor hands on, and nothing else.
//   - Listen returns the inherited socket if there is one for that address,
//     and makes a new one otherwise. The program does not tell the two apart.
//   - Ready returns when this process is the one that serves. Until then its
//     listeners are paused: Accept waits.
//   - Upgrade (or Wait, on a signal) starts the successor and returns when it
//     has taken over, or with the reason why it has not.
//   - Once it has, Exit is closed and Wait returns. The program closes its
//     listeners, which ends its accept loops, and exits as soon as its last
//     client is served.
//
// Sockets for packets (ListenPacket), connections (AddConn), files (AddFile)
// and what is in memory (Options.SendState) are handed on likewise.
//
// Upgrades and stops are requested by calls, by signals, or by control sockets
// (Request), which tell the client how it went. At Options.TakeoverSocket a
// process that this one has not started, such as one in a new container, takes
// over.
//
// Two generations never accept at once. If the predecessor dies during an
// upgrade, the successor completes its start and serves. If the successor dies
// within [Options.Probation], the predecessor takes the sockets back.
//
// The package never exits the process, never logs, and starts no goroutine
// that outlives the call that started it, except one that waits for a hook or a
// packet read of the program's which exceeds its bound. Blocking calls run on
// the goroutine that called them. All methods of an Upgrader may be called from several
// goroutines at once, and from the hooks in Options.
//
// docs/control.md and docs/handing-on.md are guides to what this package does,
// and README.md lists the others.
//
// It runs on Linux, macOS, FreeBSD, NetBSD, OpenBSD and DragonFly BSD.
// On other systems, such as Windows, it compiles so that a program can be built
// and tried there: New, Listen, Ready and Stop work as in the first process of a
// chain, and Upgrade returns an error that wraps errors.ErrUnsupported.
package ecdysis

import (
	"errors"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// The Upgrader and its beginning. The calls that lead on are in ready.go,
// listener.go, packet.go, add.go, upgrade.go, stop.go and wait.go.

// An Upgrader is this process's part in the chain of generations. A process
// has at most one, made by New. Its methods may be called from several
// goroutines at once.
//
// Locks are taken in this order: control.serving, which alone is held over
// calls that block, each of them bounded; Upgrader.mu; a gate's; a stream's.
// Those of a SeqpacketConn, of a state and control.mu stand alone. No lock is
// held over a hook or the start of a process.
type Upgrader struct {
	// New sets these, and they do not change.
	opts       Options
	generation int
	pred       *predecessor   // what this process knows of the older one; it has locks of its own
	state      *stateReader   // what the predecessor has written; nil if it has written nothing
	signals    chan os.Signal // to upgrade
	controls   []*control
	retired    []string // units that were replaced, the latest last

	stops, partialStops chan os.Signal // from catchStops until the end

	// mu guards what follows. It is held neither over a hook nor over a call
	// that can block.
	mu          sync.Mutex
	life        lifecycle
	reg         registry
	pidFile     pidFile   // as this process has written it last
	acceptError time.Time // of the last EventAcceptError
	successor   *stream   // after an upgrade; only the kernel closes it
	zombies     []*child  // successors that could not be ended when they were given up
}

// process is the Upgrader of this process: the inheritance can be taken only
// once, and the streams to the predecessor and the successor must stay open
// until this process exits, whether or not the caller keeps its Upgrader.
var process atomic.Pointer[Upgrader]

// New returns this process's Upgrader. If a predecessor has started this
// process, or one serves at Options.TakeoverSocket, New takes everything that
// it hands on. Otherwise this is the first process of a chain.
//
// A process can have one Upgrader: once New has succeeded, or failed while
// taking an inheritance, later calls fail. The predecessor is told why a call
// has failed. If it refuses to be taken over, because an upgrade is in progress
// or its Prepare says no, the error has its reason. If it does not answer
// within Options.UpgradeTimeout, the error wraps os.ErrDeadlineExceeded. In both
// cases New may be called again. A control socket that another process serves
// is an error that wraps EADDRINUSE.
func New(opts Options) (*Upgrader, error) {
	u := &Upgrader{
		opts:         opts,
		signals:      make(chan os.Signal, 1), // several that wait are one
		stops:        make(chan os.Signal, 2), // a second one is another order
		partialStops: make(chan os.Signal, 1),
	}
	u.life.make()
	if !process.CompareAndSwap(nil, u) {
		return nil, errors.New("ecdysis: New was called before; a process has one Upgrader")
	}
	s, err := openInheritance()
	u.pred = newPredecessor(s)
	if err != nil {
		return nil, errorf("ecdysis: new: %w", err)
	}
	if err = u.opts.check(); err == nil {
		if len(u.opts.UpgradeSignals) > 0 {
			signal.Notify(u.signals, u.opts.UpgradeSignals...)
		}
		if err = u.begin(); err == nil {
			return u, nil
		}
		signal.Stop(u.signals)
	}
	if u.first() {
		process.Store(nil) // nothing was taken: the caller may try again
	} else {
		_ = u.Fail(err)
		u.disinherit() // or clients would connect to sockets on which nobody accepts
	}
	return nil, errorf("ecdysis: new: %w", err)
}

// begin takes what there is to inherit, and opens the control sockets.
func (u *Upgrader) begin() (err error) {
	var hello *frame
	if !u.first() {
		hello, err = u.pred.hello()
		if err == nil {
			err = u.receiveInheritance(hello, time.Time{}) // how long it takes is the predecessor's affair
		}
	} else if path := u.opts.TakeoverSocket; path != "" {
		if err = u.takeOver(path); err != nil {
			err = errorf("TakeoverSocket %s: %w", path, err)
		}
	}
	if err != nil {
		return err
	}
	return u.openControls()
}

// first reports whether this is the first process of a chain.
func (u *Upgrader) first() bool { return u.pred.s == nil }

// HasParent reports whether this process has a predecessor: one that has
// started it, or one that it has taken over from. It does not change when that
// process exits. ("Parent" is the word of the package tableflip.)
func (u *Upgrader) HasParent() bool { return !u.first() }

// Generation returns 0 in the first process of a chain, 1 in its successor,
// and so on.
func (u *Upgrader) Generation() int { return u.generation }

// Exit returns a channel that is closed when this process has been replaced
// or stopped: the program should finish what is in flight and exit.
func (u *Upgrader) Exit() <-chan struct{} { return u.life.exit }

// notify calls the hook. No lock is held. Inlined, it would take room for an
// Event, which is large, on the stack of every caller.
//
//go:noinline
func (u *Upgrader) notify(e *Event) {
	if u.opts.Notify != nil {
		u.opts.Notify(*e)
	}
}

// notifyWithin calls the hook while nobody serves: on a goroutine of its own,
// for which it waits at most hookTimeout, and not after mustEnd reports true. A
// hook that takes longer keeps its goroutine until it returns. A panic is raised
// here.
func (u *Upgrader) notifyWithin(e *Event, mustEnd func() bool) error {
	if u.opts.Notify == nil {
		return nil
	}
	var left atomic.Bool // nobody waits any more
	var reason any
	done := make(chan bool, 1)
	go func() {
		returned := false
		defer func() {
			if !returned && !left.Load() {
				reason = recover()
			}
			done <- returned
		}()
		u.opts.Notify(*e)
		returned = true
	}()
	returned, err := awaitHook(done, e.Kind, mustEnd)
	switch {
	case err != nil:
		left.Store(true)
		return err
	case returned:
		return nil
	case reason != nil:
		panic(reason)
	}
	runtime.Goexit() // as the hook has done
	return nil
}

// awaitHook receives from done, for at most hookTimeout and not after mustEnd
// reports true.
func awaitHook(done <-chan bool, kind EventKind, mustEnd func() bool) (returned bool, err error) {
	runtime.Gosched() // most hooks return at once, and then no timer has to wake the poller
	select {
	case returned = <-done:
		return returned, nil
	default:
	}
	limit := time.NewTimer(hookTimeout)
	defer limit.Stop()
	look := time.NewTicker(pollInterval)
	defer look.Stop()
	for {
		select {
		case returned = <-done:
			return returned, nil
		case <-look.C:
			if mustEnd() {
				return false, ErrStopped
			}
		case <-limit.C:
			return false, errorf("Options.Notify has not returned within %v of %q: %w", hookTimeout, kind, os.ErrDeadlineExceeded)
		}
	}
}

// hookTimeout is how long the hooks for EventHandover and EventResumed may
// take.
const hookTimeout = 5 * time.Second
