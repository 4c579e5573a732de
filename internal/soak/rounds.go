//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// kinds are what a round may do, with how often beside the others.
var kinds = []struct {
	name   string
	weight int
}{
	{"upgrade", 12},
	{"takeover", 4},
	{"successor exits", 2},
	{"successor exits late", 2},
	{"successor panics", 2},
	{"successor fails", 2},
	{"successor hangs", 1},
	{"successor hangs and is killed", 2},
	{"program is missing", 2},
	{"predecessor refuses", 2},
	{"predecessor is stopped for a while", 6},
	{"successor is stopped for a while", 6},
	{"predecessor is killed", 6},
	{"successor is killed", 6},
	{"stop by a signal", 1},
	{"stop by a socket", 1},
	{"stop during an upgrade", 2},
}

// pick chooses what is done.
func (s *soak) pick() string {
	sum := 0
	for _, k := range kinds {
		sum += k.weight
	}
	n := s.rng.IntN(sum)
	for _, k := range kinds {
		if n -= k.weight; n < 0 {
			return k.name
		}
	}
	panic("unreachable")
}

// delay waits for a random time: mostly a short one, as an upgrade takes some
// milliseconds.
func (s *soak) delay(longest time.Duration) {
	d := time.Duration(s.rng.Int64N(int64(longest)))
	for range s.rng.IntN(3) {
		d /= 8
	}
	time.Sleep(d)
}

// round does something, and returns when the daemon serves as it is to after it.
func (s *soak) round(kind string) error {
	c := s.chain
	old := c.serving
	switch kind {
	case "takeover":
		was := s.standsBy
		if err := c.plan("none", s.probation()); err != nil {
			return err
		}
		if err := c.start(); err != nil {
			s.standsBy = was
			return err
		}
		return s.replaced(says(old, "upgraded"))
	case "stop by a signal", "stop by a socket", "stop during an upgrade":
		if err := s.stop(kind); err != nil {
			return err
		}
		if err := s.begin(); err != nil {
			return err
		}
		s.stopped()
		return nil
	}

	fault := map[string]string{"successor exits": "exit", "successor exits late": "exit-late", "successor panics": "panic", "successor fails": "fail",
		"successor hangs": "hang", "successor hangs and is killed": "hang", "predecessor refuses": "veto"}[kind]
	fails := fault != "" || kind == "program is missing"
	stoodBy := s.standsBy
	if fault == "" {
		fault = "none"
	}
	if err := errors.Join(c.plan(fault, s.probation()), c.install(kind != "program is missing")); err != nil {
		return err
	}
	began := time.Now()
	result, err := s.trigger()
	if err != nil {
		return err
	}
	switch kind {
	case "predecessor is stopped for a while":
		s.delay(30 * time.Millisecond)
		err = s.pause(old)
	case "successor is stopped for a while", "successor hangs and is killed", "predecessor is killed", "successor is killed":
		var successor int
		if successor, err = c.started(); err != nil {
			return err
		}
		switch kind {
		case "successor is stopped for a while":
			s.delay(30 * time.Millisecond)
			err = s.pause(successor)
		case "predecessor is killed":
			s.delay(30 * time.Millisecond)
			err = s.kill(old)
			result = nil // its answer may be lost
		default:
			s.delay(standBy / 2)
			// The predecessor stands by from the successor's being ready on.
			// So it does at this moment, unless it has none to be ready for.
			if fails || stoodBy && time.Since(began) < standBy*9/10 {
				err = s.kill(successor)
				fails = true
			}
		}
	}
	if err != nil {
		return err
	}
	switch {
	case fails:
		s.standsBy = stoodBy
		_, err = c.await(says(old, "upgrade failed"))
	case kind == "predecessor is killed":
		if err = s.replaced(); err == nil {
			err = s.alone()
		}
	default:
		err = s.replaced(says(old, "upgraded"))
	}
	if result != nil && err == nil {
		if told := <-result; (told != nil) != fails {
			err = fmt.Errorf("the client that has requested the upgrade is told: %v", told)
		}
	}
	return errors.Join(err, c.install(true))
}

