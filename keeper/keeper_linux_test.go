package keeper_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/keeper"
	"golang.org/x/sys/unix"
)

// The tests run the test binary again, as a daemon that calls Stay. Its log
// tells what happens. A generation that gets SIGUSR2 does what the file "do" in
// its directory says.

const (
	dirVar     = "KEEPER_TEST_DIR"
	initVar    = "KEEPER_TEST_INIT"
	rootVar    = "KEEPER_TEST_ROOT"
	siblingVar = "KEEPER_TEST_SIBLING"
)

var patience = proctest.Patience

func TestMain(m *testing.M) {
	if os.Getenv(dirVar) == "" {
		os.Exit(m.Run())
	}
	if os.Getenv(initVar) != "" { // PID 1 of a namespace, which needs its own /proc
		os.Unsetenv(initVar)
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fatal(err)
		}
		root := os.Getenv(rootVar)
		if err := unix.Mount("proc", root+"/proc", "proc", 0, ""); err != nil {
			fatal(err)
		}
		if root != "" {
			if err := errors.Join(unix.Chroot(root), os.Chdir("/")); err != nil {
				fatal(err)
			}
			fatal(syscall.Exec(os.Args[1], os.Args[1:], nil))
		}
		fatal(syscall.Exec(os.Args[0], os.Args, os.Environ()))
	}
	serve(os.Getenv(dirVar))
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "fatal:", err)
	os.Exit(9)
}

func serve(dir string) {
	if os.Getenv("GOTRACEBACK") == "crash" { // allow a core as well
		var core unix.Rlimit
		_ = unix.Getrlimit(unix.RLIMIT_CORE, &core)
		core.Cur = core.Max
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &core)
	}
	pidFile := filepath.Join(dir, "pid")
	if _, err := os.Stat(filepath.Join(dir, "late")); err == nil && strings.HasPrefix(os.Getenv("ECDYSIS_KEEPER"), "child") {
		fmt.Fprintln(os.Stderr, "the child has begun")
		for err == nil {
			time.Sleep(5 * time.Millisecond)
			_, err = os.Stat(filepath.Join(dir, "late"))
		}
	}
	if err := keeper.Stay(pidFile); err != nil {
		fatal(err)
	}
	say := func(format string, a ...any) {
		fmt.Fprintf(os.Stderr, "%d: %s\n", os.Getpid(), fmt.Sprintf(format, a...))
	}
	probation := time.Duration(0)
	if _, err := os.Stat(filepath.Join(dir, "probation")); err == nil {
		probation = time.Minute
	}
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        pidFile,
		Probation:      probation,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, syscall.SIGINT},
		UpgradeSocket:  filepath.Join(dir, "upgrade"),
		StopSocket:     filepath.Join(dir, "stop"),
		Prepare: func(c *ecdysis.Command) error {
			c.Sibling = os.Getenv(siblingVar) != ""
			return nil
		},
		Notify: func(e ecdysis.Event) { say("%s", e) },
	})
	if err != nil {
		fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "fail")); err == nil {
		fatal(u.Fail(errors.New("planned")))
	}
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fatal(u.Fail(err))
	}
	got := make(chan os.Signal, 10)
	signal.Notify(got, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGALRM, syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGIO, syscall.Signal(40))
	go func() {
		for s := range got {
			switch s {
			case syscall.SIGUSR2:
				act(dir, say)
			case syscall.SIGIO:
				fatal(errors.New("got what was for the keeper"))
			}
			say("got %d", s)
		}
	}()
	if err := u.Ready(); err != nil {
		fatal(err)
	}
	say("serving %s in group %d env %q", ln.Addr(), unix.Getpgrp(), os.Getenv("ECDYSIS_KEEPER"))
	u.Wait()
	for { // drain until the test removes the file
		if _, err := os.Stat(filepath.Join(dir, "hold")); err != nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// act does what the file "do" says.
func act(dir string, say func(string, ...any)) {
	b, _ := os.ReadFile(filepath.Join(dir, "do"))
	verb, arg, _ := strings.Cut(string(b), " ")
	n, _ := strconv.Atoi(arg)
	switch verb {
	case "exit":
		os.Exit(n)
	case "die":
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
		signal.Reset()
		_ = unix.Kill(os.Getpid(), syscall.Signal(n))
		select {}
	case "orphan": // a shell leaves a process without a parent, and that process ends
		out, err := exec.Command("/bin/sh", "-c", "sleep 0.05 >/dev/null 2>&1 & echo $!").Output()
		say("orphan %s %v", strings.TrimSpace(string(out)), err)
	}
}

// A run is a keeper and its generations.
type run struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string
	path  string
	lines chan string
}

