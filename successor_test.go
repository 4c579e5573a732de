//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What a successor can do wrong, and what it can be: whatever it is, the old
// process serves on, says why, and is left as it was.

func init() {
	// With the race detector a process takes a second to exit, which is
	// longer than the old process waits to learn how it ended.
	if _, ok := os.LookupEnv("GORACE"); !ok {
		os.Setenv("GORACE", "atexit_sleep_ms=0")
	}
	// listenat FD: listens with a socket whose number is FD.
	verbs["listenat"] = func(d *daemon, c command) (m message) {
		fd, _ := strconv.Atoi(c.Args[0])
		lc := ecdysis.ListenConfig{Control: func(string, string, syscall.RawConn) error { return syscall.Close(fd) }}
		ln, err := d.u.ListenWith(lc, "tcp", "127.0.0.1:0")
		if err != nil {
			return message{Err: toErrMsg(err)}
		}
		d.lns = append(d.lns, ln)
		d.acceptOn(ln)
		sa, err := syscall.Getsockname(fd)
		if in, ok := sa.(*syscall.SockaddrInet4); !ok || in.Port != ln.Addr().(*net.TCPAddr).Port {
			return message{Err: &errMsg{Text: fmt.Sprintf("descriptor %d is not the socket: %v, %v", fd, sa, err)}}
		}
		return message{Text: []string{ln.Addr().String()}}
	}
	verbs["closefd"] = func(d *daemon, c command) message {
		fd, _ := strconv.Atoi(c.Args[0])
		return message{Err: toErrMsg(syscall.Close(fd))}
	}
	verbs["flags"] = func(d *daemon, c command) (m message) {
		for fd := range 3 {
			n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFL, 0)
			if errno != 0 {
				m.Err = toErrMsg(errno)
			}
			m.Text = append(m.Text, strconv.FormatBool(n&syscall.O_NONBLOCK != 0))
		}
		return m
	}
}

// A survivor is a process that serves clients while its upgrades fail.
type survivor struct {
	*proc
	load   *load
	fds    []string
	failed int
}

func newSurvivor(h *hub, edit ...func(*exec.Cmd)) *survivor {
	h.t.Helper()
	p := h.serving(edit...)
	v := &survivor{proc: p, fds: p.call("fds").Text}
	network, address := p.addr(0)
	v.load = startLoad(h.t, 1, false, [2]string{network, address})
	v.load.more(10)
	return v
}

// try begins an upgrade to a successor that connects to the hub.
func (v *survivor) try(c command) (s *proc, answer func() message) {
	v.t.Helper()
	c.Verb = "upgrade"
	answer = v.begin(c)
	return v.h.proc(), answer
}

// want is what the error of a failed attempt must be; zero fields are not
// looked at, except how.
type want struct {
	step string
	is   string // of knownErrors
	how  string // how the successor ended; "": there is no State
	text string
	pid  int
}

func (v *survivor) check(m message, w want) {
	v.t.Helper()
	checkErr(v.t, m.Err, w.step, w.is)
	if m.Err.How != w.how {
		v.t.Errorf("error %+v; want State %q", m.Err, w.how)
	}
	if m.Err.PID != w.pid {
		v.t.Errorf("error %+v; want PID %d", m.Err, w.pid)
	}
	if !strings.Contains(m.Err.Text, w.text) {
		v.t.Errorf("error %.300q; want one with %.300q", m.Err.Text, w.text)
	}
	if e := v.event(ecdysis.EventUpgradeFailed, v.failed); e.Err != m.Err.Text || e.PID != w.pid {
		v.t.Errorf("event %+v; want the error %q", e, m.Err.Text)
	}
	v.failed++
	sameFiles(v.proc, v.fds)
}

// sameFiles asserts that p has, beside sockets, the descriptors that it had.
// It does not wait: what is left to the collector would be gone after a while.
func sameFiles(p *proc, before []string) {
	p.t.Helper()
	noSockets := func(fds []string) []string {
		return slices.DeleteFunc(slices.Clone(fds), func(s string) bool { return strings.Contains(s, " socket:") })
	}
	if now, before := noSockets(p.call("fds").Text), noSockets(before); !slices.Equal(now, before) {
		p.t.Errorf("descriptors that are no sockets: %q; before: %q", now, before)
	}
}

