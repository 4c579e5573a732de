//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The tests run real processes: the test binary again, in a role that the
// environment names. Each process connects to its test's hub, says at which
// point of its life it is, does there what the test has planned for it, and
// takes commands when it serves. Nothing here waits for time to pass, except
// to find that something does not happen within patience.

const (
	roleVar = "ECDYSIS_TEST_ROLE"
	hubVar  = "ECDYSIS_TEST_HUB"

	// patience is how long a test waits for what must happen.
	patience = 60 * time.Second
)

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVar); role {
	case "":
		proctest.Main(m)
	case "daemon":
		daemonMain()
	default:
		if f, ok := roles[role]; ok {
			f()
			return
		}
		fmt.Fprintf(os.Stderr, "no role %q\n", role)
		os.Exit(2)
	}
}

// roles are what a test process can be, beside "daemon".
var roles = map[string]func(){}

// A spec is what the hub tells a process when it connects. Exported fields
// travel as JSON.
type spec struct {
	Options    options
	Listen     [][2]string       // network, address
	Config     []listenConfig    // of the listeners, as far as it goes
	Do         map[string]string // point -> "hold", "exit 3", "panic", "kill", "hang", "stop" …
	NoAccept   bool              // do not accept at all
	LateAccept bool              // start the accept loops after Ready, as the README's daemon does
	Wait       bool              // run Upgrader.Wait and exit as the README's daemon does
}

type options struct {
	UpgradeTimeout, Probation time.Duration
	PIDFile                   string
	UpgradeSignals            []syscall.Signal
	StopSignals               []syscall.Signal
	PartialStopSignals        []syscall.Signal
	MaxDraining               int

	UpgradeSocket, StopSocket, PartialStopSocket, TakeoverSocket string
}

type listenConfig struct {
	Backlog    int
	Mode       os.FileMode
	ReusePort  bool
	KeepOnStop bool
}

func (o options) real() ecdysis.Options {
	r := ecdysis.Options{UpgradeTimeout: o.UpgradeTimeout, Probation: o.Probation, PIDFile: o.PIDFile, MaxDraining: o.MaxDraining,
		UpgradeSocket: o.UpgradeSocket, StopSocket: o.StopSocket, PartialStopSocket: o.PartialStopSocket, TakeoverSocket: o.TakeoverSocket}
	for _, s := range o.UpgradeSignals {
		r.UpgradeSignals = append(r.UpgradeSignals, s)
	}
	for _, s := range o.StopSignals {
		r.StopSignals = append(r.StopSignals, s)
	}
	for _, s := range o.PartialStopSignals {
		r.PartialStopSignals = append(r.PartialStopSignals, s)
	}
	return r
}

// A command is what the hub sends to a process that is at a point or serves.
type command struct {
	ID   int
	Verb string
	Args []string

	Command *ecdysis.Command // "upgrade": what Prepare makes of it; zero fields stay
	SetEnv  []string         // "upgrade": added to the environment by Prepare
}

// A message is what a process sends to its hub.
type message struct {
	At    string      `json:",omitempty"` // a point is reached
	Event *eventMsg   `json:",omitempty"`
	ID    int         `json:",omitempty"` // of the command that this answers
	Err   *errMsg     `json:",omitempty"`
	Text  []string    `json:",omitempty"`
	Hello *helloMsg   `json:",omitempty"`
	Addrs [][2]string `json:",omitempty"` // network, address of each listener
}

type helloMsg struct{ PID int }

type eventMsg struct {
	Kind       ecdysis.EventKind
	Socket     string
	PID        int
	Generation int
	Unclaimed  []string
	Err        string
	Line       string
}

// An errMsg is an error, flattened.
type errMsg struct {
	Text string
	Is   []string // which of the known errors it is
	Step string   // of an UpgradeError
	PID  int
	How  string // State.String()
}