func start(t *testing.T, change ...func(*exec.Cmd)) *run {
	t.Helper()
	dir, err := os.MkdirTemp("", "keeper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &run{t: t, dir: dir, path: filepath.Join(dir, "daemon"), lines: make(chan string, 100000)}
	r.install()
	r.cmd = exec.Command(r.path)
	r.cmd.Dir = dir
	r.cmd.Env = append(os.Environ(), dirVar+"="+dir, "GORACE=atexit_sleep_ms=0") // the race detector would sleep for a second
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = pw
	for _, f := range change {
		f(r.cmd)
	}
	err = r.cmd.Start()
	for end := time.Now().Add(patience); errors.Is(err, syscall.ETXTBSY) && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond) // a child that another test forks has the program's copy open for writing
		c := exec.Command(r.cmd.Path)
		c.Args, c.Dir, c.Env, c.Stdin, c.Stderr, c.ExtraFiles, c.SysProcAttr = r.cmd.Args, r.cmd.Dir, r.cmd.Env, r.cmd.Stdin, r.cmd.Stderr, r.cmd.ExtraFiles, r.cmd.SysProcAttr
		r.cmd = c
		err = c.Start()
	}
	if err != nil {
		pw.Close()
		pr.Close()
		if r.cmd.SysProcAttr != nil && r.cmd.SysProcAttr.Cloneflags != 0 {
			t.Skip("no namespaces can be made here: ", err)
		}
		t.Fatal(err)
	}
	pw.Close()
	go func() {
		defer pr.Close()
		defer close(r.lines)
		for s := bufio.NewScanner(pr); s.Scan(); {
			r.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		r.unset("hold")
		if b, err := os.ReadFile(filepath.Join(dir, "pid")); err == nil && (r.cmd.SysProcAttr == nil || r.cmd.SysProcAttr.Cloneflags == 0) {
			if pid, _ := strconv.Atoi(strings.TrimSpace(string(b))); pid > 0 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		for range r.lines {
		}
	})
	return r
}

// install puts a copy of the program in its place, by a rename.
func (r *run) install() {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(r.path+".new", b, 0o755)
	}
	if err == nil {
		err = os.Rename(r.path+".new", r.path)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) set(name, text string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) unset(name string) { _ = os.Remove(filepath.Join(r.dir, name)) }

// expect waits for a line that matches, and returns its submatches.
func (r *run) expect(pattern string) []string {
	r.t.Helper()
	re := regexp.MustCompile(pattern)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	var seen []string
	for {
		select {
		case line, ok := <-r.lines:
			if m := re.FindStringSubmatch(line); m != nil {
				return m
			}
			if seen = append(seen, line); !ok {
				r.t.Fatalf("ended without %q:\n%s", pattern, strings.Join(seen, "\n"))
			}
		case <-timer.C:
			r.t.Fatalf("no %q:\n%s", pattern, strings.Join(seen, "\n"))
		}
	}
}

// serving waits for the next generation, and returns its PID and address.
func (r *run) serving() (string, string) {
	r.t.Helper()
	m := r.expect(`^(\d+): serving (\S+) in group \d+ env ""$`)
	return m[1], m[2]
}

func (r *run) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// upgrade returns when the next generation serves and its predecessor knows it.
func (r *run) upgrade() (pid, addr string) {
	r.t.Helper()
	r.signal(syscall.SIGHUP)
	for range 2 { // the two lines come in either order
		if m := r.expect(`: upgraded by |^(\d+): serving (\S+) in group \d+ env ""$`); m[1] != "" {
			pid, addr = m[1], m[2]
		}
	}
	return pid, addr
}

// reached returns the PID of the generation that a signal reaches.
func (r *run) reached(s syscall.Signal) string {
	r.t.Helper()
	r.signal(s)
	return r.expect(`^(\d+): got ` + strconv.Itoa(int(s)) + "$")[1]
}

