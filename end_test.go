//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

func init() {
	verbs["goroutines"] = func(*daemon, command) message {
		return message{Text: []string{fmt.Sprint(runtime.NumGoroutine())}}
	}
}

// No goroutine outlives a call.
func TestNoGoroutines(t *testing.T) {
	t.Parallel()
	s := tcp()
	s.NoAccept = true
	p := newHub(t, s).serving()
	count := func() string { return p.call("goroutines").Text[0] }
	before := count()
	// That of the harness which has just answered may be about to end.
	steady := func(after string) {
		t.Helper()
		n := count()
		for end := time.Now().Add(patience); n != before && time.Now().Before(end); n = count() {
			time.Sleep(time.Millisecond)
		}
		if n != before {
			t.Errorf("%s goroutines after %s, %s before", n, after, before)
		}
	}
	p.failUpgrade(command{Command: &ecdysis.Command{Path: "/bin/true"}}, "init", "unexpected EOF")
	steady("a failed upgrade")
	p.upgrade()
	steady("an upgrade")
}

const dirVar = "ECDYSIS_TEST_DIR"

func init() {
	// The smallest daemon, as in the README: it exits as soon as its accept
	// loop has ended and its clients are served, whoever still runs.
	roles["smallest"] = func() {
		log.SetFlags(0)
		dir, vetoed := os.Getenv(dirVar), false
		u, err := ecdysis.New(ecdysis.Options{
			PIDFile:        filepath.Join(dir, "pid"),
			UpgradeSignals: []os.Signal{syscall.SIGHUP},
			StopSignals:    []os.Signal{syscall.SIGTERM},
			Prepare: func(*ecdysis.Command) error {
				if vetoed {
					return nil
				}
				vetoed = true
				return errors.New("the first one is for the test to see that Wait runs")
			},
			Notify: func(e ecdysis.Event) { log.Print(e) },
		})
		if err != nil {
			log.Fatal(err)
		}
		for _, name := range []string{"b", "c"} {
			if _, err := u.Listen("unix", filepath.Join(dir, name)); err != nil {
				log.Fatal(u.Fail(err))
			}
		}
		ln, err := u.Listen("unix", filepath.Join(dir, "a"))
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		go func() { u.Wait(); ln.Close() }()
		if err := u.Ready(); err != nil {
			log.Fatal(err)
		}
		var clients sync.WaitGroup
		for {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			clients.Go(func() { _, _ = io.Copy(c, c); c.Close() })
		}
		clients.Wait()
	}
}