// unharmed asserts that v serves, that no request has failed, and that
// nothing is left of the attempts.
func (v *survivor) unharmed() {
	v.t.Helper()
	v.load.more(10)
	v.serves()
	if list := proctest.ChildrenOf(v.t, v.pid); len(list) > 0 {
		v.t.Errorf("children are left: %q", list)
	}
	v.load.check()
	v.sameFDs()
}

// sameFDs asserts that v has the descriptors that it had. Those of clients
// that have just gone are about to be closed.
func (v *survivor) sameFDs() {
	v.t.Helper()
	var now []string
	for end := time.Now().Add(patience / 4); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if now = v.call("fds").Text; slices.Equal(now, v.fds) {
			return
		}
	}
	v.t.Errorf("descriptors: %q; before: %q", now, v.fds)
}

// survived asserts that v is unharmed and can upgrade, and returns its
// successor.
func (v *survivor) survived() *proc {
	v.t.Helper()
	v.unharmed()
	v.h.next(tcp())
	network, address := v.addr(0)
	v.load = startLoad(v.t, 1, false, [2]string{network, address})
	v.load.more(10)
	s := v.upgrade()
	v.load.more(10)
	s.serves()
	v.load.check()
	return s
}

func doing(point, what string) spec {
	s := tcp()
	s.Do = map[string]string{point: what}
	return s
}

// timeout is the UpgradeTimeout of those tests that let it pass, and whose
// next upgrade must be quicker.
const timeout = 2 * time.Second

func impatient() spec {
	s := tcp()
	s.Options.UpgradeTimeout = timeout
	return s
}

// testBinary is this test binary's absolute path.
func testBinary(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// realDir is a shortDir whose name has no symbolic link in it.
func realDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(shortDir(t))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func script(t *testing.T, path, body string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// quote is s as a word of the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func TestWrapperThatExecs(t *testing.T) {
	t.Parallel()
	v := newSurvivor(newHub(t, tcp()))
	wrapper := script(t, realDir(t)+"/wrapper", "exec "+quote(testBinary(t))+` "$@"`)
	s, answer := v.try(command{Command: &ecdysis.Command{Path: wrapper}})
	if m := answer(); m.Err != nil {
		t.Fatalf("%+v", m.Err)
	}
	s.at("serving")
	if parent := proctest.ParentOf(t, s.pid); parent != v.pid {
		t.Errorf("the successor's parent is %d; want %d", parent, v.pid)
	}
	s.serves()
	s = s.upgrade()
	v.load.more(10)
	s.serves()
	v.load.check()
}

// staying is a shell that runs the daemon as its child.
func staying(t *testing.T) *ecdysis.Command {
	t.Helper()
	return &ecdysis.Command{Path: script(t, realDir(t)+"/wrapper", quote(testBinary(t))+` "$@"`+"\nexit $?\n")}
}

func TestWrapperThatStays(t *testing.T) {
	t.Parallel()
	v := newSurvivor(newHub(t, tcp()))
	c := staying(t)
	p := v.proc
	for range 2 { // the second by a successor that is not its parent's child
		fds := p.call("fds").Text
		answer := p.begin(command{Verb: "upgrade", Command: c})
		s := p.h.proc()
		if m := answer(); m.Err != nil {
			t.Fatalf("%+v", m.Err)
		}
		s.at("serving")
		if parent := proctest.ParentOf(t, s.pid); parent == p.pid {
			t.Error("the successor is a child of the old process; this test shows nothing")
		}
		sameFiles(p, fds)
		if e := p.event(ecdysis.EventUpgraded, 0); e.PID != s.pid {
			t.Errorf("event %+v; want PID %d", e, s.pid)
		}
		s.serves()
		p = s
	}
	p = p.upgrade()
	v.load.more(10)
	p.serves()
	v.load.check()
}

func TestWrapperThatStaysFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		point, do string
		want      want
	}{
		{"new", "exit 3", want{step: "init", is: "unexpected EOF", how: "exit status 3"}},
		{"listened", "fail told so", want{step: "init", how: "exit status 1", text: "told so"}},
		{"event ready", "exit 3", want{step: "handover", is: "unexpected EOF", how: "exit status 3"}},
		{"event ready", "hang", want{step: "handover", is: "deadline", how: "signal: killed"}},
	} {
		t.Run(tt.point+" "+tt.do, func(t *testing.T) {
			t.Parallel()
			if tt.do == "hang" {
				proctest.OnlyOn(t, "only a child can be ended", "linux")
			}
			v := newSurvivor(newHub(t, tcp(), doing(tt.point, tt.do)))
			s, answer := v.try(command{Command: staying(t)})
			m := answer()
			if tt.want.pid = s.pid; tt.want.step == "init" && m.Err != nil {
				if tt.want.pid = m.Err.PID; tt.want.pid <= 0 || tt.want.pid == s.pid {
					t.Errorf("error %+v; want the PID of the wrapper, it knows no other", m.Err)
				}
			}
			v.check(m, tt.want)
			s.ended()
			v.survived()
		})
	}
	// Who is killed is the wrapper alone: the old process does not know the
	// other. That one has been told not to serve.
	t.Run("listened hold", func(t *testing.T) {
		t.Parallel()
		v := newSurvivor(newHub(t, impatient(), doing("listened", "hold")))
		s, answer := v.try(command{Command: staying(t)})
		s.at("listened")
		m := answer()
		checkErr(t, m.Err, "init", "deadline")
		v.check(m, want{step: "init", is: "deadline", how: "signal: killed", pid: m.Err.PID})
		s.resume()
		if e := s.at("ready failed").Err; !slices.Contains(e.Is, "ErrAborted") {
			t.Errorf("Ready: %+v; want ErrAborted", e)
		}
		v.survived()
	})
}

