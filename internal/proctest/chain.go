package proctest

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// A Chain has the processes of one test, which are a first process, its successors,
// and processes that take over.
type Chain struct {
	T   testing.TB
	Dir string // a directory whose path is short enough for sockets

	hub    net.Listener
	stderr *os.File // has no name; the processes share its offset

	mu       sync.Mutex
	specs    []Spec
	all      []*Proc
	launched []launched
	queue    []*Proc       // processes that the test has not asked for yet
	changed  chan struct{} // closed, and replaced, when a process joins the queue
}

// launched is a process that the test itself has started.
type launched struct {
	cmd    *exec.Cmd
	waited chan struct{} // closed when cmd.Wait has returned
}

// logEnds logs how those of the processes that have ended did so. A process that
// is killed cannot write it itself.
func logEnds(t testing.TB, list []launched) {
	t.Helper()
	for _, l := range list {
		select {
		case <-l.waited:
			t.Logf("process %d: %v", l.cmd.Process.Pid, l.cmd.ProcessState)
		default:
		}
	}
}

// ShortDir is a t.TempDir whose path leaves room for the names of sockets.
func ShortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ecd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// New returns a chain whose processes get these specs in the order in which
// they start. The last spec is for all that follow. Its processes end with the
// test.
func New(t testing.TB, specs ...Spec) *Chain {
	t.Helper()
	c := &Chain{T: t, Dir: ShortDir(t), changed: make(chan struct{})}
	c.Specs(specs...)
	var err error
	if c.stderr, err = os.CreateTemp("", "stderr"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stderr.Close() })
	if err := os.Remove(c.stderr.Name()); err != nil {
		t.Fatal(err)
	}
	if c.hub, err = net.Listen("unix", c.Hub()); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := c.hub.Accept()
			if err != nil {
				return
			}
			go c.serve(newConn(conn))
		}
	}()
	t.Cleanup(func() {
		c.hub.Close()
		c.mu.Lock()
		all, started := slices.Clone(c.all), slices.Clone(c.launched)
		c.mu.Unlock()
		if t.Failed() {
			logEnds(t, started) // before the rest is killed
		}
		for _, p := range all {
			_ = p.Process.Kill()
			p.conn.Close()
		}
		for _, p := range all {
			<-p.gone
		}
		if t.Failed() {
			t.Logf("what the daemons wrote to standard error:\n%s", c.Stderr())
		}
	})
	return c
}

// Start starts the first process of a new chain. It returns the process when the
// process serves.
func Start(t testing.TB, specs ...Spec) *Proc {
	t.Helper()
	return New(t, specs...).Start()
}

// Specs replaces the specs of the processes to come.
func (c *Chain) Specs(specs ...Spec) {
	for _, s := range specs {
		s.check()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.specs = specs
}

// Hub is the path of the socket to which the processes connect.
func (c *Chain) Hub() string { return filepath.Join(c.Dir, "hub") }

// Path is the path of a file in the chain's directory.
func (c *Chain) Path(name string) string { return filepath.Join(c.Dir, name) }

// Env has the variables of a process that is started by none of the chain.
func (c *Chain) Env() []string { return []string{daemonRole.Env(), hubVar + "=" + c.Hub()} }

// Start is Launch, but returns when the process serves.
func (c *Chain) Start(edit ...func(*exec.Cmd)) *Proc {
	c.T.Helper()
	p := c.Launch(edit...)
	p.At(AtServing)
	return p
}

// Launch starts a process that has no predecessor. It returns when the process has
// connected, before the process does anything else.
func (c *Chain) Launch(edit ...func(*exec.Cmd)) *Proc {
	c.T.Helper()
	cmd := exec.Command(self(), noTests)
	cmd.Env = append(os.Environ(), c.Env()...)
	cmd.Stderr = c.stderr
	for _, f := range edit {
		f(cmd)
	}
	if err := cmd.Start(); err != nil {
		c.T.Fatal(err)
	}
	waited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(waited) }()
	c.mu.Lock()
	c.launched = append(c.launched, launched{cmd, waited})
	c.mu.Unlock()
	c.T.Cleanup(func() { _ = cmd.Process.Kill() })
	p := c.Next()
	p.cmd, p.waited = cmd, waited
	return p
}

