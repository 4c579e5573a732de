// Package systemd makes a daemon that replaces itself by package ecdysis a
// service of systemd. The unit stays active through every upgrade. systemctl
// reload upgrades the daemon and returns when the new process serves. If an
// upgrade fails, the unit's status has the reason.
//
//	n, err := systemd.Setup(&opts) // then ecdysis.New(opts)
//
// A program of Type=notify or Type=notify-reload needs nothing more, with
// NotifyAccess= at its default. [Adopt] takes the sockets of socket units.
// [Notifier.Restore] and [Notifier.Store] keep sockets in systemd's file
// descriptor store. The units in docs/systemd.md are tested.
//
// systemd accepts messages from a unit's main process alone, and follows that
// process well only if it is systemd's own child. So Setup makes each successor a
// child of systemd (ecdysis.Command.Sibling). The predecessor introduces the
// successor as the main process when the successor has taken over. Until then the
// predecessor keeps the successor's messages, such as those of Status and Store.
// It forwards them when it introduces the successor, and drops them if the
// upgrade fails.
//
// The protocols are those of sd_notify(3), sd_listen_fds(3) and
// sd_watchdog_enabled(3). They need only their environment variables and
// sockets, and exist on Linux alone. On other systems the variables are not set,
// and calls return what they return on Linux without them. If a variable is set
// there, calls return errors.ErrUnsupported.
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

// ErrNoSocket means that systemd accepts no messages from this process. The
// process was not started by systemd, or its unit has neither Type=notify, nor
// Type=notify-reload, nor NotifyAccess=. The methods of a nil *Notifier return
// it, too, so that a program can ignore it and also run without systemd.
var ErrNoSocket = errors.New("systemd: NOTIFY_SOCKET is not set: this process was not started by systemd, or its unit lacks Type=notify and NotifyAccess=")

const (
	envSocket       = "NOTIFY_SOCKET"
	envWatchdog     = "WATCHDOG_USEC"
	envWatchdogPID  = "WATCHDOG_PID"
	envStoreMax     = "FDSTORE"
	envPredecessor  = "ECDYSIS_SYSTEMD"
	maxStatus       = 1 << 10 // bytes; systemd drops a datagram of more than 4096
	sendTimeout     = 5 * time.Second
	handoverTimeout = 5 * time.Second // ecdysis's bound from COMMIT to DONE, and that of a hook
)

// A Notifier sends messages about this process to systemd. [Setup] makes it. Its
// methods may be called from several goroutines at once, and from the hooks in
// ecdysis.Options. A method returns when the message is in systemd's socket, or
// is kept by the predecessor for systemd. After 5 s it returns
// os.ErrDeadlineExceeded. Only systemd's journal shows whether systemd accepts
// the message.
//
// In a process that has been replaced the methods do nothing and return
// ecdysis.ErrUpgraded, because the unit is the successor's. In a nil Notifier
// they return ErrNoSocket.
type Notifier struct {
	address   string        // of systemd's socket
	successor bool          // a predecessor introduces this process
	watchdog  time.Duration // WATCHDOG_USEC; 0 if there is none
	storeMax  int           // FDSTORE; -1 if it is unknown
	attempt   time.Duration // the longest that an upgrade can take

	// mu guards the fields below. It is held while messages are sent, so that
	// they arrive in order, and not over the hooks of the program.
	mu        sync.Mutex
	reloading bool // systemd waits for READY
	taken     bool // the running attempt is a takeover
	replaced  bool // the unit is the successor's
	served    bool // EventReady has been reported
	failed    bool // the status text is that of a failed upgrade
	relay     *relay
	next      *relayListener
	u         *ecdysis.Upgrader // of Restore; nil if Restore was not called
	stored    []storedSocket
}

