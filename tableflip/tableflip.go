// Package tableflip has the exported API of github.com/cloudflare/tableflip, on
// top of package ecdysis. A program moves by changing its import path:
//
//	import "github.com/ecdysis-go/ecdysis/tableflip"
//
// A tableflip process is a running process that has the other import path. It can
// upgrade to this program. New takes over its sockets and files, Ready tells it
// that this process serves, and clients do not notice. Later upgrades work by
// package ecdysis. A program that uses package ecdysis directly calls [Inherit]
// instead of [ecdysis.New].
//
// Some behaviour is stricter, because the other package's way can lose clients.
// Two generations never accept at once, so Accept waits until Ready has
// succeeded, and a listener is not a *net.TCPListener. Nothing can be added while
// an upgrade runs. docs/from-tableflip.md lists all differences, and says how to
// go on to package ecdysis itself.
//
// The package works on the systems of package ecdysis. On others New returns
// [ErrNotSupported], and the stubs in package testing work.
package tableflip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// DefaultUpgradeTimeout is the time that a successor has to become ready if
// Options.UpgradeTimeout is zero or negative.
const DefaultUpgradeTimeout time.Duration = time.Minute

// ErrNotSupported is returned, wrapped or not, on systems where a process
// cannot be replaced.
var ErrNotSupported = errors.New("tableflip: this system does not support graceful restart")

var errParentAlive = fmt.Errorf("the parent hasn't exited: %w", ecdysis.ErrDraining)

// Options configures an Upgrader. The zero value works.
type Options struct {
	// UpgradeTimeout is the time that a successor has until it is ready.
	// After it the successor is killed, and this process serves on. Zero and
	// negative values mean DefaultUpgradeTimeout.
	UpgradeTimeout time.Duration
	// PIDFile is a file that Ready writes the process ID to, and that Stop
	// removes if it still names this process. Empty means none.
	PIDFile string
	// ListenConfig has the Control function and the keep-alive settings of new
	// sockets. Nil means the zero ListenConfig.
	ListenConfig *net.ListenConfig
}

// A Listener is a net.Listener that can be handed on.
type Listener interface {
	net.Listener
	syscall.Conn
}

// A PacketConn is a net.PacketConn that can be handed on.
type PacketConn interface {
	net.PacketConn
	syscall.Conn
}

// A Conn is a net.Conn that can be handed on.
type Conn interface {
	net.Conn
	syscall.Conn
}

// An Upgrader replaces this process by its successor, and hands on what its
// Fds hold. Its methods may be called from several goroutines at once.
type Upgrader struct {
	*Fds
	core   *ecdysis.Upgrader
	parent *parent       // the tableflip process that has started this one; nil if there is none
	ready  chan struct{} // closed when Ready has succeeded
}

// New returns this process's Upgrader. If another process has started this one to
// be its successor, the Upgrader has everything that the other process hands on. A
// process can have one Upgrader, so later calls fail once New has succeeded.
func New(opts Options) (*Upgrader, error) {
	if !supported {
		return nil, fmt.Errorf("tableflip: new: %w", ErrNotSupported)
	}
	u := &Upgrader{ready: make(chan struct{})}
	o := ecdysis.Options{
		UpgradeTimeout: max(opts.UpgradeTimeout, 0),
		PIDFile:        opts.PIDFile,
		MaxDraining:    -1, // the parent
		Prepare:        u.prepare,
		Notify:         u.notify,
	}
	u.Fds = newFds(opts.ListenConfig)
	var err error
	if u.core, u.parent, err = inherit(o); err != nil {
		return nil, fmt.Errorf("tableflip: new: %w", err)
	}
	u.Fds.core = u.core
	return u, nil
}

// Inherit is [ecdysis.New] for a program whose running version may use
// github.com/cloudflare/tableflip. If such a process has started this one,
// Inherit adds everything that it hands on to the Upgrader, by AddFile and
// AddConn. Otherwise Inherit does what New does.
//
// Listen and ListenPacket find the sockets by their addresses. The look-ups find
// everything by its name. For example, Listener finds "listener tcp :80", PacketConn
// finds "packet udp :53", and Conn finds "conn tcp 192.0.2.1:80". File finds a file
// by its own name. Ready tells the tableflip process that this one serves,
// after Options.Notify has returned from EventReady and before this process
// accepts. The tableflip process goes on accepting until its program closes the
// listeners.
//
// For package ecdysis this is the first process of a chain. WaitForParent does
// not wait for the tableflip process, and a stop does not remove the files of
// inherited Unix sockets. A socket or file that the program does not ask for
// stays open and is handed on, as after [ecdysis.Upgrader.AddFile].
func Inherit(opts ecdysis.Options) (*ecdysis.Upgrader, error) {
	u, p, err := inherit(opts)
	if err != nil {
		return nil, fmt.Errorf("tableflip: inherit: %w", err)
	}
	if p != nil {
		p.forget()
	}
	return u, nil
}

