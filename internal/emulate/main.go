//go:build linux

// Command emulate is the first process of the machines in which .ci/emulate
// runs the tests. It mounts what the tests need, runs each program in /test, and
// switches the machine off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"tmpfs", "/dev/shm"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	if err := loopback(); err != nil {
		return err
	}
	for name, value := range map[string]string{"PATH": "/bin", "HOME": "/tmp", "TMPDIR": "/tmp"} {
		os.Setenv(name, value)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Printf("emulate: Linux %s on %s\n", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]))
	programs, err := filepath.Glob("/test/*.test")
	if err != nil {
		return err
	}
	for _, path := range programs {
		name := filepath.Base(path)
		cmd := exec.Command(path, os.Args[1:]...)
		cmd.Dir = "/src/" + name // where a package's files are
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		began := time.Now()
		result := "ok"
		if err := cmd.Run(); err != nil {
			result = "FAIL " + err.Error()
		}
		fmt.Printf("emulate: %s: %s (%.0fs)\n", name, result, time.Since(began).Seconds())
	}
	fmt.Println("emulate: done")
	return nil
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
