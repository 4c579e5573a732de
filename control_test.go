//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// controlled is a spec of a daemon with all control sockets, in dir.
func controlled(dir string) spec {
	s := tcp()
	s.Wait = true
	s.Options.UpgradeSocket = filepath.Join(dir, "upgrade")
	s.Options.StopSocket = filepath.Join(dir, "stop")
	s.Options.PartialStopSocket = filepath.Join(dir, "partial")
	s.Options.TakeoverSocket = filepath.Join(dir, "take")
	return s
}

// request asks a control socket, in the background, and returns what waits for
// the answer.
func request(t *testing.T, path string) func() (string, error) {
	t.Helper()
	type result struct {
		line string
		err  error
	}
	ch := make(chan result, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	go func() {
		defer cancel()
		line, err := firstLine(ctx, path)
		ch <- result{line, err}
	}()
	return func() (string, error) { r := <-ch; return r.line, r.err }
}

// firstLine is Request, except that it does not wait for the end of the
// connection.
func firstLine(ctx context.Context, path string) (string, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return "", err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\n")
	if text, ok := strings.CutPrefix(line, "ok "); ok {
		return text, nil
	}
	return "", fmt.Errorf("ecdysis: request at %q: %s", path, strings.TrimPrefix(line, "error: "))
}

// asked asks a control socket and wants this answer.
func asked(t *testing.T, path, want string) {
	t.Helper()
	if line, err := request(t, path)(); err != nil || line != want {
		t.Fatalf("%s answers %q, %v; want %q", path, line, err, want)
	}
}

func (p *proc) line(generation int) string {
	return fmt.Sprintf("pid=%d generation=%d", p.pid, generation)
}

func TestControlSockets(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := controlled(dir)
	p := newHub(t, s).serving()
	network, address := p.addr(0)
	l := startLoad(t, 2, false, [2]string{network, address})
	for generation := 1; generation <= 3; generation++ {
		l.more(50)
		answer := request(t, s.Options.UpgradeSocket)
		n := p.h.proc()
		if line, err := answer(); err != nil || line != n.line(generation) {
			t.Fatalf("upgrade: %q, %v; want %q", line, err, n.line(generation))
		}
		if e := p.event(ecdysis.EventUpgraded, 0); e.Socket != s.Options.UpgradeSocket {
			t.Fatalf("event %+v; want socket %s", e, s.Options.UpgradeSocket)
		}
		p.ended()
		p = n
	}
	l.more(50)
	n := p.h.start()
	n.at("serving")
	p.ended()
	l.more(50)
	l.check()
	asked(t, s.Options.StopSocket, n.line(4))
	n.ended()
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Fatalf("left: %v, %v", list, err)
	}
}

func init() {
	verbs["wait"] = func(d *daemon, _ command) message {
		e := d.u.Wait()
		return message{Text: []string{string(e.Kind), fmt.Sprint(e.Signal), e.Socket}}
	}
	// What a process does between Fail and its exit takes time.
	verbs["linger"] = func(*daemon, command) (m message) {
		time.Sleep(20 * time.Millisecond)
		return m
	}
	// A program that asks the control socket that it is told of.
	roles["request"] = func() {
		line, err := ecdysis.Request(context.Background(), os.Getenv(socketVar))
		if err != nil {
			fmt.Println(err, errors.Is(err, os.ErrPermission))
			os.Exit(1)
		}
		fmt.Println(line)
	}
}

const socketVar = "ECDYSIS_TEST_SOCKET"

// triggered is a spec of a daemon with all that can tell it what to do.
func triggered(h *hub) spec {
	s := controlled(h.dir)
	s.Options.UpgradeSignals = []syscall.Signal{syscall.SIGHUP}
	s.Options.StopSignals = []syscall.Signal{syscall.SIGTERM}
	s.Options.PartialStopSignals = []syscall.Signal{syscall.SIGUSR1}
	return s
}

