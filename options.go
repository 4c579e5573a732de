package ecdysis

import (
	"errors"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"
)

// What a program says when it calls New, and the check of it.

// DefaultUpgradeTimeout is the time from start to ready that a successor has
// if Options.UpgradeTimeout is zero.
const DefaultUpgradeTimeout = time.Minute

// Options configures an Upgrader. The zero value works: an upgrade has a minute,
// there is no probation and no PID file, and upgrades begin by calls alone. New
// refuses durations below zero.
type Options struct {
	// UpgradeTimeout is the time that a successor has from its start until it
	// is ready. After it the successor is killed, and this process serves on.
	// Zero means DefaultUpgradeTimeout. The start itself has no bound: if
	// execve(2) hangs, as on a network file system whose server is gone,
	// Upgrade waits while this process serves.
	UpgradeTimeout time.Duration

	// Probation is how long this process stands by after its successor has
	// become ready. If the successor ends within it, this process takes the
	// sockets back and resumes. Upgrade returns after it. Zero means none.
	Probation time.Duration

	// PIDFile is a file that Ready writes, by a rename, and that Stop removes
	// if it still names this process. Empty means none. A relative path is
	// taken from the working directory at the time of New.
	PIDFile string

	// UpgradeSignals are caught from New until the process exits, so that an
	// early or late one kills nobody. Wait acts on them. A terminal that is
	// closed sends SIGHUP to its programs: one that upgrades by SIGHUP and may
	// run in a terminal starts a successor then.
	UpgradeSignals []os.Signal
	// StopSignals make Wait stop this process. They are caught from before the
	// PID file can name this process, or from the call of Wait if that is
	// earlier, until Wait returns. After that they kill as usual.
	StopSignals []os.Signal
	// PartialStopSignals make Wait end accepting, and are caught like
	// StopSignals. The caller finishes what is in flight, then calls Stop.
	PartialStopSignals []os.Signal

	// UpgradeSocket, StopSocket and PartialStopSocket are the paths of control
	// sockets. These are Unix sockets by which programs of the same user, and
	// of root, request what the signals request; see Request. New makes them,
	// with mode 0600, or inherits them, and Wait serves them. They are handed
	// on in an upgrade, and their files are removed on a stop. Empty means
	// none. A relative path is taken from the working directory at the time
	// of New. On Linux a name that begins with "@" is abstract.
	UpgradeSocket, StopSocket, PartialStopSocket string

	// TakeoverSocket is the path of a Unix socket by which a process that was
	// not started by this one takes everything over from it, as a successor
	// would: a process in a new container or unit, or with another
	// environment. New connects to it, unless a predecessor has started this
	// process, and inherits from the process that serves there. If there is
	// none, this is the first process of a chain. From then on it is a control
	// socket like the others, for the next process that takes over.
	TakeoverSocket string

	// Unit names what this process belongs to, such as a pod's UID or a
	// container's ID. It is empty, or at most 256 bytes, and the same for all
	// processes of the unit. A process that takes over retires the other
	// unit: the last 64 retired units are handed on, and New of a process of
	// one of these returns ErrRetired without a takeover. So a supervisor may
	// restart a process that was taken over. If no process serves, a retired
	// unit starts as a first process.
	Unit string

	// AcrossNetworks lets a process inherit TCP and UDP sockets of another
	// network namespace than its own. Without it New fails, because clients
	// of its own namespace cannot reach it. Sockets that the predecessor
	// itself has got from another namespace are inherited in any case, and so
	// are Unix sockets. Linux before 5.14 cannot tell.
	AcrossNetworks bool

	// MaxDraining is how many older generations may still be alive, serving
	// the clients that they have, when an upgrade begins. With more of them
	// the upgrade is refused with ErrDraining. Zero means any number, and -1
	// means that none may be alive.
	MaxDraining int

	// Prepare is called before a successor is started. It may change the
	// command, and may still call Listen, AddConn or AddFile. Its error ends
	// the attempt. In a takeover nothing is started: the Command is zero, and
	// changing it has no effect.
	Prepare func(*Command) error

	// Unclaimed is called when a successor is ready, before this process pauses,
	// with what the successor has not asked for and will close. The names are
	// those of Event.Unclaimed, as many as fit into 32 KiB. It is not called
	// if there are none. Its error ends the attempt. It can keep a wrong
	// program from taking over.
	Unclaimed func(names []string) error

	// SendState writes what the successor reads with State. Only memory limits
	// its size: on Linux it is held in memory charged to this process,
	// elsewhere in an unlinked file in the temporary directory. It is called
	// for each attempt, after Prepare, while this process serves, so that what
	// changes after it has returned is not in it. Its error, and one of the
	// writer's, ends the attempt.
	SendState func(io.Writer) error

	// Notify is called with every Event, with no lock held. Calls may overlap,
	// and may call any method. The reported step waits until Notify returns, so
	// it must be quick. What it may hold up depends on the event:
	//
	//   - While nobody serves, for EventHandover and EventResumed, it runs on a
	//     goroutine of its own and has 5 s. After that the upgrade fails, or
	//     this process resumes all the same.
	//   - EventReady of a successor has 5 s, too: the predecessor kills the
	//     successor after that, and resumes.
	//   - The other events are told on the goroutine that caused them. They
	//     hold up the call of Upgrade, Stop, Ready or Accept that tells them,
	//     while this process or its successor serves.
	Notify func(Event)
}

