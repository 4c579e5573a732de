//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What may be called when, from where, and how often.

func init() {
	inWait := regexp.MustCompile(`\[select[^\n]*\n[^\n]*\*Upgrader\)\.Wait\(`)
	verbs["inwait"] = func(*daemon, command) (m message) {
		for stacks := make([]byte, 1<<20); !inWait.Match(stacks[:runtime.Stack(stacks, true)]); {
			time.Sleep(time.Millisecond)
		}
		return m
	}
	verbs["recover"] = func(d *daemon, c command) (m message) {
		defer func() {
			if r := recover(); r != nil {
				m.Text = []string{fmt.Sprint(r)}
			}
		}()
		return d.do(command{Verb: c.Args[0]})
	}
}

func (p *proc) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.os.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// A stop at any moment of an upgrade leaves one who has stopped or one who
// serves.
func TestStopAtRandomMoments(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	h := newHub(t)
	plain := bothSpec(h)
	replaced, stopped := 0, 0
	for i := range 30 {
		s := plain
		if i%3 == 2 {
			s = plain.probation(time.Minute)
		}
		h.next(s)
		p := h.serving()
		// How long an upgrade takes here and now.
		h.next(plain)
		begun := time.Now()
		timed := p.begin(command{Verb: "upgrade"})
		q := h.proc()
		q.at("serving")
		took := time.Since(begun)
		if i%3 == 2 {
			p.call("stop")
		}
		if m := timed(); m.Err != nil {
			t.Fatalf("upgrade: %+v", m.Err)
		}
		p.kill()
		p = q

		timer := time.NewTimer(time.Duration(rnd.Int64N(int64(took + took/4))))
		answer := p.begin(command{Verb: "upgrade"})
		<-timer.C
		p.call("stop")
		m := answer()
		p.call("awaitexit")
		kinds := p.kinds()
		last := kinds[len(kinds)-1]
		if m.Err == nil {
			replaced++
			s := h.proc()
			s.at("serving")
			s.serves()
			s.hasPIDFile()
			h.hasFiles("pid", "sock")
			if last != ecdysis.EventUpgraded {
				t.Fatalf("events %q; want an end with upgraded", kinds)
			}
			s.call("stop")
			s.refuses()
			s.kill()
		} else {
			stopped++
			if !slices.Contains(m.Err.Is, "ErrStopped") || last != ecdysis.EventStopping {
				t.Fatalf("error %+v, events %q; want that it was stopped", m.Err, kinds)
			}
			p.refuses()
			if m.Err.PID != 0 {
				reaped(t, m.Err.PID)
			}
			if got := proctest.ChildrenOf(t, p.pid); len(got) != 0 {
				t.Fatalf("processes %v are left", got)
			}
			// One that had connected is dead; it must not be taken for one
			// of the next round.
			h.discard()
		}
		h.hasFiles()
		p.kill()
	}
	t.Logf("%d were replaced, %d stopped", replaced, stopped)
}

// discard forgets the processes that have connected and ended.
func (h *hub) discard() {
	h.t.Helper()
	for {
		select {
		case p := <-h.procs:
			p.ended()
		default:
			return
		}
	}
}

func TestUpgradeTwice(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp(), tcp().do("start", "exit 3"), tcp().do("new", "hold"), tcp())
	p := h.serving()
	if e := p.failUpgrade(command{}, "init", "unexpected EOF"); e.How != "exit status 3" {
		t.Errorf("error %+v; want how the successor ended", e)
	}
	h.proc().ended()
	p.serves()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("new")
	for range 3 {
		checkErr(t, p.call("upgrade").Err, "", "ErrInProgress")
	}
	s.resume()
	if m := answer(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	s.at("serving")
	for range 3 {
		checkErr(t, p.call("upgrade").Err, "", "ErrUpgraded")
	}
	h.none()
	s.serves()
	s.upgrade().serves()
}

// Of many calls at once one upgrades.
func TestUpgradeConcurrently(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp())
	p := h.serving()
	var answers []func() message
	for range 20 {
		answers = append(answers, p.begin(command{Verb: "upgrade"}))
	}
	n := 0
	for _, answer := range answers {
		switch m := answer(); {
		case m.Err == nil:
			n++
		case !slices.Contains(m.Err.Is, "ErrInProgress") && !slices.Contains(m.Err.Is, "ErrUpgraded"):
			t.Errorf("error %+v", m.Err)
		}
	}
	if n != 1 {
		t.Errorf("%d of 20 calls have upgraded; want 1", n)
	}
	s := h.proc()
	s.at("serving")
	h.none()
	s.serves()
	s.upgrade().serves()
}