var knownErrors = map[string]error{
	"ErrNotReady": ecdysis.ErrNotReady, "ErrInProgress": ecdysis.ErrInProgress, "ErrUpgraded": ecdysis.ErrUpgraded,
	"ErrStopped": ecdysis.ErrStopped, "ErrDraining": ecdysis.ErrDraining, "ErrInit": ecdysis.ErrInit, "ErrAborted": ecdysis.ErrAborted,
	"deadline": os.ErrDeadlineExceeded, "unexpected EOF": io.ErrUnexpectedEOF, "not exist": os.ErrNotExist,
	"permission": os.ErrPermission, "closed": net.ErrClosed, "unsupported": errors.ErrUnsupported,
	"ENOEXEC": syscall.ENOEXEC, "EADDRINUSE": syscall.EADDRINUSE, "ETXTBSY": syscall.ETXTBSY, "EMFILE": syscall.EMFILE,
}

func toErrMsg(err error) *errMsg {
	if err == nil {
		return nil
	}
	m := &errMsg{Text: err.Error()}
	for name, known := range knownErrors {
		if errors.Is(err, known) {
			m.Is = append(m.Is, name)
		}
	}
	var ue *ecdysis.UpgradeError
	if errors.As(err, &ue) {
		m.Step, m.PID = string(ue.Step), ue.PID
		if ue.State != nil {
			m.How = ue.State.String()
		}
	}
	return m
}

// The daemon's side.

type daemon struct {
	spec  spec
	u     *ecdysis.Upgrader
	lns   []net.Listener
	wmu   sync.Mutex // serializes enc
	enc   *json.Encoder
	cmds  chan command
	prep  atomic.Pointer[command]
	conns sync.WaitGroup
	loops sync.WaitGroup
}

func daemonMain() {
	d := &daemon{cmds: make(chan command)}
	var err error
	d.dial()
	d.point("start")
	opts := d.spec.Options.real()
	opts.Notify = func(e ecdysis.Event) {
		m := &eventMsg{Kind: e.Kind, Socket: e.Socket, PID: e.PID, Generation: e.Generation, Unclaimed: e.Unclaimed, Line: e.String()}
		if e.Err != nil {
			m.Err = e.Err.Error()
		}
		d.send(message{Event: m})
		d.point("event " + string(e.Kind))
	}
	opts.Prepare = func(c *ecdysis.Command) error {
		d.point("prepare")
		p := d.prep.Swap(nil)
		if p == nil {
			return nil
		}
		if len(p.Args) > 0 && p.Args[0] == "veto" {
			return errors.New("vetoed")
		}
		if o := p.Command; o != nil {
			c.Path = cmp.Or(o.Path, c.Path)
			c.Dir = cmp.Or(o.Dir, c.Dir)
			c.Sibling = o.Sibling
			if o.Args != nil {
				c.Args = o.Args
			}
			if o.Env != nil {
				c.Env = o.Env
			}
		}
		c.Env = append(slices.DeleteFunc(c.Env, func(s string) bool {
			name, _, _ := strings.Cut(s, "=")
			return slices.ContainsFunc(p.SetEnv, func(n string) bool { return strings.HasPrefix(n, name+"=") })
		}), p.SetEnv...)
		return nil
	}
	if d.u, err = ecdysis.New(opts); err != nil {
		d.send(message{At: "new failed", Err: toErrMsg(err)})
		fatal(err)
	}
	d.point("new")
	for i, na := range d.spec.Listen {
		if err := d.listen(i, na[0], na[1]); err != nil {
			d.send(message{At: "listen failed", Err: toErrMsg(err)})
			fatal(d.u.Fail(err))
		}
	}
	d.addrs()
	d.point("listened")
	if !d.spec.LateAccept && !d.spec.NoAccept {
		d.accept()
	}
	if d.spec.Wait {
		d.loops.Add(1)
		go func() {
			defer d.loops.Done()
			e := d.u.Wait()
			d.send(message{At: "wait returned", Text: []string{string(e.Kind), fmt.Sprint(e.Signal), e.Socket}})
			for _, ln := range d.lns {
				ln.Close()
			}
		}()
	}
	if err := d.u.Ready(); err != nil {
		d.send(message{At: "ready failed", Err: toErrMsg(err)})
		fatal(err)
	}
	d.point("serving")
	if d.spec.LateAccept {
		d.accept()
	}
	go d.commands()
	if d.spec.Wait {
		d.loops.Wait()
		d.conns.Wait()
		return
	}
	select {} // until it is killed or told to exit
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "daemon:", err)
	os.Exit(1)
}

