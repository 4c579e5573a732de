package ecdysis

import (
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// A process that is no child of this one and for which there is no pidfd is
// left to its stream: it is not killed, and nothing is said of its end.
func TestNoPidfd(t *testing.T) {
	c := exec.Command("cat") // until its input ends
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{unix.EPERM, unix.ENOSYS} {
		become(t, &pidfdOpen, func(int, int) (int, error) { return -1, err })
		found := foundChild(c.Process.Pid)
		defer found.release()
		if found.watched() || found.exited(0) {
			t.Errorf("%v: watched: %v; exited: %v; want neither", err, found.watched(), found.exited(0))
		}
		if err := found.kill(); err == nil {
			t.Error("a process that the system does not name was killed")
		}
	}
	stdin.Close()
	if err := c.Wait(); err != nil {
		t.Errorf("it ended by %v", err)
	}
	become(t, &pidfdOpen, func(int, int) (int, error) { return -1, unix.ESRCH })
	gone := foundChild(c.Process.Pid)
	defer gone.release()
	if !gone.watched() || !gone.exited(0) {
		t.Error("a process that has gone is not seen to have")
	}
}