// As gives a process that Launch starts another role.
func As(r Role) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, r.Env()) }
}

// HubAt sets the path at which a process that Launch starts finds the Hub. It is
// for a process that sees another path than the test, as in a container. The Dir of
// the process is the directory of this path.
func HubAt(path string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, hubVar+"="+path) }
}

// Next returns the next process that connects.
func (c *Chain) Next() *Proc {
	c.T.Helper()
	for limit := time.After(Patience); ; {
		p, changed := c.pop()
		if p != nil {
			return p
		}
		select {
		case <-changed:
		case <-limit:
			c.T.Fatal("no process has connected")
		}
	}
}

// pop returns the first process of the queue. If there is none, it returns a
// channel that is closed when the queue changes.
func (c *Chain) pop() (*Proc, chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) == 0 {
		return nil, c.changed
	}
	p := c.queue[0]
	c.queue = c.queue[1:]
	return p, nil
}

// take returns the process of the queue that has this ID, or nil.
func (c *Chain) take(pid int) *Proc {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.queue, func(p *Proc) bool { return p.PID == pid || p.Process.Pid == pid })
	if i < 0 {
		return nil
	}
	p := c.queue[i]
	c.queue = slices.Delete(c.queue, i, i+1)
	return p
}

// has reports whether a process with this ID has connected.
func (c *Chain) has(pid int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.all, func(p *Proc) bool { return p.PID == pid || p.Process.Pid == pid })
}

// None fails the test if a process has connected for which the test has not asked.
func (c *Chain) None() {
	c.T.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.queue {
		c.T.Fatalf("process %d has been started, too", p.PID)
	}
}

// Discard forgets the processes that have connected.
func (c *Chain) Discard() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = nil
}

// Stderr is what the processes have written to standard error.
func (c *Chain) Stderr() string {
	b, err := io.ReadAll(io.NewSectionReader(c.stderr, 0, 1<<30))
	if err != nil {
		c.T.Error(err)
	}
	return string(b)
}

// Files lists what is in the chain's directory.
func (c *Chain) Files() []string {
	c.T.Helper()
	entries, err := os.ReadDir(c.Dir)
	if err != nil {
		c.T.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "hub" {
			names = append(names, e.Name())
		}
	}
	return names
}

// HasFiles fails the test unless these files, in the order of their names, are
// all that is in the chain's directory.
func (c *Chain) HasFiles(want ...string) {
	c.T.Helper()
	if got := c.Files(); !slices.Equal(got, want) {
		c.T.Fatalf("files %q are there; want %q", got, want)
	}
}

// serve receives what a process sends.
func (c *Chain) serve(conn *conn) {
	var h hello
	if err := conn.dec.Decode(&h); err != nil {
		conn.Close()
		return
	}
	pid := h.PID
	if cred, err := ecdysis.PeerCred(conn.Conn.(*net.UnixConn)); err == nil && cred.PID != 0 {
		pid = cred.PID // h.PID is the number in the process's own PID namespace
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		conn.Close()
		return
	}
	p := &Proc{T: c.T, Chain: c, PID: h.PID, Process: process, conn: conn, gone: make(chan struct{}),
		changed: make(chan struct{}), answers: make(map[int]chan message)}
	c.mu.Lock()
	c.all = append(c.all, p)
	var spec Spec
	if !h.Helper {
		spec = c.specs[0]
		if len(c.specs) > 1 {
			c.specs = c.specs[1:]
		}
		c.queue = append(c.queue, p)
		close(c.changed)
		c.changed = make(chan struct{})
	}
	c.mu.Unlock()
	defer close(p.gone)
	if !h.Helper && conn.send(spec) != nil {
		return
	}
	for {
		var m message
		if err := conn.dec.Decode(&m); err != nil {
			return
		}
		p.receive(m)
	}
}