// dial connects to the hub, over a descriptor that no child inherits.
func (d *daemon) dial() {
	c, err := net.Dial("unix", os.Getenv(hubVar))
	if err != nil {
		fatal(err)
	}
	d.enc = json.NewEncoder(c)
	d.send(message{Hello: &helloMsg{PID: os.Getpid()}})
	dec := json.NewDecoder(bufio.NewReader(c))
	if err := dec.Decode(&d.spec); err != nil {
		fatal(err)
	}
	go func() {
		for {
			var c command
			if err := dec.Decode(&c); err != nil {
				os.Exit(3) // the test is over
			}
			d.cmds <- c
		}
	}()
}

func (d *daemon) send(m message) {
	d.wmu.Lock()
	defer d.wmu.Unlock()
	_ = d.enc.Encode(m)
}

func (d *daemon) addrs() {
	var list [][2]string
	for _, ln := range d.lns {
		list = append(list, [2]string{ln.Addr().Network(), ln.Addr().String()})
	}
	d.send(message{Addrs: list})
}

// point does what the test has planned for this point.
func (d *daemon) point(name string) {
	d.send(message{At: name})
	for _, do := range strings.Split(d.spec.Do[name], ";") {
		verb, arg, _ := strings.Cut(strings.TrimSpace(do), " ")
		switch verb {
		case "":
		case "hold":
			for c := range d.cmds {
				if c.Verb == "go" {
					break
				}
				go d.run(c)
			}
		case "exit":
			n, _ := strconv.Atoi(arg)
			os.Exit(n)
		case "panic":
			panic("planned")
		case "fail":
			fatal(d.u.Fail(errors.New(arg)))
		case "kill":
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		case "hang":
			select {}
		case "call":
			res := d.do(command{Verb: arg})
			d.send(message{At: name + " " + arg, Err: res.Err, Text: res.Text})
		default:
			panic("no such thing to do: " + do)
		}
	}
}

func (d *daemon) listen(i int, network, address string) error {
	var lc ecdysis.ListenConfig
	if i < len(d.spec.Config) {
		c := d.spec.Config[i]
		lc = ecdysis.ListenConfig{Backlog: c.Backlog, Mode: c.Mode, ReusePort: c.ReusePort, KeepOnStop: c.KeepOnStop}
	}
	ln, err := d.u.ListenWith(lc, network, address)
	if err == nil {
		d.lns = append(d.lns, ln)
	}
	return err
}

// accept answers every line with this process's ID and generation.
func (d *daemon) accept() {
	for _, ln := range d.lns {
		d.acceptOn(ln)
	}
}

func (d *daemon) acceptOn(ln net.Listener) {
	d.loops.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			d.conns.Go(func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					if _, err := r.ReadString('\n'); err != nil {
						return
					}
					fmt.Fprintf(c, "%d %d\n", os.Getpid(), d.u.Generation())
				}
			})
		}
	})
}

func (d *daemon) commands() {
	for c := range d.cmds {
		go d.run(c)
	}
}

func (d *daemon) run(c command) {
	if d.spec.Wait && (c.Verb == "upgrade" || c.Verb == "stop") {
		d.loops.Add(1) // what ends this process is answered first
		defer d.loops.Done()
	}
	m := d.do(c)
	m.ID = c.ID
	d.send(m)
}