// end waits for the keeper and returns its status.
func (r *run) end() syscall.WaitStatus {
	r.t.Helper()
	done := make(chan struct{})
	go func() { _ = r.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		r.t.Fatal("the keeper does not exit")
	}
	return r.cmd.ProcessState.Sys().(syscall.WaitStatus)
}

// crashing makes SIGABRT kill the process. Otherwise Go exits with status 2.
func crashing(c *exec.Cmd) { c.Env = append(c.Env, "GOTRACEBACK=crash") }

func sibling(c *exec.Cmd) { c.Env = append(c.Env, siblingVar+"=1") }

func namespaced(c *exec.Cmd) {
	c.Env = append(c.Env, initVar+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if uid := os.Getuid(); uid != 0 {
		c.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		c.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		c.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
}

var modes = map[string][]func(*exec.Cmd){
	"child": nil, "sibling": {sibling}, "PID 1": {namespaced}, "PID 1, sibling": {namespaced, sibling},
}

// Five generations follow each other. Each gets the signals, all serve one
// address, and the keeper exits with the status of the last.
func TestGenerations(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, mode...)
			pid, addr := r.serving()
			for range 4 {
				for _, s := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGWINCH, syscall.SIGALRM, 40} {
					if got := r.reached(s); got != pid {
						t.Fatalf("signal %d reached %s; want %s", s, got, pid)
					}
				}
				next, a := r.upgrade()
				if next == pid || a != addr {
					t.Fatalf("after %s at %s: %s at %s", pid, addr, next, a)
				}
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
				pid = next
			}
			r.set("do", "exit 7")
			r.signal(syscall.SIGUSR2)
			if s := r.end(); s.ExitStatus() != 7 {
				t.Fatalf("keeper: %v; want exit status 7", r.cmd.ProcessState)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGKILL, syscall.SIGHUP, syscall.SIGABRT} {
		for name, mode := range modes {
			t.Run(fmt.Sprint(s, " ", name), func(t *testing.T) {
				t.Parallel()
				r := start(t, append(mode[:len(mode):len(mode)], crashing)...)
				r.serving()
				r.upgrade()
				r.set("do", "die "+strconv.Itoa(int(s)))
				r.signal(syscall.SIGUSR2)
				got := r.end()
				if strings.HasPrefix(name, "PID 1") {
					if got.ExitStatus() != 128+int(s) {
						t.Fatalf("PID 1: %v; want exit status %d", r.cmd.ProcessState, 128+s)
					}
				} else if !got.Signaled() || got.Signal() != s || got.CoreDump() {
					t.Fatalf("keeper: %v; want death by %v", r.cmd.ProcessState, s)
				}
			})
		}
	}
}

// The youngest of three generations ends while the older ones have clients.
// Upgrades are requested by control sockets, so the keeper learns of the second
// generation only from the PID file.
func TestDraining(t *testing.T) {
	t.Parallel()
	r := start(t, sibling)
	r.serving()
	r.set("hold", "")
	request := func(socket string) {
		t.Helper()
		if _, err := ecdysis.Request(t.Context(), filepath.Join(r.dir, socket)); err != nil {
			t.Fatal(err)
		}
	}
	request("upgrade")
	second, _ := r.serving()
	r.idle()
	request("upgrade")
	last, _ := r.serving()
	r.idle()
	stop, err := net.Dial("unix", filepath.Join(r.dir, "stop"))
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	if _, err := bufio.NewReader(stop).ReadString('\n'); err != nil { // the answer comes first, and the connection ends with the process
		t.Fatal(err)
	}
	if got := r.reached(syscall.SIGUSR1); got != last {
		t.Fatalf("signal reached %s; want %s, which drains", got, last)
	}
	r.set("do", "exit 5")
	r.signal(syscall.SIGUSR2) // the youngest generation ends, and the older ones still drain
	if got := r.reachedAfter(last); got != second {
		t.Fatalf("signal reached %s; want %s, the youngest generation left", got, second)
	}
	r.unset("hold")
	if s := r.end(); s.ExitStatus() != 5 {
		t.Fatalf("keeper: %v; want exit status 5, that of the youngest generation", r.cmd.ProcessState)
	}
}

