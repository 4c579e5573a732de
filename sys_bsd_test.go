//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package ecdysis

import (
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A child that kqueue refuses to watch is seen to exit, and is not killed by a
// number that may be another's by then. One that is not a child is left to its
// stream.
func TestWatchRefused(t *testing.T) {
	become(t, &systemKevent, func(int, []unix.Kevent_t, []unix.Kevent_t, *unix.Timespec) (int, error) {
		return -1, unix.EACCES
	})
	c := exec.Command("cat") // until its input ends
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var w, other watch
	w.begin(c.Process.Pid)
	defer w.close()
	other.find(c.Process.Pid)
	defer other.close()
	if w.exited(0) {
		t.Error("a child that runs is taken to have exited")
	}
	if done, err := w.kill(); done || err != nil {
		t.Errorf("kill of a child that runs: %v, %v; want it left to the caller", done, err)
	}
	stdin.Close()
	if !w.exited(20 * time.Second) {
		t.Error("a child that has exited is not seen to have")
	}
	if done, err := w.kill(); !done || err != nil {
		t.Errorf("kill of a child that was reaped: %v, %v; want that there is nothing left to do", done, err)
	}
	if other.exited(0) {
		t.Error("a process that cannot be watched is taken to have exited")
	}
}