// The successor gets /dev/null for a standard descriptor that is closed, and
// no socket whose number is that of one.
func TestStandardDescriptorsClosed(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells this", "linux")
	for _, what := range []string{"free", "taken by listeners"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := newHub(t, tcp())
			p := h.serving()
			next := tcp()
			addrs := [][2]string{}
			for fd := range 3 {
				if what == "free" {
					if m := p.call("closefd", strconv.Itoa(fd)); m.Err != nil {
						t.Fatalf("%+v", m.Err)
					}
					continue
				}
				m := p.call("listenat", strconv.Itoa(fd))
				if m.Err != nil {
					t.Fatalf("%+v", m.Err)
				}
				addrs = append(addrs, [2]string{"tcp", m.Text[0]})
				next.Listen = append(next.Listen, [2]string{"tcp", "127.0.0.1:0"})
			}
			h.next(next)
			// What it got is seen before Go's runtime, which opens /dev/null
			// itself, has begun.
			dir := realDir(t)
			wrapper := script(t, dir+"/wrapper", "got=$(readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2)\n"+
				"echo \"$got\" > "+quote(dir+"/got")+"\nexec "+quote(testBinary(t))+` "$@"`)
			v := &survivor{proc: p}
			s, answer := v.try(command{Command: &ecdysis.Command{Path: wrapper}})
			if m := answer(); m.Err != nil {
				t.Fatalf("%+v", m.Err)
			}
			s.at("serving")
			if got, err := os.ReadFile(dir + "/got"); err != nil || string(got) != strings.Repeat("/dev/null\n", 3) {
				t.Errorf("the successor's standard descriptors: %q, %v; want /dev/null", got, err)
			}
			fds := s.call("fds").Text
			for fd := range 3 {
				if !slices.Contains(fds, strconv.Itoa(fd)+" /dev/null") {
					t.Errorf("the successor has the descriptors %q; want %d to be /dev/null", fds, fd)
				}
			}
			s.serves()
			network, address := p.addr(0)
			for _, a := range append(addrs, [2]string{network, address}) {
				if pid, _, err := ask(a[0], a[1]); err != nil || pid != s.pid {
					t.Errorf("%s: process %d answers, %v; want %d", a[1], pid, err, s.pid)
				}
			}
			s.upgrade().serves()
		})
	}
}