// waits returns when p's Wait catches its signals. No event tells of that.
func (p *proc) waits() {
	p.t.Helper()
	p.call("inwait")
}

// kindsOf makes descriptors of different processes comparable.
func kindsOf(fds []string) []string {
	var list []string
	for _, fd := range fds {
		_, target, _ := strings.Cut(fd, " ")
		list = append(list, digits.ReplaceAllString(target, "N"))
	}
	slices.Sort(list)
	return list
}

var digits = regexp.MustCompile("[0-9]+")

func TestManyGenerations(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(bothSpec(h))
	p := h.serving()
	first := p
	var early []string
	for n := 1; n <= 200; n++ {
		s := p.upgrade()
		p.kill()
		p = s
		if n%20 == 10 { // not those whose descriptors are counted
			p.serves()
		}
		switch n {
		case 3:
			early = kindsOf(p.call("fds").Text)
		case 200:
			if late := kindsOf(p.call("fds").Text); !slices.Equal(early, late) {
				t.Errorf("descriptors of generation 3: %q, of generation 200: %q", early, late)
			}
			if m := p.call("generation"); m.Text[0] != "200" {
				t.Errorf("generation %s", m.Text[0])
			}
		}
	}
	p.inherits(first)
	p.serves()
	p.hasPIDFile()
	h.hasFiles("pid", "sock")
}

func TestManyListeners(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	var sp spec
	for i := range 250 {
		sp.Listen = append(sp.Listen, [2]string{"tcp", "127.0.0.1:0"}, [2]string{"unix", filepath.Join(h.dir, strconv.Itoa(i))})
	}
	h.next(sp)
	p := h.serving()
	p.serves()
	fds := len(p.call("fds").Text)
	if fds > 500+20 {
		t.Errorf("500 listeners take %d descriptors", fds)
	}
	s := p.upgrade()
	s.inherits(p)
	p.kill()
	s2 := s.upgrade()
	s2.inherits(p)
	s.kill()
	s2.serves()
	// The last of the clients' descriptors are about to be closed.
	n := len(s2.call("fds").Text)
	for end := time.Now().Add(patience / 4); n > fds+2 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		n = len(s2.call("fds").Text)
	}
	if n > fds+2 {
		t.Errorf("%d descriptors, %d two generations before", n, fds)
	}
	s2.call("stop")
	h.hasFiles()
}

// hugeSpec has more listeners than the system takes before the successor
// reads, even where a socket's buffer may have two megabytes: the words that
// they were asked for with, which travel with them, are many.
func hugeSpec() spec {
	sp := spec{}
	port := strings.Repeat("0", 500)
	for i := range 5000 {
		sp.Listen = append(sp.Listen, [2]string{"tcp", fmt.Sprintf("127.1.%d.%d:%s", i/100, 1+i%100, port)})
	}
	return sp
}

// answers asserts that p answers at some of its addresses.
func (p *proc) answers() {
	p.t.Helper()
	list := p.list()
	for i := 0; i < len(list); i += 100 {
		if pid, _, err := ask(list[i][0], list[i][1]); err != nil || pid != p.pid {
			p.t.Fatalf("listener %d: process %d answers, %v; want %d", i, pid, err, p.pid)
		}
	}
	last := list[len(list)-1]
	if pid, _, err := ask(last[0], last[1]); err != nil || pid != p.pid {
		p.t.Fatalf("the last listener: process %d answers, %v; want %d", pid, err, p.pid)
	}
}