// alone waits until the process that serves knows of the end of its predecessor,
// which the system tells some time after SIGKILL. Until then it may refuse an
// upgrade, because the predecessor may stand by. What it is asked for is an
// upgrade that Prepare refuses.
func (s *soak) alone() error {
	if err := s.chain.plan("veto", "0s"); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		told := <-s.request("upgrade")
		if _, err := s.chain.await(says(s.chain.serving, "upgrade failed")); err != nil {
			return err
		}
		if told == nil || !strings.Contains(told.Error(), "an upgrade is in progress") {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not within %v: process %d knows of the end of its predecessor", patience, s.chain.serving)
		}
	}
}

// replaced waits until a new process serves, and the other lines have come.
func (s *soak) replaced(also ...wanted) error {
	generation := s.chain.generation
	a, err := s.chain.replaced(also...)
	if err != nil {
		return err
	}
	s.result.Upgrades++
	if was := s.load.addrs.Load(); a != *was || s.chain.generation != generation+1 {
		return fmt.Errorf("generation %d serves at %v; want generation %d at %v", s.chain.generation, a, generation+1, *was)
	}
	return nil
}

// trigger requests an upgrade, by a signal or the socket. It returns what the
// client of the socket is told, or nil for a signal.
func (s *soak) trigger() (<-chan error, error) {
	if s.rng.IntN(2) == 0 {
		return nil, syscall.Kill(s.chain.serving, syscall.SIGHUP)
	}
	return s.request("upgrade"), nil
}

// request has a client ask at a control socket, and returns what it is told. It
// is a program of its own, because examples/demo must not import package
// ecdysis, which takes an inheritance when it is initialised: in the tour the demo
// itself is started as a successor, and executes another program then.
func (s *soak) request(socket string) <-chan error {
	result := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(s.ctx, 2*patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, filepath.Join(s.dir, "soaked"), s.dir, socket).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
		}
		result <- err
	}()
	return result
}

// pause stops a process for a while, which is shorter than any bound.
func (s *soak) pause(pid int) error {
	s.log.add("SIGSTOP to %d", pid)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	s.delay(300 * time.Millisecond)
	s.log.add("SIGCONT to %d", pid)
	return syscall.Kill(pid, syscall.SIGCONT)
}

// kill kills a process, which excuses what it has in its hands.
func (s *soak) kill(pid int) error {
	s.log.add("SIGKILL to %d", pid)
	over := s.load.excuse(pid)
	time.AfterFunc(50*time.Millisecond, over) // it has accepted nothing since
	return syscall.Kill(pid, syscall.SIGKILL)
}

// stop ends the daemon, and returns when all of its processes have ended.
func (s *soak) stop(how string) error {
	s.overs = append(s.overs, s.load.excuse(0))
	var result <-chan error
	switch how {
	case "stop by a signal":
		if err := syscall.Kill(s.chain.serving, syscall.SIGTERM); err != nil {
			return err
		}
	default:
		if how == "stop during an upgrade" {
			if err := s.chain.plan("none", s.probation()); err != nil {
				return err
			}
			if _, err := s.trigger(); err != nil {
				return err
			}
			s.delay(30 * time.Millisecond)
		}
		result = s.request("stop")
	}
	if err := s.chain.ended(); err != nil {
		return err
	}
	if result != nil {
		if err := <-result; err != nil {
			return fmt.Errorf("the client that has requested the stop is told: %w", err)
		}
	}
	for _, name := range []string{"pid", "echo", "upgrade", "stop", "takeover"} {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the file %q was left by a stop: %v", name, err)
		}
	}
	return nil
}

// stopped ends the excuse of a stop: the daemon serves again.
func (s *soak) stopped() {
	for _, over := range s.overs {
		over()
	}
	s.overs = nil
}

// look notes what is there while there are no clients, once older processes have
// ended.
func (s *soak) look() error {
	if err := s.sampler.alone(); err != nil {
		return err
	}
	list, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	known := "pid echo upgrade stop takeover plan daemon soaked "
	for _, f := range list {
		if !strings.Contains(known, f.Name()+" ") {
			return fmt.Errorf("the file %q was left", f.Name())
		}
	}
	return nil
}