// A program that ends with its accept loop leaves nothing undone: the files
// are gone, and the last event was delivered.
func TestNothingUndone(t *testing.T) {
	t.Parallel()
	for range 10 {
		dir := shortDir(t)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVar+"=smallest", dirVar+"="+dir)
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(stderr)
		var seen []string
		until := func(prefix string) (pid int) {
			for lines.Scan() {
				line := lines.Text()
				if seen = append(seen, line); strings.HasPrefix(line, prefix) {
					_, s, _ := strings.Cut(line, "pid=")
					_, _ = fmt.Sscan(s, &pid)
					return pid
				}
			}
			t.Fatalf("no line %q in %q", prefix, seen)
			return 0
		}
		hangUp := func(pid int, then string) int {
			if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			return until(then)
		}
		first := until("ready")
		hangUp(first, "upgrade failed")
		second := hangUp(first, "ready")
		until("upgraded by signal hangup") // or the scanner finds no such line
		if err := cmd.Process.Signal(syscall.Signal(0)); err == nil {
			if state, err := cmd.Process.Wait(); err != nil || !state.Success() {
				t.Errorf("the replaced process: %v, %v", state, err)
			}
		}
		hangUp(second, "upgrade failed")
		if err := syscall.Kill(second, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		until("stopping by signal terminated")
		for lines.Scan() { // to the end: the last process has gone
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// A successor that was stopped within its probation has ended the service,
// even if the old process hears of it later than of its exit.
func TestStoppedWhileParentIsPaused(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	sock := filepath.Join(dir, "s")
	h := newHub(t, spec{Listen: [][2]string{{"unix", sock}}, Options: options{Probation: patience, PIDFile: filepath.Join(dir, "pid")}})
	p := h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("serving")
	if err := p.os.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.call("stop")
	s.begin(command{Verb: "exit"})
	s.ended()
	if err := p.os.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if m := answer(); m.Err != nil {
		t.Errorf("upgrade: %+v", m.Err)
	}
	p.call("awaitexit")
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A successor that is stopped before it is ready says so at once.
func TestStopBeforeReady(t *testing.T) {
	t.Parallel()
	s := tcp()
	s.Options.UpgradeTimeout = 4 * time.Second
	h := newHub(t, s)
	p := h.serving()
	h.next(spec{Do: map[string]string{"new": "call stop; hang"}})
	if e := p.failUpgrade(command{}, "init", ""); !strings.Contains(e.Text, "has been stopped") {
		t.Errorf("the reason: %s", e.Text)
	}
	h.proc() // that one
	p.serves()
	h.next(s)
	p.upgrade().serves()
}

// The file of an inherited socket that is closed too early to be removed goes
// when it is this process's own.
func TestFilesOfClosed(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before Ready", "within probation", "by a partial stop"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(shortDir(t), "s")
			s := spec{Listen: [][2]string{{"unix", path}}, Options: options{Probation: patience, PartialStopSignals: []syscall.Signal{syscall.SIGUSR1}}}
			h := newHub(t, s)
			p := h.serving()
			if when == "before Ready" {
				s.Do = map[string]string{"listened": "hold"}
			}
			s.Wait = when == "by a partial stop"
			if s.Wait {
				s.Do = map[string]string{"wait returned": ""}
			}
			h.next(s)
			answer := p.begin(command{Verb: "upgrade"})
			g := h.proc()
			switch when {
			case "before Ready":
				g.at("listened")
				if m := g.call("close", "0"); m.Err != nil {
					t.Fatal(m.Err)
				}
				g.resume()
				g.at("serving")
			case "within probation":
				g.at("serving")
				if m := g.call("close", "0"); m.Err != nil {
					t.Fatal(m.Err)
				}
			case "by a partial stop":
				g.at("serving")
				g.waits()
				g.signal(syscall.SIGUSR1)
				g.event(ecdysis.EventPartialStop, 0)
			}
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("within probation: %v", err)
			}
			p.kill() // which ends the probation, as its time would
			_ = answer
			if when == "by a partial stop" {
				g.ended()
				return // it exits as the README's daemon does, without Stop
			}
			if m := g.call("waitparent"); m.Err != nil {
				t.Fatal(m.Err)
			}
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("when it is this process's own: %v", err)
			}
		})
	}
}

func init() {
	verbs["exhaust"] = func(*daemon, command) message {
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return message{Err: toErrMsg(err)}
		}
		limit.Cur = 64
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return message{Err: toErrMsg(err)}
		}
		for {
			if _, err := syscall.Dup(2); err != nil {
				return message{}
			}
		}
	}
}

// A process that is out of descriptors still clears away what is its own.
func TestStopWithoutDescriptors(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	p := newHub(t, spec{Listen: [][2]string{{"unix", filepath.Join(dir, "s")}}, Options: options{PIDFile: filepath.Join(dir, "pid")}}).serving()
	if m := p.call("exhaust"); m.Err != nil {
		t.Fatal(m.Err)
	}
	p.call("stop")
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A listener that is closed after a stop leaves the file alone that another
// process has bound since, though the system may have given it the same inode.
func TestCloseAfterStop(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	p := newHub(t, spec{Listen: [][2]string{{"unix", path}}}).serving()
	p.call("stop")
	p.call("awaitexit")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if m := p.call("close", "0"); m.Err != nil {
		t.Fatalf("Close: %+v", m.Err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("another process's file: %v", err)
	}
}
