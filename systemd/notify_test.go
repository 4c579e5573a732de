//go:build linux

package systemd_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/systemd"
	"golang.org/x/sys/unix"
)

// A manager is systemd's end of NOTIFY_SOCKET.
type manager struct {
	t       *testing.T
	c       *net.UnixConn
	address string
}

// A message is a datagram of sd_notify(3).
type message struct {
	text  string
	pid   int
	files []*os.File
}

func newManager(t *testing.T, address string) *manager {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &manager{t, c, address}
}

// socketPath returns a path that is short enough for a socket.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "notify")
}

func abstract(t *testing.T) string {
	return fmt.Sprintf("@ecdysis-systemd-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
}

// receive returns the next message, or an error if none arrives in time.
func (m *manager) receive(d time.Duration) (message, error) {
	_ = m.c.SetReadDeadline(time.Now().Add(d))
	b, oob := make([]byte, 8<<10), make([]byte, 1<<10)
	n, oobn, _, _, err := m.c.ReadMsgUnix(b, oob)
	if err != nil {
		return message{}, err
	}
	got := message{text: string(b[:n])}
	parts, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return message{}, err
	}
	for i := range parts {
		if cred, err := unix.ParseUnixCredentials(&parts[i]); err == nil {
			got.pid = int(cred.Pid)
		} else if fds, err := unix.ParseUnixRights(&parts[i]); err == nil {
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				got.files = append(got.files, os.NewFile(uintptr(fd), "passed"))
			}
		}
	}
	return got, nil
}

func (m *manager) next() message {
	m.t.Helper()
	got, err := m.receive(patience)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(got.close)
	return got
}

func (g message) close() {
	for _, f := range g.files {
		f.Close()
	}
}

// gets asserts that text is the next message, and that it has no descriptors.
func (m *manager) gets(want string) {
	m.t.Helper()
	if got := m.next(); got.text != want || len(got.files) > 0 {
		m.t.Fatalf("systemd got %q with %d descriptors; want %q", got.text, len(got.files), want)
	}
}

// hasAll asserts that no message is left.
func (m *manager) hasAll() {
	m.t.Helper()
	if got, err := m.receive(time.Millisecond); err == nil {
		m.t.Fatalf("systemd got %q; want nothing more", got.text)
	}
}

// barrier receives the message BARRIER=1, and returns the function that answers it.
func (m *manager) barrier() (answer func()) {
	m.t.Helper()
	got := m.next()
	if got.text != "BARRIER=1" || len(got.files) != 1 {
		m.t.Fatalf("systemd got %q with %d descriptors; want BARRIER=1 with one", got.text, len(got.files))
	}
	return got.close
}