func inherit(opts ecdysis.Options) (*ecdysis.Upgrader, *parent, error) {
	timeout := opts.UpgradeTimeout
	if timeout <= 0 {
		timeout = DefaultUpgradeTimeout
	}
	p, err := openParent(time.Now().Add(timeout))
	if err != nil {
		return nil, nil, err
	}
	if p != nil {
		next := opts.Notify
		opts.Notify = func(e ecdysis.Event) {
			if next != nil {
				next(e)
			}
			if e.Kind == ecdysis.EventReady {
				p.tell()
			}
		}
	}
	u, err := ecdysis.New(opts)
	if p == nil {
		return u, nil, err
	}
	if err == nil {
		err = p.addTo(u)
	}
	p.closeFiles()
	if err != nil {
		p.close()
		return nil, nil, err
	}
	return u, p, nil
}

// Ready writes the PID file and tells the parent that this process can serve. It
// closes everything that was handed on and that the program has not asked for.
// When it returns nil, this process serves and its listeners accept. It also
// returns nil if the parent has died meanwhile.
func (u *Upgrader) Ready() error {
	defer u.Fds.catchUp()
	if u.parent != nil { // without a tableflip process the core closes what is unclaimed
		if err := u.Fds.dropUnclaimed(); err != nil {
			return fmt.Errorf("tableflip: ready: %w", err)
		}
	}
	if err := u.core.Ready(); err != nil {
		return fmt.Errorf("tableflip: ready: %w", err)
	}
	if u.Fds.becomeReady() {
		close(u.ready)
	}
	return nil
}

// Exit returns a channel that is closed when this process has been replaced or
// stopped, and should exit.
func (u *Upgrader) Exit() <-chan struct{} { return u.core.Exit() }

// HasParent reports whether another process, the parent, has started this one to
// be its successor.
func (u *Upgrader) HasParent() bool { return u.parent != nil || u.core.HasParent() }

// Upgrade starts the successor, and returns nil when the successor has taken over.
// Otherwise the error says why it has not, and this process serves on. An upgrade
// is refused before Ready, while another one runs, and while the parent is alive.
func (u *Upgrader) Upgrade() error {
	defer u.Fds.catchUp()
	err := u.core.Upgrade()
	if errors.Is(err, ecdysis.ErrDraining) {
		err = errParentAlive
	}
	if err != nil {
		return fmt.Errorf("tableflip: upgrade: %w", err)
	}
	return nil
}

// Stop ends this process's service. It gives up an upgrade that runs, removes the
// files of this process's Unix sockets, and closes the channel that Exit returns.
// It does nothing if this process has been replaced.
func (u *Upgrader) Stop() { u.core.Stop() }

// WaitForParent waits until Ready has succeeded and the parent has exited. If ctx
// is done earlier, it returns ctx's error. It returns nil at once if there is no
// parent.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if !u.HasParent() {
		return nil
	}
	select {
	case <-u.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	if u.parent != nil {
		return u.parent.wait(ctx)
	}
	err := u.core.WaitForParent(ctx)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// prepare refuses an upgrade while a tableflip process is the parent and alive.
// Otherwise nothing can be added until the upgrade is over.
func (u *Upgrader) prepare(*ecdysis.Command) error {
	if u.parent != nil && !u.parent.gone() {
		return errParentAlive
	}
	u.Fds.freeze()
	return nil
}

func (u *Upgrader) notify(e ecdysis.Event) {
	switch e.Kind {
	case ecdysis.EventReady:
		for _, label := range e.Unclaimed {
			u.Fds.noteDropped(label)
		}
	case ecdysis.EventStopping:
		if !u.HasParent() || closed(u.ready) {
			u.Fds.unlink()
		}
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
