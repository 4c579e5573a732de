//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

// Package cost measures what an upgrade costs, each figure beside its floor in
// the same run, for examples/demo -cost and docs/cost.md. What is measured is
// the small program in the directory measured.
package cost

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const program = "github.com/ecdysis-go/ecdysis/internal/cost/measured"

// A Plan says how much is measured.
type Plan struct {
	Listeners, Pairs []int // pairs for each number of listeners
	Calls            int   // pairs of batches
	Events, Rate     int   // upgrades under load, and requests a second
}

// UnderAMinute is the plan of examples/demo -cost.
var UnderAMinute = Plan{
	Listeners: []int{1, 100, 1000, 10000},
	Pairs:     []int{300, 300, 30, 7},
	Calls:     150,
	Events:    20, Rate: 2000,
}

// A Result is all that was measured.
type Result struct {
	Date     time.Time
	Machine  string
	Upgrades []Upgrade
	Skipped  []string // what was not measured, and why

	Calls            []Call
	Rate             int // requests a second
	Upgraded, Forked Latency
	Sizes            []Size // nil unless MeasureSizes was called
}

// Measure builds the program and measures. It tells what it is at.
func Measure(ctx context.Context, p Plan, say func(format string, args ...any)) (*Result, error) {
	dir, err := os.MkdirTemp("", "ecdysis-cost")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r := &Result{Date: time.Now(), Machine: machine(), Rate: p.Rate}
	say("building the program that is measured")
	path := filepath.Join(dir, "measured")
	if err := build(ctx, path, program); err != nil {
		return nil, err
	}
	for i, n := range p.Listeners {
		if limit := descriptors(); limit < n+200 {
			r.Skipped = append(r.Skipped, fmt.Sprintf("%d listeners, because a process may have %d descriptors (ulimit -n)", n, limit))
			continue
		}
		say("upgrades with %d listeners: %d pairs", n, p.Pairs[i])
		u, err := measureUpgrade(ctx, path, n, p.Pairs[i])
		if err != nil {
			return nil, fmt.Errorf("upgrades with %d listeners: %w", n, err)
		}
		r.Upgrades = append(r.Upgrades, u)
	}
	say("calls beside those of package net")
	if r.Calls, err = measureCalls(ctx, path, p.Calls); err != nil {
		return nil, fmt.Errorf("calls: %w", err)
	}
	say("%d requests a second through %d upgrades, and around %d other programs' starts", p.Rate, p.Events, p.Events)
	if r.Upgraded, r.Forked, err = measureLatency(ctx, path, p.Events, p.Rate); err != nil {
		return nil, fmt.Errorf("requests: %w", err)
	}
	return r, nil
}

// Failed is how many requests were not answered.
func (r *Result) Failed() int { return r.Upgraded.Failed + r.Forked.Failed }

// build builds a stripped program. Variables are added to its environment.
func build(ctx context.Context, path, pkg string, env ...string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, pkg)
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s, in the module's directory: %w\n%s", pkg, err, out)
	}
	return nil
}

// machine describes where this is measured, as far as the system tells.
func machine() string {
	s := fmt.Sprintf("%d CPUs", runtime.NumCPU())
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
				s += " (" + strings.TrimSpace(value) + ")"
				break
			}
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		release, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
		s += ", " + unix.ByteSliceToString(u.Sysname[:]) + " " + release
	}
	s += ", " + runtime.Version() + " " + runtime.GOARCH
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ := strings.Cut(string(b), " ")
		s += ", load average " + load + " at the beginning"
	}
	return s
}

// descriptors is how many a process may have. The go runtime has raised the
// soft limit to the hard one.
func descriptors() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return 256
	}
	return int(min(uint64(r.Cur), 1<<20))
}

// median returns the value in the middle, or 0 if there is none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
