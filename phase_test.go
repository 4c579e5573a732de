//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"fmt"
	"os"
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
