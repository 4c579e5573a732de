package interop

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// A chain is a program and the generations of it.
type chain struct {
	t   testing.TB
	dir string // for the program's sockets and files
	exe string // what is started, and replaced for the next version
	cmd *exec.Cmd

	mu     sync.Mutex
	said   []said
	more   chan struct{} // closed when something is said
	stderr strings.Builder
}

// A said is a line that a process has said.
type said struct {
	pid, gen int
	words    string
}

// start starts the first generation of an executable.
func start(t testing.TB, exe string, args ...string) *chain {
	t.Helper()
	return startWith(t, exe, args, "")
}

// startWith starts it with a variable in its environment, and with files from
// descriptor 3 on, which are closed here.
func startWith(t testing.TB, exe string, args []string, variable string, files ...*os.File) *chain {
	t.Helper()
	c := prepare(t, exe)
	c.start(args, variable, files...)
	return c
}

// prepare returns a chain that has not been started.
func prepare(t testing.TB, exe string) *chain {
	t.Helper()
	c := &chain{t: t, dir: proctest.ShortDir(t), more: make(chan struct{})}
	c.exe = filepath.Join(c.dir, "program")
	c.install(exe)
	if err := os.Mkdir(c.orders(), 0o700); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *chain) start(args []string, variable string, files ...*os.File) {
	t := c.t
	t.Helper()
	args = slices.Clone(args)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "DIR", c.dir)
	}
	stdout, w1, err1 := os.Pipe()
	stderr, w2, err2 := os.Pipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	defer w1.Close()
	defer w2.Close()
	c.cmd = exec.Command(c.exe, args...)
	c.cmd.Stdout, c.cmd.Stderr = w1, w2
	c.cmd.Env = append(os.Environ(), "TEST_ORDERS="+c.orders(), variable)
	c.cmd.ExtraFiles = files
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := c.cmd.Start()
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() { c.listen(stdout) })
	ended.Go(func() {
		io.Copy(lockedWriter{c}, stderr)
		stderr.Close()
	})
	t.Cleanup(func() {
		// The group is the chain's alone, and its first process is reaped
		// after this.
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		_ = c.cmd.Wait()
		ended.Wait()
		if t.Failed() {
			t.Logf("the processes have said:\n%s\nand on standard error:\n%s", c.transcript(), c.stderr.String())
		}
	})
}

// lockedWriter keeps what the processes write to standard error.
type lockedWriter struct{ c *chain }

func (w lockedWriter) Write(b []byte) (int, error) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.c.stderr.Write(b)
}

func (c *chain) orders() string { return filepath.Join(c.dir, "orders") }

// order says what a generation does at a point; see line.Point.
func (c *chain) order(gen int, point, order string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.orders(), fmt.Sprintf("%d.%s", gen, point)), []byte(order), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// release ends a hold.
func (c *chain) release(gen int, point string) {
	c.t.Helper()
	if err := os.Remove(filepath.Join(c.orders(), fmt.Sprintf("%d.%s", gen, point))); err != nil {
		c.t.Fatal(err)
	}
}

// install makes an executable the next version.
func (c *chain) install(exe string) {
	c.t.Helper()
	next := c.exe + ".next"
	in, err := os.Open(exe)
	if err != nil {
		c.t.Fatal(err)
	}
	defer in.Close()
	// A descriptor that is open for writing must not be in a process that is
	// forked meanwhile.
	syscall.ForkLock.RLock()
	out, err := os.OpenFile(next, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o700)
	if err == nil {
		_, err = io.Copy(out, in)
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = os.Rename(next, c.exe)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// listen notes what the processes say until all have ended.
func (c *chain) listen(r *os.File) {
	defer r.Close()
	for s := bufio.NewScanner(r); s.Scan(); {
		var l said
		if _, err := fmt.Sscan(s.Text(), &l.pid, &l.gen); err != nil {
			l.words = s.Text()
		} else {
			l.words = strings.SplitN(s.Text(), " ", 3)[2]
		}
		c.mu.Lock()
		c.said = append(c.said, l)
		close(c.more)
		c.more = make(chan struct{})
		c.mu.Unlock()
	}
}

func (c *chain) transcript() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, s := range c.said {
		fmt.Fprintf(&b, "%d %d %s\n", s.pid, s.gen, s.words)
	}
	return b.String()
}

// await returns the first line of a generation that begins with these words.
func (c *chain) await(gen int, words string) (line said) {
	c.t.Helper()
	if !c.until(func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		i := slices.IndexFunc(c.said, func(s said) bool { return s.gen == gen && strings.HasPrefix(s.words, words) })
		if i >= 0 {
			line = c.said[i]
		}
		return i >= 0
	}) {
		c.t.Fatalf("generation %d does not say %q", gen, words)
	}
	return line
}

