// Package systemd lets a daemon that replaces itself by package ecdysis be a
// service of systemd: the unit stays active through every upgrade, systemctl
// reload upgrades it and returns when the new process serves, and the failure
// of an upgrade stands in the unit's status.
//
//	n, err := systemd.Setup(&opts) // then ecdysis.New(opts)
//
// is all that a program of Type=notify or Type=notify-reload needs, with
// NotifyAccess= at its default. [Adopt] takes the sockets of socket units,
// [Notifier.Restore] and [Notifier.Store] keep sockets in systemd's file
// descriptor store. The units in docs/systemd.md are tested.
//
// systemd listens to a unit's main process alone, and takes a process for its
// own only if it is its child. So Setup makes each successor a child of
// systemd (ecdysis.Command.Sibling), and it is the old process that introduces
// the new one, when that one has taken over. Until then the old process speaks
// for the new one: what a successor says of itself (Status, Store) is heard
// when it is introduced, and not at all if the upgrade fails.
//
// The protocols are those of sd_notify(3), sd_listen_fds(3) and
// sd_watchdog_enabled(3), and need nothing but their environment variables
// and sockets. They are there on Linux alone. On other systems the variables
// are not set, and the calls say so as they would on Linux; if they are, the
// calls return errors.ErrUnsupported.
package systemd

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ecdysis-go/ecdysis"
)

// ErrNoSocket: systemd does not listen to this process. It was not started by
// systemd, or its unit has neither Type=notify, nor Type=notify-reload, nor
// NotifyAccess=. It is also what the methods of a nil *Notifier return, so that
// a program can ignore it and run without systemd, too.
var ErrNoSocket = errors.New("systemd: NOTIFY_SOCKET is not set: this process was not started by systemd, or its unit lacks Type=notify and NotifyAccess=")

const (
	envSocket       = "NOTIFY_SOCKET"
	envWatchdog     = "WATCHDOG_USEC"
	envWatchdogPID  = "WATCHDOG_PID"
	envStoreMax     = "FDSTORE"
	envPredecessor  = "ECDYSIS_SYSTEMD"
	maxStatus       = 1 << 10 // bytes; systemd drops a datagram of more than 4096
	sendTimeout     = 5 * time.Second
	handoverTimeout = 5 * time.Second // what ecdysis gives a successor between the old process's word and its own
)

// A Notifier tells systemd about this process. It is made by [Setup]. Its
// methods may be called from several goroutines at once, and from the hooks in
// ecdysis.Options. Each returns when systemd has, or will find, the message in
// its socket, and waits for that at most 5 s, with os.ErrDeadlineExceeded;
// whether systemd heeds it is in systemd's journal alone.
//
// In a process that has been replaced they do nothing and return
// ecdysis.ErrUpgraded: the unit is the successor's. In a nil Notifier they
// return ErrNoSocket.
type Notifier struct {
	address   string        // of systemd's socket
	successor bool          // an older process introduces this one
	watchdog  time.Duration // 0: none
	storeMax  int           // -1: unknown
	attempt   time.Duration // the longest that an upgrade can take

	// mu guards what follows. It is held over the sending of messages, so
	// that they arrive in order, and not over the hooks of the program.
	mu        sync.Mutex
	reloading bool // systemd waits for READY
	taken     bool // the attempt that runs is a takeover
	replaced  bool // the unit is no longer this process's
	served    bool // EventReady was
	failed    bool // the status is that of a failed upgrade
	relay     *relay
	next      *relayListener
	u         *ecdysis.Upgrader // of Restore; nil: it was not called
	stored    []storedSocket
}