// idle returns when the keeper waits for signals, and has acted on all earlier
// ones.
func (r *run) idle() {
	r.t.Helper()
	if _, err := os.ReadFile("/proc/self/syscall"); err != nil {
		r.t.Skip("the kernel does not tell what a process waits in: ", err)
	}
	proc := fmt.Sprintf("/proc/%d/", r.cmd.Process.Pid)
	eventually(r.t, "the keeper reads its signalfd", func() bool {
		want := "no such system call"
		fds, _ := filepath.Glob(proc + "fd/*")
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); to == "anon_inode:[signalfd]" {
				n, _ := strconv.Atoi(filepath.Base(fd))
				want = fmt.Sprintf("%d %#x ", unix.SYS_READ, n)
			}
		}
		tasks, _ := filepath.Glob(proc + "task/*/syscall")
		for _, task := range tasks {
			b, _ := os.ReadFile(task)
			if strings.HasPrefix(string(b), want) { // the file says "running" if there is anything to read
				return true
			}
		}
		return false
	})
}

// reachedAfter sends s until a process other than pid, which is ending, gets it.
func (r *run) reachedAfter(pid string) string {
	r.t.Helper()
	for range 1000 {
		r.signal(syscall.SIGUSR1)
		select {
		case line := <-r.lines:
			if p, _, ok := strings.Cut(line, ": "+got(syscall.SIGUSR1)); ok && p != pid {
				return p
			}
		case <-time.After(20 * time.Millisecond):
		}
	}
	r.t.Fatal("no older generation gets a signal")
	return ""
}

func TestFailures(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, mode...)
			first, _ := r.serving()
			r.set("fail", "")
			r.signal(syscall.SIGHUP)
			r.expect("upgrade failed")
			if got := r.reached(syscall.SIGUSR1); got != first {
				t.Fatalf("after a failed upgrade: signal reached %s; want %s", got, first)
			}
			r.unset("fail")
			r.set("probation", "")
			second, _ := r.upgrade()
			r.signal(syscall.SIGHUP) // the next generation is on probation
			third, _ := r.serving()
			if got := r.reached(syscall.SIGUSR1); got != third {
				t.Fatalf("on probation: signal reached %s; want %s", got, third)
			}
			r.set("do", "exit 6")
			r.signal(syscall.SIGUSR2)
			r.expect("upgrade failed")
			if got := r.reached(syscall.SIGUSR1); got != second {
				t.Fatalf("after a probation: signal reached %s; want %s", got, second)
			}
			r.signal(syscall.SIGTERM)
			if s := r.end(); s.ExitStatus() != 0 {
				t.Fatalf("keeper: %v; want 0", r.cmd.ProcessState)
			}
		})
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// runs reports whether the process runs the program that is at path now.
func runs(t *testing.T, pid int, path string) bool {
	t.Helper()
	var st unix.Stat_t
	// The link is missing for a moment while a thread other than the first
	// executes a program.
	return unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st) == nil && st.Ino == inode(t, path)
}

// eventually waits for a change in another process that no event reports.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within ", patience, ": ", what)
		}
	}
}

func TestRenewed(t *testing.T) {
	t.Parallel()
	r := start(t, sibling)
	r.serving()
	proc := fmt.Sprintf("/proc/%d/", r.cmd.Process.Pid)
	before := inode(t, proc+"exe")
	r.install()
	r.set("fail", "") // the keeper must not run a version that fails
	r.signal(syscall.SIGHUP)
	r.expect("upgrade failed")
	r.reached(syscall.SIGUSR1)
	if inode(t, proc+"exe") != before {
		t.Fatal("the keeper runs a program that has failed")
	}
	r.unset("fail")
	r.set("probation", "") // the second generation will resume after the third
	second, _ := r.upgrade()
	eventually(t, "the keeper runs the new program", func() bool { return runs(t, r.cmd.Process.Pid, r.path) })
	before = inode(t, proc+"exe")
	r.install()
	r.signal(syscall.SIGHUP)
	r.serving()
	r.reached(syscall.SIGUSR1)
	if inode(t, proc+"exe") != before {
		t.Fatal("the keeper runs a program that is on probation")
	}
	r.set("do", "exit 6")
	r.signal(syscall.SIGUSR2)
	r.expect("upgrade failed")
	r.unset("probation")
	r.signal(syscall.SIGHUP)
	r.serving()
	n, _ := strconv.Atoi(second)
	if err := unix.Kill(n, unix.SIGKILL); err != nil { // otherwise it would stand by for a minute
		t.Fatal(err)
	}
	eventually(t, "the keeper runs the new program", func() bool { return runs(t, r.cmd.Process.Pid, r.path) })
	r.upgrade()
	r.set("do", "die 1")
	r.signal(syscall.SIGUSR2)
	if s := r.end(); !s.Signaled() || s.Signal() != syscall.SIGHUP {
		t.Fatalf("keeper: %v; want death by SIGHUP", r.cmd.ProcessState)
	}
}

