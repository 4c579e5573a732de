package ecdysis_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// sameFile returns what asserts that a path still leads to the file that it
// leads to now.
func sameFile(t *testing.T, path string) (check func()) {
	t.Helper()
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if now, err := os.Lstat(path); err != nil || !os.SameFile(before, now) {
			t.Errorf("%s is another file than it was, or none: %v", path, err)
		}
	}
}

// failedBecauseOf returns the event of an upgrade that has failed with n as
// the successor.
func (p *proc) failedBecauseOf(n *proc) (e eventMsg) {
	p.t.Helper()
	p.wait("event of a failed upgrade", func() bool {
		i := slices.IndexFunc(p.events, func(e eventMsg) bool { return e.Kind == ecdysis.EventUpgradeFailed && e.PID == n.pid })
		if i >= 0 {
			e = p.events[i]
		}
		return i >= 0
	})
	return e
}

// The successor is killed while clients connect and connect: the old one takes
// the sockets, the PID file and the control sockets back, nobody is refused,
// and the next upgrade works.
func TestProbationUnderLoad(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{10 * time.Millisecond, 500 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			s := triggered(h)
			s.Listen = append(s.Listen, [2]string{"unix", h.sock()})
			s.Options.PIDFile = h.pidFile()
			h.next(s.probation(time.Minute), s)
			p := h.serving()
			l := startCrashLoad(t, p.list())
			files := []func(){sameFile(t, h.sock())}
			for _, name := range []string{"upgrade", "stop", "partial", "take"} {
				files = append(files, sameFile(t, filepath.Join(h.dir, name)))
			}
			busy := ecdysis.ErrInProgress.Error()

			// fail begins an upgrade, and kills the successor when it has
			// served for some time.
			fail := func(client *client) {
				t.Helper()
				l.more(20)
				n := h.proc()
				n.at("serving")
				ready := time.Now()
				n.hasPIDFile()
				connect(t, s.Options.UpgradeSocket).wants("error: " + busy)
				time.Sleep(time.Until(ready.Add(after))) // as the scenario wants it
				n.kill()
				e := p.failedBecauseOf(n)
				want := "ecdysis: upgrade failed at probation: successor " + strconv.Itoa(n.pid) + " (signal: killed): unexpected EOF"
				if e.Err != want {
					t.Errorf("event %+v; want the error %q", e, want)
				}
				if client != nil {
					client.wants("error: " + want)
				}
				reaped(t, n.pid)
				p.serves()
				p.hasPIDFile()
				for _, same := range files {
					same()
				}
				l.more(20)
			}
			c := connect(t, s.Options.UpgradeSocket)
			fail(&c)
			// The control sockets are the old one's: it is this one that
			// answers, and whose Wait acts.
			c = connect(t, s.Options.UpgradeSocket)
			fail(&c)
			p.signal(syscall.SIGHUP)
			fail(nil)
			l.more(20)
			l.check(3 * 2)

			// An upgrade that nobody disturbs. The old one's end ends its
			// standing by.
			c = connect(t, s.Options.UpgradeSocket)
			n := h.proc()
			n.at("serving")
			n.serves()
			p.kill()
			n.hasPIDFile()
			for _, same := range files {
				same()
			}
			connect(t, s.Options.StopSocket).wants("ok " + n.line(1))
			n.ended()
			h.hasFiles()
		})
	}
}

// After a probation that was taken back the old one's stop sockets are its
// own, too.
func TestProbationThenStop(t *testing.T) {
	t.Parallel()
	for what, kind := range map[string]ecdysis.EventKind{"stop": ecdysis.EventStopping, "partial": ecdysis.EventPartialStop} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			s := triggered(h)
			h.next(s.probation(time.Minute), s)
			p := h.serving()
			answer := request(t, s.Options.UpgradeSocket)
			n := h.proc()
			n.at("serving")
			n.kill()
			if _, err := answer(); err == nil {
				t.Fatal("the upgrade has not failed")
			}
			path := filepath.Join(h.dir, what)
			connect(t, path).wants("ok " + p.line(0))
			p.causedBy(kind, "<nil>", path)
			p.ended()
			if c, err := net.Dial("unix", path); err == nil {
				c.Close()
				t.Errorf("%s takes connections still", path)
			}
		})
	}
}