// Setup makes opts those of a service of systemd, whose events systemd is told
// of. It is called just before [ecdysis.New], with options that are complete:
// hooks that are there go on being called, and the time-outs are those that
// systemd is told. It does what follows.
//
//   - EventReady is READY=1, after the program's own hook.
//   - EventUpgrading is RELOADING=1, for as long as the attempt can take,
//     whatever the unit's TimeoutStartSec= is. If systemd cannot be told, the
//     attempt fails: it would end in systemd taking the service for ended.
//   - EventUpgraded makes the successor the unit's main process (MAINPID=), and
//     is READY=1 for it. The hook returns when systemd has acted on it.
//   - EventUpgradeFailed is READY=1, so that systemctl reload returns, with the
//     reason in STATUS=. That text goes with the next Status or the next
//     upgrade. A refused trigger is answered likewise.
//   - EventStopping is STOPPING=1. (A partial stop is none: the process serves
//     on those who are connected, as long as that takes. TimeoutStopSec= is for
//     what comes after.)
//   - Being taken over by a process that this one has not started
//     (Options.TakeoverSocket) is no reload, and changes STATUS= alone: that
//     process is another unit's, and makes it ready. This unit is active until
//     this process exits.
//   - Each successor is a child of systemd itself: Command.Sibling. It inherits
//     NOTIFY_SOCKET and WATCHDOG_USEC, which Setup takes out of the environment
//     of this process, so that no other program that this one runs can speak
//     for it. What Prepare makes of these variables is overwritten.
//
// Errors in telling systemd go to the program's Notify, in Event.Err, except
// for EventReady, which systemd itself then reports as a start that timed out.
//
// Setup returns ErrNoSocket, with opts as they were, if NOTIFY_SOCKET is not
// set. Any other error means that a variable does not have the form that
// systemd gives it, or that nobody is there at NOTIFY_SOCKET, a path or an
// abstract name. Nothing was changed then.
func Setup(opts *ecdysis.Options) (*Notifier, error) {
	n, err := newNotifier()
	if err != nil {
		return nil, err
	}
	timeout := opts.UpgradeTimeout
	if timeout <= 0 {
		timeout = ecdysis.DefaultUpgradeTimeout
	}
	n.attempt = 2 * handoverTimeout
	for _, d := range []time.Duration{timeout, opts.Probation} {
		n.attempt += min(max(d, 0), math.MaxInt64-n.attempt)
	}
	for _, name := range []string{envSocket, envWatchdog, envWatchdogPID, envPredecessor} {
		_ = os.Unsetenv(name) // fails for no name like these
	}

	prepare, notify := opts.Prepare, opts.Notify
	opts.Prepare = func(c *ecdysis.Command) error {
		taken := c.Path == "" // nothing is to be started
		if err := n.begin(taken); err != nil {
			return err
		}
		if prepare != nil {
			if err := prepare(c); err != nil {
				return err
			}
		}
		if !taken {
			n.equip(c)
		}
		return nil
	}
	opts.Notify = func(e ecdysis.Event) {
		if e.Kind == ecdysis.EventReady {
			if notify != nil {
				notify(e)
			}
			_ = n.tell(e)
			return
		}
		if err := n.tell(e); err != nil {
			e.Err = errors.Join(e.Err, err)
		}
		if notify != nil {
			notify(e)
		}
	}
	return n, nil
}

// newNotifier reads the environment.
func newNotifier() (*Notifier, error) {
	n := &Notifier{address: os.Getenv(envSocket), storeMax: -1}
	if n.address == "" {
		return nil, ErrNoSocket
	}
	if err := n.check(); err != nil {
		return nil, fmt.Errorf("systemd: NOTIFY_SOCKET is %q: %w", n.address, err)
	}
	var err error
	if n.watchdog, err = watchdogInterval(); err != nil {
		return nil, err
	}
	if s, ok := os.LookupEnv(envStoreMax); ok {
		if n.storeMax, err = strconv.Atoi(s); err != nil || n.storeMax < 0 {
			return nil, fmt.Errorf("systemd: FDSTORE is %q; want a number", s)
		}
	}
	if s, ok := os.LookupEnv(envPredecessor); ok {
		n.successor = true
		address, list, _ := strings.Cut(s, ":")
		if n.stored, err = parseStored(list); err != nil {
			return nil, fmt.Errorf("systemd: %s is %q; want what an upgrading process sets for its successor: %w", envPredecessor, s, err)
		}
		n.relay = dialRelay(address)
	}
	return n, nil
}

// check reports, as an error, why nothing can be sent to the socket.
func (n *Notifier) check() error {
	switch {
	case !supported:
		return errors.ErrUnsupported
	case n.address[0] != '/' && n.address[0] != '@' || len(n.address) < 2:
		return errors.New("want an absolute path, or an abstract name that begins with @")
	}
	c, err := n.dial()
	if err != nil {
		return err
	}
	return c.Close()
}

// watchdogInterval is what systemd expects to hear from this process in; 0: it
// does not.
func watchdogInterval() (time.Duration, error) {
	usec, ok := os.LookupEnv(envWatchdog)
	if !ok {
		return 0, nil
	}
	u, err := strconv.ParseUint(usec, 10, 63)
	if err != nil || u == 0 || u > uint64(1<<63-1)/uint64(time.Microsecond) {
		return 0, fmt.Errorf("systemd: WATCHDOG_USEC is %q; want a number of microseconds", usec)
	}
	if pid, ok := os.LookupEnv(envWatchdogPID); ok {
		p, err := strconv.Atoi(pid)
		if err != nil || p <= 0 {
			return 0, fmt.Errorf("systemd: WATCHDOG_PID is %q; want a process ID", pid)
		}
		if p != os.Getpid() {
			return 0, nil
		}
	}
	return time.Duration(u) * time.Microsecond, nil
}