// Setup adds hooks to opts that send each event to systemd. Call it just before
// [ecdysis.New], when opts are complete. The hooks that are there are still
// called. The time-outs in opts are reported to systemd. In detail:
//
//   - EventReady sends READY=1, after the program's own hook.
//   - EventUpgrading sends RELOADING=1, with the longest time that the attempt can
//     take, so that a shorter TimeoutStartSec= does not end it. If sending fails,
//     the attempt fails. Otherwise systemd would take the service for ended when
//     this process exits.
//   - EventUpgraded makes the successor the unit's main process (MAINPID=), and
//     sends READY=1 for it. The hook returns when systemd has acted on it.
//   - EventUpgradeFailed sends READY=1, so that systemctl reload returns, with the
//     reason in STATUS=. The next call of Status or the next successful upgrade
//     removes the reason. A trigger that was refused is answered in the same way.
//   - EventStopping sends STOPPING=1. EventPartialStop sends nothing, because the
//     process serves its clients for as long as that takes. TimeoutStopSec= is
//     for the stop that follows.
//   - A takeover by a process that this one has not started
//     (Options.TakeoverSocket) is no reload, and changes STATUS= alone. The other
//     process belongs to another unit, and makes that unit ready. This unit stays
//     active until this process exits.
//   - Each successor is a child of systemd itself (Command.Sibling). It inherits
//     NOTIFY_SOCKET and WATCHDOG_USEC. Setup removes them from the environment of
//     this process, so that no other program that this process runs can send
//     messages in its place. If Prepare sets these variables, they are
//     overwritten.
//
// An error in sending is added to Event.Err for the program's Notify. The
// exception is EventReady, for which systemd itself reports that the start has
// timed out.
//
// Setup returns ErrNoSocket, with opts unchanged, if NOTIFY_SOCKET is not set.
// Any other error means that a variable does not have systemd's form, or that no
// process receives at NOTIFY_SOCKET. That is a path or an abstract name. Nothing
// has been changed then.
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
		_ = os.Unsetenv(name) // cannot fail for these names
	}

	prepare, notify := opts.Prepare, opts.Notify
	opts.Prepare = func(c *ecdysis.Command) error {
		taken := c.Path == "" // a takeover, which starts no process
		if err := n.begin(taken); err != nil {
			return err
		}
		if prepare != nil {
			if err := prepare(c); err != nil {
				return err
			}
		}
		if !taken {
			n.setEnv(c)
		}
		return nil
	}
	opts.Notify = func(e ecdysis.Event) {
		if e.Kind == ecdysis.EventReady {
			if notify != nil {
				notify(e)
			}
			_ = n.notify(e)
			return
		}
		if err := n.notify(e); err != nil {
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

// check returns an error if nothing can be sent to the socket.
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

// watchdogInterval returns the time within which systemd expects a sign of life
// from this process, or 0 if it expects none.
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

// begin tells systemd that an upgrade begins. A takeover is not told.
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

// reloadingMessage returns the message that a reload has begun. Its time shows
// systemd that the message answers systemd's own signal.
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

// setEnv changes c so that the successor is a service of systemd.
func (n *Notifier) setEnv(c *ecdysis.Command) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next.close() // left from an attempt whose hook has panicked
	n.next = listenRelay()
	c.Sibling = true
	c.Env = slices.DeleteFunc(slices.Clone(c.Env), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains([]string{envSocket, envWatchdog, envWatchdogPID, envPredecessor}, name)
	})
	c.Env = append(c.Env, envSocket+"="+n.address, envPredecessor+"="+n.next.address()+formatStored(n.stored))
	if n.watchdog > 0 {
		// Without WATCHDOG_PID it is meant for any process that has it.
		c.Env = append(c.Env, envWatchdog+"="+strconv.FormatInt(n.watchdog.Microseconds(), 10))
	}
}

// notify sends to systemd what an event means for it.
func (n *Notifier) notify(e ecdysis.Event) error {
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
		return n.promote(e.PID)
	case ecdysis.EventUpgradeFailed:
		return n.fail(e)
	case ecdysis.EventStopping:
		// A successor that has never served is not the main process.
		if n.served || !n.successor {
			return n.send("STOPPING=1")
		}
	}
	return nil
}

