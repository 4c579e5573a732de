package ecdysis

import (
	"os"
	"strconv"
	"time"
)

// What Options.Notify is told.

// An EventKind says what an Event is about.
type EventKind string

const (
	// EventReady means that this process serves from the return of this call
	// on. Locks that only one process may hold are taken here. Err is set if
	// the PID file could not be put in its place.
	EventReady EventKind = "ready"
	// EventUpgrading means that an upgrade begins. EventUpgraded or
	// EventUpgradeFailed follows.
	EventUpgrading EventKind = "upgrading"
	// EventHandover means that every listener of this process is paused and
	// that the successor waits. Locks are released here.
	EventHandover EventKind = "handover"
	// EventResumed means that the upgrade has failed after EventHandover.
	// Locks are taken back here. This process accepts again when the hook
	// has returned, and EventUpgradeFailed follows.
	EventResumed EventKind = "resumed"
	// EventUpgradeFailed means that the attempt has failed. Err says why. It
	// also tells of a trigger that was refused, with ErrInProgress,
	// ErrDraining or ErrInit.
	EventUpgradeFailed EventKind = "upgrade failed"
	// EventUpgraded means that the successor serves and that its probation is
	// over.
	EventUpgraded EventKind = "upgraded"
	// EventAcceptError means that Accept waits out a lasting error, Err, such
	// as a lack of descriptors. The first one is told, and then at most one a
	// minute.
	EventAcceptError EventKind = "accept error"
	// EventStopDeferred means that a stop has come while another process takes
	// over. It is consent: this process goes on until that process serves, has
	// failed, or has used up UpgradeTimeout, and ends then. A second stop ends
	// it at once.
	EventStopDeferred EventKind = "stop deferred"
	// EventPartialStop means that this process has ended accepting.
	EventPartialStop EventKind = "partial stop"
	// EventStopping means that this process ends.
	EventStopping EventKind = "stopping"
)

// An Event tells what an Upgrader does.
type Event struct {
	Kind       EventKind
	Signal     os.Signal // the signal that caused it; nil if a control socket or a call did
	Socket     string    // the path of the control socket that caused it; empty if a signal or a call did
	PassedOn   bool      // EventStopping, EventPartialStop: the predecessor got the stop while it was being replaced, and has passed it on
	Takeover   bool      // the upgrade is a takeover by a process of another unit
	PID        int       // of the process that the event is about; 0 if there is none yet
	Generation int       // of that process: in an upgrade, the successor's
	Unclaimed  []string  // EventReady: what was inherited and closed because no call asked for it: "tcp :80", "conn name", "file name", "pair name", "state"
	Rebound    []string  // EventReady: paths of Unix sockets whose files were gone, and that were made anew
	Lost       []string  // EventReady: paths of Unix sockets at which another process's file is, so that no client reaches this process

	// In an upgrade: what was started, after Prepare, and the time since the
	// attempt began.
	Program, Dir string
	Elapsed      time.Duration

	Err error // EventUpgradeFailed, EventReady, EventAcceptError: what went wrong
}

// String returns e as a line for a log. It leaves out Program, Dir and Elapsed.
func (e Event) String() string {
	s := string(e.Kind)
	if e.Signal != nil {
		s += " by signal " + e.Signal.String()
	}
	if e.Socket != "" {
		s += " by socket " + e.Socket
	}
	if e.PassedOn {
		s += " passed on by the predecessor"
	}
	if e.PID != 0 {
		s += ": pid=" + strconv.Itoa(e.PID) + " generation=" + strconv.Itoa(e.Generation)
	}
	for _, l := range []struct {
		what  string
		items []string
	}{{" unclaimed=", e.Unclaimed}, {" rebound=", e.Rebound}, {" lost=", e.Lost}} {
		s += list(l.what, l.items)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// list returns the items with commas between them, after what they are. It returns
// "" if there are none.
func list(what string, items []string) string {
	var b []byte
	for i, item := range items {
		if i == 0 {
			b = append(b, what...)
		} else {
			b = append(b, ',')
		}
		b = append(b, item...)
	}
	return string(b)
}

// MarshalText returns String's line, so that a log in JSON has the reason, too.
func (e Event) MarshalText() ([]byte, error) { return []byte(e.String()), nil }
