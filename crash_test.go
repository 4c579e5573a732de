package ecdysis_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What happens when one of two generations is killed, at every step of their
// conversation.

// rootVar makes a program that is owned by root and has the setuid bit become
// root altogether: who started it cannot kill it.
const rootVar = "ECDYSIS_TEST_ROOT"

func init() {
	if os.Getenv(rootVar) != "" {
		if err := syscall.Setuid(0); err != nil {
			os.Exit(4)
		}
	}
	roles["nobody"] = func() {}
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

func (s spec) probation(d time.Duration) spec {
	s.Options.Probation = d
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

// none asserts that no further process has connected.
func (h *hub) none() {
	h.t.Helper()
	select {
	case p := <-h.procs:
		h.t.Fatalf("process %d has been started, too", p.pid)
	default:
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

// A crashLoad is clients for a process that will be killed: they may lose
// what it had accepted, but are never refused and never left alone.
type crashLoad struct {
	load
	cut atomic.Int64
}

func startCrashLoad(t *testing.T, addrs [][2]string) *crashLoad {
	l := &crashLoad{load: load{t: t, stop: make(chan struct{})}}
	for _, a := range addrs {
		l.wg.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				c, err := net.DialTimeout(a[0], a[1], patience)
				if err == nil {
					if _, _, err = askOn(c); err == nil {
						l.answered.Add(1)
					} else if !errors.Is(err, os.ErrDeadlineExceeded) {
						l.cut.Add(1)
						err = nil
					}
					c.Close()
				}
				if err != nil {
					l.mu.Lock()
					l.failures = append(l.failures, err.Error())
					l.mu.Unlock()
				}
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

// check ends the load and asserts that at most one connection for each client
// was in the hands of a process that was killed.
func (l *crashLoad) check(clients int64) {
	l.t.Helper()
	l.load.check()
	if n := l.cut.Load(); n > clients {
		l.t.Errorf("%d connections were cut; there were %d clients and one process was killed", n, clients)
	}
}

// unkillable starts a first process that is not root, and returns it with the
// command that starts a successor that is.
func unkillable(t *testing.T, specs ...spec) (*hub, *proc, command) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a process that its parent may not kill takes root to start")
	}
	h := newHub(t, specs...)
	nobody := filepath.Join(h.dir, "nobody")
	root := filepath.Join(h.dir, "root")
	for _, to := range []string{nobody, root} {
		// Another process writes them, so that no concurrent fork of this
		// one has them open for writing when they are started.
		if out, err := exec.Command("cp", os.Args[0], to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for _, err := range []error{
		os.Chmod(h.dir, 0o755),
		os.Chmod(h.path, 0o777),
		os.Chmod(nobody, 0o755),
		os.Chmod(root, 0o755|os.ModeSetuid),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	asNobody := func(cmd *exec.Cmd) {
		cmd.Dir = h.dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	probe := exec.Command(root, "-test.run=^$")
	probe.Env = append(os.Environ(), roleVar+"=nobody", rootVar+"=1")
	if asNobody(probe); probe.Run() != nil {
		t.Skip("the setuid bit has no effect in ", h.dir)
	}
	p := h.serving(asNobody, func(cmd *exec.Cmd) { cmd.Path, cmd.Args[0] = nobody, nobody })
	return h, p, command{Verb: "upgrade", Command: &ecdysis.Command{Path: root}, SetEnv: []string{rootVar + "=1"}}
}

// zombie returns when a process has ended with all of its threads, and its
// parent has not noticed.
func zombie(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if proctest.IsZombie(pid) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d is in state %q; want a zombie", pid, proctest.State(t, pid))
		}
	}
}

// lateTimeout is what a busy machine needs to bring a successor to the point
// where it holds.
const lateTimeout = 5 * time.Second

func TestUnkillableSuccessorLate(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"start", "new", "listened"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			first := tcp()
			first.Options.UpgradeTimeout = lateTimeout
			h, p, root := unkillable(t, first, tcp().do(point, "hold"), tcp().do("start", "exit 3"), tcp())
			begun := time.Now()
			answer := p.begin(root)
			late := h.proc()
			late.at(point)
			m := answer()
			checkErr(t, m.Err, "init", "deadline")
			if d := time.Since(begun); d < lateTimeout || d > patience {
				t.Errorf("Upgrade returned after %v; the time-out is %v", d, lateTimeout)
			}
			if m.Err.PID != late.pid || m.Err.How != "" || proctest.State(t, late.pid) == "" {
				t.Errorf("error %+v; want the living process %d", m.Err, late.pid)
			}
			p.serves()
			p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)

			late.resume()
			failed := "ready failed"
			late.wait(failed, func() bool {
				last := late.points[len(late.points)-1].At
				if last == "new failed" {
					failed = last
				}
				return last == failed
			})
			checkErr(t, late.at(failed).Err, "", "ErrAborted")
			zombie(t, late.pid)
			p.serves()

			p.failUpgrade(command{}, "init", "unexpected EOF")
			reaped(t, late.pid)
			h.proc().ended()
			p.serves()
			s := p.upgrade()
			s.inherits(p)
			s.serves()
		})
	}
}

// An unkillable successor that has the word may serve at any moment: until it
// does, or ends, nobody serves.
func TestUnkillableSuccessorCommitted(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"serves", "is killed"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			h, p, root := unkillable(t, tcp(), tcp().do("event ready", "hold"), tcp())
			answer := p.begin(root)
			s := h.proc()
			s.at("event ready")
			network, address := p.addr(0)
			c, err := net.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			// The time that a successor has for this is 5 s.
			if err := c.SetDeadline(time.Now().Add(6 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("who\n")); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(make([]byte, 64)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("%d bytes, %v; want that nobody answers", n, err)
			}
			if s := proctest.State(t, s.pid); s == "" || s == "Z" {
				t.Fatal("the successor has ended")
			}
			answers := s
			if end == "serves" {
				s.resume()
				if m := answer(); m.Err != nil {
					t.Fatalf("upgrade: %+v", m.Err)
				}
			} else {
				s.kill()
				checkErr(t, answer().Err, "handover", "unexpected EOF")
				reaped(t, s.pid)
				answers = p
			}
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			var pid, generation int
			if _, err := fmt.Fscan(c, &pid, &generation); err != nil || pid != answers.pid {
				t.Fatalf("process %d answers, %v; want %d", pid, err, answers.pid)
			}
			answers.serves()
			answers.upgrade().serves()
		})
	}
}

