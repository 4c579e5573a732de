//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	program = "github.com/ecdysis-go/ecdysis/internal/soak/soaked"

	// patience is how long anything may take that must happen.
	patience = 30 * time.Second
)

// addresses are where the daemon answers.
type addresses struct{ tcp, unix, http, udp string }

// A line is what a process has said.
type line struct {
	pid  int
	text string
}

// A chain is the daemon from a start to a stop, in all its generations.
type chain struct {
	ctx  context.Context
	dir  string
	path string // a link to the program, which is what is started next
	log  *history

	leader int       // of the process group in which all are
	held   io.Closer // ends the leader
	stderr *os.File  // for processes that the soak starts itself; nil: no more
	lines  chan line
	wg     sync.WaitGroup // waits for those

	serving    int // process
	generation int
}

// startChain runs the first process, and returns when it serves.
func startChain(ctx context.Context, dir, probation string, log *history) (*chain, addresses, error) {
	c := &chain{ctx: ctx, dir: dir, path: filepath.Join(dir, "daemon"), log: log, lines: make(chan line, 1000)}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, addresses{}, err
	}
	c.stderr = w
	go func() {
		defer close(c.lines) // every process has ended
		defer r.Close()
		for s := bufio.NewScanner(r); s.Scan(); {
			pid, text, _ := strings.Cut(s.Text(), " ")
			n, err := strconv.Atoi(pid)
			if err != nil {
				n, text = 0, s.Text() // as of a panic
			}
			log.add("%s", s.Text())
			c.lines <- line{n, text}
		}
	}()
	err = errors.Join(c.plan("none", probation), c.install(true))
	if err == nil {
		err = c.lead()
	}
	if err == nil {
		err = c.start()
	}
	var a addresses
	if err == nil {
		a, err = c.replaced()
	}
	if err != nil {
		c.kill()
		return nil, a, err
	}
	return c, a, nil
}

// plan says what the next process does, and for how long it stands by after it
// was replaced.
func (c *chain) plan(fault, probation string) error {
	path := filepath.Join(c.dir, "plan")
	if err := os.WriteFile(path+".new", []byte(fault+" "+probation), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// install puts the program in its place, or nothing.
func (c *chain) install(there bool) error {
	target := filepath.Join(c.dir, "nothing")
	if there {
		target = filepath.Join(c.dir, "soaked")
	}
	if err := os.Symlink(target, c.path+".new"); err != nil {
		return err
	}
	return os.Rename(c.path+".new", c.path)
}

// lead starts a process that does nothing but lead the group. The system sends
// SIGHUP, which requests an upgrade, to a group with a stopped process if its
// last parent outside of the group is lost, as when the first process ends.
func (c *chain) lead() error {
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.leader, c.held = cmd.Process.Pid, in
	c.wg.Go(func() { _ = cmd.Wait() })
	return nil
}

// start runs a process of the soak's own: the first, or one that takes over.
func (c *chain) start() error {
	cmd := exec.Command(c.path, c.dir)
	cmd.Stderr = c.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: c.leader}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.wg.Go(func() { _ = cmd.Wait() })
	return nil
}

// A wanted is a line that is awaited.
type wanted struct {
	what string
	is   func(l line) bool
}

// await returns when all of the lines have come, in any order. Lines before
// them are lost.
func (c *chain) await(list ...wanted) ([]line, error) {
	limit := time.After(patience)
	found := make([]line, len(list))
	for missing := len(list); missing > 0; {
		what := ""
		for i, w := range list {
			if found[i].text == "" {
				what = w.what
			}
		}
		select {
		case l, ok := <-c.lines:
			if !ok {
				return nil, fmt.Errorf("all processes have ended before %s", what)
			}
			for i, w := range list {
				if found[i].text == "" && w.is(l) {
					found[i] = l
					missing--
				}
			}
		case <-limit:
			return nil, fmt.Errorf("not within %v: %s", patience, what)
		case <-c.ctx.Done():
			return nil, c.ctx.Err()
		}
	}
	return found, nil
}

var serves = wanted{"a new process serves", func(l line) bool { return strings.HasPrefix(l.text, "serves ") }}

func says(pid int, kind string) wanted {
	return wanted{fmt.Sprintf("process %d says %q", pid, kind), func(l line) bool { return l.pid == pid && strings.HasPrefix(l.text, kind) }}
}

// started returns the number of the process that is started next.
func (c *chain) started() (int, error) {
	l, err := c.await(wanted{"a process has started", func(l line) bool { return l.text == "started" }})
	if err != nil {
		return 0, err
	}
	return l[0].pid, nil
}

// replaced returns when a new process serves, and the other lines have come.
func (c *chain) replaced(also ...wanted) (a addresses, err error) {
	l, err := c.await(append(also, serves)...)
	if err != nil {
		return a, err
	}
	s := l[len(also)]
	a.unix = filepath.Join(c.dir, "echo")
	_, err = fmt.Sscanf(s.text, "serves %d %s %s %s", &c.generation, &a.tcp, &a.http, &a.udp)
	c.serving = s.pid
	return a, err
}

// ended returns when all processes have ended, as they are to.
func (c *chain) ended() error {
	c.stderr.Close()
	c.stderr = nil
	limit := time.After(2 * patience) // its clients are served first
	for {
		select {
		case _, ok := <-c.lines:
			if !ok {
				c.held.Close()
				c.wg.Wait()
				return nil
			}
		case <-limit:
			return errors.New("there are processes left after a stop")
		}
	}
}

// kill ends what is left of it.
func (c *chain) kill() {
	if c.stderr != nil {
		c.stderr.Close()
	}
	for open := true; open; {
		select {
		case _, open = <-c.lines:
		default:
			if c.leader != 0 {
				// A process lives, so the group is still ours.
				_ = syscall.Kill(-c.leader, syscall.SIGKILL)
			}
			_, open = <-c.lines
		}
	}
	if c.held != nil {
		c.held.Close()
	}
	c.wg.Wait()
}

// A history is what was done and said, of which the last is printed if
// something goes wrong. It knows the processes that have said something.
type history struct {
	started time.Time

	mu   sync.Mutex
	last []string
	pids map[int]bool
}

func (h *history) add(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = append(h.last, fmt.Sprintf("%9.3f %s", time.Since(h.started).Seconds(), s))
	if len(h.last) > 120 {
		h.last = append(h.last[:0], h.last[60:]...)
	}
	pid, text, _ := strings.Cut(s, " ")
	if n, err := strconv.Atoi(pid); err == nil && text == "started" {
		h.pids[n] = true
	}
}

// tail returns the last lines.
func (h *history) tail() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.last[max(0, len(h.last)-60):], "\n")
}
