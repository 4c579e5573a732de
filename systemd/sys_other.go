//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package systemd

import (
	"errors"
	"net"
	"os"
	"time"
)

// There is no systemd on these systems, so Setup never returns a Notifier.
const supported = false

func monotonic() time.Duration { return 0 }

type relay struct{}

func dialRelay(string) *relay                        { return nil }
func (*relay) open() bool                            { return false }
func (*relay) send(string, []*os.File) (bool, error) { return false, nil }

type relayListener struct{}

func listenRelay() *relayListener      { return nil }
func (*relayListener) address() string { return "" }
func (*relayListener) close()          {}

func (*relayListener) accept(int) (*net.UnixConn, error) { return nil, errors.ErrUnsupported }