// begin tells systemd that an upgrade begins. A takeover is none for it.
func (n *Notifier) begin(taken bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken = taken; taken {
		return nil
	}
	if err := n.send(n.reloadingMessage()); err != nil {
		return err
	}
	n.reloading = true
	return nil
}

// reloadingMessage has the time, by which systemd knows that it is the answer to
// its signal.
func (n *Notifier) reloadingMessage() string {
	return "RELOADING=1\nMONOTONIC_USEC=" + strconv.FormatInt(monotonic().Microseconds(), 10) + "\n" + extendTimeout(n.attempt)
}

func extendTimeout(d time.Duration) string {
	usec := d.Microseconds()
	if d%time.Microsecond > 0 {
		usec++
	}
	return "EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(usec, 10)
}

// equip gives a successor what it needs to be a service of systemd.
func (n *Notifier) equip(c *ecdysis.Command) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next.close() // of an attempt whose hook has panicked
	n.next = listenRelay()
	c.Sibling = true
	c.Env = slices.DeleteFunc(slices.Clone(c.Env), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains([]string{envSocket, envWatchdog, envWatchdogPID, envPredecessor}, name)
	})
	c.Env = append(c.Env, envSocket+"="+n.address, envPredecessor+"="+n.next.address()+formatStored(n.stored))
	if n.watchdog > 0 {
		// Without WATCHDOG_PID it is meant for whoever has it.
		c.Env = append(c.Env, envWatchdog+"="+strconv.FormatInt(n.watchdog.Microseconds(), 10))
	}
}

// tell tells systemd of an event.
func (n *Notifier) tell(e ecdysis.Event) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.replaced {
		return nil
	}
	switch e.Kind {
	case ecdysis.EventReady:
		n.served = true
		if !n.successor {
			return n.send("READY=1")
		}
	case ecdysis.EventUpgraded:
		if n.taken {
			return n.send("STATUS=" + oneLine(e.String()))
		}
		return n.introduce(e.PID)
	case ecdysis.EventUpgradeFailed:
		return n.fail(e)
	case ecdysis.EventStopping:
		// A successor that has come to nothing is not what systemd waits for.
		if n.served || !n.successor {
			return n.send("STOPPING=1")
		}
	}
	return nil
}

// introduce makes the successor the main process.
func (n *Notifier) introduce(pid int) error {
	defer func() {
		n.next.close()
		n.next, n.reloading, n.replaced = nil, false, true
	}()
	var errs []error
	if n.failed {
		errs = append(errs, n.send("STATUS="))
	}
	said, err := n.next.accept(pid)
	if said != nil {
		// What it says from now on it says itself, as soon as it is heard:
		// when said is closed.
		defer said.Close()
		errs = append(errs, said.CloseRead())
		errs = append(errs, n.forward(said))
	}
	message := "MAINPID=" + strconv.Itoa(pid) + "\nREADY=1"
	if n.watchdog > 0 {
		message += "\nWATCHDOG=1" // its first interval is a whole one
	}
	errs = append(errs, err, n.send(message), n.barrier())
	return errors.Join(errs...)
}

// forward sends on what the successor has said until now.
func (n *Notifier) forward(said *net.UnixConn) error {
	if err := said.SetReadDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	buf := make([]byte, 4<<10)
	for {
		m, files, err := ecdysis.ReadFiles(said, buf)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = n.send(string(buf[:m]), files...)
		}
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			return err
		}
	}
}

// fail tells why this process serves on.
func (n *Notifier) fail(e ecdysis.Event) error {
	var attempted *ecdysis.UpgradeError
	if !errors.As(e.Err, &attempted) {
		if n.relay.open() {
			return nil // not the main process yet: systemd does not wait for it
		}
		if err := n.send(n.reloadingMessage()); err != nil || n.reloading {
			return err // READY comes with the end of the upgrade that runs
		}
	} else {
		n.next.close()
		n.next, n.reloading = nil, false
	}
	n.failed = true
	return n.send("READY=1\nSTATUS=" + oneLine(e.String()))
}

