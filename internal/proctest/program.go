package proctest

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A Program is a command and all processes that it starts, such as its successors.
// They share one standard error, whose lines show the test what they do.
type Program struct {
	T   testing.TB
	Cmd *exec.Cmd

	pipe  *os.File    // the test's copy of the end that they write to
	lines chan string // closed when all have closed their standard error
	mu    sync.Mutex
	said  []string
	once  sync.Once
	state *os.ProcessState
}

// Run starts cmd in a process group of its own. Processes of the group that are left
// at the end of the test are killed.
func Run(t testing.TB, cmd *exec.Cmd) *Program {
	t.Helper()
	p := Open(t, cmd)
	p.CloseStderr()
	return p
}

// Open is Run for a test that lets further processes write to Stderr. It must
// call CloseStderr after it has started them.
func Open(t testing.TB, cmd *exec.Cmd) *Program {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &Program{T: t, Cmd: cmd, pipe: w, lines: make(chan string, 10000)}
	cmd.Stderr = w
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		defer r.Close()
		for s := bufio.NewScanner(r); s.Scan(); {
			p.mu.Lock()
			p.said = append(p.said, s.Text())
			p.mu.Unlock()
			p.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		w.Close()
		defer func() {
			p.Wait()
			if t.Failed() {
				t.Logf("what %s wrote to standard error:\n%s", cmd.Path, strings.Join(p.Said(), "\n"))
			}
		}()
		for {
			select {
			case _, ok := <-p.lines:
				if !ok {
					return
				}
			default: // a process lives, so the group's number cannot be another group's
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
				for range p.lines {
				}
				return
			}
		}
	})
	return p
}

// Stderr returns the standard error for further processes of an Open program.
func (p *Program) Stderr() *os.File { return p.pipe }

// CloseStderr closes the test's copy of Stderr.
func (p *Program) CloseStderr() { p.pipe.Close() }

// Await returns the next line that matches, and its submatches, as
// regexp.FindStringSubmatch does. Earlier lines are dropped.
func (p *Program) Await(pattern string) []string {
	p.T.Helper()
	re := regexp.MustCompile(pattern)
	limit := time.After(Patience)
	for {
		select {
		case line, ok := <-p.lines:
			if m := re.FindStringSubmatch(line); m != nil {
				return m
			}
			if !ok {
				p.T.Fatalf("all processes have ended without a line %q", pattern)
			}
		case <-limit:
			p.T.Fatalf("no line %q", pattern)
		}
	}
}

// Ready returns the process of this generation, when it has logged an
// EventReady.
func (p *Program) Ready(generation int) *os.Process {
	p.T.Helper()
	pid, err := strconv.Atoi(p.Await(`ready: pid=(\d+) generation=` + strconv.Itoa(generation) + `\b`)[1])
	if err != nil {
		p.T.Fatal(err)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		p.T.Fatal(err)
	}
	return process
}

// Said returns all lines so far.
func (p *Program) Said() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.said)
}

// End waits until all processes have ended. It returns the state of the first one.
func (p *Program) End() *os.ProcessState {
	p.T.Helper()
	limit := time.After(2 * Patience)
	for {
		select {
		case _, ok := <-p.lines:
			if ok {
				continue
			}
			return p.Wait()
		case <-limit:
			p.T.Fatal("processes are left")
		}
	}
}

// Refused returns when connections to the address fail. It fails the test if they
// succeed for longer than Patience. They can succeed for a moment after End, because
// a process that exits closes its standard error before its sockets.
func (p *Program) Refused(network, address string) {
	p.T.Helper()
	for limit := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial(network, address)
		if err != nil {
			return
		}
		c.Close()
		if time.Now().After(limit) {
			p.T.Fatalf("somebody still listens on %s %s", network, address)
		}
	}
}

// Wait waits until the first process has ended, and returns its state.
func (p *Program) Wait() *os.ProcessState {
	p.once.Do(func() {
		_ = p.Cmd.Wait()
		p.state = p.Cmd.ProcessState
	})
	return p.state
}
