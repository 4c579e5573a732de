//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// listenTest returns this process's Upgrader, which serves.
func listenTest(t *testing.T) *ecdysis.Upgrader {
	t.Helper()
	u := proctest.Ours(t)
	return u
}

func TestListenBadInput(t *testing.T) {
	t.Parallel()
	u := listenTest(t)
	dir := shortDir(t)
	long := filepath.Join(dir, strings.Repeat("x", 120))
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		network, address string
		lc               ecdysis.ListenConfig
		want             []string
	}{
		{"", ":0", ecdysis.ListenConfig{}, []string{"unknown network", "want tcp, tcp4, tcp6, unix or unixpacket"}},
		{"udp", ":0", ecdysis.ListenConfig{}, []string{"udp", "want tcp"}},
		{"TCP", ":0", ecdysis.ListenConfig{}, []string{"TCP", "want tcp"}},
		{"tcp", "80", ecdysis.ListenConfig{}, []string{"80", "missing port", "want host:port"}},
		{"tcp", "::1:80", ecdysis.ListenConfig{}, []string{"::1:80", "too many colons"}},
		{"tcp", ":99999", ecdysis.ListenConfig{}, []string{"99999", "invalid port"}},
		{"tcp", ":-1", ecdysis.ListenConfig{}, []string{"-1", "invalid port"}},
		{"tcp", ":no such service", ecdysis.ListenConfig{}, []string{"no such service"}},
		{"tcp4", "[::1]:0", ecdysis.ListenConfig{}, []string{"::1"}},
		{"tcp6", "127.0.0.1:0", ecdysis.ListenConfig{}, []string{"127.0.0.1"}},
		{"tcp", "[fe80::1%nosuchif]:0", ecdysis.ListenConfig{}, []string{"nosuchif"}},
		{"tcp", "192.0.2.1:0", ecdysis.ListenConfig{}, []string{"192.0.2.1", "bind"}},
		{"unix", "", ecdysis.ListenConfig{}, []string{"address is empty", "want the path"}},
		{"unix", "a\x00b", ecdysis.ListenConfig{}, []string{`"a\x00b"`, "zero byte"}},
		{"unix", long, ecdysis.ListenConfig{}, []string{long, fmt.Sprint(len(long)), "at most"}},
		{"unix", file, ecdysis.ListenConfig{}, []string{file, "not a socket"}},
		{"unix", filepath.Join(dir, "no", "such"), ecdysis.ListenConfig{}, []string{"no/such", "no such file"}},
		{"unix", filepath.Join(dir, "s"), ecdysis.ListenConfig{Mode: os.ModeSetuid | 0o600}, []string{"Mode", "permission bits"}},
		{"unix", filepath.Join(dir, "s"), ecdysis.ListenConfig{ReusePort: true}, []string{"ReusePort", "TCP"}},
		{"tcp", "127.0.0.1:0", ecdysis.ListenConfig{Mode: 0o600}, []string{"Mode", "Unix"}},
		{"tcp", "127.0.0.1:0", ecdysis.ListenConfig{Backlog: -1}, []string{"Backlog is -1"}},
	} {
		ln, err := u.ListenWith(c.lc, c.network, c.address)
		if err == nil {
			ln.Close()
			t.Errorf("ListenWith(%+v, %q, %q): no error", c.lc, c.network, c.address)
			continue
		}
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "listen" || op.Net != c.network {
			t.Errorf("ListenWith(%+v, %q, %q): %v; want a net.OpError", c.lc, c.network, c.address, err)
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("ListenWith(%+v, %q, %q): %v; want it to say %q", c.lc, c.network, c.address, err, w)
			}
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	var unknown net.UnknownNetworkError
	if _, err := u.Listen("udp", ":0"); !errors.As(err, &unknown) || string(unknown) != "udp" {
		t.Errorf("Listen(udp): %v; want net.UnknownNetworkError", err)
	}
	ctl := errors.New("from Control")
	_, err := u.ListenWith(ecdysis.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		if network != "tcp4" || address != "127.0.0.1:0" {
			t.Errorf("Control(%q, %q)", network, address)
		}
		called := false
		if err := c.Control(func(fd uintptr) { called = fd > 2 }); err != nil || !called {
			t.Errorf("RawConn.Control: %v", err)
		}
		return ctl
	}}, "tcp", "127.0.0.1:0")
	if !errors.Is(err, ctl) {
		t.Errorf("error of Control: %v", err)
	}
}

// A process has one Upgrader, and options that cannot be meant change nothing.
func TestNewBadInput(t *testing.T) {
	t.Parallel()
	role := "bad options"
	h := newHub(t, spec{Do: map[string]string{"start": "call " + role}})
	p := h.serving()
	for i, line := range p.at("start " + role).Text {
		if !strings.HasPrefix(line, "ok") {
			t.Errorf("%d: %s", i, line)
		}
	}
}

