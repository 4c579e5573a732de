//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package tableflip

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

const supported = false

// A parent is the tableflip process that has started this one. On these systems
// there is none.
type parent struct{}

func openParent(time.Time) (*parent, error) { return nil, nil }

func (p *parent) addTo(*ecdysis.Upgrader) error { return nil }
func (p *parent) closeFiles()                   {}
func (p *parent) close()                        {}
func (p *parent) tell()                         {}
func (p *parent) wait(context.Context) error    { return nil }
func (p *parent) gone() bool                    { return true }
func (p *parent) forget()                       {}

func duplicate(syscall.Conn, string) (*os.File, error) { return nil, errors.ErrUnsupported }