// count returns in how many of its lines a generation has said this.
func (c *chain) count(gen int, words string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.said {
		if s.gen == gen && strings.Contains(s.words, words) {
			n++
		}
	}
	return n
}

// addrs waits until a generation is ready, and returns where it serves.
func (c *chain) addrs(gen int) (pid int, list []proctest.Addr) {
	c.t.Helper()
	s := c.await(gen, "ready ")
	words := strings.Fields(s.words)[1:]
	for i := 0; i+1 < len(words); i += 2 {
		list = append(list, proctest.Addr{Network: words[i], Address: words[i+1]})
	}
	return s.pid, list
}

// upgrade lets the process of a generation upgrade, after the one before it has
// exited, and returns the next one.
func (c *chain) upgrade(pid, gen int) (next int, addrs []proctest.Addr) {
	c.t.Helper()
	for tries := 0; ; tries++ {
		c.signal(pid, syscall.SIGHUP)
		// The parent may still be exiting: its first thread has, and that is
		// what gone sees. Theirs notices some time later, too.
		more := func() bool { return c.count(gen, "parent hasn't exited") > tries }
		if !c.until(func() bool { return c.count(gen+1, "ready ") > 0 || more() }) {
			c.t.Fatalf("generation %d does not upgrade", gen)
		}
		if !more() {
			return c.addrs(gen + 1)
		}
	}
}

// until waits until f is true, looking each time that something is said.
func (c *chain) until(f func() bool) bool {
	for limit := time.After(patience); ; {
		c.mu.Lock()
		more := c.more
		c.mu.Unlock()
		if f() {
			return true
		}
		select {
		case <-more:
		case <-limit:
			return false
		}
	}
}

// signal sends a signal to the process of a generation.
func (c *chain) signal(pid int, sig os.Signal) {
	c.t.Helper()
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Signal(sig)
	}
	if err != nil {
		c.t.Fatalf("process %d: %v", pid, err)
	}
}

// gone waits until a process has exited.
func (c *chain) gone(pid int) {
	c.t.Helper()
	c.state(pid, "Z") // a zombie has exited, too
}

// stopped waits until a process is stopped.
func (c *chain) stopped(pid int) {
	c.t.Helper()
	c.state(pid, "T")
}

// state waits until a process is in a state, as proc(5) has it, or has gone.
func (c *chain) state(pid int, want string) {
	c.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return
		}
		// The state follows the name in brackets.
		if i := strings.LastIndexByte(string(b), ')'); i > 0 && strings.HasPrefix(string(b[i:]), ") "+want) {
			return
		}
	}
	c.t.Fatalf("process %d is not in state %s", pid, want)
}

// ask connects to a address and returns which generation answers.
func ask(t testing.TB, a proctest.Addr) (gen int) {
	t.Helper()
	_, gen, err := a.Ask()
	if err != nil {
		t.Fatalf("%v: %v", a, err)
	}
	return gen
}

// find returns the address of a network.
func find(t testing.TB, list []proctest.Addr, network string) proctest.Addr {
	t.Helper()
	for _, a := range list {
		if a.Network == network {
			return a
		}
	}
	t.Fatalf("no address of %s in %v", network, list)
	return proctest.Addr{}
}

// dial connects to an address.
func dial(t testing.TB, a proctest.Addr) net.Conn {
	t.Helper()
	c, err := a.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// answer returns the generation that answers to what was written.
func answer(conn net.Conn) (gen int, err error) {
	b := make([]byte, 100)
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	n, err := conn.Read(b)
	if err != nil {
		return 0, err
	}
	var pid int
	_, err = fmt.Sscan(string(b[:n]), &pid, &gen)
	return gen, err
}