// Status sets the text that systemctl status shows: one line, of at most 1024
// bytes. What cannot be in it is replaced by spaces, and what is too long is
// cut off. Of a successor it is shown when that has taken over.
func (n *Notifier) Status(text string) error {
	return n.say("status", func() error {
		err := n.send("STATUS=" + oneLine(text))
		n.failed = n.failed && err != nil
		return err
	})
}

// ExtendTimeout tells systemd that what the unit does now, starting or stopping,
// takes until d from now at least, however short TimeoutStartSec=,
// TimeoutStopSec= or RuntimeMaxSec= is. d is above 0; it does not make a time-out
// shorter. See EXTEND_TIMEOUT_USEC in sd_notify(3). A successor that has not
// taken over has Options.UpgradeTimeout, and no effect by this call.
func (n *Notifier) ExtendTimeout(d time.Duration) error {
	return n.say("extend timeout", func() error {
		if d <= 0 {
			return fmt.Errorf("by %v; want more than 0", d)
		}
		if n.relay.open() {
			return nil
		}
		return n.send(extendTimeout(d))
	})
}

// Watchdog returns in which time systemd expects a sign of life from this
// process, WatchdogSec= in the unit, and the call that gives one. 0: it expects
// none, and ping does nothing. A program calls ping in half of the time, as
// long as it is well, until it exits: no goroutine here does. In a successor
// that has not taken over yet ping does nothing: then the old process, its
// Probation included, is the one that is watched.
func (n *Notifier) Watchdog() (interval time.Duration, ping func() error) {
	if n == nil {
		return 0, func() error { return ErrNoSocket }
	}
	return n.watchdog, func() error {
		return n.say("watchdog", func() error {
			if n.watchdog == 0 || n.relay.open() {
				return nil
			}
			return n.send("WATCHDOG=1")
		})
	}
}

// say does what a call named what is for, if systemd listens to this process.
// Send sends lines of sd_notify(3) for which there is no method, such as
// "MONITOR_ENV=1" or "X_MYAPP_READY=1", separated by newlines. Of a successor
// they are sent when it has taken over. READY=1, RELOADING=1, STOPPING=1 and
// MAINPID= are the package's, and an error, because systemd would follow them
// at the wrong time.
func (n *Notifier) Send(lines string) error {
	return n.say("send", func() error {
		if err := checkLines(lines); err != nil {
			return err
		}
		return n.send(strings.TrimSuffix(lines, "\n"))
	})
}

func checkLines(lines string) error {
	for _, line := range strings.Split(strings.TrimSuffix(lines, "\n"), "\n") {
		name, _, ok := strings.Cut(line, "=")
		switch {
		case !ok || name == "":
			return fmt.Errorf("the line %q; want NAME=value", line)
		case slices.Contains([]string{"READY", "RELOADING", "STOPPING", "MAINPID", "MAINPIDFDID", "FDSTORE", "BARRIER"}, name):
			return fmt.Errorf("the line %q; %s= is told by this package", line, name)
		}
	}
	return nil
}

func (n *Notifier) say(what string, f func() error) error {
	if n == nil {
		return ErrNoSocket
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.replaced {
		return ecdysis.ErrUpgraded
	}
	if err := f(); err != nil {
		return fmt.Errorf("systemd: %s: %w", what, err)
	}
	return nil
}

// send sends a message and copies of descriptors: to systemd or, from a
// successor, to the old process for systemd. n.mu is held.
func (n *Notifier) send(message string, files ...*os.File) error {
	if done, err := n.relay.send(message, files); done {
		return err
	}
	c, err := n.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	if _, err := ecdysis.WriteFiles(c, []byte(message), files...); err != nil {
		return fmt.Errorf("%s to %s: %w", strings.ReplaceAll(message, "\n", " "), n.address, err)
	}
	return nil
}

// dial leads to systemd anew for each message: it costs little, and nothing is
// left open.
func (n *Notifier) dial() (*net.UnixConn, error) {
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: n.address})
}

// barrier returns when systemd has acted on all that was sent: it closes the
// descriptor then. Without it, what a process has sent before it ended is
// nobody's.
func (n *Notifier) barrier() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = n.send("BARRIER=1", w)
	w.Close()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("systemd has not acted on it within %v: %w", sendTimeout, err)
	}
	return nil
}

// oneLine makes a text one that systemd takes as a value: it ends at the end of
// the line, and has to be UTF-8.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s) // Map puts U+FFFD in the place of what is not UTF-8
	if len(s) <= maxStatus {
		return s
	}
	const more = "…"
	end := maxStatus - len(more)
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + more
}