func init() {
	verbs["bad options"] = func(d *daemon, c command) (m message) {
		check := func(opts ecdysis.Options, want ...string) {
			u, err := ecdysis.New(opts)
			if err == nil || u != nil {
				m.Text = append(m.Text, fmt.Sprintf("New(%+v): no error", opts))
				return
			}
			for _, w := range want {
				if !strings.Contains(err.Error(), w) {
					m.Text = append(m.Text, fmt.Sprintf("New(%+v): %v; want %q", opts, err, w))
				}
			}
			m.Text = append(m.Text, "ok "+err.Error())
		}
		check(ecdysis.Options{UpgradeTimeout: -1}, "UpgradeTimeout is -1ns", "want 0")
		check(ecdysis.Options{Probation: -time.Second}, "Probation is -1s", "want 0")
		check(ecdysis.Options{PIDFile: "/tmp/"}, `PIDFile is "/tmp/"`)
		check(ecdysis.Options{StopSignals: []os.Signal{syscall.SIGKILL}}, "StopSignals", "SIGKILL")
		check(ecdysis.Options{UpgradeSignals: []os.Signal{nil}}, "UpgradeSignals", "nil")
		check(ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}, StopSignals: []os.Signal{syscall.SIGHUP}}, "hangup is in StopSignals")
		return m
	}
	verbs["new"] = func(d *daemon, c command) message {
		_, err := ecdysis.New(ecdysis.Options{})
		return message{Err: toErrMsg(err)}
	}
	verbs["listenwith"] = func(d *daemon, c command) message {
		d.spec.Config = nil
		ln, err := d.u.Listen(c.Args[0], c.Args[1])
		if err == nil {
			d.lns = append(d.lns, ln)
		}
		return message{Err: toErrMsg(err)}
	}
	verbs["deadline"] = func(d *daemon, c command) message {
		ln := d.lns[0].(interface{ SetDeadline(time.Time) error })
		limit, err := time.ParseDuration(c.Args[0])
		if err == nil {
			err = ln.SetDeadline(time.Now().Add(limit))
		}
		if err == nil {
			_, err = d.lns[0].Accept()
		}
		return message{Err: toErrMsg(err)}
	}
	verbs["accepterror"] = func(d *daemon, c command) message {
		_, err := d.lns[0].Accept()
		return message{Err: toErrMsg(err)}
	}
}

func TestSecondNew(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp())
	p := h.serving()
	if m := p.call("new"); m.Err == nil || !strings.Contains(m.Err.Text, "one Upgrader") {
		t.Errorf("a second New: %+v", m.Err)
	}
	p.serves()
	p.upgrade().serves()
}

// Several sockets of one address are handed on, in order.
func TestReusePort(t *testing.T) {
	t.Parallel()
	first := newHub(t, tcp())
	_, address := first.serving().addr(0)
	// A port that was free a moment ago, now for the real ones.
	h := newHub(t, spec{})
	first.all[0].kill()
	many := spec{}
	for range 4 {
		many.Listen = append(many.Listen, [2]string{"tcp", address})
		many.Config = append(many.Config, listenConfig{ReusePort: true})
	}
	h.next(many)
	p := h.serving()
	before := p.call("sockets").Text
	s := p.upgrade()
	if e := s.event(ecdysis.EventReady, 0); len(e.Unclaimed) != 0 {
		t.Errorf("unclaimed: %v", e.Unclaimed)
	}
	if after := s.call("sockets").Text; len(after) != 4 || !slices.Equal(before, after) {
		t.Errorf("sockets %v, handed on as %v", before, after)
	}
	l := startLoad(t, 2, false, [2]string{"tcp", address})
	l.more(200)
	g := s.upgrade()
	l.more(200)
	l.check()
	g.serves()
}

func init() {
	// The inodes of the listening sockets, in order.
	verbs["sockets"] = func(d *daemon, c command) (m message) {
		for _, ln := range d.lns {
			raw, err := ln.(syscall.Conn).SyscallConn()
			if err != nil {
				return message{Err: toErrMsg(err)}
			}
			_ = raw.Control(func(fd uintptr) {
				var st syscall.Stat_t
				if err := syscall.Fstat(int(fd), &st); err == nil {
					m.Text = append(m.Text, fmt.Sprint(st.Ino))
				}
			})
		}
		return m
	}
}

