//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
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
	verbs["listen0"] = func(d *daemon, c command) message {
		return d.do(command{Verb: "listen", Args: []string{"tcp", "127.0.0.1:0"}})
	}
	verbs["close1"] = func(d *daemon, c command) message {
		return d.do(command{Verb: "close", Args: []string{"1"}})
	}
	// Every call of a successor that has said that it fails: the old process
	// ends it soon after.
	verbs["afterfail"] = func(d *daemon, c command) (m message) {
		_ = d.u.Fail(errors.New("planned"))
		m.Text = d.phase()
		d.u.Stop()
		return m
	}
	verbs["phase"] = func(d *daemon, c command) (m message) {
		m.Text = d.phase()
		return m
	}
	inWait := regexp.MustCompile(`\[select[^\n]*\n[^\n]*\*Upgrader\)\.Wait\(`)
	verbs["inwait"] = func(*daemon, command) (m message) {
		for stacks := make([]byte, 1<<20); !inWait.Match(stacks[:runtime.Stack(stacks, true)]); {
			time.Sleep(time.Millisecond)
		}
		return m
	}
	panicked := false
	verbs["paniconce"] = func(*daemon, command) (m message) {
		if !panicked {
			panicked = true
			panic("planned")
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
	verbs["recoverready"] = func(d *daemon, c command) message {
		return d.do(command{Verb: "recover", Args: []string{"ready"}})
	}
}

// phase calls what an Upgrader has and returns which error each call gave.
func (d *daemon) phase() []string {
	name := func(err error) string {
		if err == nil {
			return "nil"
		}
		m := toErrMsg(err)
		if len(m.Is) == 0 {
			return m.Text
		}
		slices.Sort(m.Is)
		return strings.Join(m.Is, ",")
	}
	reason := errors.New("a reason")
	wait := d.do(command{Verb: "waitparent", Args: []string{"1ms"}}).Err
	list := []string{
		"upgrade " + name(d.u.Upgrade()),
		"ready " + name(d.u.Ready()),
		"wait " + "nil",
		"listen nil",
	}
	if wait != nil {
		list[2] = "wait " + strings.Join(wait.Is, ",")
	}
	if ln, err := d.u.Listen("tcp", "127.0.0.1:0"); err != nil {
		list[3] = "listen " + name(err)
	} else {
		err = ln.Close()
		list[3] = "listen " + name(err)
	}
	if !slices.Contains(list, "ready ErrNotReady") && d.u.Fail(reason) != reason {
		list = append(list, "fail another")
	}
	return list
}

// inPhase asserts what each call gives now.
func (p *proc) inPhase(upgrade, ready, wait, listen string) {
	p.t.Helper()
	checkPhase(p.t, p.call("phase").Text, upgrade, ready, wait, listen)
}

func checkPhase(t *testing.T, got []string, upgrade, ready, wait, listen string) {
	t.Helper()
	want := []string{"upgrade " + upgrade, "ready " + ready, "wait " + wait, "listen " + listen}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q\nwant %q", got, want)
	}
}

func TestPhases(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.probation(time.Minute).do("new", "hold"), plain.do("new", "hold"), plain)
	p := h.start()
	p.at("new")
	checkErr(t, p.call("upgrade").Err, "", "ErrNotReady")
	if m := p.call("waitparent"); m.Err != nil {
		t.Fatalf("WaitForParent in the first process: %+v", m.Err)
	}
	_ = p.call("fail") // nobody to tell
	p.resume()
	p.at("serving")
	p.serves()

	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("new")
	checkErr(t, s.call("upgrade").Err, "", "ErrNotReady")
	checkErr(t, s.call("waitparent").Err, "", "ErrNotReady")
	p.inPhase("ErrInProgress", "nil", "nil", "ErrInProgress")
	p.serves()
	s.resume()
	s.at("serving")
	p.inPhase("ErrInProgress", "nil", "nil", "ErrInProgress")
	s.inPhase("ErrInProgress", "nil", "context deadline", "nil")
	if m := p.call("exited"); m.Text[0] != "no" {
		t.Error("Exit is closed within probation")
	}
	p.call("stop")
	if m := answer(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	p.inPhase("ErrUpgraded", "ErrUpgraded", "nil", "ErrUpgraded")
	p.call("stop")
	p.call("stop")
	p.call("awaitexit")
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	checkErr(t, s.call("upgrade").Err, "", "ErrStopped") // the stop was passed on
	s2 := s
	s2.call("stop")
	s2.inPhase("ErrStopped", "ErrStopped", "context deadline", "ErrStopped")
	s2.hasEvents(ecdysis.EventStopping)
	s2.refuses()
	h.hasFiles()
}