// No signal is lost, and none ends the keeper, while it replaces its program.
// The Go runtime unblocks some signals when the new program starts.
func TestRenewedUnderSignals(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, mode...)
			r.serving()
			for range 5 {
				r.install()
				pid, _ := r.upgrade()
				for renewed := false; !renewed; {
					renewed = runs(t, r.cmd.Process.Pid, r.path)
					for _, s := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGUSR1, 40} {
						if got := r.reached(s); got != pid {
							t.Fatalf("signal %d reached %s; want %s", s, got, pid)
						}
					}
				}
			}
			r.signal(syscall.SIGTERM)
			if s := r.end(); s.ExitStatus() != 0 || s.Signaled() {
				t.Fatalf("keeper: %v; want exit status 0", r.cmd.ProcessState)
			}
		})
	}
}

func TestHoldsNothing(t *testing.T) {
	t.Parallel()
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	r := start(t, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{pr} })
	pid, _ := r.serving()
	extra, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", pr.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	fds := func(pid string) (list []string) {
		dir, _ := filepath.Glob("/proc/" + pid + "/fd/*")
		for _, f := range dir {
			to, _ := os.Readlink(f)
			list = append(list, to)
		}
		return list
	}
	if !strings.Contains(strings.Join(fds(pid), " "), extra) {
		t.Fatal("the child lacks a descriptor that the keeper was started with")
	}
	r.upgrade()
	r.reached(syscall.SIGUSR1)
	all := strings.Join(fds(strconv.Itoa(r.cmd.Process.Pid)), " ")
	if strings.Contains(all, "socket:") || strings.Contains(all, extra) || !strings.Contains(all, r.dir) {
		t.Fatalf("the keeper has %s", all)
	}
}

// children returns how many children a process has.
func children(t *testing.T, pid int) (n int) {
	t.Helper()
	if _, err := os.Stat("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children"); err != nil {
		t.Skip("the kernel does not tell a process's children: ", err)
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		n += len(strings.Fields(string(b)))
	}
	return n
}

func TestOrphans(t *testing.T) {
	for _, name := range []string{"child", "PID 1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, modes[name]...)
			r.serving()
			r.upgrade()
			r.set("do", "orphan")
			r.signal(syscall.SIGUSR2)
			r.expect(`orphan \d+ <nil>`)
			eventually(t, "one child is left", func() bool {
				return children(t, r.cmd.Process.Pid) == 1
			})
		})
	}
}

// got is what a generation says that has caught a signal. MIPS has numbers of its
// own.
func got(s syscall.Signal) string { return fmt.Sprintf("got %d", int(s)) }

// late makes the first generation wait before it catches any signal.
func late(c *exec.Cmd) {
	if err := os.WriteFile(filepath.Join(filepath.Dir(c.Path), "late"), nil, 0o644); err != nil {
		panic(err)
	}
}

// A signal to a first generation that does not catch it yet would end that
// generation, and the container with it.
func TestHeldBack(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, append(mode[:len(mode):len(mode)], late)...)
			r.expect("^the child has begun$")
			r.idle()
			want := map[string]bool{"upgraded by signal hangup": true}
			r.signal(syscall.SIGHUP)
			for _, s := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGALRM, syscall.SIGWINCH, 40} {
				r.signal(s)
				want[got(s)] = true
			}
			r.unset("late")
			for len(want) > 0 { // they come in any order
				line := r.expect(`: (upgraded by signal hangup|got \d+)`)[1]
				if !want[line] {
					t.Fatalf("%q has come a second time; yet to come: %v", line, want)
				}
				delete(want, line)
			}
			r.set("do", "exit 7")
			r.signal(syscall.SIGUSR2)
			if s := r.end(); s.ExitStatus() != 7 {
				t.Fatalf("keeper: %v; want exit status 7", r.cmd.ProcessState)
			}
		})
	}
}