// A client is connected to a control socket and has said nothing.
type client struct {
	net.Conn
	t *testing.T
}

func connect(t *testing.T, path string) client {
	t.Helper()
	c, err := net.DialTimeout("unix", path, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return client{c, t}
}

// answer returns all that c is sent until the other end hangs up.
func (c client) answer() string {
	c.t.Helper()
	b, err := io.ReadAll(c)
	if err != nil {
		c.t.Fatalf("after %q: %v", b, err)
	}
	return string(b)
}

func (c client) wants(line string) {
	c.t.Helper()
	if got := c.answer(); got != line+"\n" {
		c.t.Fatalf("the answer is %q; want %q and a newline", got, line)
	}
}

// causedBy asserts what Wait has returned.
func (p *proc) causedBy(kind ecdysis.EventKind, signal, socket string) {
	p.t.Helper()
	want := []string{string(kind), signal, socket}
	if m := p.at("wait returned"); !slices.Equal(m.Text, want) {
		p.t.Fatalf("Wait returned %q; want %q", m.Text, want)
	}
}

// failed returns the n-th event of a failed upgrade, which has this cause.
func (p *proc) failed(n int, cause, err string) {
	p.t.Helper()
	e := p.event(ecdysis.EventUpgradeFailed, n)
	if !strings.HasPrefix(e.Line, "upgrade failed"+cause+": ") || e.Err != err {
		p.t.Fatalf("event %q, %q; want the cause %q and the error %q", e.Line, e.Err, cause, err)
	}
}

func bySocket(path string) string { return " by socket " + path }

// trigger tells p to do something ("upgrade", "stop" or "partial") by a
// "signal", a "socket" or a "call". It returns what waits for the answer, and
// the cause as Wait tells it.
func (p *proc) trigger(what, by string) (answered func(), signal, socket string) {
	p.t.Helper()
	switch by {
	case "signal":
		sig := map[string]syscall.Signal{"upgrade": syscall.SIGHUP, "stop": syscall.SIGTERM, "partial": syscall.SIGUSR1}[what]
		p.signal(sig)
		return func() {}, sig.String(), ""
	case "socket":
		path := filepath.Join(p.h.dir, what)
		answer := request(p.t, path)
		return func() {
			p.t.Helper()
			if line, err := answer(); err != nil || what != "upgrade" && line != p.line(0) {
				p.t.Fatalf("the answer is %q, %v", line, err)
			}
		}, "<nil>", path
	default:
		answer := p.begin(command{Verb: what})
		return func() {
			p.t.Helper()
			if m := answer(); m.Err != nil {
				p.t.Fatal(m.Err)
			}
		}, "<nil>", ""
	}
}

// Each trigger works in a process that has all of them, and Wait tells which
// it was.
func TestTriggersUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(triggered(h))
	p := h.serving()
	for _, by := range []string{"signal", "socket", "call", "socket", "signal"} {
		answered, signal, socket := p.trigger("upgrade", by)
		n := h.proc()
		n.at("serving")
		p.causedBy(ecdysis.EventUpgraded, signal, socket)
		answered()
		p.ended()
		n.serves()
		p = n
	}
	h.none()
}