// promote makes the successor the main process.
func (n *Notifier) promote(pid int) error {
	defer func() {
		n.next.close()
		n.next, n.reloading, n.replaced = nil, false, true
	}()
	var errs []error
	if n.failed {
		errs = append(errs, n.send("STATUS="))
	}
	relayed, err := n.next.accept(pid)
	if relayed != nil {
		// CloseRead makes the successor keep its next messages until relayed is
		// closed. It then sends them to systemd itself.
		defer relayed.Close()
		errs = append(errs, relayed.CloseRead())
		errs = append(errs, n.forward(relayed))
	}
	message := "MAINPID=" + strconv.Itoa(pid) + "\nREADY=1"
	if n.watchdog > 0 {
		message += "\nWATCHDOG=1" // gives the successor a whole interval
	}
	errs = append(errs, err, n.send(message), n.barrier())
	return errors.Join(errs...)
}

// forward sends the messages that the successor has sent until now to systemd.
func (n *Notifier) forward(relayed *net.UnixConn) error {
	if err := relayed.SetReadDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	buf := make([]byte, 4<<10)
	for {
		m, files, err := ecdysis.ReadFiles(relayed, buf)
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

// fail tells systemd that this process serves on, and why.
func (n *Notifier) fail(e ecdysis.Event) error {
	var attempted *ecdysis.UpgradeError
	if !errors.As(e.Err, &attempted) {
		if n.relay.open() {
			return nil // systemd does not wait for this process, which is not the main process yet
		}
		if err := n.send(n.reloadingMessage()); err != nil || n.reloading {
			return err // READY is sent at the end of the running upgrade
		}
	} else {
		n.next.close()
		n.next, n.reloading = nil, false
	}
	n.failed = true
	return n.send("READY=1\nSTATUS=" + oneLine(e.String()))
}

// Status sets the text that systemctl status shows. It is one line of at most
// 1024 bytes. Control characters are replaced by spaces, and a longer text is cut
// off. The text of a successor is shown when the successor has taken over.
func (n *Notifier) Status(text string) error {
	return n.say("status", func() error {
		err := n.send("STATUS=" + oneLine(text))
		n.failed = n.failed && err != nil
		return err
	})
}

// ExtendTimeout tells systemd that the unit's present start or stop may take
// until d from now, if TimeoutStartSec=, TimeoutStopSec= or RuntimeMaxSec= is
// shorter. It does not make a time-out shorter. It is an error if d is not above
// 0. See EXTEND_TIMEOUT_USEC in sd_notify(3). In a successor that has not taken
// over the call has no effect, because Options.UpgradeTimeout bounds its start.
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

// Watchdog returns the time within which systemd expects a sign of life from this
// process (WatchdogSec= in the unit), and a function that sends one. If interval
// is 0, systemd expects none, and ping does nothing. While a program is well it
// should call ping after half the interval, again and again until it exits. No
// goroutine of this package calls ping. In a successor that has not taken over
// ping does nothing, because systemd watches the predecessor until then, its
// Probation included.
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

// Send sends lines of sd_notify(3) for which there is no method, such as
// "MONITOR_ENV=1" or "X_MYAPP_READY=1", separated by newlines. The lines of a
// successor reach systemd when the successor has taken over. Lines that the
// package itself sends are refused, such as READY=1, RELOADING=1, STOPPING=1 and
// MAINPID=, because systemd would act on them at the wrong time.
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
			return fmt.Errorf("the line %q; only this package sends %s=", line, name)
		}
	}
	return nil
}

// say calls f for the method named what, unless this process has no unit. It
// wraps f's error.
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

// send sends a message and copies of descriptors to systemd. A successor that has
// not taken over sends them to its predecessor, which forwards them. n.mu is
// held.
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

// dial connects to systemd. Each message has a connection of its own, because
// that costs little and leaves nothing open.
func (n *Notifier) dial() (*net.UnixConn, error) {
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: n.address})
}

// barrier returns when systemd has acted on all earlier messages. systemd shows
// this by closing the descriptor. Without a barrier, systemd drops the last
// messages of a process that ends, because it cannot tell whose they are.
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
		return fmt.Errorf("systemd has not acted on the messages within %v: %w", sendTimeout, err)
	}
	return nil
}

// oneLine returns s as a value that systemd accepts, which must be one line of
// UTF-8.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s) // Map replaces bytes that are not UTF-8 by U+FFFD
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
