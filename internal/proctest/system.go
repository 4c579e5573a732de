package proctest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What the system says about processes. These need Linux's /proc.

// State is the state of a process as ps(1) shows it, such as "S" or "Z", or ""
// if there is none with this ID.
func State(t testing.TB, pid int) string {
	t.Helper()
	f := stat(pid)
	if f == nil {
		return ""
	}
	return f[0]
}

// stat returns the fields of /proc/PID/stat that follow the name.
func stat(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// "pid (name) state ppid …", and the name may hold anything.
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
}

// Reaped fails the test unless nothing is left of p.
func (p *Proc) Reaped() {
	p.T.Helper()
	if s := State(p.T, p.Process.Pid); s != "" {
		p.T.Fatalf("process %d is there still, in state %s", p.PID, s)
	}
}

// Zombie returns when p has ended with all of its threads. Its parent must not
// have noticed.
func (p *Proc) Zombie() {
	p.T.Helper()
	p.until("a zombie", func() bool { return State(p.T, p.Process.Pid) == "Z" && threads(p.Process.Pid) == 1 })
}

// Closed returns when p has ended and everything that it had is closed. Ended
// may return earlier.
func (p *Proc) Closed() {
	p.T.Helper()
	p.Ended()
	p.until("gone", func() bool {
		s := State(p.T, p.Process.Pid)
		return s == "" || s == "Z" && threads(p.Process.Pid) <= 1
	})
}

// threads counts a process's threads. Of a zombie the others may still run.
func threads(pid int) int {
	list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return len(list)
}

// until looks again and again, because the system tells of no such event.
func (p *Proc) until(what string, f func() bool) {
	p.T.Helper()
	for end := time.Now().Add(Patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.T.Fatalf("process %d is in state %q; want it %s", p.PID, State(p.T, p.Process.Pid), what)
		}
	}
}

// Children lists p's children, with their states. Those that have ended and
// were not reaped are among them.
func (p *Proc) Children() (list []string) {
	p.T.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil || len(all) == 0 {
		p.T.Skip("needs /proc")
	}
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if f := stat(pid); f != nil && f[1] == strconv.Itoa(p.PID) {
			list = append(list, fmt.Sprint(pid, " ", f[0]))
		}
	}
	return list
}

// Parent returns the ID of p's parent.
func (p *Proc) Parent() int {
	p.T.Helper()
	f := stat(p.PID)
	if f == nil {
		p.T.Skip("needs /proc")
	}
	n, err := strconv.Atoi(f[1])
	if err != nil {
		p.T.Fatal(err)
	}
	return n
}

// Goroutines counts p's goroutines.
func (p *Proc) Goroutines() int { p.T.Helper(); return callGoroutines.On(p) }

// Keeps returns a function that fails the test unless p has the descriptors
// and goroutines, and has no more children, than it has now. It waits, because
// those that serve a client or this test may be about to end.
func (p *Proc) Keeps() (check func()) {
	p.T.Helper()
	fds, goroutines, children := p.FDs(), p.Goroutines(), p.Children()
	return func() {
		p.T.Helper()
		var fdsNow, childrenNow []string
		var goroutinesNow int
		for end := time.Now().Add(Patience / 4); time.Now().Before(end); time.Sleep(time.Millisecond) {
			fdsNow, goroutinesNow, childrenNow = p.FDs(), p.Goroutines(), p.Children()
			if slices.Equal(fdsNow, fds) && goroutinesNow == goroutines && len(childrenNow) <= len(children) {
				return
			}
		}
		p.T.Errorf("process %d has descriptors %q, %d goroutines and children %q; before: %q, %d and %q",
			p.PID, fdsNow, goroutinesNow, childrenNow, fds, goroutines, children)
	}
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