// A listener that is to be kept accepts through either stop.
func TestTriggersStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what, by string
		kind     ecdysis.EventKind
	}{
		{"stop", "signal", ecdysis.EventStopping},
		{"stop", "socket", ecdysis.EventStopping},
		{"stop", "call", ecdysis.EventStopping},
		{"partial", "signal", ecdysis.EventPartialStop},
		{"partial", "socket", ecdysis.EventPartialStop},
	} {
		t.Run(c.what+" by "+c.by, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			s := triggered(h)
			s.Wait = false
			s.Listen = append(s.Listen, [2]string{"tcp", "127.0.0.1:0"})
			s.Config = []listenConfig{{}, {KeepOnStop: true}}
			s.Options.PIDFile = h.pidFile()
			h.next(s)
			p := h.serving()
			over := p.begin(command{Verb: "wait"})
			p.waits()
			answered, signal, socket := p.trigger(c.what, c.by)
			if m := over(); !slices.Equal(m.Text, []string{string(c.kind), signal, socket}) {
				t.Fatalf("Wait returned %q; want %q by %q, %q", m.Text, c.kind, signal, socket)
			}
			answered()
			a := p.list()
			if pid, _, err := ask(a[1][0], a[1][1]); err != nil || pid != p.pid {
				t.Fatalf("the kept listener: %d, %v", pid, err)
			}
			if _, err := net.Dial(a[0][0], a[0][1]); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("the other listener: %v", err)
			}
			want := []ecdysis.EventKind{ecdysis.EventStopping}
			if c.kind == ecdysis.EventPartialStop {
				h.hasFiles("pid")
				p.call("stop")
				want = []ecdysis.EventKind{ecdysis.EventPartialStop, ecdysis.EventStopping}
			}
			p.call("awaitexit")
			h.hasFiles()
			p.hasEvents(want...)
		})
	}
}

// Whoever comes before Ready waits for it.
func TestSocketBeforeReady(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what string
		then []ecdysis.EventKind
	}{
		{"upgrade", []ecdysis.EventKind{ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded}},
		{"stop", []ecdysis.EventKind{ecdysis.EventStopping}},
		{"partial", []ecdysis.EventKind{ecdysis.EventPartialStop}},
	} {
		for _, point := range []string{"new", "event ready"} { // Wait runs from "listened" on
			t.Run(c.what+"/"+point, func(t *testing.T) {
				t.Parallel()
				h := newHub(t)
				plain := triggered(h)
				h.next(plain.do(point, "hold"), plain)
				p := h.start()
				p.at(point)
				client := connect(t, filepath.Join(h.dir, c.what))
				if point == "event ready" {
					p.waits()
				}
				p.resume()
				line := "ok " + p.line(0)
				if c.what == "upgrade" {
					line = "ok " + h.proc().line(1)
				}
				client.wants(line)
				p.ended()
				p.hasEvents(c.then...)
				h.none()
			})
		}
	}
}

// From the moment on at which a successor serves its sockets, it acts on what
// comes there: however long it takes to close what nobody has asked for.
func TestSocketAtReady(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	many := plain
	many.Listen = slices.Repeat(plain.Listen, 200)
	many.Extra = map[string]string{"state": "size 67108864"} // memory that takes time to free
	h.next(many, plain.do("event ready", "hold"), plain)
	p := h.serving()
	first := connect(t, plain.Options.UpgradeSocket)
	n := h.proc()
	n.at("event ready")
	n.resume()
	// The old one answers until it knows that the successor serves.
	line := ""
	old := []string{"", "error: " + ecdysis.ErrInProgress.Error() + "\n", "error: " + ecdysis.ErrUpgraded.Error() + "\n"}
	for end := time.Now().Add(patience); slices.Contains(old, line) && time.Now().Before(end); {
		line = connect(t, plain.Options.UpgradeSocket).answer()
	}
	if strings.HasPrefix(line, "error") {
		t.Fatalf("the answer is %q", line)
	}
	if n2 := h.proc(); line != "ok "+n2.line(2)+"\n" {
		t.Fatalf("the answer is %q; want ok %s", line, n2.line(2))
	}
	first.wants("ok " + n.line(1))
	p.ended()
	n.ended()
}