// Signals that are meant to end a process are not held back.
func TestEndedEarly(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		for name, mode := range modes {
			t.Run(fmt.Sprint(s, " ", name), func(t *testing.T) {
				t.Parallel()
				r := start(t, append(mode[:len(mode):len(mode)], late)...)
				r.expect("^the child has begun$")
				r.idle()
				r.signal(syscall.SIGHUP)
				r.signal(s)
				got := r.end()
				if s == syscall.SIGQUIT { // Go prints its stacks and exits
					if got.ExitStatus() != 2 {
						t.Fatalf("keeper: %v; want exit status 2", r.cmd.ProcessState)
					}
				} else if strings.HasPrefix(name, "PID 1") {
					if got.ExitStatus() != 128+int(s) {
						t.Fatalf("PID 1: %v; want exit status %d", r.cmd.ProcessState, 128+s)
					}
				} else if !got.Signaled() || got.Signal() != s {
					t.Fatalf("keeper: %v; want death by %v", r.cmd.ProcessState, s)
				}
			})
		}
	}
}

// A signal that comes as soon as there is a child reaches the keeper's first
// program. That program goes through its descriptors before it blocks signals.
func TestSignalAtStart(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	many := func(c *exec.Cmd) { c.ExtraFiles = slices.Repeat([]*os.File{null}, 500) }
	for range 10 {
		r := start(t, many)
		for end := time.Now().Add(patience); children(t, r.cmd.Process.Pid) == 0; { // without a pause, because the signal must come early
			if time.Now().After(end) {
				t.Fatal("the keeper has no child")
			}
		}
		r.signal(syscall.SIGHUP)
		group, _ := strconv.Atoi(r.expect(`: serving \S+ in group (\d+)`)[1])
		_ = unix.Kill(-group, unix.SIGKILL) // an upgrade may be on its way
		r.end()
	}
}

// A child must not go on alone if its keeper is killed before it has executed
// its second program.
func TestGate(t *testing.T) {
	t.Parallel()
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	pw.Close()
	r := start(t, func(c *exec.Cmd) {
		c.ExtraFiles = []*os.File{pr}
		c.Env = append(c.Env, "ECDYSIS_KEEPER=child gate=3")
	})
	pr.Close()
	r.expect("fatal: keeper: the keeper has ended")
	if s := r.end(); s.ExitStatus() != 9 {
		t.Fatalf("%v; want exit status 9", r.cmd.ProcessState)
	}
}