// The standard descriptors are shared with others, who would be surprised to
// find them non-blocking, or blocking.
func TestNonblockUnchanged(t *testing.T) {
	t.Parallel()
	var in, out [2]int
	for _, p := range []*[2]int{&in, &out} {
		if err := syscall.Pipe(p[:]); err != nil {
			t.Fatal(err)
		}
		syscall.CloseOnExec(p[0])
		syscall.CloseOnExec(p[1])
	}
	files := make(map[int]*os.File)
	for _, fd := range append(in[:], out[:]...) {
		files[fd] = os.NewFile(uintptr(fd), "pipe")
		t.Cleanup(func() { files[fd].Close() })
	}
	h := newHub(t, doing("start", "hold"), doing("new", "exit 3"))
	p := h.start(func(c *exec.Cmd) { c.Stdin, c.Stdout = files[in[0]], files[out[1]] })
	p.at("start")
	if err := syscall.SetNonblock(in[0], true); err != nil {
		t.Fatal(err)
	}
	p.resume()
	p.at("serving")
	check := func(p *proc) {
		t.Helper()
		if m := p.call("flags"); m.Err != nil || !slices.Equal(m.Text, []string{"true", "false", "false"}) {
			t.Fatalf("process %d: O_NONBLOCK of the standard descriptors is %v, %+v; want it of the first", p.pid, m.Text, m.Err)
		}
	}
	check(p)
	p.failUpgrade(command{}, "init", "unexpected EOF")
	h.proc()
	check(p)
	h.next(tcp())
	s := p.upgrade()
	check(p)
	check(s)
	s.serves()
	check(s.upgrade())
}

func checkNoVariable(t *testing.T, who string, env []string) {
	t.Helper()
	if len(env) < 2 {
		t.Errorf("%s: no environment: %q", who, env)
	}
	for _, e := range env {
		if strings.HasPrefix(e, "ECDYSIS_PARENT") {
			t.Errorf("%s has %q in its environment", who, e)
		}
	}
}

// inheritedBy takes what ls says of its own descriptors and lists their
// numbers, without that of the directory that it reads.
func inheritedBy(t *testing.T, lines []string) []string {
	t.Helper()
	var list []string
	for _, line := range lines {
		name, target, ok := strings.Cut(line, " -> ")
		if ok && !strings.HasPrefix(target, "/proc/") {
			list = append(list, name[strings.LastIndexByte(name, ' ')+1:])
		}
	}
	if len(list) < 3 {
		t.Errorf("ls: %q", lines)
	}
	return list
}

// checkPrograms asserts that a program that p runs inherits no more than one
// that the test runs: the standard descriptors, and what the test itself was
// started with.
func checkPrograms(t *testing.T, who string, p *proc) {
	t.Helper()
	proctest.OnlyOn(t, "it has no /proc that tells this", "linux")
	checkNoVariable(t, who, p.call("environ").Text)
	checkNoVariable(t, "a program of "+who, p.call("program", "/usr/bin/env").Text)
	out, err := exec.Command("/bin/ls", "-l", "/proc/self/fd").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := inheritedBy(t, strings.Split(string(out), "\n"))
	m := p.call("program", "/bin/ls", "-l", "/proc/self/fd")
	if got := inheritedBy(t, m.Text); m.Err != nil || !slices.Equal(got, want) {
		t.Errorf("a program of %s inherits the descriptors %q, %+v; want %q", who, got, m.Err, want)
	}
}

func TestNothingIsInherited(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp(), doing("new", "hold"))
	v := newSurvivor(h)
	checkPrograms(t, "the first process", v.proc)
	s, answer := v.try(command{})
	s.at("new")
	checkPrograms(t, "the upgrading process", v.proc)
	checkPrograms(t, "the starting process", s)
	s.resume()
	if m := answer(); m.Err != nil {
		t.Fatalf("%+v", m.Err)
	}
	s.at("serving")
	sameFiles(v.proc, v.fds)
	checkPrograms(t, "the old process", v.proc)
	checkPrograms(t, "the new process", s)
	h.next(tcp())
	s = s.upgrade()
	checkPrograms(t, "the newest process", s)
	v.load.more(10)
	v.load.check()
}