// Whatever comes during an upgrade is answered, and does not begin another.
func TestTriggersDuringUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain, plain.do("new", "hold"), plain)
	p := h.serving()
	first := connect(t, plain.Options.UpgradeSocket)
	n := h.proc()
	n.at("new")
	busy := ecdysis.ErrInProgress.Error()
	for i := range 3 {
		connect(t, plain.Options.UpgradeSocket).wants("error: " + busy)
		p.failed(2*i, bySocket(plain.Options.UpgradeSocket), busy)
		p.signal(syscall.SIGHUP)
		p.failed(2*i+1, " by signal hangup", busy)
		p.failUpgrade(command{}, "", "ErrInProgress")
	}
	p.serves()
	n.resume()
	first.wants("ok " + n.line(1))
	p.causedBy(ecdysis.EventUpgraded, "<nil>", plain.Options.UpgradeSocket)
	p.ended()
	n.at("serving")
	n.serves()
	n.hasEvents()
	h.none()
}

// Once the successor has the word, too, and during its probation.
func TestTriggersDuringHandover(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain.probation(time.Minute), plain.do("event ready", "hold"), plain)
	p := h.serving()
	first := connect(t, plain.Options.UpgradeSocket)
	n := h.proc()
	n.at("event ready")
	busy := ecdysis.ErrInProgress.Error()
	connect(t, plain.Options.UpgradeSocket).wants("error: " + busy)
	p.failed(0, bySocket(plain.Options.UpgradeSocket), busy)
	n.resume()
	n.at("serving")
	n.signal(syscall.SIGHUP)
	n.failed(0, " by signal hangup", busy)
	// The old one may not know at once that the successor serves, and answer
	// for a moment. Then it is the successor alone.
	failures := func(p *proc) (n int) {
		for _, kind := range p.kinds() {
			if kind == ecdysis.EventUpgradeFailed {
				n++
			}
		}
		return n
	}
	const many = 50
	for round := 0; ; round++ {
		old, all := failures(p), failures(p)+failures(n)
		for range many {
			connect(t, plain.Options.UpgradeSocket).wants("error: " + busy)
		}
		for end := time.Now().Add(patience); failures(p)+failures(n) < all+many; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d events tell of %d refusals", failures(p)+failures(n)-all, many)
			}
		}
		if failures(p) == old {
			break
		}
		if round == 5 {
			t.Fatal("the old one answers while the successor serves")
		}
	}
	n.failed(1, bySocket(plain.Options.UpgradeSocket), busy)
	// The successor's stop makes it final.
	connect(t, plain.Options.StopSocket).wants("ok " + n.line(1))
	first.wants("ok " + n.line(1))
	n.causedBy(ecdysis.EventStopping, "<nil>", plain.Options.StopSocket)
	p.causedBy(ecdysis.EventUpgraded, "<nil>", plain.Options.UpgradeSocket)
	n.ended()
	p.ended()
	h.hasFiles()
	h.none()
}

// A stop during an upgrade ends it, and all who wait are told.
func TestStopSocketDuringUpgrade(t *testing.T) {
	t.Parallel()
	for what, kind := range map[string]ecdysis.EventKind{"stop": ecdysis.EventStopping, "partial": ecdysis.EventPartialStop} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			plain := triggered(h)
			h.next(plain, plain.do("new", "hold"))
			p := h.serving()
			upgrade := connect(t, plain.Options.UpgradeSocket)
			n := h.proc()
			n.at("new")
			path := filepath.Join(h.dir, what)
			connect(t, path).wants("ok " + p.line(0))
			line := upgrade.answer()
			if !strings.HasPrefix(line, "error: ecdysis: upgrade failed at init: successor ") || !strings.HasSuffix(line, ": "+ecdysis.ErrStopped.Error()+"\n") {
				t.Errorf("who upgrades is told %q", line)
			}
			p.causedBy(kind, "<nil>", path)
			p.ended()
			n.ended()
			p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, kind)
		})
	}
}

