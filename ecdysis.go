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
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"
)

// DefaultUpgradeTimeout is the time from start to ready that a successor has
// if Options.UpgradeTimeout is zero.
const DefaultUpgradeTimeout = time.Minute

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

// HasParent reports whether an older process has started this one to be its
// successor, or was taken over. It does not change when that process exits.
func (u *Upgrader) HasParent() bool { return u.parent != nil }

// Generation returns 0 in the first process of a chain, 1 in its successor,
// and so on.
func (u *Upgrader) Generation() int { return u.generation }

// Exit returns a channel that is closed when this process has been replaced
// or stopped: the program should finish what is in flight and exit.
func (u *Upgrader) Exit() <-chan struct{} { return u.exit }

func (u *Upgrader) notify(e Event) {
	if u.opts.Notify != nil {
		u.opts.Notify(e)
	}
}