func TestVariableIsReplaced(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells this", "linux")
	h := newHub(t, tcp())
	p := h.serving()
	env := append(os.Environ(), roleVar+"=daemon", hubVar+"="+h.path,
		"ECDYSIS_PARENT=fd=99 pid=1 uid=0", "ECDYSIS_PARENT=", "ECDYSIS_PARENTS=3")
	answer := p.begin(command{Verb: "upgrade", Command: &ecdysis.Command{Env: env}})
	s := h.proc()
	if m := answer(); m.Err != nil {
		t.Fatalf("%+v", m.Err)
	}
	s.at("serving")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.pid))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for e := range strings.SplitSeq(string(b), "\x00") {
		if strings.HasPrefix(e, "ECDYSIS_PARENT") {
			found = append(found, e)
		}
	}
	if len(found) != 2 || found[0] != "ECDYSIS_PARENTS=3" || !strings.Contains(found[1], " pid="+strconv.Itoa(p.pid)+" ") {
		t.Errorf("the successor was started with %q", found)
	}
	if g := s.call("generation").Text; g[0] != "1" || g[1] != "true" {
		t.Errorf("generation, has a parent: %q", g)
	}
	s.serves()
	s.upgrade().serves()
}

// reap takes the status of a child of the test process.
func reap(t *testing.T, p *proc) *os.ProcessState {
	t.Helper()
	p.ended()
	state, err := p.os.Wait()
	if err != nil {
		t.Fatalf("process %d is no child of the test: %v", p.pid, err)
	}
	return state
}

func TestSibling(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "Command.Sibling is for Linux", "linux")
	sibling := command{Command: &ecdysis.Command{Sibling: true}}
	h := newHub(t, tcp())
	v := newSurvivor(h)
	p := v.proc
	for range 2 {
		s, answer := (&survivor{proc: p}).try(sibling)
		t.Cleanup(func() { _ = s.os.Kill(); reap(t, s) })
		if m := answer(); m.Err != nil {
			t.Fatalf("%+v", m.Err)
		}
		s.at("serving")
		if parent := proctest.ParentOf(t, s.pid); parent != os.Getpid() {
			t.Errorf("the successor's parent is %d; want %d", parent, os.Getpid())
		}
		if e := p.event(ecdysis.EventUpgraded, 0); e.PID != s.pid {
			t.Errorf("event %+v; want PID %d", e, s.pid)
		}
		if list := proctest.ChildrenOf(t, p.pid); len(list) > 0 {
			t.Errorf("the old process has children: %q", list)
		}
		s.serves()
		p = s
	}
	v.load.more(10)
	v.load.check()
}

func TestSiblingFails(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "Command.Sibling is for Linux", "linux")
	for _, tt := range []struct {
		point, do string
		want      want
		how       string
	}{
		{"new", "exit 3", want{step: "init", is: "unexpected EOF"}, "exit status 3"},
		{"listened", "fail told so", want{step: "init", text: "told so"}, "exit status 1"},
		{"listened", "hang", want{step: "init", is: "deadline"}, "signal: killed"},
		{"event ready", "kill", want{step: "handover", is: "unexpected EOF"}, "signal: killed"},
	} {
		t.Run(tt.point+" "+tt.do, func(t *testing.T) {
			t.Parallel()
			v := newSurvivor(newHub(t, impatient(), doing(tt.point, tt.do)))
			s, answer := v.try(command{Command: &ecdysis.Command{Sibling: true}})
			tt.want.pid = s.pid
			v.check(answer(), tt.want)
			if how := reap(t, s).String(); how != tt.how {
				t.Errorf("it ended by %s; want %s", how, tt.how)
			}
			v.survived()
		})
	}
}