func TestProbationKilled(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.probation(time.Minute), plain)
	p := h.serving()
	l := startCrashLoad(t, p.list())
	for range 3 {
		l.more(20)
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		s.at("serving")
		s.serves()
		s.hasPIDFile()
		l.more(20)
		s.kill()
		checkErr(t, answer().Err, "probation", "unexpected EOF")
		reaped(t, s.pid)
		p.serves()
		p.hasPIDFile()
	}
	l.more(20)
	l.check(3 * 2)
	_ = p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("serving")
	s.serves()
	// The end of the old one, which stands by, makes it final.
	p.kill()
	s.serves()
	s.hasPIDFile()
	h.hasFiles("pid", "sock")
	s.upgrade().serves()
}

// A successor that is stopped in its probation has not failed.
func TestProbationStopped(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.probation(time.Minute), plain)
	p := h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("serving")
	begun := time.Now()
	s.call("stop")
	h.hasFiles()
	if m := answer(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	if d := time.Since(begun); d > patience/2 {
		t.Errorf("Upgrade returned %v after the stop", d)
	}
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	p.refuses()
	if m := p.call("exited"); m.Text[0] != "yes" {
		t.Error("Exit of the old process is not closed")
	}
	checkErr(t, p.call("upgrade").Err, "", "ErrUpgraded")
	checkErr(t, s.call("upgrade").Err, "", "ErrStopped")
	h.none()
}

// A successor that does nothing has not ended.
func TestProbationPaused(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.probation(time.Second), plain)
	p := h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("serving")
	if err := s.os.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	m := answer()
	if err := s.os.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	s.serves()
	s.upgrade().serves()
}

func TestProbationLimits(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	plain.Listen = append(plain.Listen, [2]string{"unix", filepath.Join(h.dir, "sock2")})
	h.next(plain.probation(time.Minute), plain)
	p := h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("serving")
	checkErr(t, s.call("upgrade").Err, "", "ErrInProgress")
	checkErr(t, p.call("upgrade").Err, "", "ErrInProgress")
	s.hasEvents()
	if m := s.call("close", "2"); m.Err != nil {
		t.Fatalf("Close: %+v", m.Err)
	}
	h.hasFiles("pid", "sock", "sock2") // the old one may need it again
	s.kill()
	checkErr(t, answer().Err, "probation", "unexpected EOF")
	p.serves() // at all three

	_ = p.begin(command{Verb: "upgrade"})
	s = h.proc()
	s.at("serving")
	checkErr(t, s.call("upgrade").Err, "", "ErrInProgress")
	p.kill() // final
	if m := s.call("close", "2"); m.Err != nil {
		t.Fatalf("Close: %+v", m.Err)
	}
	h.hasFiles("pid", "sock")
	s2 := s.upgrade()
	s2.serves()
	h.none()
}
