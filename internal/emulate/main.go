//go:build linux

// Command emulate is the first process of the machines in which .ci/emulate
// runs the tests. It mounts what the tests need, installs busybox's commands,
// runs each test program in /src with the arguments in /arguments, and switches
// the machine off.
package main

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("emulate:", err)
	}
	unix.Sync()
	time.Sleep(time.Second) // until the console has shown it all
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"devpts", "/dev/pts"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"tmpfs", "/dev/shm"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		if err := os.Symlink(fmt.Sprint("/proc/self/fd/", i), "/dev/"+name); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/self/fd", "/dev/fd"); err != nil {
		return err
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	if err := os.Mkdir("/mnt", 0o755); err != nil {
		return err
	}
	// The limits that programs find under Debian's own first process.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 512 << 10}); err != nil {
		return err
	}
	if err := loopback(); err != nil {
		return err
	}
	for name, value := range map[string]string{"PATH": "/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "PROCTEST_PATIENCE": "5m"} {
		os.Setenv(name, value)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Printf("emulate: Linux %s on %s\n", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]))
	if out, err := exec.Command("/bin/busybox", "--install", "-s", "/bin").CombinedOutput(); err != nil {
		return fmt.Errorf("busybox: %w: %s", err, out)
	}
	arguments, err := os.ReadFile("/arguments")
	if err != nil {
		return err
	}
	err = filepath.WalkDir("/src", func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".test" {
			test(path, strings.Fields(string(arguments)))
		}
		return err
	})
	if err != nil {
		return err
	}
	fmt.Println("emulate: done")
	return nil
}

// test runs a test program and prints its result.
func test(path string, arguments []string) {
	name := filepath.Base(path)
	began := time.Now()
	cmd := exec.Command(path, append([]string{"-test.v"}, arguments...)...)
	cmd.Dir = filepath.Dir(path) // where the package's files are
	r, w, err := os.Pipe()
	if err != nil {
		fmt.Printf("emulate: %s: FAIL %v\n", name, err)
		return
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	o := output{counts: make(map[string]int)}
	if err == nil {
		// The wait below is for the program, not for the end of its output: a process
		// that a test has left behind may still have a copy of w.
		read := make(chan struct{})
		go func() {
			defer close(read)
			for lines := bufio.NewScanner(r); lines.Scan(); {
				o.line(lines.Text())
			}
		}()
		err = reapUntil(cmd.Process.Pid)
		r.SetReadDeadline(time.Now().Add(10 * time.Second))
		<-read
	}
	result := "ok"
	if err != nil {
		result = "FAIL " + err.Error()
	}
	fmt.Printf("emulate: %s: %s, %d passed, %d skipped, %d failed (%.0fs)\n", name, result,
		o.counts["PASS"], o.counts["SKIP"], o.counts["FAIL"], time.Since(began).Seconds())
}

// reapUntil returns when this child has ended, with an error if it has failed.
// Meanwhile it reaps the processes that have lost their parents, and tells of
// those that have crashed, because nobody else sees that.
func reapUntil(child int) error {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("wait4", err)
		case pid == child && status.Signaled():
			return fmt.Errorf("signal: %v", status.Signal())
		case pid == child && status.ExitStatus() != 0:
			return fmt.Errorf("exit status %d", status.ExitStatus())
		case pid == child:
			return nil
		case status.Signaled() && status.Signal() != unix.SIGKILL: // by which tests end what they leave behind
			fmt.Printf("emulate: process %d, an orphan: signal: %v\n", pid, status.Signal())
		}
	}
}

// An output is that of a test program with -test.v.
type output struct {
	heading string         // the last line that says whose lines follow, if it was not printed
	counts  map[string]int // of the tests, by result
}

// line prints a line, but no heading without anything below it, and no part of a
// test that has passed.
func (o *output) line(s string) {
	if strings.HasPrefix(s, "=== ") {
		o.heading = s
		return
	}
	if result, _, ok := strings.Cut(strings.TrimPrefix(s, "--- "), ":"); ok && strings.HasPrefix(s, "--- ") {
		o.counts[result]++
	} else if rest := strings.TrimSpace(s); strings.HasPrefix(rest, "--- PASS") {
		return
	} else if o.heading != "" && s != rest && !strings.HasPrefix(rest, "--- ") {
		fmt.Println(o.heading)
		o.heading = ""
	}
	fmt.Println(s)
}

// loopback makes 127.0.0.1 and ::1 reachable.
func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}