func (d *daemon) do(c command) (m message) {
	arg := func(i int) string {
		if i < len(c.Args) {
			return c.Args[i]
		}
		return ""
	}
	switch c.Verb {
	case "upgrade":
		if c.Command != nil || c.SetEnv != nil || c.Args != nil {
			d.prep.Store(&c)
		}
		m.Err = toErrMsg(d.u.Upgrade())
	case "ready":
		m.Err = toErrMsg(d.u.Ready())
	case "stop":
		d.u.Stop()
	case "fail":
		m.Err = toErrMsg(d.u.Fail(errors.New("told to fail")))
	case "listen":
		n := len(d.lns)
		if m.Err = toErrMsg(d.listen(len(d.spec.Config), arg(0), arg(1))); m.Err == nil {
			d.acceptOn(d.lns[n])
			m.Text = []string{d.lns[n].Addr().String()}
		}
	case "close": // a listener
		n, _ := strconv.Atoi(arg(0))
		m.Err = toErrMsg(d.lns[n].Close())
	case "waitparent":
		limit, err := time.ParseDuration(cmp.Or(arg(0), patience.String()))
		if err != nil {
			panic(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		m.Err = toErrMsg(d.u.WaitForParent(ctx))
	case "exited": // has Exit been closed?
		select {
		case <-d.u.Exit():
			m.Text = []string{"yes"}
		default:
			m.Text = []string{"no"}
		}
	case "awaitexit":
		<-d.u.Exit()
	case "fds":
		m.Text = proctest.OpenFDs()
	case "chdir":
		m.Err = toErrMsg(os.Chdir(arg(0)))
	case "generation":
		m.Text = []string{strconv.Itoa(d.u.Generation()), strconv.FormatBool(d.u.HasParent())}
	case "exit":
		n, _ := strconv.Atoi(arg(0))
		d.conns.Wait()
		os.Exit(n)
	default:
		if f, ok := verbs[c.Verb]; ok {
			return f(d, c)
		}
		m.Err = &errMsg{Text: "no such command: " + c.Verb}
	}
	return m
}

// verbs are commands that single tests add.
var verbs = map[string]func(*daemon, command) message{}

// The test's side.

type hub struct {
	t    *testing.T
	ln   net.Listener
	path string
	dir  string

	mu    sync.Mutex
	specs []spec // of the processes to come; the last one stays
	procs chan *proc
	all   []*proc
}

// shortDir is a t.TempDir with a path that leaves room for socket names.
func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "ecd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newHub returns a hub whose processes get these specs, in the order in which
// they start; the last one is for all that follow.
func newHub(t *testing.T, specs ...spec) *hub {
	t.Helper()
	dir := shortDir(t)
	h := &hub{t: t, dir: dir, path: filepath.Join(dir, "hub"), specs: specs, procs: make(chan *proc, 1000)}
	var err error
	if h.ln, err = net.Listen("unix", h.path); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := h.ln.Accept()
			if err != nil {
				return
			}
			go h.serve(c)
		}
	}()
	t.Cleanup(func() {
		h.ln.Close()
		h.mu.Lock()
		all := h.all
		h.mu.Unlock()
		for _, p := range all {
			_ = p.os.Kill()
			p.conn.Close()
		}
		for _, p := range all {
			<-p.gone
		}
	})
	return h
}

// next replaces the specs of the processes to come.
func (h *hub) next(specs ...spec) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.specs = specs
}

// A proc is a process that has connected to the hub.
type proc struct {
	h     *hub
	t     *testing.T
	pid   int
	os    *os.Process
	conn  net.Conn
	gone  chan struct{} // closed when it has ended, or closed its connection
	addrs chan [][2]string

	mu      sync.Mutex
	changed chan struct{}
	points  []message
	events  []eventMsg
	replies map[int]chan message
	lastID  int
}