// A Command is what a successor is started with.
//
// Standard input, output and error are those of this process. A log that was
// redirected goes on in the file that this process has open, also if that was
// renamed by a rotation. If standard output or error is a pipe whose reader has
// gone, the next line that a process writes kills it by SIGPIPE, as in every Go
// program: also this process, while it serves its last clients.
//
// A program that sets a parent-death signal (PR_SET_PDEATHSIG, see prctl(2)) is
// killed when its predecessor exits, unless it is a Sibling.
type Command struct {
	// Path is the program. Initially it is os.Args[0] as it was at the start
	// of this process: made absolute if it has a slash, else looked up in this
	// process's $PATH when the successor is started. A file that was replaced
	// and a symbolic link that was flipped are picked up. If os.Args[0] does
	// not lead to the executable, it is the executable's own path. A script
	// that has executed this program is not run again; what it has set in the
	// environment is inherited. A relative path from Prepare is taken from
	// Dir.
	Path string
	// Args are the arguments without the program's name. Initially they are
	// those of this process.
	Args []string
	// Env is the environment. Initially it is that of this process at this
	// moment. The variable by which a successor finds its inheritance is
	// added later and replaces any other of that name.
	Env []string
	// Dir is the working directory. Initially it is the one in which this
	// process was started: $PWD if that leads there, so that a symbolic link
	// is followed anew. It is empty if that directory is gone or closed to the
	// user that this process has become. Empty means the working directory of
	// this process.
	Dir string
	// Sibling makes the successor a child of this process's own parent, for
	// a supervisor that watches its children. It works on Linux only. On
	// other systems the upgrade fails with errors.ErrUnsupported.
	Sibling bool
}

// maxUnit is the length of the longest Options.Unit.
const maxUnit = 256

// A socketPath is one of the paths in Options: a control socket's or the PID
// file's.
type socketPath struct {
	option string // the name of the field
	path   *string
}

func (o *Options) socketPaths() []socketPath {
	return []socketPath{
		{"UpgradeSocket", &o.UpgradeSocket},
		{"StopSocket", &o.StopSocket},
		{"PartialStopSocket", &o.PartialStopSocket},
		{"TakeoverSocket", &o.TakeoverSocket},
	}
}

// check fills in the defaults and makes the paths absolute.
func (o *Options) check() error {
	if o.UpgradeTimeout < 0 {
		return errorf("UpgradeTimeout is %v; want 0 (for %v) or more", o.UpgradeTimeout, DefaultUpgradeTimeout)
	}
	if o.UpgradeTimeout == 0 {
		o.UpgradeTimeout = DefaultUpgradeTimeout
	}
	if o.Probation < 0 {
		return errorf("the Probation is %v; want 0 (for none) or more", o.Probation)
	}
	if o.MaxDraining < -1 {
		return errorf("MaxDraining is %d; want -1 (for none), 0 (for any number) or more", o.MaxDraining)
	}
	if len(o.Unit) > maxUnit {
		return errorf("the Unit has %d bytes; want at most %d", len(o.Unit), maxUnit)
	}
	if err := o.checkPaths(); err != nil {
		return err
	}
	return o.checkSignals()
}

// checkPaths makes the paths absolute. No two may be the same.
func (o *Options) checkPaths() error {
	if o.PIDFile != "" {
		if strings.HasSuffix(o.PIDFile, "/") {
			return errorf("PIDFile is %q; want the path of a file", o.PIDFile)
		}
		path, err := absolute(o.PIDFile)
		if err != nil {
			return errorf("PIDFile: %w", err)
		}
		o.PIDFile = path
	}
	taken := []socketPath{{"PIDFile", &o.PIDFile}}
	for _, s := range o.socketPaths() {
		if *s.path == "" {
			continue
		}
		path, err := controlPath(*s.path)
		if err != nil {
			return errorf("%s: %w", s.option, err)
		}
		for _, other := range taken {
			if *other.path == path {
				return errorf("%s and %s are both %q; want a path for each", other.option, s.option, path)
			}
		}
		*s.path = path
		taken = append(taken, s)
	}
	return nil
}

// checkSignals refuses signals that cannot be caught or would mean two things.
func (o *Options) checkSignals() error {
	lists := []struct {
		option  string
		signals []os.Signal
	}{{"UpgradeSignals", o.UpgradeSignals}, {"StopSignals", o.StopSignals}, {"PartialStopSignals", o.PartialStopSignals}}
	var seen []os.Signal
	for _, l := range lists {
		for _, s := range l.signals {
			switch {
			case s == nil:
				return errors.New(l.option + " holds nil; want a signal")
			case uncatchable(s):
				return errors.New(l.option + " holds SIGKILL or SIGSTOP, which no process can catch")
			case slices.Contains(seen, s):
				return errorf("%v is in %s and was named before; want it in one list, once", s, l.option)
			}
			seen = append(seen, s)
		}
	}
	return nil
}

// WaitRetired waits for one of the signals, and returns it. It is for a program
// whose New has returned ErrRetired: its supervisor would restart it if it
// exited, and tells it by a signal when it is to end.
func WaitRetired(signals ...os.Signal) os.Signal {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, signals...)
	defer signal.Stop(ch)
	return <-ch
}