// Not parallel: two processes of this have 10,000 descriptors in flight, and
// the system counts those of all processes of a user.
func TestHugeInheritance(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs all of 127.0.0.0/8")
	}
	if n := openFileLimit(t); n < 6000 {
		t.Skip("the limit of open files is ", n)
	}
	t.Run("upgrade", func(t *testing.T) {
		h := newHub(t, hugeSpec())
		p := h.serving()
		s := p.upgrade()
		s.inherits(p)
		s.answers()
	})
	t.Run("parent killed at the start", func(t *testing.T) {
		h := newHub(t, hugeSpec(), hugeSpec().do("start", "hold"), hugeSpec())
		p := h.serving()
		_ = p.begin(command{Verb: "upgrade"})
		s := h.proc()
		s.at("start")
		p.kill()
		s.resume()
		s.at("serving") // every Listen has succeeded
		old, now := p.list(), s.list()
		n := 0
		for n < len(old) && old[n] == now[n] {
			n++
		}
		t.Log(n, "sockets had been handed on")
		if n < 100 || n == len(old) {
			t.Errorf("%d of %d sockets had been handed on; want many, and not all", n, len(old))
		}
		same := 0
		for i := n; i < len(old); i++ {
			if old[i] == now[i] { // the system may choose a port again
				same++
			}
		}
		if same > 5 {
			t.Fatalf("socket %d was not handed on, %d after it were", n, same)
		}
		s.answers()
		s2 := s.upgrade()
		s2.inherits(s)
		s2.answers()
	})
	t.Run("successor killed at the start", func(t *testing.T) {
		h := newHub(t, hugeSpec(), hugeSpec().do("start", "kill"), hugeSpec())
		p := h.serving()
		begun := time.Now()
		e := p.failUpgrade(command{}, "init", "unexpected EOF")
		if d := time.Since(begun); d > patience/2 {
			t.Errorf("Upgrade returned after %v", d)
		}
		reaped(t, e.PID)
		h.proc()
		p.answers()
		s := p.upgrade()
		s.inherits(p)
		s.answers()
	})
}

func openFileLimit(t *testing.T) uint64 {
	t.Helper()
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	return uint64(l.Max)
}

func TestDescriptorLimit(t *testing.T) {
	t.Parallel()
	var sp spec
	for range 60 {
		sp.Listen = append(sp.Listen, [2]string{"tcp", "127.0.0.1:0"})
	}
	h := newHub(t, sp)
	p := h.serving()
	low := command{Command: &ecdysis.Command{
		Path: "/bin/sh",
		Args: []string{"-c", `ulimit -n 20; exec "$0" "-test.run=^$"`, os.Args[0]},
	}}
	for range 2 {
		e := p.failUpgrade(low, "init", "")
		if !strings.Contains(e.Text, "RLIMIT_NOFILE") {
			t.Fatalf("error %+v; want that it names RLIMIT_NOFILE", e)
		}
		s := h.proc()
		if m := s.at("new failed"); !strings.Contains(m.Err.Text, "RLIMIT_NOFILE") {
			t.Errorf("New's error %+v; want that it names RLIMIT_NOFILE", m.Err)
		}
		reaped(t, s.pid)
		p.serves()
	}
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	s := p.upgrade()
	s.inherits(p)
	s.serves()
}

// pidSpec has a PID file in a directory of its own.
func pidSpec(h *hub) spec {
	s := tcp()
	s.Options.PIDFile = filepath.Join(h.dir, "run", "d.pid")
	return s
}