var reloadingText = regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=(\d+)\nEXTEND_TIMEOUT_USEC=(\d+)$`)

// reloads asserts that the next message reports a reload that has begun between
// the two times. It returns the longest time that the message allows.
func (m *manager) reloads(from, to int64) time.Duration {
	m.t.Helper()
	got := m.next()
	w := reloadingText.FindStringSubmatch(got.text)
	if w == nil {
		m.t.Fatalf("systemd got %q; want RELOADING=1", got.text)
	}
	at, _ := strconv.ParseInt(w[1], 10, 64)
	if at < from || at > to {
		m.t.Fatalf("MONOTONIC_USEC=%d; want one from %d to %d", at, from, to)
	}
	limit, _ := strconv.ParseInt(w[2], 10, 64)
	return time.Duration(min(limit, 1<<63/1000-1)) * time.Microsecond
}

func monotonicUsec() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano() / 1000
}

var variables = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE", "ECDYSIS_SYSTEMD"}

var environment sync.Mutex // held while a test has its own

// setup calls Setup with these variables and no others of systemd's.
func setup(t *testing.T, opts *ecdysis.Options, env ...string) (*systemd.Notifier, error) {
	t.Helper()
	environment.Lock()
	defer environment.Unlock()
	for _, name := range variables {
		os.Unsetenv(name)
	}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		if slices.Contains(variables, name) {
			os.Setenv(name, value)
		}
	}
	n, err := systemd.Setup(opts)
	for _, name := range variables[:3] {
		if v, ok := os.LookupEnv(name); ok && err == nil {
			t.Errorf("%s=%s is left in the environment", name, v)
		}
	}
	return n, err
}

// hooked returns options whose hooks a test calls, and the events that the
// program's own hooks have seen.
func hooked(t *testing.T, m *manager, env ...string) (*systemd.Notifier, *ecdysis.Options, *[]ecdysis.Event) {
	t.Helper()
	var events []ecdysis.Event
	opts := &ecdysis.Options{
		UpgradeTimeout: 2 * time.Second,
		Probation:      time.Second,
		Prepare: func(c *ecdysis.Command) error {
			if slices.Contains(c.Args, "no") {
				return errVeto
			}
			c.Args = append(c.Args, "prepared")
			return nil
		},
		Notify: func(e ecdysis.Event) { events = append(events, e) },
	}
	n, err := setup(t, opts, append(env, "NOTIFY_SOCKET="+m.address)...)
	if err != nil {
		t.Fatal(err)
	}
	return n, opts, &events
}

var errVeto = errors.New("not now")

// failed is the event of an attempt that has failed.
func failed(reason string) ecdysis.Event {
	return ecdysis.Event{Kind: ecdysis.EventUpgradeFailed, Signal: syscall.SIGHUP, PID: 4, Generation: 1,
		Err: &ecdysis.UpgradeError{Step: "init", PID: 4, Err: errors.New(reason)}}
}

// prepare begins an upgrade, and returns the successor's command.
func prepare(t *testing.T, m *manager, opts *ecdysis.Options) *ecdysis.Command {
	t.Helper()
	c := &ecdysis.Command{Path: "/daemon", Args: []string{"-x"}, Env: []string{"A=b", "NOTIFY_SOCKET=other", "WATCHDOG_PID=1", "WATCHDOG_USEC=5"}}
	from := monotonicUsec()
	if err := opts.Prepare(c); err != nil {
		t.Fatal(err)
	}
	// The time-out, the probation, and twice the bound of a handover.
	if limit := m.reloads(from, monotonicUsec()); limit < 13*time.Second || limit > time.Minute {
		t.Fatalf("systemd is told %v; want 3 s of Options, and 10 s", limit)
	}
	return c
}

func TestEvents(t *testing.T) {
	for name, address := range map[string]func(*testing.T) string{"path": socketPath, "abstract": abstract} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManager(t, address(t))
			n, opts, events := hooked(t, m)
			m.hasAll() // the check that systemd is there sends nothing
			notify := func(e ecdysis.Event) {
				t.Helper()
				opts.Notify(e)
				if got := *events; len(got) != 1 || got[0].Kind != e.Kind || got[0].PID != e.PID || got[0].Err != e.Err {
					t.Fatalf("the program's Notify got %+v; want %+v", got, e)
				}
				*events = nil
			}

			notify(ecdysis.Event{Kind: ecdysis.EventReady, PID: os.Getpid()})
			m.gets("READY=1")

			c := prepare(t, m, opts)
			if !c.Sibling || !slices.Equal(c.Args, []string{"-x", "prepared"}) {
				t.Fatalf("the successor's command is %+v; want a sibling, and what Prepare has done", c)
			}
			if len(c.Env) != 3 || c.Env[0] != "A=b" || c.Env[1] != "NOTIFY_SOCKET="+m.address || !strings.HasPrefix(c.Env[2], "ECDYSIS_SYSTEMD=@") {
				t.Fatalf("the successor's environment is %q", c.Env)
			}
			notify(ecdysis.Event{Kind: ecdysis.EventUpgrading})
			m.hasAll()
			notify(failed("bad\nMAINPID=1\x00\xffend"))
			m.gets("READY=1\nSTATUS=upgrade failed by signal hangup: pid=4 generation=1: ecdysis: upgrade failed at init: successor 4: bad MAINPID=1 \ufffdend")

			// An error of the program's Prepare ends the reload, too.
			from := monotonicUsec()
			if err := opts.Prepare(&ecdysis.Command{Path: "/daemon", Args: []string{"no"}}); err != errVeto {
				t.Fatalf("Prepare: %v; want the program's own error", err)
			}
			m.reloads(from, monotonicUsec())
			notify(ecdysis.Event{Kind: ecdysis.EventUpgradeFailed, Err: &ecdysis.UpgradeError{Step: "prepare", Err: errVeto}})
			if got := m.next().text; !strings.HasPrefix(got, "READY=1\nSTATUS=upgrade failed") || !strings.Contains(got, "not now") {
				t.Fatalf("systemd got %q; want READY=1 and the reason", got)
			}

			// A trigger that is refused ends its reload at once or, during an upgrade,
			// with that upgrade.
			refused := ecdysis.Event{Kind: ecdysis.EventUpgradeFailed, Signal: syscall.SIGHUP, Err: ecdysis.ErrInProgress}
			from = monotonicUsec()
			notify(refused)
			m.reloads(from, monotonicUsec())
			if got := m.next().text; !strings.HasPrefix(got, "READY=1\nSTATUS=upgrade failed by signal hangup") {
				t.Fatalf("systemd got %q; want READY=1", got)
			}
			prepare(t, m, opts)
			from = monotonicUsec()
			notify(refused)
			m.reloads(from, monotonicUsec())
			m.hasAll()
			notify(failed("late"))
			m.next()

			// The next successful upgrade removes the status of a failed one.
			prepare(t, m, opts)
			done := make(chan struct{})
			go func() {
				defer close(done)
				notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4, Generation: 1})
			}()
			m.gets("STATUS=")
			m.gets("MAINPID=4\nREADY=1")
			answer := m.barrier()
			select {
			case <-done:
				t.Fatal("the hook has returned before systemd has acted")
			case <-time.After(20 * time.Millisecond):
			}
			answer()
			<-done

			// The unit is the successor's now.
			notify(ecdysis.Event{Kind: ecdysis.EventStopping})
			_, ping := n.Watchdog()
			for what, err := range map[string]error{
				"Status":        n.Status("text"),
				"ExtendTimeout": n.ExtendTimeout(time.Second),
				"ping":          ping(),
				"Store":         n.Store(nil),
			} {
				if err != ecdysis.ErrUpgraded {
					t.Errorf("%s in a replaced process: %v; want ErrUpgraded", what, err)
				}
			}
			m.hasAll()
		})
	}
}

func TestStopping(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	_, opts, _ := hooked(t, m)
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventPartialStop})
	m.hasAll()
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventStopping})
	m.gets("STOPPING=1")

	// A successor sends STOPPING=1 only if it has served.
	_, opts, _ = hooked(t, m, "ECDYSIS_SYSTEMD=")
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventStopping, Generation: 1})
	m.hasAll()
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventReady, Generation: 1})
	m.hasAll() // the predecessor sends it
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventStopping, Generation: 1})
	m.gets("STOPPING=1")
}

// A process that takes over is another unit's, and makes that unit ready.
func TestTakenOver(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, opts, _ := hooked(t, m)
	c := &ecdysis.Command{}
	if err := opts.Prepare(c); err != nil || c.Sibling || c.Env != nil {
		t.Fatalf("Prepare: %v, %+v; want nothing to be started", err, c)
	}
	m.hasAll()
	opts.Notify(failed("it has gone"))
	if got := m.next().text; !strings.HasPrefix(got, "READY=1\nSTATUS=upgrade failed") {
		t.Fatalf("systemd got %q; want the reason", got)
	}
	if err := opts.Prepare(&ecdysis.Command{}); err != nil {
		t.Fatal(err)
	}
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4, Generation: 3})
	m.gets("STATUS=upgraded: pid=4 generation=3")
	if err := n.Status("serving the last clients"); err != nil { // the unit is still this process's
		t.Fatal(err)
	}
	m.gets("STATUS=serving the last clients")
	m.hasAll()

	_, opts, _ = hooked(t, m)
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventReady, Generation: 3})
	m.gets("READY=1")
}

func TestNoHooks(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	opts := &ecdysis.Options{}
	if _, err := setup(t, opts, "NOTIFY_SOCKET="+m.address); err != nil {
		t.Fatal(err)
	}
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventReady})
	m.gets("READY=1")
	c := &ecdysis.Command{Path: "/daemon"}
	from := monotonicUsec()
	if err := opts.Prepare(c); err != nil || !c.Sibling {
		t.Fatalf("Prepare: %v, %+v; want a sibling", err, c)
	}
	if limit := m.reloads(from, monotonicUsec()); limit < ecdysis.DefaultUpgradeTimeout || limit > 2*ecdysis.DefaultUpgradeTimeout {
		t.Fatalf("systemd is told %v; want somewhat more than %v", limit, ecdysis.DefaultUpgradeTimeout)
	}
	const longest = 1<<63 - 1
	opts = &ecdysis.Options{UpgradeTimeout: longest, Probation: longest}
	if _, err := setup(t, opts, "NOTIFY_SOCKET="+m.address); err != nil {
		t.Fatal(err)
	}
	from = monotonicUsec()
	if err := opts.Prepare(c); err != nil {
		t.Fatal(err)
	}
	if limit := m.reloads(from, monotonicUsec()); limit < longest/2 {
		t.Fatalf("systemd is told %v; want %v", limit, time.Duration(longest))
	}
}

func TestBadEnvironment(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	there := "NOTIFY_SOCKET=" + m.address
	for _, c := range []struct {
		env  []string
		is   error
		says string
	}{
		{env: nil, is: systemd.ErrNoSocket},
		{env: []string{"NOTIFY_SOCKET="}, is: systemd.ErrNoSocket},
		{env: []string{"NOTIFY_SOCKET=run/notify"}, says: `NOTIFY_SOCKET is "run/notify": want an absolute path, or an abstract name that begins with @`},
		{env: []string{"NOTIFY_SOCKET=@"}, says: `NOTIFY_SOCKET is "@": want`},
		{env: []string{"NOTIFY_SOCKET=" + m.address + "x"}, is: os.ErrNotExist, says: m.address + "x"},
		{env: []string{"NOTIFY_SOCKET=@no-such-name-" + strconv.Itoa(os.Getpid())}, is: syscall.ECONNREFUSED, says: "@no-such-name"},
		{env: []string{"NOTIFY_SOCKET=/" + strings.Repeat("x", 200)}, is: syscall.EINVAL, says: "NOTIFY_SOCKET"},
		{env: []string{there, "WATCHDOG_USEC=1s"}, says: `WATCHDOG_USEC is "1s"; want a number of microseconds`},
		{env: []string{there, "WATCHDOG_USEC=0"}, says: `WATCHDOG_USEC is "0"`},
		{env: []string{there, "WATCHDOG_USEC=9223372036854776"}, says: `WATCHDOG_USEC is "9223372036854776"`},
		{env: []string{there, "WATCHDOG_USEC=1", "WATCHDOG_PID=me"}, says: `WATCHDOG_PID is "me"; want a process ID`},
		{env: []string{there, "FDSTORE=many"}, says: `FDSTORE is "many"; want a number`},
		{env: []string{there, "ECDYSIS_SYSTEMD=@x:y"}, says: `ECDYSIS_SYSTEMD is "@x:y"`},
	} {
		opts := ecdysis.Options{}
		n, err := setup(t, &opts, c.env...)
		if n != nil || err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || !strings.HasPrefix(err.Error(), "systemd: ") {
			t.Errorf("%q: %v; want %v, %q", c.env, err, c.is, c.says)
		}
		if opts.Notify != nil || opts.Prepare != nil {
			t.Errorf("%q: the options are changed", c.env)
		}
	}
	m.hasAll()
}

func TestNilNotifier(t *testing.T) {
	t.Parallel()
	var n *systemd.Notifier
	interval, ping := n.Watchdog()
	if interval != 0 {
		t.Errorf("the interval of the watchdog is %v; want 0", interval)
	}
	for what, err := range map[string]error{
		"Status":        n.Status("text"),
		"ExtendTimeout": n.ExtendTimeout(time.Second),
		"ping":          ping(),
		"Store":         n.Store(nil),
	} {
		if err != systemd.ErrNoSocket {
			t.Errorf("%s: %v; want ErrNoSocket", what, err)
		}
	}
}

func TestStatusText(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, _, _ := hooked(t, m)
	for _, c := range []struct{ text, want string }{
		{"12 clients", "12 clients"},
		{"", ""},
		{"a\nREADY=1\tb\x00c\u0085d", "a READY=1 b c d"},
		{"grün \xff", "grün \ufffd"},
		{strings.Repeat("x", 1024), strings.Repeat("x", 1024)},
		{strings.Repeat("x", 1025), strings.Repeat("x", 1021) + "…"},
		{strings.Repeat("ü", 600), strings.Repeat("ü", 510) + "…"},
	} {
		if err := n.Status(c.text); err != nil {
			t.Fatal(err)
		}
		m.gets("STATUS=" + c.want)
	}
	// The program's status replaces that of a failure, so that the next upgrade does
	// not remove it.
	n, opts, _ := hooked(t, m)
	prepare(t, m, opts)
	opts.Notify(failed("x"))
	m.next()
	if err := n.Status("well"); err != nil {
		t.Fatal(err)
	}
	m.gets("STATUS=well")
	prepare(t, m, opts)
	go opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4})
	m.gets("MAINPID=4\nREADY=1")
	m.barrier()()
}

func TestExtendTimeout(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, _, _ := hooked(t, m)
	for d, want := range map[time.Duration]string{time.Second: "1000000", time.Nanosecond: "1", 1500 * time.Nanosecond: "2", 1<<63 - 1: "9223372036854776"} {
		if err := n.ExtendTimeout(d); err != nil {
			t.Fatal(err)
		}
		m.gets("EXTEND_TIMEOUT_USEC=" + want)
	}
	for _, d := range []time.Duration{0, -1} {
		if err := n.ExtendTimeout(d); err == nil || !strings.Contains(err.Error(), d.String()) {
			t.Errorf("%v: %v; want an error that names it", d, err)
		}
	}
	m.hasAll()
}

func TestWatchdog(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	pid := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		env  []string
		want time.Duration
	}{
		{nil, 0},
		{[]string{"WATCHDOG_USEC=1500000", "WATCHDOG_PID=" + pid}, 1500 * time.Millisecond},
		{[]string{"WATCHDOG_USEC=1500000"}, 1500 * time.Millisecond},
		{[]string{"WATCHDOG_USEC=1500000", "WATCHDOG_PID=1"}, 0},
	} {
		n, opts, _ := hooked(t, m, c.env...)
		interval, ping := n.Watchdog()
		if interval != c.want {
			t.Errorf("%q: %v; want %v", c.env, interval, c.want)
		}
		if err := ping(); err != nil {
			t.Fatal(err)
		}
		if c.want > 0 {
			m.gets("WATCHDOG=1")
		}
		m.hasAll()
		// The successor gets the watchdog, too.
		cmd := prepare(t, m, opts)
		if got := slices.Contains(cmd.Env, "WATCHDOG_USEC=1500000"); got != (c.want > 0) || slices.Contains(cmd.Env, "WATCHDOG_PID=1") {
			t.Errorf("%q: the successor has %q", c.env, cmd.Env)
		}
		go opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4})
		want := "MAINPID=4\nREADY=1"
		if c.want > 0 {
			want += "\nWATCHDOG=1"
		}
		m.gets(want)
		m.barrier()()
	}
}

// Without systemd no reload begins, because its end could not be sent. Another
// message that cannot be sent is an error of its event.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, opts, events := hooked(t, m)
	m.c.Close()
	if err := n.Status("x"); !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Status: %v; want the system's error", err)
	}
	if err := opts.Prepare(&ecdysis.Command{Path: "/daemon"}); err == nil {
		t.Error("an upgrade begins of which systemd cannot be told")
	}
	opts.Notify(failed("x"))
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4})
	for _, e := range *events {
		if !errors.Is(e.Err, os.ErrNotExist) && !errors.Is(e.Err, syscall.ECONNREFUSED) {
			t.Errorf("%v: %v; want the system's error", e.Kind, e.Err)
		}
	}
	if len(*events) != 2 {
		t.Errorf("the program's Notify got %v", *events)
	}
}

// A slow systemd is waited for, but not for ever.
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	_, opts, events := hooked(t, m)
	prepare(t, m, opts)
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: 4})
	if e := (*events)[0]; !errors.Is(e.Err, os.ErrDeadlineExceeded) {
		t.Errorf("after a barrier without an answer: %v; want ErrDeadlineExceeded", e.Err)
	}
}

// A full socket ends in a time-out, too.
func TestFullSocket(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, _, _ := hooked(t, m)
	var err error
	for range 10000 {
		if err = n.Status("x"); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with a full socket: %v; want ErrDeadlineExceeded", err)
	}
}

// successor returns the Notifier and options of the successor that prepare has
// prepared. They are in the same process.
func successor(t *testing.T, m *manager, c *ecdysis.Command) (*systemd.Notifier, *ecdysis.Options) {
	t.Helper()
	n, opts, _ := hooked(t, m, c.Env...)
	opts.Notify(ecdysis.Event{Kind: ecdysis.EventReady, Generation: 1})
	m.hasAll()
	return n, opts
}

// The predecessor forwards the successor's messages when it introduces the
// successor.
func TestRelay(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	_, opts, _ := hooked(t, m, "WATCHDOG_USEC=1000000")
	c := prepare(t, m, opts)

	// Any process can find the address, but only the successor's messages are
	// forwarded.
	stranger := startStranger(t, relayAddress(c))

	n, opts2 := successor(t, m, c)
	interval, ping := n.Watchdog()
	if interval != time.Second {
		t.Errorf("the successor's watchdog is %v; want its predecessor's", interval)
	}
	ln := listenTCP(t)
	if err := errors.Join(n.Status("warm"), ping(), n.ExtendTimeout(time.Second), n.Store(map[string]any{"web": ln})); err != nil {
		t.Fatal(err)
	}
	opts2.Notify(ecdysis.Event{Kind: ecdysis.EventUpgradeFailed, Err: ecdysis.ErrInProgress}) // systemd does not wait for a refused trigger
	m.hasAll()
	go opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: os.Getpid(), Generation: 1})
	m.gets("STATUS=warm")
	got := m.next()
	if got.text != "FDSTORE=1\nFDNAME=web\nFDPOLL=0" || len(got.files) != 1 || inode(t, got.files[0]) != inode(t, ln) {
		t.Fatalf("systemd got %q with %d descriptors; want the socket", got.text, len(got.files))
	}
	m.gets("MAINPID=" + strconv.Itoa(os.Getpid()) + "\nREADY=1\nWATCHDOG=1")
	answer := m.barrier()
	// While the successor is introduced, its next message waits. The successor then
	// sends it itself.
	said := make(chan error, 1)
	go func() { said <- n.Status("hot") }()
	select {
	case err := <-said:
		t.Fatalf("Status has returned before the successor was introduced: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	m.hasAll()
	answer()
	if err := <-said; err != nil {
		t.Fatal(err)
	}
	m.gets("STATUS=hot")
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	m.gets("WATCHDOG=1")
	stranger()
}

func relayAddress(c *ecdysis.Command) (address string) {
	for _, v := range c.Env {
		if a, ok := strings.CutPrefix(v, "ECDYSIS_SYSTEMD="); ok {
			address, _, _ = strings.Cut(a, ":")
		}
	}
	return address
}

// startStranger starts another process, which connects to the relay and sends a
// message.
func startStranger(t *testing.T, address string) (end func()) {
	t.Helper()
	p := program(t, "stranger", nil, address)
	p.expect("said <nil>")
	return func() { p.in.Close(); p.wait() }
}

func init() {
	mains["stranger"] = func() {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: os.Args[1]})
		if err == nil {
			_, err = c.Write([]byte("STATUS=I am another"))
		}
		fmt.Println("said", err)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
}

// If the attempt fails or the predecessor has gone, the successor sends its
// messages to systemd itself.
func TestRelayEnds(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	_, opts, _ := hooked(t, m)
	n, _ := successor(t, m, prepare(t, m, opts))
	if err := n.Status("never seen"); err != nil {
		t.Fatal(err)
	}
	opts.Notify(failed("x"))
	if got := m.next().text; !strings.HasPrefix(got, "READY=1\nSTATUS=upgrade failed") {
		t.Fatalf("systemd got %q", got)
	}
	// A child that another test forks has the relay until it executes its program.
	// So this may take more than one try.
	for end := time.Now().Add(patience); ; {
		if err := n.Status("alone"); err != nil {
			t.Fatal(err)
		}
		got, err := m.receive(10 * time.Millisecond)
		if err == nil && got.text == "STATUS=alone" {
			break
		}
		if err == nil || time.Now().After(end) {
			t.Fatalf("systemd got %q, %v; want STATUS=alone", got.text, err)
		}
	}
	if err := n.Status("last"); err != nil {
		t.Fatal(err)
	}
	for got := m.next().text; got != "STATUS=last"; got = m.next().text {
		if got != "STATUS=alone" { // of another try, which this process was slow to see
			t.Fatalf("systemd got %q; want STATUS=last", got)
		}
	}
	m.hasAll()

	// An attempt whose hook has panicked, so that no event came, leaves nothing.
	c := prepare(t, m, opts)
	next := prepare(t, m, opts)
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("unixpacket", relayAddress(c))
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		if err == nil {
			c.Close()
		}
		if err != nil || time.Now().After(end) {
			t.Fatalf("the relay of an attempt before: %v; want ECONNREFUSED", err)
		}
	}

	// The successor sends more than there is room for.
	n, _ = successor(t, m, next)
	var err error
	for i := 0; i < 10000 && err == nil; i++ {
		err = n.Status(strings.Repeat("x", 1000))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "to the predecessor") {
		t.Errorf("Status of a successor that sends too much: %v; want ErrDeadlineExceeded", err)
	}
	m.hasAll()
	opts.Notify(failed("x")) // the predecessor's relay was open until now
	m.next()
}

// Every message of the daemon comes from its main process. With NotifyAccess= at
// its default systemd drops the others silently.
func TestMainSpeaks(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	conf := filepath.Join(t.TempDir(), "conf")
	configure := func(lines ...string) {
		t.Helper()
		lines = append(lines, "listen=web tcp 127.0.0.1:0", "status=serving as", "store=yes", fmt.Sprint("timeout=", patience/10))
		err := os.WriteFile(conf+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o644)
		if err := errors.Join(err, os.Rename(conf+".new", conf)); err != nil {
			t.Fatal(err)
		}
	}
	configure()
	p := program(t, "mydaemon", func(c *exec.Cmd) {
		c.Env = append(c.Env, "NOTIFY_SOCKET="+m.address, "MYDAEMON_CONF="+conf)
	})
	main := p.cmd.Process.Pid
	t.Cleanup(func() {
		_ = unix.Kill(main, unix.SIGKILL)
		if main != p.cmd.Process.Pid {
			_, _ = unix.Wait4(main, nil, 0, nil)
		}
		for t.Failed() {
			select {
			case l, ok := <-p.lines:
				if ok {
					t.Log(l)
					continue
				}
			default:
			}
			break
		}
	})
	// hears returns when all of these messages have arrived, in any order.
	hears := func(want ...string) {
		t.Helper()
		for len(want) > 0 {
			got := m.next()
			if got.pid != main {
				t.Fatalf("%q is from process %d; the main process is %d", got.text, got.pid, main)
			}
			i := slices.IndexFunc(want, func(w string) bool { return regexp.MustCompile("^(?:" + w + ")$").MatchString(got.text) })
			if i < 0 {
				t.Fatalf("systemd got %q; want %q", got.text, want)
			}
			want = slices.Delete(want, i, i+1)
			if pid, ok := strings.CutPrefix(got.text, "MAINPID="); ok {
				if _, err := fmt.Sscan(pid, &main); err != nil {
					t.Fatal(err)
				}
				// From here on systemd drops the old process's messages, except the
				// barrier, which it accepts from any process.
				m.barrier()()
			}
			got.close()
		}
	}
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := unix.Kill(main, s); err != nil {
			t.Fatal(err)
		}
	}
	const reload = `RELOADING=1\nMONOTONIC_USEC=\d+\nEXTEND_TIMEOUT_USEC=\d+`
	const store = `FDSTORE=1\nFDNAME=web\nFDPOLL=0`
	hears(store, "BARRIER=1")
	hears("STATUS=starting as 0")
	hears("READY=1")
	hears("STATUS=serving as 0")
	for generation := 1; generation <= 3; generation++ {
		old := main
		signal(syscall.SIGHUP)
		hears(reload)
		hears(fmt.Sprintf("STATUS=starting as %d", generation), `MAINPID=\d+\nREADY=1`, fmt.Sprintf("STATUS=serving as %d", generation))
		if main == old {
			t.Fatalf("the main process is still %d", main)
		}
		if old != p.cmd.Process.Pid {
			if _, err := unix.Wait4(old, nil, 0, nil); err != nil { // a sibling is a child of systemd, here of this test
				t.Fatal(err)
			}
		}
	}
	for do, reason := range map[string]string{"crash": "ended without", "fail": "it says: bad MAINPID=1 configuration", "hang": "not ready within"} {
		configure("do=" + do)
		signal(syscall.SIGHUP)
		hears(reload)
		hears(`READY=1\nSTATUS=upgrade failed by signal hangup: .*` + reason + `.*`)
	}
	signal(syscall.SIGTERM)
	hears("STOPPING=1")
	m.hasAll()
}