func TestPhaseStoppedEarly(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain.do("listened", "hold"))
	p := h.start()
	p.at("listened")
	p.call("stop")
	p.inPhase("ErrStopped", "ErrStopped", "nil", "ErrStopped")
	p.refuses()
	h.hasFiles()
	p.resume()
	checkErr(t, p.at("ready failed").Err, "", "ErrStopped")

	// The same in a successor tells the old process.
	h.next(plain, plain.do("listened", "hold"), plain)
	p = h.serving()
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("listened")
	s.call("stop")
	if m := answer(); m.Err == nil || m.Err.Step != "init" || !strings.Contains(m.Err.Text, ecdysis.ErrStopped.Error()) {
		t.Fatalf("error %+v; want that the successor was stopped", m.Err)
	}
	p.serves()
	p.hasPIDFile()
	h.hasFiles("pid", "sock")
	p.upgrade().serves()
}

func TestPhaseRefused(t *testing.T) {
	t.Parallel()
	t.Run("by itself", func(t *testing.T) {
		t.Parallel()
		h := newHub(t)
		plain := bothSpec(h)
		h.next(plain, plain.do("listened", "call afterfail; hold"), plain)
		p := h.serving()
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		m := s.at("listened afterfail")
		checkPhase(t, m.Text, "ErrAborted", "ErrAborted", "ErrNotReady", "ErrAborted")
		if m := answer(); m.Err == nil || m.Err.Step != "init" || !strings.HasSuffix(m.Err.Text, ": it says: planned") {
			t.Fatalf("error %+v; want the reason of the successor", m.Err)
		}
		reaped(t, s.pid)
		p.serves()
		p.hasPIDFile()
		h.hasFiles("pid", "sock")
		p.upgrade().serves()
	})
	t.Run("by the old one", func(t *testing.T) {
		t.Parallel()
		first := tcp()
		first.Options.UpgradeTimeout = lateTimeout
		_, p, root := unkillable(t, first, tcp().do("listened", "hold"), tcp())
		answer := p.begin(root)
		late := p.h.proc()
		late.at("listened")
		checkErr(t, answer().Err, "init", "deadline")
		checkErr(t, late.call("ready").Err, "", "ErrAborted")
		late.inPhase("ErrAborted", "ErrAborted", "ErrNotReady", "ErrAborted")
		late.call("stop")
		checkErr(t, late.call("ready").Err, "", "ErrStopped")
		p.serves()
		p.upgrade().serves()
	})
}

func TestPhasePartial(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	first := bothSpec(h)
	first.Options.PartialStopSignals = []syscall.Signal{syscall.SIGUSR1}
	first.Wait = true
	h.next(first)
	p := h.serving()
	network, address := p.addr(0)
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if pid, _, err := askOn(c); err != nil || pid != p.pid {
		t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
	}
	p.waits()
	p.signal(syscall.SIGUSR1)
	if m := p.at("wait returned"); m.Text[0] != string(ecdysis.EventPartialStop) {
		t.Fatalf("Wait returned %q", m.Text)
	}
	p.refuses()
	p.inPhase("ErrStopped", "ErrStopped", "nil", "ErrStopped")
	h.hasFiles("pid")
	if pid, _, err := askOn(c); err != nil || pid != p.pid {
		t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
	}
	if m := p.call("exited"); m.Text[0] != "no" {
		t.Error("Exit is closed after a partial stop")
	}
	p.call("stop")
	p.call("awaitexit")
	p.hasEvents(ecdysis.EventPartialStop, ecdysis.EventStopping)
	h.hasFiles()
	c.Close()
	p.ended()
}

func (p *proc) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.os.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// results returns what the calls in a hook gave.
func (p *proc) results(point string, verbs ...string) []string {
	p.t.Helper()
	var got []string
	for _, v := range verbs {
		m := p.at(point + " " + v)
		s := "nil"
		if m.Err != nil {
			s = strings.Join(m.Err.Is, ",")
		}
		got = append(got, v+" "+s)
	}
	return got
}