// The line of a failure names the step, how the successor ended, and what it
// has said. It is the event's error, on one line.
func TestFailureLine(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain)
	p := h.serving()
	for i, c := range []struct{ point, do, want string }{
		{"start", "exit 3", "init: successor PID (exit status 3): it ended without a call of Ready or Fail: unexpected EOF"},
		{"new", "fail no such colour:\n\tmauve", "init: successor PID (exit status 1): it says: no such colour:\n\tmauve"},
		{"new", "call fail; call linger; exit 5", "init: successor PID (exit status 5): it says: told to fail"},
		{"listened", "kill", "init: successor PID (signal: killed): it ended without a call of Ready or Fail: unexpected EOF"},
		{"event ready", "exit 4", "handover: successor PID (exit status 4): unexpected EOF"},
	} {
		h.next(plain.do(c.point, c.do))
		answer := request(t, plain.Options.UpgradeSocket)
		n := h.proc()
		want := "ecdysis: upgrade failed at " + strings.Replace(c.want, "PID", fmt.Sprint(n.pid), 1)
		_, err := answer()
		text := fmt.Sprintf("ecdysis: request at %q: %s", plain.Options.UpgradeSocket, strings.NewReplacer("\n", " ", "\t", " ").Replace(want))
		if err == nil || err.Error() != text {
			t.Errorf("Request: %v; want %s", err, text)
		}
		if e := p.event(ecdysis.EventUpgradeFailed, i); e.Err != want || e.PID != n.pid || e.Socket != plain.Options.UpgradeSocket {
			t.Errorf("event %+v; want error %s", e, want)
		}
		p.serves()
	}
	h.next(plain)
	answer := request(t, plain.Options.UpgradeSocket)
	n := h.proc()
	if line, err := answer(); err != nil || line != n.line(1) {
		t.Fatalf("then: %q, %v; want %q", line, err, n.line(1))
	}
}

// To connect is the request: who hangs up early has asked, too.
func TestClientHangsUp(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain, plain.do("new", "hold"), plain)
	p := h.serving()
	early := connect(t, plain.Options.UpgradeSocket)
	n := h.proc()
	n.at("new")
	early.Close()
	connect(t, plain.Options.UpgradeSocket).Close() // refused, and not there to hear it
	p.failed(0, bySocket(plain.Options.UpgradeSocket), ecdysis.ErrInProgress.Error())
	n.resume()
	p.causedBy(ecdysis.EventUpgraded, "<nil>", plain.Options.UpgradeSocket)
	p.ended()
	n.at("serving")
	n.serves()
	connect(t, plain.Options.PartialStopSocket).Close()
	n.causedBy(ecdysis.EventPartialStop, "<nil>", plain.Options.PartialStopSocket)
	n.ended()
}

// What a client sends is no matter, and does not cost it the answer.
func TestClientSendsGarbage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain, plain.do("new", "hold"), plain)
	p := h.serving()
	garbage := strings.Repeat("GET / HTTP/1.1\r\n\x00\xff", 1000)
	send := func(path string) client {
		t.Helper()
		c := connect(t, path)
		if _, err := io.WriteString(c, garbage); err != nil {
			t.Fatal(err)
		}
		return c
	}
	// The takeover socket's client is told, in that socket's own words, or
	// finds what it has sent too much reset.
	if b, err := io.ReadAll(send(plain.Options.TakeoverSocket)); len(b) > 0 && b[0] != 'F' || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("garbage is answered with %q, %v", b, err)
	}
	first := send(plain.Options.UpgradeSocket)
	n := h.proc()
	n.at("new")
	n.resume()
	first.wants("ok " + n.line(1))
	p.ended()
	n.at("serving")
	n.serves()
	connect(t, plain.Options.StopSocket).wants("ok " + n.line(1))
	n.ended()

	// Sent before it is looked at: later it could find nobody there.
	h.next(plain.do("new", "hold"))
	p = h.start()
	p.at("new")
	stop := send(plain.Options.StopSocket)
	p.resume()
	stop.wants("ok " + p.line(0))
	p.ended()
}

