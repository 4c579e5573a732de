//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

// Package soak replaces a daemon again and again, with faults at random
// moments, under clients over TCP, a Unix socket, HTTP and UDP, for
// examples/demo -soak. A request that fails without an excuse ends it, and so
// does growth: of descriptors, memory or processes.
package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// A Result is what a soak has done and seen.
type Result struct {
	Seed     uint64
	Duration time.Duration
	Rounds   map[string]int // by the kind of what was done
	Upgrades int            // that have succeeded
	Answered int            // requests
	Killed   int            // requests that ended with a process that was killed
	Refused  int            // requests that came while the daemon was stopped
	Samples  []Sample
	Done     []Action
}

// An Action is what was done in a round, and when.
type Action struct {
	At   time.Duration
	Kind string
}

// An Error has what a soak was doing when it failed.
type Error struct {
	Err  error
	Seed uint64
	Last string // lines: what was done, and what the processes have said
}

func (e *Error) Error() string {
	return fmt.Sprintf("%v\nwith -seed %d; the last steps, each after so many seconds:\n%s", e.Err, e.Seed, e.Last)
}

func (e *Error) Unwrap() error { return e.Err }

// A soak is one that runs.
type soak struct {
	ctx     context.Context
	dir     string
	rng     *rand.Rand
	load    *load
	log     *history
	chain   *chain
	sampler *sampler
	result  *Result

	standsBy bool     // the process that serves, after it was replaced
	overs    []func() // end the excuses of stops
}

// Run soaks for a time. The seed says what is done, and how long it waits in
// between. It tells now and then how far it is.
func Run(ctx context.Context, d time.Duration, seed uint64, say func(format string, args ...any)) (*Result, error) {
	dir, err := os.MkdirTemp("", "ecdysis-soak")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "soaked"), program)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build %s, in the module's directory: %w\n%s", program, err, out)
	}
	s := newSoak(ctx, dir, seed)
	s.sampler = startSampler(s.log, filepath.Join(dir, "soaked"))
	err = s.run(d, say)
	s.result.Samples = s.sampler.end()
	s.result.Duration = time.Since(s.log.started)
	s.load.mu.Lock()
	s.result.Answered, s.result.Killed, s.result.Refused = s.load.answered, s.load.killed, s.load.refused
	s.load.mu.Unlock()
	if ctx.Err() != nil {
		return nil, errors.New("interrupted")
	}
	if err != nil {
		return s.result, &Error{err, seed, s.log.tail()}
	}
	return s.result, nil
}

func newSoak(ctx context.Context, dir string, seed uint64) *soak {
	return &soak{ctx: ctx, dir: dir, rng: rand.New(rand.NewPCG(seed, 0)), load: &load{stopped: make(chan struct{})},
		log: &history{started: time.Now(), pids: make(map[int]bool)}, result: &Result{Seed: seed, Rounds: make(map[string]int)}}
}

// run does rounds until the time is over, and ends what it has started.
func (s *soak) run(d time.Duration, say func(format string, args ...any)) error {
	if err := s.begin(); err != nil {
		return err
	}
	s.load.start()
	defer s.load.end() // after the processes: a client may wait for one
	defer func() { s.chain.kill() }()
	const rounds = 5 // between two looks at what is left behind
	for n := 1; ; n++ {
		last := time.Since(s.log.started) >= d
		if n%rounds == 0 || last {
			if err := s.load.rest(s.look); err != nil {
				return err
			}
			say("%6.1f s: %d rounds, %d upgrades, %d requests", time.Since(s.log.started).Seconds(), n-1, s.result.Upgrades, s.load.total())
		}
		if last {
			return errors.Join(s.stop("stop by a socket"), s.load.failed())
		}
		kind := s.pick()
		s.log.add("round %d: %s", n, kind)
		s.result.Rounds[kind]++
		s.result.Done = append(s.result.Done, Action{time.Since(s.log.started), kind})
		err := s.round(kind)
		if err == nil {
			err = s.answers()
		}
		if err = errors.Join(err, s.load.failed()); err != nil {
			return fmt.Errorf("round %d, %s: %w", n, kind, err)
		}
	}
}

// begin starts the daemon. What replaces it is planned by each round.
func (s *soak) begin() error {
	c, a, err := startChain(s.ctx, s.dir, s.probation(), s.log)
	if err != nil {
		return err
	}
	s.chain = c
	s.load.addrs.Store(&a)
	return nil
}

// standBy is the probation of processes that have one.
const standBy = time.Second

// probation chooses whether the next process stands by when it was replaced.
func (s *soak) probation() string {
	if s.standsBy = s.rng.IntN(2) == 0; s.standsBy {
		return fmt.Sprint(standBy.Milliseconds())
	}
	return "0"
}

// answers asks at each address who serves.
func (s *soak) answers() error {
	a := s.load.addrs.Load()
	for name, dial := range map[string]func() (asker, error){
		"tcp":  func() (asker, error) { return dialLines("tcp", a.tcp) },
		"unix": func() (asker, error) { return dialLines("unix", a.unix) },
		"http": func() (asker, error) { return dialHTTP(a.http) },
		"udp":  func() (asker, error) { return s.load.dialUDP(a.udp) },
	} {
		c, err := dial()
		if err != nil {
			return err
		}
		pid, _, err := c.ask("who")
		c.Close()
		if err == nil && pid != s.chain.serving {
			err = fmt.Errorf("process %d answers; want %d", pid, s.chain.serving)
		}
		if err != nil {
			return fmt.Errorf("over %s: %w", name, err)
		}
	}
	return nil
}