func (h *hub) serve(c net.Conn) {
	dec := json.NewDecoder(bufio.NewReader(c))
	var m message
	if err := dec.Decode(&m); err != nil || m.Hello == nil {
		c.Close()
		return
	}
	pid := m.Hello.PID
	seen := max(pid, -pid)
	if cred, err := ecdysis.PeerCred(c.(*net.UnixConn)); err == nil && cred.PID != 0 {
		seen = cred.PID // from another PID namespace it says another number
	}
	proc0, _ := os.FindProcess(seen)
	p := &proc{h: h, t: h.t, pid: pid, os: proc0, conn: c, gone: make(chan struct{}), addrs: make(chan [][2]string, 16),
		changed: make(chan struct{}), replies: make(map[int]chan message)}
	h.mu.Lock()
	h.all = append(h.all, p)
	if pid > 0 {
		s := h.specs[0]
		if len(h.specs) > 1 {
			h.specs = h.specs[1:]
		}
		_ = json.NewEncoder(c).Encode(s)
	}
	h.mu.Unlock()
	if pid > 0 {
		h.procs <- p
	}
	defer close(p.gone)
	for {
		var m message
		if err := dec.Decode(&m); err != nil {
			return
		}
		p.mu.Lock()
		switch {
		case m.Addrs != nil:
			p.addrs <- m.Addrs
		case m.Event != nil:
			p.events = append(p.events, *m.Event)
		case m.At != "":
			p.points = append(p.points, m)
		case p.replies[m.ID] != nil:
			p.replies[m.ID] <- m
			delete(p.replies, m.ID)
		}
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

// start starts the first process. It ends with the test.
func (h *hub) start(edit ...func(*exec.Cmd)) *proc {
	h.t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), roleVar+"=daemon", hubVar+"="+h.path)
	stderr := new(lockedBuffer)
	cmd.Stderr = stderr
	for _, f := range edit {
		f(cmd)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	h.t.Cleanup(func() { // before that of newHub, which ends the others
		_ = cmd.Process.Kill()
		if h.t.Failed() {
			h.t.Logf("stderr of the daemons:\n%s", stderr)
		}
	})
	return h.proc()
}

// A lockedBuffer is read while processes still write to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// proc returns the next process that connects.
func (h *hub) proc() *proc {
	h.t.Helper()
	select {
	case p := <-h.procs:
		return p
	case <-time.After(patience):
		h.t.Fatal("no process has connected")
		return nil
	}
}

// serving starts the first process and returns it when it serves.
func (h *hub) serving(edit ...func(*exec.Cmd)) *proc {
	h.t.Helper()
	p := h.start(edit...)
	p.at("serving")
	return p
}

// wait calls f with p's state locked until it returns true.
func (p *proc) wait(what string, f func() bool) {
	p.t.Helper()
	limit := time.After(patience)
	gone := p.gone
	for {
		p.mu.Lock()
		ok, changed := f(), p.changed
		p.mu.Unlock()
		if ok {
			return
		}
		if gone == nil {
			p.t.Fatalf("process %d ended before %s; points %v, events %v", p.pid, what, p.points, p.events)
		}
		select {
		case <-changed:
		case <-gone:
			gone = nil // look once more
		case <-limit:
			p.t.Fatalf("process %d: no %s; points %v, events %v", p.pid, what, p.points, p.events)
		}
	}
}

// at returns when the process has come to the point.
func (p *proc) at(point string) message {
	p.t.Helper()
	var m message
	p.wait("point "+point, func() bool {
		i := slices.IndexFunc(p.points, func(m message) bool { return m.At == point })
		if i >= 0 {
			m = p.points[i]
		}
		return i >= 0
	})
	return m
}

// event returns the n-th event of this kind, counted from 0.
func (p *proc) event(kind ecdysis.EventKind, n int) eventMsg {
	p.t.Helper()
	var e eventMsg
	p.wait("event "+string(kind), func() bool {
		i := 0
		for _, e = range p.events {
			if e.Kind == kind {
				if i++; i > n {
					return true
				}
			}
		}
		return false
	})
	return e
}

// kinds lists the events so far.
func (p *proc) kinds() []ecdysis.EventKind {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []ecdysis.EventKind
	for _, e := range p.events {
		list = append(list, e.Kind)
	}
	return list
}

// begin sends a command; what it returns waits for the answer.
func (p *proc) begin(c command) func() message {
	p.t.Helper()
	ch := make(chan message, 1)
	p.mu.Lock()
	p.lastID++
	c.ID = p.lastID
	p.replies[c.ID] = ch
	err := json.NewEncoder(p.conn).Encode(c)
	p.mu.Unlock()
	if err != nil {
		p.t.Fatalf("process %d: %v", p.pid, err)
	}
	return func() message {
		p.t.Helper()
		select {
		case m := <-ch:
			return m
		case <-p.gone:
			select {
			case m := <-ch:
				return m
			default:
			}
			p.t.Fatalf("process %d ended without an answer to %s", p.pid, c.Verb)
		case <-time.After(patience):
			p.t.Fatalf("process %d does not answer to %s; points %v, events %v", p.pid, c.Verb, p.points, p.events)
		}
		return message{}
	}
}

// call sends a command and returns its answer.
func (p *proc) call(verb string, args ...string) message {
	p.t.Helper()
	return p.begin(command{Verb: verb, Args: args})()
}

// resume lets a process go on that holds at a point.
func (p *proc) resume() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := json.NewEncoder(p.conn).Encode(command{Verb: "go"}); err != nil {
		p.t.Fatal(err)
	}
}