// A thousand clients that say nothing, at each socket.
func TestSilentClients(t *testing.T) {
	t.Parallel()
	const many = 1000
	crowd := func(t *testing.T, path string) []client {
		t.Helper()
		list := make([]client, many)
		for i := range list {
			list[i] = connect(t, path)
		}
		return list
	}
	t.Run("upgrade", func(t *testing.T) {
		t.Parallel()
		h := newHub(t)
		plain := triggered(h)
		h.next(plain, plain.do("new", "hold"), plain)
		p := h.serving()
		first := connect(t, plain.Options.UpgradeSocket)
		n := h.proc()
		n.at("new")
		for _, c := range crowd(t, plain.Options.UpgradeSocket) {
			c.wants("error: " + ecdysis.ErrInProgress.Error())
		}
		p.failed(many-1, bySocket(plain.Options.UpgradeSocket), ecdysis.ErrInProgress.Error())
		p.serves()
		n.resume()
		first.wants("ok " + n.line(1))
		n.at("serving")
		n.serves()
		h.none()
	})
	t.Run("stop", func(t *testing.T) {
		t.Parallel()
		h := newHub(t)
		plain := triggered(h)
		h.next(plain.do("new", "hold"))
		p := h.start()
		p.at("new")
		list := crowd(t, plain.Options.StopSocket)
		p.resume()
		list[0].wants("ok " + p.line(0))
		// The others are answered, or came too late for it.
		var all sync.WaitGroup
		for _, c := range list[1:] {
			all.Go(func() {
				b, err := io.ReadAll(c)
				if errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 && string(b) != "ok "+p.line(0)+"\n" {
					t.Errorf("after %q: %v", b, err)
				}
			})
		}
		all.Wait()
		p.ended()
		p.hasEvents(ecdysis.EventStopping)
		h.hasFiles()
	})
	t.Run("takeover", func(t *testing.T) {
		t.Parallel()
		h := newHub(t)
		plain := triggered(h)
		h.next(plain)
		p := h.serving()
		before := len(p.call("fds").Text)
		list := crowd(t, plain.Options.TakeoverSocket)
		const keeps = 32 // the last ones; each of the others gives its place up
		for _, c := range list[:many-keeps] {
			if line := c.answer(); strings.HasPrefix(line, "H") {
				t.Fatalf("who has said nothing is told %q", line)
			}
		}
		if n := len(p.call("fds").Text); n > before+keeps {
			t.Errorf("%d descriptors with %d silent clients, %d before", n, many, before)
		}
		p.serves()
		answer := request(t, plain.Options.UpgradeSocket)
		n := h.proc()
		if line, err := answer(); err != nil || line != n.line(1) {
			t.Fatalf("upgrade: %q, %v; want %q", line, err, n.line(1))
		}
		p.ended()
		n.at("serving")
		n.serves()
	})
}

// Only root and the process's own user are served.
func TestControlSocketUsers(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("another user's process takes root to start")
	}
	h := newHub(t)
	if err := os.Chmod(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(h.dir, "bin")
	// Written by another process, so that no concurrent fork of this one has
	// it open for writing when it is started.
	if out, err := exec.Command("cp", os.Args[0], bin).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	ask := func(uid uint32, path string) string {
		t.Helper()
		cmd := exec.Command(bin, "-test.run=^$")
		cmd.Env = append(os.Environ(), roleVar+"=request", socketVar+"="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.Output()
		if err != nil && cmd.ProcessState.ExitCode() != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	const nobody = 65534
	plain := triggered(h)
	h.next(plain)
	p := h.serving()
	for _, path := range []string{plain.Options.UpgradeSocket, plain.Options.StopSocket, plain.Options.PartialStopSocket} {
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Fatalf("%s: %v, %v; want mode 0600", path, fi.Mode(), err)
		}
		if text := ask(nobody, path); !strings.HasSuffix(text, "permission denied true") {
			t.Errorf("who may not connect is told %q", text)
		}
		// The mode is not all that protects it.
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		if text, want := ask(nobody, path), "the peer is a process of user 65534; want one of user 0 or 0 false"; !strings.HasSuffix(text, want) {
			t.Errorf("another user is told %q; want %q", text, want)
		}
		p.serves()
	}
	p.hasEvents()
	if text := ask(0, plain.Options.StopSocket); text != p.line(0) {
		t.Errorf("root is told %q; want %q", text, p.line(0))
	}
	p.ended()

	// A process that is not root's serves its own user, and root.
	for _, uid := range []uint32{nobody, 0} {
		dir := filepath.Join(h.dir, fmt.Sprint("of", uid))
		if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, nobody, nobody), os.Chmod(h.path, 0o777)); err != nil {
			t.Fatal(err)
		}
		own := controlled(dir)
		h.next(own)
		p := h.serving(func(cmd *exec.Cmd) {
			cmd.Path, cmd.Args[0], cmd.Dir = bin, bin, h.dir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		})
		if text := ask(uid, own.Options.StopSocket); text != p.line(0) {
			t.Errorf("user %d is told %q; want %q", uid, text, p.line(0))
		}
		p.ended()
	}
}

