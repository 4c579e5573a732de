package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

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

// A socketOption is one of the paths in Options.
type socketOption struct {
	name string
	path *string
	act  func(*control, trigger, *sync.WaitGroup)
	// late: in a handover it accepts until the successor serves, so that
	// who comes during an upgrade is told so, and does not begin the next.
	late     bool
	takeover bool // its clients speak the protocol, the others' wait for a line
}

func (o *Options) sockets() []socketOption {
	return []socketOption{
		{"UpgradeSocket", &o.UpgradeSocket, (*control).upgrade, true, false},
		{"StopSocket", &o.StopSocket, (*control).stop, false, false},
		{"PartialStopSocket", &o.PartialStopSocket, (*control).partialStop, false, false},
		{"TakeoverSocket", &o.TakeoverSocket, (*control).handOver, true, true},
	}
}

// controlPath returns the path of a control socket, made absolute.
func controlPath(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	if strings.HasSuffix(path, "/") {
		return "", fmt.Errorf("%q is a directory; want the path of a socket", path)
	}
	if !isAbstract(path) {
		var err error
		if path, err = absolute(path); err != nil {
			return "", err
		}
	}
	return path, ListenConfig{}.check(kindListener, "unix", path)
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