// upgrade upgrades p and returns its successor, which serves.
func (p *proc) upgrade() *proc {
	p.t.Helper()
	answer := p.begin(command{Verb: "upgrade"})
	s := p.h.proc()
	if m := answer(); m.Err != nil {
		p.t.Fatalf("upgrade: %+v", m.Err)
	}
	s.at("serving")
	return s
}

// failUpgrade makes an attempt that must fail so, and returns its error.
func (p *proc) failUpgrade(c command, step, is string) *errMsg {
	p.t.Helper()
	c.Verb = "upgrade"
	m := p.begin(c)()
	checkErr(p.t, m.Err, step, is)
	return m.Err
}

func checkErr(t *testing.T, e *errMsg, step, is string) {
	t.Helper()
	if e == nil {
		t.Fatalf("no error; want one at step %q that is %q", step, is)
	}
	if e.Step != step || is != "" && !slices.Contains(e.Is, is) {
		t.Fatalf("error %+v; want step %q, %q", e, step, is)
	}
}

// addr returns the first process's i-th address.
func (p *proc) addr(i int) (network, address string) {
	p.t.Helper()
	select {
	case a := <-p.addrs:
		p.addrs <- a
		return a[i][0], a[i][1]
	case <-time.After(patience):
		p.t.Fatal("no addresses")
		return "", ""
	}
}

// kill ends p and returns when it has ended.
func (p *proc) kill() {
	p.t.Helper()
	if err := p.os.Kill(); err != nil {
		p.t.Fatal(err)
	}
	p.ended()
}

// ended returns when p has ended.
func (p *proc) ended() {
	p.t.Helper()
	select {
	case <-p.gone:
	case <-time.After(patience):
		p.t.Fatalf("process %d has not ended", p.pid)
	}
}

// ask connects, sends a line and returns who answers.
func ask(network, address string) (pid, generation int, err error) {
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	return askOn(c)
}

func askOn(c net.Conn) (pid, generation int, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, 0, err
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return 0, 0, err
	}
	var line [64]byte
	n := 0
	for n == 0 || line[n-1] != '\n' {
		m, err := c.Read(line[n:])
		if err != nil {
			return 0, 0, err
		}
		n += m
	}
	_, err = fmt.Sscan(string(line[:n]), &pid, &generation)
	return pid, generation, err
}

// serves asserts that p answers at each of its addresses.
func (p *proc) serves() {
	p.t.Helper()
	a := <-p.addrs
	p.addrs <- a
	for _, na := range a {
		pid, _, err := ask(na[0], na[1])
		if err != nil || pid != p.pid {
			p.t.Fatalf("%s %s: process %d answers, %v; want %d", na[0], na[1], pid, err, p.pid)
		}
	}
}

func tcp() spec { return spec{Listen: [][2]string{{"tcp", "127.0.0.1:0"}}} }