// What a new configuration drops is closed and named, and its file removed.
func TestDropped(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	keep, drop := filepath.Join(dir, "keep"), filepath.Join(dir, "drop")
	h := newHub(t, spec{Listen: [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", drop}, {"unix", keep}}})
	p := h.serving()
	_, gone := p.addr(0)
	h.next(spec{Listen: [][2]string{{"unix", keep}}, Do: map[string]string{"listened": "hold"}})
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("listened")
	p.serves() // all of it, as long as the new one is not ready
	s.resume()
	if m := answer(); m.Err != nil {
		t.Fatal(m.Err)
	}
	if e := s.event(ecdysis.EventReady, 0); !slices.Equal(e.Unclaimed, []string{"tcp 127.0.0.1:0", "unix " + drop}) {
		t.Errorf("unclaimed: %q", e.Unclaimed)
	}
	s.at("serving")
	s.serves()
	if _, err := net.Dial("tcp", gone); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the dropped port: %v", err)
	}
	if _, err := os.Lstat(drop); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the dropped socket's file: %v", err)
	}
	if _, err := os.Lstat(keep); err != nil {
		t.Error(err)
	}
}

// A listener that is closed is not handed on, and its file goes only if it is
// this process's own.
func TestCloseWithdraws(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	s := spec{Listen: [][2]string{{"unix", a}, {"unix", b}, {"unix", c}}}
	h := newHub(t, s)
	p := h.serving()
	if m := p.call("close", "0"); m.Err != nil {
		t.Fatal(m.Err)
	}
	if m := p.call("close", "0"); m.Err == nil || !slices.Contains(m.Err.Is, "closed") {
		t.Errorf("a second Close: %+v", m.Err)
	}
	if _, err := os.Lstat(a); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the closed socket's file: %v", err)
	}
	// Somebody else's file at the path stays.
	if err := os.Remove(b); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", b)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if m := p.call("close", "1"); m.Err != nil {
		t.Fatal(m.Err)
	}
	if _, err := os.Lstat(b); err != nil {
		t.Errorf("the file of another process's socket: %v", err)
	}
	// Closed while the successor has its copy: the file stays with it, and
	// goes if the upgrade fails.
	h.next(spec{Listen: [][2]string{{"unix", c}}, Do: map[string]string{"listened": "hold", "start": ""}})
	for _, ok := range []bool{false, true} {
		answer := p.begin(command{Verb: "upgrade"})
		g := h.proc()
		g.at("listened")
		if !ok {
			g.kill()
			checkErr(t, answer().Err, "init", "unexpected EOF")
			continue
		}
		if m := p.call("close", "2"); m.Err != nil {
			t.Fatal(m.Err)
		}
		if _, err := os.Lstat(c); err != nil {
			t.Errorf("the file, closed while the successor has the socket: %v", err)
		}
		g.kill()
		checkErr(t, answer().Err, "init", "unexpected EOF")
		if _, err := os.Lstat(c); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file of the closed socket after the upgrade failed: %v", err)
		}
	}
}

// Stop closes what is open, removes the files, and leaves alone what is to be
// kept.
func TestStopCloses(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	sock := filepath.Join(dir, "s")
	h := newHub(t, spec{
		Listen: [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", sock}, {"tcp", "127.0.0.1:0"}},
		Config: []listenConfig{{}, {}, {KeepOnStop: true}},
	})
	p := h.serving()
	p = p.upgrade() // KeepOnStop is handed on
	_, closed := p.addr(0)
	network, kept := p.addr(2)
	p.call("stop")
	p.call("awaitexit")
	if _, err := net.Dial("tcp", closed); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Stop: %v", err)
	}
	if _, err := os.Lstat(sock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's file after Stop: %v", err)
	}
	if pid, _, err := ask(network, kept); err != nil || pid != p.pid {
		t.Errorf("the kept listener: %d, %v", pid, err)
	}
	if m := p.call("close", "1"); m.Err != nil {
		t.Errorf("Close after Stop has closed it: %v", m.Err)
	}
	if m := p.call("close", "2"); m.Err != nil {
		t.Error(m.Err)
	}
	if _, err := net.Dial(network, kept); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the kept listener after Close: %v", err)
	}
}

func TestUnixMode(t *testing.T) {
	t.Parallel()
	u := listenTest(t)
	path := filepath.Join(shortDir(t), "s")
	for _, mode := range []os.FileMode{0o600, 0o666, 0o660} {
		ln, err := u.ListenWith(ecdysis.ListenConfig{Mode: mode}, "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Lstat(path)
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("mode %v, %v; want %v", fi.Mode(), err, mode)
		}
		ln.Close()
	}
}

