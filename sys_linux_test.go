package ecdysis

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
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

// A directory that is closed to the user that the thread has become cannot be
// entered, although it is there.
func TestEnterable(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := enterable(dir); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine, as another user
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- enterable(dir)
	}()
	if err := <-done; err != unix.EACCES {
		t.Errorf("%v; want EACCES", err)
	}
	if err := enterable(os.Args[0]); err != unix.ENOTDIR {
		t.Errorf("%v; want ENOTDIR", err)
	}
}

// A socket file that this user may not connect to is not said to be another
// process's, and stays.
func TestStaleFileOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	dir, err := os.MkdirTemp("", "ecd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := dir + "/sock"
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if err := errors.Join(os.Chmod(dir, 0o777), os.Chmod(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	a, err := resolve("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine, as another user
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- a.removeStale()
	}()
	if err := <-done; !errors.Is(err, unix.EACCES) || !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "cannot be told") {
		t.Errorf("%v; want EADDRINUSE and EACCES, and that it cannot be told", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}