// Every hook may call every method. What it gets is what anybody would get at
// that moment, and nothing waits for itself.
func TestHooksCall(t *testing.T) {
	t.Parallel()
	const progress, done, over = "ErrInProgress", "ErrUpgraded", "ErrStopped"
	for _, c := range []struct {
		at                     string
		ready, listen, upgrade string
		kill                   bool // the first successor, at its EventReady
		sock                   bool // the file is there after the Close and all that follows
	}{
		{at: "event ready", ready: progress, listen: progress, upgrade: "ErrNotReady"},
		{at: "prepare", ready: "nil", listen: "nil", upgrade: progress, sock: true},
		{at: "event upgrading", ready: "nil", listen: "nil", upgrade: progress, sock: true},
		{at: "event handover", ready: "nil", listen: progress, upgrade: progress, sock: true},
		{at: "event resumed", ready: "nil", listen: progress, upgrade: progress, kill: true},
		{at: "event upgrade failed", ready: "nil", listen: "nil", upgrade: "nil", kill: true, sock: true},
		{at: "event upgraded", ready: done, listen: done, upgrade: done, sock: true},
		{at: "event stopping", ready: over, listen: over, upgrade: over},
	} {
		t.Run(c.at, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := bothSpec(h)
			plus := plain
			if c.listen == "nil" {
				plus.Listen = append(plus.Listen, [2]string{"tcp", "127.0.0.1:0"})
			}
			specs := []spec{plain.do(c.at, "call ready; call listen0; call close1; call upgrade")}
			if c.kill {
				specs = append(specs, plain.do("event ready", "kill"))
			}
			h.next(append(specs, plus)...)
			p := h.serving()
			want := []string{"ready " + c.ready, "listen0 " + c.listen, "close1 nil", "upgrade " + c.upgrade}
			check := func() {
				t.Helper()
				if got := p.results(c.at, "ready", "listen0", "close1", "upgrade"); !slices.Equal(got, want) {
					t.Fatalf("got %q\nwant %q", got, want)
				}
			}
			if c.at == "event stopping" {
				p.call("stop")
				check()
				p.refuses()
				h.hasFiles()
				return
			}
			m := p.begin(command{Verb: "upgrade"})()
			check()
			s := h.proc()
			if c.kill {
				checkErr(t, m.Err, "handover", "unexpected EOF")
				reaped(t, s.pid)
				if c.upgrade != "nil" {
					network, address := p.addr(0)
					if pid, _, err := ask(network, address); err != nil || pid != p.pid {
						t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
					}
					h.hasFiles("pid")
					return
				}
				s = h.proc()
			} else if m.Err != nil {
				t.Fatalf("upgrade: %+v", m.Err)
			}
			s.at("serving")
			s.serves()
			s.hasPIDFile()
			h.hasFiles("pid", "sock")
			if c.listen == "nil" {
				if _, a := s.addr(2); a != p.at(c.at + " listen0").Text[0] {
					t.Errorf("the successor listens at %s; want what the hook has made, %s", a, p.at(c.at + " listen0").Text[0])
				}
			}
			if a, b := s.list()[0], p.list()[0]; a != b {
				t.Errorf("the successor listens at %s, the old one at %s", a, b)
			}
			s.upgrade().serves()
		})
	}
}

