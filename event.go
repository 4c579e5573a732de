package ecdysis

import (
	"os"
	"strconv"
	"strings"
)

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