// A PID file from an earlier run names a process that the keeper must not touch.
func TestStalePIDFile(t *testing.T) {
	t.Parallel()
	if err := keeper.Stay(""); err == nil {
		t.Error("no error for an empty path")
	}
	if err := keeper.Stay("/nonexistent/dir/pid"); !errors.Is(err, os.ErrNotExist) {
		t.Error("no directory: ", err)
	}
	r := start(t, func(c *exec.Cmd) {
		dir := filepath.Dir(c.Path)
		if err := os.WriteFile(filepath.Join(dir, "pid"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "fail"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	if s := r.end(); s.ExitStatus() != 9 {
		t.Fatalf("keeper: %v; want exit status 9, its child's", r.cmd.ProcessState)
	}
	if b, _ := os.ReadFile(filepath.Join(r.dir, "pid")); len(b) == 0 {
		t.Fatal("the PID file is gone")
	}
	r.unset("pid") // otherwise the clean-up would kill this test
}

// The keeper is a terminal's foreground process. Ctrl-C reaches the generation
// that serves, once, and not the one that drains. Ctrl-Z stops both.
func TestTerminal(t *testing.T) {
	t.Parallel()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminals here: ", err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no terminals here: ", err)
	}
	defer tty.Close()
	// As under a shell, a session leader stays, and the job is in the foreground.
	r := start(t, func(c *exec.Cmd) {
		c.Args = []string{"sh", "-c", "set -m; " + c.Path + "; echo status $? >&2; read x; fg >/dev/null; echo status $? >&2"}
		c.Path = "/bin/sh"
		c.Stdin = tty
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	})
	pid, _ := r.serving()
	group, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPGRP)
	if err != nil {
		t.Fatal(err)
	}
	pgid := int(group)
	if err := unix.Kill(pgid, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	r.expect(pid + ": " + got(syscall.SIGUSR1))
	r.set("hold", "")
	if err := unix.Kill(pgid, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	var last string
	for range 2 {
		if m := r.expect(`: upgraded by |^(\d+): serving`); m[1] != "" {
			last = m[1]
		}
	}
	r.set("fail", "")
	if err := unix.Kill(pgid, syscall.SIGHUP); err != nil { // a generation that upgrades on SIGHUP acts on SIGINT, too
		t.Fatal(err)
	}
	r.expect("upgrade failed")
	state := func(pid string) string {
		b, _ := os.ReadFile("/proc/" + pid + "/stat")
		_, after, _ := strings.Cut(string(b), ") ")
		return after[:min(1, len(after))]
	}
	if _, err := master.WriteString("\x1a"); err != nil { // Ctrl-Z
		t.Fatal(err)
	}
	eventually(t, "all generations stop", func() bool { return state(pid) == "T" && state(last) == "T" })
	r.expect("status 1[0-9][0-9]")                      // the shell goes on
	if _, err := master.WriteString("\n"); err != nil { // and continues it
		t.Fatal(err)
	}
	eventually(t, "both run", func() bool { return state(pid) != "T" && state(last) != "T" })
	if _, err := master.WriteString("\x03"); err != nil { // Ctrl-C
		t.Fatal(err)
	}
	r.expect("^" + last + ": stopping by signal interrupt")
	if state(pid) == "" || state(pid) == "Z" || state(last) == "Z" || state(last) == "" {
		t.Fatal("Ctrl-C has ended a generation that drains")
	}
	r.unset("hold")
	r.expect("^status 0$")
}

// The image of docs/containers.md is tested as far as that is possible without
// Docker. Its ENTRYPOINT is PID 1 in a root directory that has the program, /proc
// and /run.
func TestContainer(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the image's program cannot be built here: ", err)
	}
	page, err := os.ReadFile("../docs/containers.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^ENTRYPOINT (\[.*\])$`).FindSubmatch(page)
	var entry []string
	if m == nil || json.Unmarshal(m[1], &entry) != nil || len(entry) == 0 {
		t.Fatal("docs/containers.md has no Dockerfile with an ENTRYPOINT")
	}
	for i, a := range entry {
		if a == ":7000" { // this port may be in use here
			entry[i] = "127.0.0.1:0"
		}
	}
	root := t.TempDir()
	for _, dir := range []string{"/proc", "/run", filepath.Dir(entry[0])} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := func() {
		t.Helper()
		c := exec.Command("go", "build", "-o", root+entry[0]+".new", "../examples/kept")
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := os.Rename(root+entry[0]+".new", root+entry[0]); err != nil {
			t.Fatal(err)
		}
	}
	build()
	r := start(t, namespaced, func(c *exec.Cmd) {
		c.Args = append(c.Args, entry...)
		c.Env = append(c.Env, rootVar+"="+root)
	})
	addr := r.expect(`listening on (\S+)`)[1]
	r.expect("ready: .*generation=0$")
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	build()
	for i := range 3 {
		r.signal(syscall.SIGHUP)
		r.expect(fmt.Sprintf("upgraded .*generation=%d$", i+1))
	}
	if _, err := c.Write([]byte("hello")); err != nil { // to the first generation
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 5)); n == 0 {
		t.Fatal("the first generation's client: ", err)
	}
	c.Close()
	eventually(t, "PID 1 runs the new program", func() bool {
		return runs(t, r.cmd.Process.Pid, root+entry[0])
	})
	if err := os.Remove(root + entry[0]); err != nil {
		t.Fatal(err)
	}
	r.signal(syscall.SIGHUP) // a generation that upgrades on SIGHUP acts on SIGTERM, too
	r.expect("upgrade failed")
	r.signal(syscall.SIGTERM)
	r.expect("stopping by signal terminated: .*generation=3$")
	if s := r.end(); s.ExitStatus() != 0 {
		t.Fatalf("PID 1: %v; want exit status 0", r.cmd.ProcessState)
	}
}
