// Package testing has stand-ins for package tableflip, for tests of programs
// and for systems on which tableflip.New returns tableflip.ErrNotSupported.
// They listen, and do nothing else.
package testing

import (
	"context"
	"net"
	"os"

	"github.com/ecdysis-go/ecdysis/tableflip"
)

// An Upgrader is a stand-in for a tableflip.Upgrader of a process that is never
// replaced.
type Upgrader struct {
	*Fds
}

// New returns an Upgrader. It may be called any number of times, and does not
// fail.
func New() (*Upgrader, error) { return &Upgrader{&Fds{}}, nil }

// Ready returns nil.
func (u *Upgrader) Ready() error { return nil }

// Exit returns nil, a channel that is never closed.
func (u *Upgrader) Exit() <-chan struct{} { return nil }

// Stop does nothing.
func (u *Upgrader) Stop() {}

// WaitForParent returns nil.
func (u *Upgrader) WaitForParent(ctx context.Context) error { return nil }

// HasParent returns false.
func (u *Upgrader) HasParent() bool { return false }

// Upgrade returns tableflip.ErrNotSupported.
func (u *Upgrader) Upgrade() error { return tableflip.ErrNotSupported }

// Fds is a stand-in for a tableflip.Fds that has inherited nothing and keeps
// nothing.
type Fds struct{}

// Listen is net.Listen.
func (f *Fds) Listen(network, addr string) (net.Listener, error) { return net.Listen(network, addr) }

// Listener returns nil, nil.
func (f *Fds) Listener(network, addr string) (net.Listener, error) { return nil, nil }

// AddListener returns nil.
func (f *Fds) AddListener(network, addr string, ln net.Listener) error { return nil }

// Conn returns nil, nil.
func (f *Fds) Conn(network, addr string) (net.Conn, error) { return nil, nil }

// AddConn returns nil.
func (f *Fds) AddConn(network, addr string, conn net.Conn) error { return nil }

// File returns nil, nil.
func (f *Fds) File(name string) (*os.File, error) { return nil, nil }

// AddFile returns nil.
func (f *Fds) AddFile(name string, file *os.File) error { return nil }