func init() {
	knownErrors["context deadline"] = context.DeadlineExceeded
	knownErrors["ENOSPC"] = syscall.ENOSPC

	// A hook of a process that serves, whose commands are taken elsewhere,
	// holds at the first "call holdonce" until the command "release".
	held, released := false, make(chan struct{})
	verbs["holdonce"] = func(*daemon, command) (m message) {
		if !held {
			held = true
			<-released
		}
		return m
	}
	verbs["release"] = func(*daemon, command) (m message) {
		close(released)
		return m
	}
}

// bothSpec listens on TCP and at h.dir/sock, and has a PID file.
func bothSpec(h *hub) spec {
	return spec{
		Listen:  [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", h.sock()}},
		Options: options{PIDFile: h.pidFile()},
	}
}

func (h *hub) sock() string    { return filepath.Join(h.dir, "sock") }
func (h *hub) pidFile() string { return filepath.Join(h.dir, "pid") }

func (s spec) do(point, what string) spec {
	s.Do = map[string]string{point: what}
	return s
}

// list returns p's addresses.
func (p *proc) list() [][2]string {
	p.t.Helper()
	p.addr(0)
	a := <-p.addrs
	p.addrs <- a
	return a
}

// inherits asserts that p's sockets are those of an older process.
func (p *proc) inherits(old *proc) {
	p.t.Helper()
	if a, b := p.list(), old.list(); !slices.Equal(a, b) {
		p.t.Fatalf("process %d listens at %v, the one before it at %v", p.pid, a, b)
	}
}

// hasPIDFile asserts that the PID file names p.
func (p *proc) hasPIDFile() {
	p.t.Helper()
	b, err := os.ReadFile(p.h.pidFile())
	if err != nil || string(b) != strconv.Itoa(p.pid)+"\n" {
		p.t.Fatalf("PID file holds %q, %v; want %d", b, err, p.pid)
	}
}

// files lists what is in the test's directory beside the hub.
func (h *hub) files() []string {
	h.t.Helper()
	entries, err := os.ReadDir(h.dir)
	if err != nil {
		h.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "hub" {
			names = append(names, e.Name())
		}
	}
	return names
}

// hasFiles asserts that nothing else is in the test's directory.
func (h *hub) hasFiles(want ...string) {
	h.t.Helper()
	if got := h.files(); !slices.Equal(got, want) {
		h.t.Fatalf("files %q are there; want %q", got, want)
	}
}

// refuses asserts that nobody listens any more at p's addresses.
func (p *proc) refuses() {
	p.t.Helper()
	for _, a := range p.list() {
		c, err := net.DialTimeout(a[0], a[1], patience)
		if err == nil {
			c.Close()
			p.t.Fatalf("%v takes connections", a)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
			p.t.Fatalf("%v: %v; want that it is refused", a, err)
		}
	}
}

// reaped asserts that nothing is left of a process.
func reaped(t *testing.T, pid int) {
	t.Helper()
	if s := proctest.State(t, pid); s != "" {
		t.Fatalf("process %d is still there, in state %s", pid, s)
	}
}

// hasEvents asserts what p has been notified of, Ready aside.
func (p *proc) hasEvents(want ...ecdysis.EventKind) {
	p.t.Helper()
	if got := p.kinds(); !slices.Equal(got, append([]ecdysis.EventKind{ecdysis.EventReady}, want...)) {
		p.t.Fatalf("events %q; want ready and %q", got, want)
	}
}

// lateTimeout is what a busy machine needs to bring a successor to the point
// where it holds.
const lateTimeout = 5 * time.Second

// sameFiles asserts that p has, beside sockets, the descriptors that it had.
// It does not wait: what is left to the collector would be gone after a while.
func sameFiles(p *proc, before []string) {
	p.t.Helper()
	noSockets := func(fds []string) []string {
		return slices.DeleteFunc(slices.Clone(fds), func(s string) bool { return strings.Contains(s, " socket:") })
	}
	if now, before := noSockets(p.call("fds").Text), noSockets(before); !slices.Equal(now, before) {
		p.t.Errorf("descriptors that are no sockets: %q; before: %q", now, before)
	}
}
