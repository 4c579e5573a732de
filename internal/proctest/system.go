package proctest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// This file asks the system about processes, by /proc on Linux and ps(1) elsewhere.

// A process is one of the system's processes.
type process struct {
	pid, parent int
	state       string // its first letter, as ps(1) shows it
	threads     int    // 1 if the system does not tell; other threads of a zombie may still run
}

// stateOf returns the state of a process as ps(1) shows it, such as "S" or "Z", or ""
// if there is none with this ID.
func stateOf(pid int) string {
	p, _ := look(pid)
	return p.state
}

// IsZombie reports whether a process has ended with all of its threads and was not
// reaped.
func IsZombie(pid int) bool {
	p, ok := look(pid)
	return ok && p.state == "Z" && p.threads == 1
}

// ChildrenOf lists a process's children with their states, including those that
// have ended and were not reaped.
func ChildrenOf(t testing.TB, pid int) (list []string) {
	t.Helper()
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.parent == pid {
			list = append(list, fmt.Sprint(c.pid, " ", c.state))
		}
	}
	return list
}

// ParentOf returns the ID of a process's parent.
func ParentOf(t testing.TB, pid int) int {
	t.Helper()
	p, ok := look(pid)
	if !ok {
		t.Fatalf("process %d is not there", pid)
	}
	return p.parent
}

// OpenFDs lists the descriptors of this process, each with its number and the
// system's description.
func OpenFDs() []string { return openFDs() }

// Reaped fails the test unless p has ended and was reaped.
func (p *Proc) Reaped() {
	p.T.Helper()
	if s := stateOf(p.Process.Pid); s != "" {
		p.T.Fatalf("process %d is there still, in state %s", p.PID, s)
	}
}

// Zombie returns when p has ended with all of its threads. Its parent must not have
// reaped it.
func (p *Proc) Zombie() {
	p.T.Helper()
	p.until("a zombie", func() bool { return IsZombie(p.Process.Pid) })
}

// Closed returns when p has ended and everything that it had is closed. Ended
// may return earlier.
func (p *Proc) Closed() {
	p.T.Helper()
	p.Ended()
	p.until("gone", func() bool {
		s, ok := look(p.Process.Pid)
		return !ok || s.state == "Z" && s.threads <= 1
	})
}

// until polls, because the system reports no event.
func (p *Proc) until(what string, f func() bool) {
	p.T.Helper()
	for end := time.Now().Add(Patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.T.Fatalf("process %d is in state %q; want it %s", p.PID, stateOf(p.Process.Pid), what)
		}
	}
}

// Children is ChildrenOf p.
func (p *Proc) Children() []string { p.T.Helper(); return ChildrenOf(p.T, p.Process.Pid) }

// Parent is ParentOf p.
func (p *Proc) Parent() int { p.T.Helper(); return ParentOf(p.T, p.Process.Pid) }

// Goroutines counts p's goroutines.
func (p *Proc) Goroutines() int { p.T.Helper(); return callGoroutines.On(p) }

// Keeps returns a function that fails the test unless p has the descriptors that it
// has now, and no more children and goroutines. It waits only for goroutines, which
// may be about to end. So it notices descriptors that are left to the garbage
// collector. p must have no clients; see KeepsWithClients.
func (p *Proc) Keeps() (check func()) {
	p.T.Helper()
	return p.keeps(slices.Equal)
}

// KeepsWithClients is Keeps for a process with clients. They must have gone at the
// time of the check. It also waits for sockets, because p may be about to notice
// that.
func (p *Proc) KeepsWithClients() (check func()) {
	p.T.Helper()
	return p.keeps(func(a, b []string) bool { return slices.Equal(noSockets(a), noSockets(b)) })
}

func (p *Proc) keeps(atOnce func(now, before []string) bool) (check func()) {
	p.T.Helper()
	fds, goroutines, children := p.FDs(), p.Goroutines(), p.Children()
	return func() {
		p.T.Helper()
		now := p.FDs()
		if !atOnce(now, fds) {
			p.T.Errorf("process %d has descriptors %q; before: %q", p.PID, now, fds)
		}
		if list := p.Children(); len(list) > len(children) {
			p.T.Errorf("process %d has children %q; before: %q", p.PID, list, children)
		}
		n := p.Goroutines()
		for end := time.Now().Add(Patience / 4); time.Now().Before(end) && (n > goroutines || !slices.Equal(now, fds)); time.Sleep(time.Millisecond) {
			n, now = p.Goroutines(), p.FDs()
		}
		if n > goroutines || !slices.Equal(now, fds) {
			p.T.Errorf("process %d has %d goroutines and descriptors %q; before: %d and %q", p.PID, n, now, goroutines, fds)
		}
	}
}

// KeepsFiles returns a function that fails the test unless p has the descriptors
// that it has now, without regard to sockets. It does not wait, and p may serve
// clients.
func (p *Proc) KeepsFiles() (check func()) {
	p.T.Helper()
	before := noSockets(p.FDs())
	return func() {
		p.T.Helper()
		if now := noSockets(p.FDs()); !slices.Equal(now, before) {
			p.T.Errorf("process %d has, sockets aside, descriptors %q; before: %q", p.PID, now, before)
		}
	}
}

// noSockets removes the descriptors that openFDs describes as sockets, on any
// system.
func noSockets(fds []string) []string {
	return slices.DeleteFunc(slices.Clone(fds), func(s string) bool {
		return strings.Contains(s, " socket:") || strings.Contains(s, " mode 14")
	})
}

// SameFile returns a function that fails the test unless the path leads to the
// file to which it leads now.
func SameFile(t testing.TB, path string) (check func()) {
	t.Helper()
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if now, err := os.Lstat(path); err != nil || !os.SameFile(before, now) {
			t.Errorf("%s is another file than it was, or none: %v", path, err)
		}
	}
}