// A stop in a hook ends what is running, once, and with the right goodbye.
func TestHooksStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		at, step, is string
		kill         bool
	}{
		{at: "event ready"},
		{at: "prepare", step: "start", is: "ErrStopped"},
		{at: "event upgrading", step: "start", is: "ErrStopped"},
		{at: "event handover", step: "handover", is: "ErrStopped"},
		{at: "event resumed", step: "handover", is: "unexpected EOF", kill: true},
		{at: "event upgrade failed", step: "handover", is: "unexpected EOF", kill: true},
		{at: "event upgraded"},
		{at: "event stopping"},
	} {
		t.Run(c.at, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := bothSpec(h)
			specs := []spec{plain.do(c.at, "call stop; call stop")}
			if c.kill {
				specs = append(specs, plain.do("event ready", "kill"))
			}
			h.next(append(specs, plain)...)
			p := h.start()
			if c.at == "event ready" {
				checkErr(t, p.at("ready failed").Err, "", "ErrStopped")
				p.hasEvents(ecdysis.EventStopping)
				p.refuses()
				h.hasFiles()
				return
			}
			p.at("serving")
			if c.at == "event stopping" {
				p.call("stop")
				p.hasEvents(ecdysis.EventStopping)
				p.refuses()
				h.hasFiles()
				return
			}
			m := p.begin(command{Verb: "upgrade"})()
			p.call("awaitexit")
			if c.at == "event upgraded" {
				if m.Err != nil {
					t.Fatalf("upgrade: %+v", m.Err)
				}
				s := h.proc()
				s.at("serving")
				s.serves()
				s.hasPIDFile()
				h.hasFiles("pid", "sock")
				s.upgrade().serves()
				return
			}
			checkErr(t, m.Err, c.step, c.is)
			p.refuses()
			h.hasFiles()
			want := []ecdysis.EventKind{ecdysis.EventUpgrading}
			if c.step == "handover" {
				want = append(want, ecdysis.EventHandover, ecdysis.EventResumed)
			}
			p.hasEvents(append(want, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)...)
			if c.step == "start" {
				h.none()
			} else {
				reaped(t, h.proc().pid)
			}
			checkErr(t, p.call("upgrade").Err, "", "ErrStopped")
		})
	}
}

// A successor that is stopped by its own hook, after COMMIT, is the service: it
// ends, and the predecessor does not come back.
func TestSuccessorStopsInHook(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	h.next(plain, plain.do("event ready", "call stop"), plain)
	p := h.serving()
	l := startLoad(t, 1, true, p.list()...)
	l.more(10)
	l.check()
	if m := p.begin(command{Verb: "upgrade"})(); m.Err != nil {
		t.Fatalf("upgrade: %+v", m.Err)
	}
	h.proc().ended()
	h.hasFiles()
}

func TestPrepareVeto(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp())
	p := h.serving()
	m := p.begin(command{Verb: "upgrade", Args: []string{"veto"}})()
	checkErr(t, m.Err, "prepare", "")
	if m.Err.PID != 0 || m.Err.How != "" || !strings.HasSuffix(m.Err.Text, ": vetoed") {
		t.Errorf("error %+v; want Prepare's own", m.Err)
	}
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	h.none()
	p.serves()
	p.upgrade().serves()
}

// A hook that panics, or that ends its goroutine, ends the attempt; who
// recovers has a process that serves.
func TestHookPanics(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		at   string
		kill bool
	}{
		{at: "prepare"},
		{at: "event upgrading"},
		{at: "event handover"},
		{at: "event resumed", kill: true},
		{at: "event upgrade failed", kill: true},
		{at: "event upgraded"},
	} {
		t.Run(c.at, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := bothSpec(h)
			specs := []spec{plain.do(c.at, "call paniconce")}
			if c.kill {
				specs = append(specs, plain.do("event ready", "kill"))
			}
			h.next(append(specs, plain)...)
			p := h.serving()
			m := p.call("recover", "upgrade")
			if !slices.Equal(m.Text, []string{"planned"}) {
				t.Fatalf("recovered %q, %+v", m.Text, m.Err)
			}
			if c.at == "event upgraded" {
				s := h.proc()
				s.at("serving")
				p.call("awaitexit")
				checkErr(t, p.call("upgrade").Err, "", "ErrUpgraded")
				s.serves()
				s.upgrade().serves()
				return
			}
			if c.kill || c.at == "event handover" {
				reaped(t, h.proc().pid)
			}
			h.none()
			for range 3 {
				p.serves()
			}
			p.hasPIDFile()
			s := p.upgrade()
			s.inherits(p)
			s.serves()
			s.hasPIDFile()
			h.hasFiles("pid", "sock")
		})
	}
}