// A stale file is replaced; a live one is not, even if its backlog is full.
func TestStaleFile(t *testing.T) {
	t.Parallel()
	u := listenTest(t)
	path := filepath.Join(shortDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if _, err := u.Listen("unix", path); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("at a live socket's path: %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("the live one after that: %v", err)
	} else {
		c.Close()
	}
	l.Close()
	ln, err := u.Listen("unix", path)
	if err != nil {
		t.Fatalf("at a stale socket's path: %v", err)
	}
	ln.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

// Of several processes that find one stale file, one gets it and the others
// are told.
func TestStaleFileRace(t *testing.T) {
	t.Parallel()
	h := newHub(t, spec{Do: map[string]string{"new": "hold"}})
	const n = 4
	var procs []*proc
	for range n {
		procs = append(procs, h.start())
	}
	for _, p := range procs {
		p.at("new")
	}
	for round := range 20 {
		path := filepath.Join(h.dir, fmt.Sprint("s", round))
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		var answers []func() message
		for _, p := range procs {
			answers = append(answers, p.begin(command{Verb: "listenwith", Args: []string{"unix", path}}))
		}
		won := 0
		for _, answer := range answers {
			switch m := answer(); {
			case m.Err == nil:
				won++
			case !slices.Contains(m.Err.Is, "EADDRINUSE"):
				t.Errorf("round %d: %+v", round, m.Err)
			}
		}
		if won != 1 {
			t.Errorf("round %d: %d processes got the path", round, won)
		}
		if c, err := net.Dial("unix", path); err != nil {
			t.Errorf("round %d: %v", round, err)
		} else {
			c.Close()
		}
	}
}

// The deadline is the caller's, before Ready, while serving, and over an
// upgrade that fails; nothing else ends Accept.
func TestAcceptDeadline(t *testing.T) {
	t.Parallel()
	s := tcp()
	s.NoAccept = true
	s.Do = map[string]string{"listened": "hold"}
	h := newHub(t, s)
	p := h.start()
	p.at("listened")
	if m := p.call("deadline", "1ms"); m.Err == nil || !slices.Contains(m.Err.Is, "deadline") {
		t.Fatalf("before Ready: %+v", m.Err)
	}
	_, address := p.addr(0)
	c, err := net.Dial("tcp", address) // waits in the backlog
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if m := p.call("deadline", "1ms"); m.Err == nil || !slices.Contains(m.Err.Is, "deadline") {
		t.Fatalf("before Ready, with a client there: %+v", m.Err)
	}
	p.resume()
	p.at("serving")
	if m := p.call("deadline", "1m"); m.Err != nil {
		t.Fatalf("the client that waited: %+v", m.Err)
	}
	if m := p.call("deadline", "1ms"); m.Err == nil || !slices.Contains(m.Err.Is, "deadline") {
		t.Fatalf("while serving: %+v", m.Err)
	}
	// The accept that waits over a failed handover sees its own deadline and
	// nothing of the upgrade.
	accepted := p.begin(command{Verb: "deadline", Args: []string{"1m"}})
	h.next(spec{Listen: s.Listen, NoAccept: true, Do: map[string]string{"event ready": "exit 1"}})
	p.failUpgrade(command{}, "handover", "unexpected EOF")
	c2, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	if m := accepted(); m.Err != nil {
		t.Fatalf("an Accept over a failed upgrade: %+v", m.Err)
	}
}

// Close, while the listener is quiet, wakes Accept.
func TestCloseWhileQuiet(t *testing.T) {
	t.Parallel()
	s := tcp()
	s.NoAccept = true
	s.Do = map[string]string{"listened": "hold"}
	p := newHub(t, s).start()
	p.at("listened")
	answer := p.begin(command{Verb: "accepterror"})
	if m := p.call("close", "0"); m.Err != nil {
		t.Fatal(m.Err)
	}
	if m := answer(); m.Err == nil || !slices.Contains(m.Err.Is, "closed") {
		t.Errorf("Accept: %+v; want net.ErrClosed", m.Err)
	}
	if m := p.call("close", "0"); m.Err == nil || !slices.Contains(m.Err.Is, "closed") {
		t.Errorf("a second Close: %+v", m.Err)
	}
}

// A process that is out of descriptors waits, and serves when it has some.
func TestAcceptWaitsOutEMFILE(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp())
	p := h.serving(func(c *exec.Cmd) { // a limit of its own
		c.Args = append([]string{"sh", "-c", `ulimit -n 40; exec "$0" "$@"`}, c.Args...)
		path, err := exec.LookPath("sh")
		if err != nil {
			t.Fatal(err)
		}
		c.Path = path
	})
	network, address := p.addr(0)
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range 60 { // more than it can have; the rest waits in the backlog
		c, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	last := held[len(held)-1]
	held = held[:len(held)-1]
	if pid, _, err := askOn(held[0]); err != nil || pid != p.pid {
		t.Fatalf("the first: %d, %v", pid, err)
	}
	for _, c := range held {
		c.Close()
	}
	held = nil
	if pid, _, err := askOn(last); err != nil || pid != p.pid {
		t.Fatalf("the last, when descriptors are free again: %d, %v", pid, err)
	}
	last.Close()
}