func TestRequestErrors(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	// serve listens at a path, and does this with each client.
	serve := func(name string, f func(c *net.UnixConn)) string {
		t.Helper()
		path := filepath.Join(dir, name)
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				f(c.(*net.UnixConn))
			}
		}()
		return path
	}
	says := func(name, text string) string {
		return serve(name, func(c *net.UnixConn) { _, _ = io.WriteString(c, text); c.Close() })
	}
	stale := says("stale", "")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "left")})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	var held []net.Conn // and not collected
	holds := serve("holds", func(c *net.UnixConn) { held = append(held, c) })
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	background := context.Background()
	for _, c := range []struct {
		name, path string
		ctx        context.Context
		is         error
		text       string
	}{
		{"no file", filepath.Join(dir, "none"), background, syscall.ENOENT, "none"},
		{"refused", filepath.Join(dir, "left"), background, syscall.ECONNREFUSED, "left"},
		{"empty path", "", background, nil, `""`},
		{"long path", strings.Repeat("x", 200), background, nil, "200 bytes"},
		{"no word", stale, background, io.ErrUnexpectedEOF, "without an answer"},
		{"half a line", says("half", "ok pid=1 gener"), background, io.ErrUnexpectedEOF, "without an answer"},
		{"garbage", says("garbage", "220 mail.example ESMTP\r\n"), background, nil, `"220 mail.example ESMTP\r"`},
		{"endless", serve("endless", func(c *net.UnixConn) {
			for {
				if _, err := c.Write(make([]byte, 4096)); err != nil {
					c.Close()
					return
				}
			}
		}), background, io.ErrUnexpectedEOF, ""},
		{"failure", says("failure", "error: no paper\n"), background, nil, "failure\": no paper"},
		{"ctx done", holds, canceled, context.Canceled, "holds"},
	} {
		t.Run(c.name, func(t *testing.T) {
			line, err := ecdysis.Request(c.ctx, c.path)
			if err == nil || line != (ecdysis.Reply{}) || !strings.HasPrefix(err.Error(), fmt.Sprintf("ecdysis: request at %q: ", c.path)) ||
				!strings.Contains(err.Error(), c.text) || c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("%v, %v; want an error with %q that is %v", line, err, c.text, c.is)
			}
			var oe *net.OpError
			if _, isErrno := c.is.(syscall.Errno); isErrno && !errors.As(err, &oe) {
				t.Errorf("%v is no *net.OpError", err)
			}
		})
	}
	t.Run("ctx ends", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(background, 20*time.Millisecond)
		defer cancel()
		if _, err := ecdysis.Request(ctx, holds); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%v; want the context's", err)
		}
	})
}