// A stop that a hook has asked for is not lost when a hook panics afterwards.
func TestHookStopsAndPanics(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"prepare", "event upgrading", "event handover", "event resumed", "event upgrade failed"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := bothSpec(h)
			specs := []spec{plain.do(at, "call stop; call paniconce")}
			if at == "event resumed" || at == "event upgrade failed" {
				specs = append(specs, plain.do("event ready", "kill"))
			}
			h.next(append(specs, plain)...)
			p := h.serving()
			if m := p.call("recover", "upgrade"); !slices.Equal(m.Text, []string{"planned"}) {
				t.Fatalf("recovered %q, %+v", m.Text, m.Err)
			}
			if m := p.call("exited"); m.Text[0] != "yes" {
				t.Fatal("the process has not stopped")
			}
			p.refuses()
			h.hasFiles()
			if got := proctest.ChildrenOf(t, p.pid); len(got) != 0 {
				t.Fatalf("processes %v are left", got)
			}
		})
	}
}

func TestReadyHookPanics(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := bothSpec(h)
	panics := plain
	panics.Do = map[string]string{"listened": "call recoverready; hold", "event ready": "call paniconce"}
	h.next(panics, panics, plain)
	p := h.start()
	if m := p.at("listened recoverready"); !slices.Equal(m.Text, []string{"planned"}) {
		t.Fatalf("recovered %q, %+v", m.Text, m.Err)
	}
	checkErr(t, p.call("upgrade").Err, "", "ErrNotReady")
	p.resume() // calls Ready again
	p.at("serving")
	p.serves()
	p.hasPIDFile()

	m := p.begin(command{Verb: "upgrade"})()
	if m.Err == nil || m.Err.Step != "handover" || !strings.Contains(m.Err.Text, "it says: ") {
		t.Fatalf("error %+v; want what the successor says", m.Err)
	}
	reaped(t, h.proc().pid)
	p.serves()
	p.hasPIDFile()
	h.hasFiles("pid", "sock")
	p.upgrade().serves()
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

// signalSpec is a daemon as the README has it.
func signalSpec(h *hub) spec {
	s := bothSpec(h)
	s.Wait = true
	s.Options.UpgradeSignals = []syscall.Signal{syscall.SIGHUP}
	s.Options.StopSignals = []syscall.Signal{syscall.SIGTERM}
	s.Options.PartialStopSignals = []syscall.Signal{syscall.SIGUSR1}
	return s
}

// withStatus starts a process through a shell, which tells its exit status
// by a named pipe. What is returned waits for it.
func withStatus(h *hub) (edit func(*exec.Cmd), status func() string) {
	fifo := filepath.Join(shortDir(h.t), "status")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		h.t.Fatal(err)
	}
	// Open for both, so that no end waits for the other.
	f, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { f.Close() })
	edit = func(cmd *exec.Cmd) {
		args := append([]string{"sh", "-c", `f=$1; shift; "$@"; echo $? >"$f"`, "sh", fifo}, cmd.Args...)
		cmd.Path, cmd.Args = "/bin/sh", args
	}
	return edit, func() string {
		h.t.Helper()
		_ = f.SetReadDeadline(time.Now().Add(patience))
		var b [8]byte
		n, err := f.Read(b[:])
		if err != nil {
			h.t.Fatal(err)
		}
		return strings.TrimSpace(string(b[:n]))
	}
}

// waits returns when p's Wait catches its signals. No event tells of that.
func (p *proc) waits() {
	p.t.Helper()
	p.call("inwait")
}

func (p *proc) waitReturned(kind ecdysis.EventKind, sig string) {
	p.t.Helper()
	if m := p.at("wait returned"); m.Text[0] != string(kind) || m.Text[1] != sig {
		p.t.Fatalf("Wait returned %q; want %q by %s", m.Text, kind, sig)
	}
}

func TestSignalUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := signalSpec(h)
	h.next(plain, plain.do("new", "hold"), plain)
	edit, status := withStatus(h)
	p := h.serving(edit)
	l := startLoad(t, 1, false, p.list()...)
	l.more(10)
	p.signal(syscall.SIGHUP)
	s := h.proc()
	s.at("new")
	p.signal(syscall.SIGHUP) // a second one meanwhile
	if e := p.event(ecdysis.EventUpgradeFailed, 0); e.Err != ecdysis.ErrInProgress.Error() || e.PID != 0 {
		t.Errorf("event %+v; want ErrInProgress", e)
	}
	p.serves()
	s.resume()
	s.at("serving")
	s.serves()
	p.waitReturned(ecdysis.EventUpgraded, "hangup")
	l.more(10)
	if s := status(); s != "0" {
		t.Errorf("the old process ended with %s", s)
	}
	p.ended()
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventHandover, ecdysis.EventUpgraded)
	h.none()

	// Many at once are one or several upgrades, one after the other: each
	// process has at most one successor.
	for range 3 {
		s.signal(syscall.SIGHUP)
		s.signal(syscall.SIGHUP)
		s2 := h.proc()
		s2.at("serving")
		s.ended()
		h.none()
		s2.serves()
		s = s2
	}
	l.more(10)
	l.check()
}