func (h *hub) mkdir() (path string) {
	h.t.Helper()
	dir := filepath.Join(h.dir, "run")
	if err := os.Mkdir(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	return filepath.Join(dir, "d.pid")
}

func TestPIDFile(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.do("event ready", "hold"), plain.do("listened", "hold"), plain)
	p := h.start()
	p.at("event ready")
	p.hasPIDFile() // who is notified of Ready finds it
	p.resume()
	p.at("serving")
	fi, err := os.Lstat(h.pidFile())
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm() != 0o644 {
		t.Errorf("PID file: %v, %v; want a file of mode 0644", fi.Mode(), err)
	}
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("listened")
	p.hasPIDFile()
	s.resume()
	if m := answer(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	s.hasPIDFile()
	p.call("stop") // not its own any more
	s.hasPIDFile()
	if err := os.WriteFile(h.pidFile(), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.at("serving")
	s.call("stop")
	h.hasFiles("pid")
	if b, err := os.ReadFile(h.pidFile()); err != nil || string(b) != "1\n" {
		t.Errorf("another's PID file holds %q, %v", b, err)
	}
}

// The PID file is there at every moment, and whole.
func TestPIDFileNeverAbsent(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(bothSpec(h))
	p := h.serving()
	seen := make(map[string]bool)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		whole := regexp.MustCompile("^[1-9][0-9]*\n$")
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			b, err := os.ReadFile(h.pidFile())
			if err != nil || !whole.Match(b) {
				done <- fmt.Errorf("read %d: %q, %v", n, b, err)
				return
			}
			seen[string(b)] = true
		}
	}()
	for range 20 {
		s := p.upgrade()
		s.hasPIDFile()
		p.kill()
		p = s
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if len(seen) < 2 {
		t.Errorf("only %v were seen", seen)
	}
	h.hasFiles("pid", "sock")
}

func TestPIDFileDirectory(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := pidSpec(h)
	h.next(plain.do("listened", "hold"), plain)
	p := h.start()
	p.at("listened")
	m := p.call("ready")
	checkErr(t, m.Err, "", "not exist")
	if path := plain.Options.PIDFile; !strings.Contains(m.Err.Text, path) {
		t.Errorf("error %+v; want that it names %s", m.Err, path)
	}
	checkErr(t, p.call("upgrade").Err, "", "ErrNotReady")
	path := h.mkdir()
	if m := p.call("ready"); m.Err != nil {
		t.Fatalf("Ready: %+v", m.Err)
	}
	p.resume()
	p.at("serving")
	p.serves()

	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	e := p.failUpgrade(command{}, "init", "")
	if !strings.Contains(e.Text, path) || !strings.Contains(e.Text, syscall.ENOENT.Error()) {
		t.Errorf("error %+v; want that it names %s", e, path)
	}
	s := h.proc()
	checkErr(t, s.at("ready failed").Err, "", "not exist")
	reaped(t, s.pid)
	p.serves()
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	h.mkdir()
	s = p.upgrade()
	s.serves()
	if b, err := os.ReadFile(path); err != nil || string(b) != strconv.Itoa(s.pid)+"\n" {
		t.Errorf("PID file holds %q, %v; want %d", b, err, s.pid)
	}
}

// A directory that takes no file, or a file but no content.
func TestPIDFileDirectoryFull(t *testing.T) {
	t.Parallel()
	if err := exec.Command("unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt").Run(); err != nil {
		t.Skip("no file system can be mounted here: unshare -m mount: ", err)
	}
	for _, c := range []struct{ name, size string }{
		{"files", "size=1m,nr_inodes=2"},
		{"bytes", "size=4k,nr_inodes=10"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			path := h.mkdir()
			plain := pidSpec(h)
			h.next(plain.do("start", "hold"), plain)
			p := h.start(func(cmd *exec.Cmd) {
				unshare, err := exec.LookPath("unshare")
				if err != nil {
					t.Fatal(err)
				}
				cmd.Path, cmd.Args = unshare, append([]string{"unshare", "-m"}, cmd.Args...)
			})
			sh := func(script string) string {
				t.Helper()
				m := p.call("program", "sh", "-c", "cd "+filepath.Dir(path)+"; "+script)
				if m.Err != nil {
					t.Fatalf("%s: %+v: %q", script, m.Err, m.Text)
				}
				return strings.TrimSpace(strings.Join(m.Text, " "))
			}
			p.at("start")
			sh("mount -t tmpfs -o " + c.size + " tmpfs " + filepath.Dir(path))
			p.resume()
			p.at("serving")
			e := p.failUpgrade(command{}, "init", "")
			if !strings.Contains(e.Text, path) || !strings.Contains(e.Text, syscall.ENOSPC.Error()) {
				t.Errorf("error %+v; want that it names %s and the reason", e, path)
			}
			s := h.proc()
			checkErr(t, s.at("ready failed").Err, "", "ENOSPC")
			reaped(t, s.pid)
			p.serves()
			if got := sh("cat d.pid; ls"); got != strconv.Itoa(p.pid)+" d.pid" {
				t.Errorf("content of the PID file, and files there: %q", got)
			}
			sh("mount -o remount,size=1m,nr_inodes=100 " + filepath.Dir(path))
			s = p.upgrade()
			s.serves()
			if got := sh("cat d.pid; ls"); got != strconv.Itoa(s.pid)+" d.pid" {
				t.Errorf("content of the PID file, and files there: %q", got)
			}
		})
	}
}

// The PID file's way back, which the old process goes after its word, may be
// blocked: it serves all the same and says so.
func TestPIDFileNotRestored(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	path := h.mkdir()
	plain := pidSpec(h)
	h.next(plain, plain.do("event ready", "hold"), plain)
	p := h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("event ready")
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	s.kill()
	m := answer()
	checkErr(t, m.Err, "handover", "unexpected EOF")
	if !strings.Contains(m.Err.Text, path) {
		t.Errorf("error %+v; want that it names %s", m.Err, path)
	}
	p.serves()
	h.mkdir()
	p.upgrade().serves()
}
