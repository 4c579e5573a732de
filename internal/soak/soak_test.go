//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// A short soak has upgrades and faults, loses nothing, and leaves nothing.
func TestSoak(t *testing.T) {
	t.Parallel()
	r, err := Run(t.Context(), 4*time.Second, 5, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	alone := 0
	for _, s := range r.Samples {
		if s.Alone {
			alone++
		}
	}
	if r.Upgrades == 0 || r.Answered == 0 || len(r.Rounds) < 2 || procIsThere() && alone == 0 {
		t.Errorf("%d upgrades, %d requests, rounds %v, %d samples of a process alone", r.Upgrades, r.Answered, r.Rounds, alone)
	}
	var out strings.Builder
	r.Print(&out)
	svg := string(r.Figure().SVG())
	for kind := range r.Rounds {
		if !strings.Contains(out.String(), kind) || !strings.Contains(svg, ">"+kind+"<") {
			t.Errorf("no %q in what is printed, or in the picture:\n%s", kind, out.String())
		}
	}
}

// The seed alone says what is done.
func TestSeed(t *testing.T) {
	t.Parallel()
	picks := func(seed uint64) (list []string) {
		s := newSoak(t.Context(), t.TempDir(), seed)
		for range 100 {
			list = append(list, s.pick())
		}
		return list
	}
	a, b, c := strings.Join(picks(1), ","), strings.Join(picks(1), ","), strings.Join(picks(2), ",")
	if a != b || a == c {
		t.Errorf("with seed 1:\n%s\nonce more:\n%s\nwith seed 2:\n%s", a, b, c)
	}
	for _, k := range kinds {
		if !strings.Contains(a+c, k.name) {
			t.Errorf("200 rounds without %q", k.name)
		}
	}
}

// Nothing excuses a request but a process that had it, or a stop.
func TestExcuse(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	at := func(ms int) time.Time { return begin.Add(time.Duration(ms) * time.Millisecond) }
	kill := excuse{pid: 7, begin: begin, over: at(50)}
	stop := excuse{begin: begin, over: at(500)}
	running := excuse{begin: begin}
	for _, c := range []struct {
		name               string
		f                  failure
		kill, stop, during bool
	}{
		{"the killed process's own", failure{pid: 7, began: at(-10000), at: at(1)}, true, false, false},
		{"another process's", failure{pid: 8, began: at(-10), at: at(1)}, false, false, false},
		{"nobody's yet", failure{began: at(-10), at: at(1)}, true, true, true},
		{"failed before", failure{began: at(-10), at: at(-1)}, false, false, false},
		{"began after a kill", failure{began: at(100), at: at(101)}, false, true, true},
		{"began after a stop", failure{began: at(600), at: at(601)}, false, false, true},
		{"unanswered for long", failure{began: at(-6000), at: at(1)}, false, false, false},
	} {
		if k, s, d := kill.covers(c.f), stop.covers(c.f), running.covers(c.f); k != c.kill || s != c.stop || d != c.during {
			t.Errorf("a failure %s is excused by a kill: %v, a stop: %v, a stop that goes on: %v; want %v, %v, %v", c.name, k, s, d, c.kill, c.stop, c.during)
		}
		l := &load{excuses: []*excuse{&stop}}
		l.fail(c.f)
		if (l.failed() == nil) != c.stop || l.refused != len(l.excuses)-len(l.failures) {
			t.Errorf("a failure %s: %v, %d refused", c.name, l.failed(), l.refused)
		}
	}
}

// Growth of what a process has without clients is an error, and ups and downs
// are none.
func TestGrowth(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		descriptors func(i int) int
		memory      func(i int) int64
		want        string
	}{
		{"steady", func(i int) int { return 16 + i%3 }, func(i int) int64 { return 8<<20 + int64(i%3)<<20 }, ""},
		{"one descriptor each time", func(i int) int { return 16 + i }, func(int) int64 { return 8 << 20 }, "descriptors"},
		{"1 MB each time", func(i int) int { return 16 }, func(i int) int64 { return int64(8+i) << 20 }, "memory"},
	} {
		s := &sampler{}
		for i := range 20 {
			s.add(Sample{Descriptors: c.descriptors(i), Memory: c.memory(i), Alone: true})
			s.add(Sample{Descriptors: 100 * i, Memory: int64(i) << 30}) // with clients
		}
		if err := s.growth(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// What is printed of a failure is enough to try again.
func TestError(t *testing.T) {
	t.Parallel()
	s := newSoak(t.Context(), t.TempDir(), 42)
	for range 200 {
		s.log.add("1 an early step")
	}
	s.log.add("1 the last step")
	lost := errors.New("lost")
	err := error(&Error{lost, 42, s.log.tail()})
	if text := err.Error(); !errors.Is(err, lost) || !strings.Contains(text, "-seed 42") || !strings.HasSuffix(text, "the last step") || strings.Count(text, "\n") > 70 {
		t.Errorf("%v", err)
	}
}