// A full queue is waited out, as long as ctx lasts.
func TestRequestQueue(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "full")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	connect(t, path) // fills it
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := ecdysis.Request(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		if runtime.GOOS != "linux" {
			t.Skipf("a full queue refuses here: %v", err)
		}
		t.Fatalf("%v; want the context's", err)
	}
	answer := request(t, path)
	for range 2 {
		nfd, _, err := syscall.Accept(fd)
		if err != nil {
			t.Fatal(err)
		}
		c := os.NewFile(uintptr(nfd), path)
		_, _ = io.WriteString(c, "ok pid=1 generation=0\n")
		c.Close()
	}
	if line, err := answer(); err != nil || line != "pid=1 generation=0" {
		t.Fatalf("%q, %v", line, err)
	}
}

// The end of ctx takes nothing back; the end of the process is told.
func TestRequestGivenUp(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	plain := triggered(h)
	h.next(plain, plain.do("new", "hold"), plain.do("new", "hold"), plain)
	p := h.serving()
	ctx, cancel := context.WithCancel(context.Background())
	given := make(chan error, 1)
	go func() {
		_, err := ecdysis.Request(ctx, plain.Options.UpgradeSocket)
		given <- err
	}()
	n := h.proc()
	n.at("new")
	cancel()
	if err := <-given; !errors.Is(err, context.Canceled) {
		t.Fatalf("%v; want the context's", err)
	}
	n.resume()
	p.causedBy(ecdysis.EventUpgraded, "<nil>", plain.Options.UpgradeSocket)
	n.at("serving")

	answer := request(t, plain.Options.UpgradeSocket)
	n2 := h.proc()
	n2.at("new")
	n.kill()
	if _, err := answer(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%v; want io.ErrUnexpectedEOF", err)
	}
	n2.resume()
	n2.at("serving")
	n2.serves()
	connect(t, plain.Options.StopSocket).wants("ok " + n2.line(2))
	n2.ended()
	h.hasFiles()
}

// accepts returns what waits until p has accepted so many since then, of those
// who wait for an answer. Who is not accepted when p ends is not answered.
func (p *proc) accepts(n int) (accepted func()) {
	p.t.Helper()
	sockets := func() (list []string) {
		for _, s := range p.call("fds").Text {
			if _, target, _ := strings.Cut(s, " "); strings.HasPrefix(target, "socket:") {
				list = append(list, target)
			}
		}
		return list
	}
	before := map[string]bool{}
	for _, s := range sockets() {
		before[s] = true
	}
	return func() {
		p.t.Helper()
		more := 0
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			list := slices.DeleteFunc(sockets(), func(s string) bool { return before[s] })
			if more = len(list); more >= n {
				return
			}
		}
		p.t.Fatalf("process %d has accepted %d; want %d", p.pid, more, n)
	}
}

// Two who ask for the end of accepting at once get no more than that.
func TestPartialStopTwice(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := triggered(h)
	s.Wait = false
	s.Options.PIDFile = filepath.Join(h.dir, "pid")
	s = s.do("event partial stop", "call holdonce")
	h.next(s)
	p := h.serving()
	wait := p.begin(command{Verb: "wait"})
	accepted := p.accepts(2)
	answers := []func() (string, error){request(t, s.Options.PartialStopSocket)}
	p.at("event partial stop")
	answers = append(answers, request(t, s.Options.PartialStopSocket))
	accepted()
	p.call("release")
	for _, answer := range answers {
		if line, err := answer(); err != nil || line != p.line(0) {
			t.Errorf("%q, %v; want %q", line, err, p.line(0))
		}
	}
	if m := wait(); m.Text[0] != string(ecdysis.EventPartialStop) {
		t.Errorf("Wait returned %q", m.Text)
	}
	p.hasEvents(ecdysis.EventPartialStop)
	if m := p.call("exited"); m.Text[0] != "no" {
		t.Error("Exit is closed after a partial stop")
	}
	p.hasPIDFile()
	p.call("stop")
	p.hasEvents(ecdysis.EventPartialStop, ecdysis.EventStopping)
	h.hasFiles()
}