// A signal that comes too late kills nobody, either.
func TestSignalAfterUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(signalSpec(h))
	p := h.serving()
	network, address := p.addr(0)
	c, err := net.Dial(network, address) // keeps the old one busy
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if pid, _, err := askOn(c); err != nil || pid != p.pid {
		t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
	}
	p.signal(syscall.SIGHUP)
	s := h.proc()
	s.at("serving")
	p.waitReturned(ecdysis.EventUpgraded, "hangup")
	p.signal(syscall.SIGHUP)
	for range 3 {
		if pid, _, err := askOn(c); err != nil || pid != p.pid {
			t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
		}
	}
	p.call("awaitexit")
	h.none()
	s.serves()
	c.Close()
	p.ended()
}

func TestSignalBeforeReady(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"new", "listened", "event ready"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := signalSpec(h)
			h.next(plain.do(point, "hold"), plain)
			p := h.start()
			p.at(point)
			p.signal(syscall.SIGHUP)
			h.none()
			p.resume()
			s := h.proc()
			s.at("serving")
			s.serves()
			p.ended()
			p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
		})
	}
}

func TestSignalStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		sig  syscall.Signal
		kind ecdysis.EventKind
	}{
		{"stop", syscall.SIGTERM, ecdysis.EventStopping},
		{"partial stop", syscall.SIGUSR1, ecdysis.EventPartialStop},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.next(signalSpec(h))
			edit, status := withStatus(h)
			p := h.serving(edit)
			network, address := p.addr(0)
			conn, err := net.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, _, err := askOn(conn); err != nil {
				t.Fatal(err)
			}
			p.waits()
			p.signal(c.sig)
			p.waitReturned(c.kind, c.sig.String())
			p.refuses()
			if c.kind == ecdysis.EventStopping {
				h.hasFiles()
			} else {
				h.hasFiles("pid")
			}
			if pid, _, err := askOn(conn); err != nil || pid != p.pid {
				t.Fatalf("process %d answers, %v; want %d", pid, err, p.pid)
			}
			conn.Close()
			if s := status(); s != "0" {
				t.Errorf("the process ended with %s", s)
			}
			p.ended()
			p.hasEvents(c.kind)
		})
		for _, point := range []string{"start", "new", "listened"} {
			t.Run(c.name+" during an upgrade, at "+point, func(t *testing.T) {
				t.Parallel()
				h := newHub(t)
				plain := signalSpec(h)
				h.next(plain, plain.do(point, "hold"), plain)
				edit, status := withStatus(h)
				p := h.serving(edit)
				p.signal(syscall.SIGHUP)
				s := h.proc()
				s.at(point)
				p.signal(c.sig)
				s.ended()
				p.waitReturned(c.kind, c.sig.String())
				if s := status(); s != "0" {
					t.Errorf("the process ended with %s", s)
				}
				p.ended()
				p.refuses()
				p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, c.kind)
				if e := p.event(ecdysis.EventUpgradeFailed, 0); !strings.HasSuffix(e.Err, ecdysis.ErrStopped.Error()) {
					t.Errorf("event %+v; want ErrStopped", e)
				}
				h.none()
			})
		}
	}
	// In a process whose successor stands ready, a stop ends both; in one that
	// is stood by, the old one does not come back.
	t.Run("within probation", func(t *testing.T) {
		t.Parallel()
		h := newHub(t)
		plain := signalSpec(h)
		h.next(plain.probation(time.Minute), plain)
		p := h.serving()
		p.signal(syscall.SIGHUP)
		s := h.proc()
		s.at("serving")
		s.waits()
		s.signal(syscall.SIGTERM)
		s.waitReturned(ecdysis.EventStopping, "terminated")
		p.waitReturned(ecdysis.EventUpgraded, "hangup")
		s.ended()
		p.ended()
		s.refuses()
		h.hasFiles()
	})
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
