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
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Takeover: a process that nobody forked gets everything from the one that
// serves. Each of these processes is started by the test, which is no part of
// the chain.

// frameOf is a frame of one record, as docs/design.md has it.
func frameOf(kind byte, fields ...string) string {
	var b strings.Builder
	for _, f := range fields {
		for n := len(f); ; n >>= 7 {
			if n < 0x80 {
				b.WriteByte(byte(n))
				break
			}
			b.WriteByte(byte(n) | 0x80)
		}
		b.WriteString(f)
	}
	if len(fields) > 0 {
		b.WriteByte(0)
	}
	n := b.Len()
	return string([]byte{kind, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) + b.String()
}

// readFrame returns the next frame and its bytes. Descriptors that come with
// it are discarded.
func readFrame(r io.Reader) (kind byte, payload string, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, "", err
	}
	b := make([]byte, int(h[1])<<24|int(h[2])<<16|int(h[3])<<8|int(h[4]))
	_, err = io.ReadFull(r, b)
	return h[0], string(b), err
}

// A peer is one end of a conversation that the test itself leads, frame by
// frame.
type peer struct {
	t *testing.T
	c net.Conn
}

// dials connects to a takeover socket.
func dials(t *testing.T, path string) *peer {
	t.Helper()
	c, err := net.DialTimeout("unix", path, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &peer{t, c}
}

// asks connects and says TAKE.
func asks(t *testing.T, path string) *peer {
	t.Helper()
	p := dials(t, path)
	say(t, p.c, takeFrame)
	return p
}

var takeFrame = frameOf('T', "version=1")

// hears reads to the next frame of this kind, and returns what is in it.
func (p *peer) hears(kind byte) string {
	p.t.Helper()
	for heard := ""; ; {
		k, payload, err := readFrame(p.c)
		if err != nil {
			p.t.Fatalf("the other end said %q and then: %v; want a frame %q", heard, err, kind)
		}
		if k == kind {
			return payload
		}
		heard += string(k)
	}
}

// refused asserts that this reason is all that the other end still says.
func (p *peer) refused(says string) {
	p.t.Helper()
	k, reason, err := readFrame(p.c)
	if err != nil || k != 'F' || !strings.Contains(reason, "reason=") || !strings.Contains(reason, says) {
		p.t.Fatalf("the other end says %q %q, %v; want a refusal that says %q", k, reason, err, says)
	}
	p.hungUp()
}

// hungUp asserts that the other end says no more.
func (p *peer) hungUp() {
	p.t.Helper()
	k, payload, err := readFrame(p.c)
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("the other end says %q %q, %v; want that it hangs up", k, payload, err)
	}
}

func init() {
	// A process that takes over frame by frame, as the test says.
	roles["taker"] = func() {
		d := &daemon{cmds: make(chan command)}
		d.dial()
		d.point("taker")
		var conn net.Conn
		for c := range d.cmds {
			var m message
			var err error
			switch c.Verb {
			case "dial":
				conn, err = net.Dial("unix", c.Args[0])
			case "say":
				_, err = io.WriteString(conn, frameOf(c.Args[0][0], c.Args[1:]...))
			case "hear":
				err = readUntil(conn, c.Args[0][0])
			case "live":
			}
			m.ID, m.Err = c.ID, toErrMsg(err)
			d.send(m)
		}
	}
	// The next attempt is vetoed by Prepare.
	verbs["veto"] = func(d *daemon, c command) message {
		d.prep.Store(&command{Args: []string{"veto"}})
		return message{}
	}
	// A hook ends its goroutine.
	verbs["goexit"] = func(*daemon, command) message {
		runtime.Goexit()
		return message{}
	}
	// A first call of New that must fail; the second is the daemon's own.
	adjust = append(adjust, func(d *daemon, o *ecdysis.Options) {
		if d.spec.Extra["New twice"] == "" {
			return
		}
		_, err := ecdysis.New(*o)
		d.send(message{At: "first New", Err: toErrMsg(err)})
		if err == nil {
			fatal(errors.New("the first New has succeeded"))
		}
		d.point("first New failed")
	})
}

// taker starts a process that the test leads.
func (h *hub) taker() *proc {
	h.t.Helper()
	p := h.start(func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, roleVar+"=taker") })
	p.at("taker")
	p.does("dial", h.take())
	return p
}

// does gives p a command that must succeed.
func (p *proc) does(verb string, args ...string) {
	p.t.Helper()
	if m := p.call(verb, args...); m.Err != nil {
		p.t.Fatalf("process %d: %s %q: %+v", p.pid, verb, args, m.Err)
	}
}

// says asserts that an error says all of this, and is that.
func (e *errMsg) says(t *testing.T, is string, says ...string) {
	t.Helper()
	if e == nil || is != "" && !slices.Contains(e.Is, is) {
		t.Errorf("error %+v; want one that is %q and says %q", e, is, says)
		return
	}
	for _, s := range says {
		if !strings.Contains(e.Text, s) {
			t.Errorf("error %+v; want that it says %q", e, s)
		}
	}
}

// turnedAway starts a process whose New must fail so.
func (h *hub) turnedAway(is string, says ...string) {
	h.t.Helper()
	n := h.start()
	n.at("new failed").Err.says(h.t, is, says...)
	n.ended()
}

// hasFailed asserts that the attempt that failed as p's n-th, from 0, came by
// the takeover socket and failed at this step.
func (p *proc) hasFailed(n int, step string, says ...string) {
	p.t.Helper()
	e := p.event(ecdysis.EventUpgradeFailed, n)
	if e.Socket != p.h.take() {
		p.t.Errorf("event %+v; want one by %s", e, p.h.take())
	}
	_, at, _ := strings.Cut(e.Err, "upgrade failed at ")
	at, _, _ = strings.Cut(at, ":")
	if step != "" && !slices.Contains(strings.Split(step, " or "), at) {
		p.t.Errorf("event %+v; want a failure at %s", e, step)
	}
	(&errMsg{Text: e.Err}).says(p.t, "", says...)
}

// settles returns when p has the descriptors and the goroutines that it had
// before: of what runs in Wait the last words may come before the end.
func (p *proc) settles(before func(*proc) string) func() {
	want := before(p)
	for same := 0; same < 10; time.Sleep(5 * time.Millisecond) { // Wait is just being called
		if now := before(p); now == want {
			same++
		} else {
			want, same = now, 0
		}
	}
	return func() {
		p.t.Helper()
		now := ""
		for end := time.Now().Add(patience / 4); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if now = before(p); now == want {
				return
			}
		}
		p.t.Errorf("process %d has %s; before: %s", p.pid, now, want)
	}
}

// holdings is what p has: descriptors and goroutines.
func (p *proc) holdings() string {
	p.t.Helper()
	return strings.Join(append(p.call("fds").Text, p.call("goroutines").Text...), ", ")
}

// taking is a daemon that takes over in the hub's directory, has all that
// bothSpec has, and waits to be taken over.
func (h *hub) taking() spec {
	s := bothSpec(h)
	s.Wait = true
	s.Options.TakeoverSocket = h.take()
	return s
}

func (h *hub) take() string { return filepath.Join(h.dir, "take") }

func (s spec) hold(points ...string) spec {
	do := map[string]string{}
	for k, v := range s.Do {
		do[k] = v
	}
	for _, p := range points {
		do[p] = "hold"
	}
	s.Do = do
	return s
}

// is asserts that p is of this generation, and whether it has a parent.
func (p *proc) is(generation int) {
	p.t.Helper()
	want := []string{fmt.Sprint(generation), fmt.Sprint(generation > 0)}
	if m := p.call("generation"); !slices.Equal(m.Text, want) {
		p.t.Fatalf("process %d: generation, HasParent %q; want %q", p.pid, m.Text, want)
	}
}

// replaced asserts that p has been replaced by s at the takeover socket, and
// knows it, and returns when p has exited.
func (p *proc) replaced(s *proc, generation int) {
	p.t.Helper()
	p.ended()
	e := p.event(ecdysis.EventUpgraded, 0)
	if e.PID != s.pid || e.Generation != generation || e.Socket != p.h.take() || e.Err != "" {
		p.t.Errorf("event %+v; want one of process %d, generation %d, by %s", e, s.pid, generation, p.h.take())
	}
	if m := p.at("wait returned"); m.Text[0] != string(ecdysis.EventUpgraded) || m.Text[2] != p.h.take() {
		p.t.Errorf("Wait returned %q; want that it was replaced by %s", m.Text, p.h.take())
	}
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

// Everything is handed on, in use and under load, and no client sees it.
func TestTakeoverOfEverything(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	h := newHub(t)
	s := h.taking()
	s.Options.UpgradeSocket = filepath.Join(h.dir, "upgrade")
	s.Options.StopSocket = filepath.Join(h.dir, "stop")
	s.Options.PartialStopSocket = filepath.Join(h.dir, "partial")
	d := dgrams(1, dgramSpec{Network: "udp", Address: "127.0.0.1:0"}, dgramSpec{Network: "unixgram", Address: filepath.Join(h.dir, "gram")})
	s.Extra = d.Extra
	s.Extra["seqpacket"] = filepath.Join(h.dir, "seq")
	s.Extra["state"] = "all 100000"
	h.next(s, s.hold("new"))
	p := h.serving()
	p.is(0)

	conn := dialled(p, "c", "tcp")
	p.thing("AddConn", "conn", "c")
	p.thing("close", "c")
	p.thing("open", "f", filepath.Join(h.dir, "file"))
	p.thing("write", "f", "0123456789")
	p.thing("seek", "f", "4")
	p.thing("AddFile", "file", "f")
	p.thing("close", "f")
	p.thing("DatagramPair", "pair", "pair")
	sockets := p.dgram("inodes")
	network, address := p.addr(0)
	client, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if pid, _, err := askOn(client); err != nil || pid != p.pid {
		t.Fatalf("%d, %v", pid, err)
	}
	l := startLoad(t, 2, false, p.list()...)
	dl := startDgrams(p, 1, 4)
	l.more(100)

	n := h.start()
	n.at("new")
	l.more(50) // the old one serves while the new one begins
	p.hasPIDFile()
	n.gives("*net.TCPConn", "Conn", "conn", "c")
	n.gives("*os.File", "File", "file", "f")
	n.gives("456789", "read", "f", "6")
	n.gives("100000|EOF", "state read", "-1", "4096")
	n.gives("*net.UnixConn", "DatagramPair", "pair", "pair")
	n.thing("write", "pair.up", "hello")
	p.gives("hello", "read", "pair.down", "5")
	n.resume()
	n.at("serving")
	n.inherits(p)
	n.is(1)
	n.unclaimed()
	n.hasPIDFile()
	if got := n.dgram("inodes"); !slices.Equal(got, sockets) {
		t.Errorf("packet sockets %q; want %q", got, sockets)
	}
	converse(n, "c", conn)
	n.thing("close", "c")
	ends(t, conn)
	l.more(50)
	dl.answered(n, 20)
	n.serves()

	// The old one drains, and exits when its last client has gone.
	if pid, generation, err := askOn(client); err != nil || pid != p.pid || generation != 0 {
		t.Errorf("the old one's client: %d %d, %v", pid, generation, err)
	}
	if m := n.call("waitparent", "1ms"); m.Err == nil || !slices.Contains(m.Err.Is, "context deadline") {
		t.Errorf("WaitForParent: %+v; want that its time is over", m.Err)
	}
	dl.end()
	client.Close()
	if m := n.call("waitparent"); m.Err != nil {
		t.Errorf("WaitForParent: %+v", m.Err)
	}
	p.replaced(n, 1)
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
	n.hasEvents()
	dl.check(n)
	l.check()

	// Its control sockets are the new one's.
	h.next(s)
	answer := request(t, s.Options.UpgradeSocket)
	g := h.proc()
	if line, err := answer(); err != nil || line != g.line(2) {
		t.Fatalf("upgrade: %q, %v", line, err)
	}
	g.is(2)
	g.inherits(p)
	asked(t, s.Options.StopSocket, g.line(2))
	g.ended()
	h.hasFiles("file")
}

// The one that took over is taken over, and upgrades, and so does the next.
func TestTakeoverAgain(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	p := h.serving()
	first := p
	l := startLoad(t, 1, false, p.list()...)
	for generation := 1; generation <= 6; generation++ {
		l.more(20)
		var n *proc
		if generation%3 == 0 {
			p.begin(command{Verb: "upgrade"})
			n = h.proc()
			n.at("serving")
			p.ended()
		} else {
			n = h.serving()
			p.replaced(n, generation)
		}
		n.is(generation)
		n.inherits(first)
		n.hasPIDFile()
		p = n
	}
	l.more(20)
	l.check()
	p.begin(command{Verb: "stop"})
	p.ended()
	h.hasFiles()
}

// Nobody there is a cold start: no file, or one that a process has left that
// was killed.
func TestTakeoverColdStart(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	for range 2 {
		p := h.serving()
		p.is(0)
		p.serves()
		p.hasEvents()
		p.kill()
		h.hasFiles("pid", "sock", "take")
	}
	p := h.serving()
	p.is(0)
	n := h.serving()
	n.is(1)
	p.replaced(n, 1)
	n.serves()
}

// Who comes at the wrong time, or with the wrong words, is told why, and hinders
// nobody.
func TestTakeoverRefused(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	p := h.serving()
	unchanged := p.settles((*proc).holdings)

	say := func(text string) *peer {
		q := dials(t, h.take())
		say(t, q.c, text)
		return q
	}
	say(frameOf('T', "version=2")).refused(`version "2"`)
	say(frameOf('T')).refused(`version ""`)
	say(frameOf('H', "version=1")).refused(`a frame 'H'`)
	say("GET / HTTP/1.1\r\n\r\n").refused("does not use this protocol")
	say("T\x00\x00\x00\x02\x05a").refused("does not use this protocol")
	q := dials(t, h.take()) // the first byte with descriptors
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := ecdysis.WriteFiles(q.c.(*net.UnixConn), []byte(takeFrame), f); err != nil {
		t.Fatal(err)
	}
	q.refused("descriptors")
	for _, part := range []string{"", "T", takeFrame[:len(takeFrame)-1]} {
		say(part).c.Close()
	}
	p.hasEvents() // none of these has begun anything
	unchanged()

	// Prepare's word.
	p.call("veto")
	h.next(h.taking())
	h.turnedAway("", h.take(), "refuses", "vetoed")
	p.hasFailed(0, "prepare", "vetoed")
	unchanged()
	p.serves()
	p.hasPIDFile()
	n := h.serving()
	p.replaced(n, 1)
	n.serves()
}

// A hook that ends its goroutine leaves nobody waiting.
func TestTakeoverHookGone(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking().do("event upgrading", "call goexit"), h.taking())
	p := h.serving()
	h.turnedAway("", "refuses", "a hook did not return")
	p.serves()
}

// silent clients are not served before those who have something to say, and
// take no more of the process than a few descriptors.
func TestTakeoverSilentClients(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	p := h.serving()
	before := len(p.call("fds").Text)
	unchanged := p.settles((*proc).holdings)
	var list []*peer
	for range 300 {
		list = append(list, dials(t, h.take()))
	}
	const most = 32
	for _, q := range list[:len(list)-most] {
		q.hungUp() // its place was taken
	}
	if n := len(p.call("fds").Text); n > before+most+1 {
		t.Errorf("%d descriptors beside a few hundred silent clients, %d before", n, before)
	}
	p.hasEvents()
	p.serves()
	q := asks(t, h.take()) // in the place of another one
	q.hears('E')
	q.c.Close()
	p.hasFailed(0, "init", "ended without")
	for _, q := range list {
		q.c.Close()
	}
	unchanged()
	// And they do not keep the process from ending.
	for range 3 {
		list = append(list, dials(t, h.take()))
	}
	n := h.serving()
	p.replaced(n, 1)
	for _, q := range list[len(list)-3:] {
		q.hungUp()
	}
	n.serves()
}

// Two at once: one wins, and the other one is told, and may call New again.
func TestTwoTakers(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := h.taking()
	late := s.do("first New failed", "hold")
	late.Extra = map[string]string{"New twice": "yes"}
	h.next(s, s.do("new", "hold"), late, s)
	p := h.serving()
	l := startLoad(t, 1, false, p.list()...)
	n := h.start()
	n.at("new")
	m := h.start()
	m.at("first New").Err.says(t, "", h.take(), "refuses", ecdysis.ErrInProgress.Error())
	p.hasFailed(0, "", ecdysis.ErrInProgress.Error())
	h.turnedAway("", ecdysis.ErrInProgress.Error())
	l.more(10)
	p.serves()
	n.resume()
	n.at("serving")
	p.replaced(n, 1)
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventUpgradeFailed, ecdysis.EventHandover, ecdysis.EventUpgraded)
	m.resume()
	m.at("serving")
	m.is(2)
	n.replaced(m, 2)
	m.serves()
	l.check()
}

// So is one that comes during an upgrade, up to the end of its probation.
func TestTakerDuringUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := h.taking()
	h.next(s.probation(time.Hour), s.do("new", "hold"), s)
	p := h.serving()
	l := startLoad(t, 1, false, p.list()...)
	p.begin(command{Verb: "upgrade"})
	n := h.proc()
	n.at("new")
	h.turnedAway("", "refuses", ecdysis.ErrInProgress.Error())
	p.hasFailed(0, "", ecdysis.ErrInProgress.Error())
	n.resume()
	n.at("serving")
	l.check() // whom the old one has accepted, it has answered
	l = startLoad(t, 1, false, p.list()...)
	// Not even a moment earlier: nobody but the new one accepts now.
	if err := p.os.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); proctest.State(t, p.pid) != "T"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d is in state %q", p.pid, proctest.State(t, p.pid))
		}
	}
	h.turnedAway("", "refuses", ecdysis.ErrInProgress.Error())
	n.hasFailed(0, "", ecdysis.ErrInProgress.Error())
	n.serves()
	p.kill() // which ends the probation
	g := h.serving()
	g.is(2)
	n.replaced(g, 2)
	g.serves()
	l.check()
}

// One that comes when the successor has the word and does not serve yet is told
// so, too, and is not the first thing that the successor finds in the queue.
func TestTakerDuringHandover(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := h.taking()
	h.next(s, s.do("event ready", "hold"))
	p := h.serving()
	p.begin(command{Verb: "upgrade"})
	n := h.proc()
	n.at("event ready")
	asks(t, h.take()).refused(ecdysis.ErrInProgress.Error())
	p.hasFailed(0, "", ecdysis.ErrInProgress.Error())
	n.resume()
	n.at("serving")
	p.ended()
	n.hasEvents()
	n.serves()
}

// One that comes before Ready waits for it, and for its end: closing what nobody
// has asked for takes a while.
func TestTakerBeforeReady(t *testing.T) {
	t.Parallel()
	needSeqpacket(t)
	h := newHub(t)
	h.next(h.taking(), h.taking().hold("listened"))
	p := h.serving()
	p.thing("many", "300", shortDir(t))
	n := h.start()
	n.at("listened")
	p.kill()
	q := asks(t, h.take())
	n.resume()
	q.hears('E')
	n.at("serving")
	q.c.Close()
	n.hasFailed(0, "init", "ended without")
	n.serves()
}

// The new one dies at each step: the old one serves on, says why the attempt
// failed, and is taken over by the next.
func TestTakerDies(t *testing.T) {
	t.Parallel()
	says := func(n *proc, frame string) { n.does("say", frame, "version=1", fmt.Sprint("pid=", n.pid)) }
	const gone = "ended without a call of Ready or Fail"
	for name, d := range map[string]struct {
		step, says string               // of the failed attempt
		hold       string               // the point at which the taker holds; "": the test leads it
		old        string               // the point at which the old one holds
		until      func(p, taker *proc) // brings them to the step
	}{
		"silent":              {until: func(p, n *proc) {}},
		"before HELLO":        {step: "start", old: "event upgrading", until: func(p, n *proc) { says(n, "T") }},
		"in Prepare":          {step: "start", old: "prepare", until: func(p, n *proc) { says(n, "T") }},
		"after HELLO":         {step: "start or init", until: func(p, n *proc) { says(n, "T"); n.does("hear", "H") }},
		"during the transfer": {step: "start or init", until: func(p, n *proc) { says(n, "T"); n.does("hear", "S") }},
		"after END":           {step: "init", says: gone, until: func(p, n *proc) { says(n, "T"); n.does("hear", "E") }},
		"after ACK":           {step: "init", says: gone, until: func(p, n *proc) { says(n, "T"); n.does("hear", "E"); says(n, "K") }},
		"after New":           {step: "init", says: gone, hold: "new"},
		"before READY":        {step: "init", says: gone, hold: "listened"},
		"before COMMIT":       {step: "handover", old: "event handover", hold: "none"},
		"after COMMIT":        {step: "handover", hold: "event ready"},
		"before DONE": {step: "handover", until: func(p, n *proc) {
			says(n, "T")
			n.does("hear", "E")
			says(n, "K")
			says(n, "R")
			n.does("hear", "C")
		}},
		"in probation": {step: "probation", hold: "serving"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			first, next := h.taking(), h.taking()
			if d.old != "" {
				first = first.do(d.old, "call holdonce")
			}
			if d.step == "probation" {
				first.Options.Probation = time.Hour
			}
			if d.hold != "" {
				next = next.do(d.hold, "hold")
			}
			h.next(first, next)
			p := h.serving()
			unchanged := p.settles((*proc).holdings)
			l := startCrashLoad(t, p.list())
			var n *proc
			switch d.hold {
			case "":
				n = h.taker()
				d.until(p, n)
			case "none":
				n = h.start()
			default:
				n = h.start()
				n.at(d.hold)
			}
			if d.old != "" {
				p.at(d.old)
			}
			n.kill()
			if d.old != "" {
				p.call("release")
			}
			switch d.step {
			case "":
				p.hasEvents()
			case "start", "init", "start or init": // it may still have been filling the stream
				p.hasFailed(0, d.step, d.says, fmt.Sprint("successor ", n.pid, ": "))
				p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
			default:
				p.hasFailed(0, d.step, d.says, fmt.Sprint("successor ", n.pid, ": "))
				p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed, ecdysis.EventUpgradeFailed)
			}
			l.more(10)
			if l.end(); d.step != "probation" && l.cut.Load() > 0 {
				t.Errorf("%d connections were cut", l.cut.Load())
			}
			l.check(2)
			p.serves()
			p.hasPIDFile()
			h.hasFiles("pid", "sock", "take")
			unchanged()

			h.next(h.taking())
			again := startLoad(t, 1, false, p.list()...)
			again.more(10)
			g := h.serving()
			again.more(10)
			again.check()
			g.is(1)
			g.inherits(p)
			g.hasPIDFile()
			if d.step == "probation" {
				g.begin(command{Verb: "stop"}) // which ends it
			}
			p.replaced(g, 1)
		})
	}
}

// The old one dies at each step: until it has handed all on, the new one is a
// first process; from then on it is the successor, and serves.
func TestTakenDies(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]struct {
		old       string // where the old one kills itself
		hold      string // where the new one holds until the old one is killed
		probation bool
		cold      bool
	}{
		"before HELLO":  {old: "event upgrading", cold: true},
		"in Prepare":    {old: "prepare", cold: true},
		"after New":     {hold: "new"},
		"before READY":  {hold: "listened"},
		"before COMMIT": {old: "event handover"},
		"before DONE":   {hold: "event ready"},
		"in probation":  {hold: "serving", probation: true},
		"after FINAL":   {old: "event upgraded"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			first, next := h.taking(), h.taking()
			if d.old != "" {
				first = first.do(d.old, "kill")
			}
			if d.hold != "" {
				next = next.do(d.hold, "hold")
			}
			if d.probation {
				first.Options.Probation = time.Hour
			}
			h.next(first, next, h.taking())
			p := h.serving()
			var l *crashLoad
			if !d.cold { // in which there is a moment without anybody
				l = startCrashLoad(t, p.list())
				l.more(10)
			}
			n := h.start()
			if d.hold != "" {
				n.at(d.hold)
				p.kill()
				n.resume()
			}
			n.at("serving")
			p.ended()
			if d.cold {
				n.is(0)
			} else {
				n.is(1)
				n.inherits(p)
				l.more(10)
				l.check(2)
			}
			n.serves()
			n.hasEvents()
			n.hasPIDFile()
			h.hasFiles("pid", "sock", "take")
			g := h.serving()
			n.replaced(g, map[bool]int{true: 1, false: 2}[d.cold])
			g.serves()
			g.begin(command{Verb: "stop"})
			g.ended()
			h.hasFiles()
		})
	}
}

// What somebody else who listens there says, and what comes of it. None of it
// lets New wait for longer than UpgradeTimeout.
func TestTakeoverFromOthers(t *testing.T) {
	t.Parallel()
	hello := frameOf('H', "version=1", "generation=4", "pid=1")
	reads := func(q *peer) { q.hears('T') }
	says := func(text string) func(q *peer) {
		return func(q *peer) { q.hears('T'); say(q.t, q.c, text) }
	}
	// told is that the other one is told why.
	told := func(text, why string) func(q *peer) {
		return func(q *peer) {
			says(text)(q)
			if reason := q.hears('F'); !strings.Contains(reason, why) {
				q.t.Errorf("told %q; want that it says %q", reason, why)
			}
		}
	}
	const late, foreign = "Options.UpgradeTimeout", "does not use this protocol"
	for name, c := range map[string]struct {
		talk  func(q *peer) // nil: it does not even accept
		is    string
		says  string
		final bool // New may not be called again: there was an inheritance
	}{
		"nothing":                 {is: "deadline", says: late},
		"nothing, having heard":   {talk: reads, is: "deadline", says: late},
		"a line":                  {talk: says("220 mail.example ESMTP\r\n"), says: foreign},
		"another version":         {talk: told(frameOf('H', "version=2", "generation=4"), `version "2"`), says: `version "2"`},
		"no version":              {talk: told(frameOf('H'), `version ""`), says: `version ""`},
		"another frame":           {talk: told(frameOf('E'), foreign), says: foreign},
		"no":                      {talk: says(frameOf('F', "reason=not today")), says: "refuses: not today"},
		"no reason":               {talk: says(frameOf('F')), says: "refuses"},
		"a bad generation":        {talk: told(frameOf('H', "version=1", "generation=x"), `generation is "x"`), says: `generation is "x"`, final: true},
		"HELLO and nothing":       {talk: told(hello, late), is: "deadline", says: late, final: true},
		"HELLO and a line":        {talk: says(hello + "220 mail.example ESMTP\r\n"), says: foreign, final: true},
		"descriptors without any": {talk: told(hello+frameOf('S', "kind=file", "name=x"), "1 descriptors were announced and 0 came"), says: "descriptors", final: true},
		"HELLO and ABORT":         {talk: says(hello + frameOf('A')), is: "ErrAborted", final: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			ln, err := net.Listen("unix", h.take())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			s := h.taking()
			s.Options.UpgradeTimeout = patience
			if c.is == "deadline" {
				s.Options.UpgradeTimeout = 50 * time.Millisecond
			}
			s.Extra = map[string]string{"New twice": "yes"}
			h.next(s.do("first New failed", "hold"))
			n := h.start()
			if c.talk != nil {
				q := accepts(t, ln)
				c.talk(q)
				n.at("first New").Err.says(t, c.is, h.take(), c.says)
				if !c.final {
					q.hungUp()
				}
			}
			n.at("first New").Err.says(t, c.is, h.take(), c.says)
			if left := h.files(); !slices.Equal(left, []string{"take"}) {
				t.Errorf("files %q", left)
			}
			unlisten(ln)
			n.resume()
			if c.final {
				n.at("new failed").Err.says(t, "", "called before")
				n.ended()
				return
			}
			n.at("serving")
			n.is(0)
			n.serves()
		})
	}
}

// unlisten closes ln when no process that is being started has a copy of it.
func unlisten(ln net.Listener) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	ln.Close()
}

// accepts returns the other end of the next client's conversation.
func accepts(t *testing.T, ln net.Listener) *peer {
	t.Helper()
	_ = ln.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience))
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &peer{t, c}
}

// One that hangs up without a word has ended, or was just being replaced: New
// looks again, and at last gives up.
func TestTakeoverHungUp(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"and is gone", "and is another", "again and again"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.next(h.taking())
			ln, err := net.Listen("unix", h.take())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			n := h.start()
			switch name {
			case "and is gone":
				for range 3 {
					accepts(t, ln).c.Close()
				}
				q := accepts(t, ln)
				unlisten(ln)
				q.c.Close()
				n.at("serving")
				n.is(0)
			case "and is another":
				accepts(t, ln).c.Close()
				q := accepts(t, ln)
				q.hears('T')
				q.c.Close()
				q = accepts(t, ln)
				q.hears('T')
				unlisten(ln)
				say(t, q.c, frameOf('H', "version=1", "generation=4", "pid=1")+frameOf('E'))
				q.hears('R')
				say(t, q.c, frameOf('C', "probation=0"))
				q.hears('D')
				say(t, q.c, frameOf('L'))
				n.at("serving")
				n.is(5)
			case "again and again":
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						c.Close()
					}
				}()
				n.at("new failed").Err.says(t, "unexpected EOF", h.take(), "closes the connection")
				return
			}
			n.serves()
		})
	}
}

// An older process that ends while it hands on leaves a successor that makes
// anew what it has not got.
func TestTakeoverCutShort(t *testing.T) {
	t.Parallel()
	hello := frameOf('H', "version=1", "generation=4", "pid=1")
	for name, text := range map[string]string{
		"after HELLO":     hello,
		"within a frame":  hello + "S\x00",
		"after END":       hello + frameOf('E'),
		"an unknown word": hello + frameOf('?', "later=1"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.next(h.taking())
			ln, err := net.Listen("unix", h.take())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			n := h.start()
			q := accepts(t, ln)
			q.hears('T')
			unlisten(ln)
			say(t, q.c, text)
			q.c.Close()
			n.at("serving")
			n.is(5)
			n.serves()
			n.hasPIDFile()
			g := h.serving()
			n.replaced(g, 6)
			g.serves()
		})
	}
}

// One that takes too long is given up, and not ended: it is not the old one's.
func TestTakerLate(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	first := h.taking()
	first.Options.UpgradeTimeout = 100 * time.Millisecond
	h.next(first, h.taking())
	p := h.serving()
	unchanged := p.settles((*proc).holdings)
	l := startLoad(t, 1, false, p.list()...)
	n := h.taker()
	n.does("say", "T", "version=1")
	n.does("hear", "A")
	p.hasFailed(0, "init", "not ready within 100ms (Options.UpgradeTimeout)")
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	n.does("live")
	l.more(10)
	l.check()
	unchanged()
	p.serves()
}

// One that has had the word and does not keep to the protocol may serve at any
// moment: it is ended before the old one resumes.
func TestTakerEnded(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking())
	p := h.serving()
	unchanged := p.settles((*proc).holdings)
	l := startLoad(t, 1, false, p.list()...)
	n := h.taker()
	n.does("say", "T", "version=1")
	n.does("hear", "E")
	n.does("say", "K")
	n.does("say", "R", fmt.Sprint("pid=", os.Getpid())) // whom it names is not ended
	n.does("hear", "C")
	p.event(ecdysis.EventHandover, 0)
	n.begin(command{Verb: "say", Args: []string{"?"}})
	n.ended()
	p.hasFailed(0, "handover", "a frame '?'")
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed, ecdysis.EventUpgradeFailed)
	l.more(10)
	l.check()
	unchanged()
	p.serves()
	if list := proctest.ChildrenOf(t, p.pid); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
}

// Before that, it is told and left alone, whatever it says.
func TestTakerTalksNonsense(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ frame, fields, says string }{
		"early DONE":   {"D", "", "a frame 'D'"},
		"another TAKE": {"T", "version=1", "a frame 'T'"},
		"no PID":       {"R", "pid=x", `process ID is "x"`},
		"a bad PID":    {"R", "pid=-1", `process ID is "-1"`},
		"FAIL":         {"F", "reason=my disk is full", "it says: my disk is full"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.next(h.taking())
			p := h.serving()
			unchanged := p.settles((*proc).holdings)
			n := h.taker()
			n.does("say", "T", "version=1")
			n.does("hear", "E")
			n.does("say", c.frame, c.fields)
			n.does("hear", "A")
			p.hasFailed(0, "init", c.says)
			p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
			n.does("live")
			p.serves()
			unchanged()
		})
	}
}

// A second stop of the old process ends a takeover. The first one is consent.
func TestTakenStops(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.next(h.taking(), h.taking().hold("new"))
	p := h.serving()
	n := h.start()
	n.at("new")
	p.begin(command{Verb: "stop"})
	p.event(ecdysis.EventStopDeferred, 0)
	p.serves()
	p.begin(command{Verb: "stop"})
	p.ended()
	p.hasFailed(0, "init", "stopped")
	p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventStopDeferred, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)
	h.hasFiles()
	n.resume()
	n.at("ready failed").Err.says(t, "ErrAborted")
	n.ended()
	h.hasFiles()
}

// After a probation that was not passed the PID file and the control sockets
// are the old one's, and it upgrades and is taken over as before.
func TestTakeoverProbation(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := h.taking()
	s.Options.UpgradeSocket = filepath.Join(h.dir, "upgrade")
	h.next(s.probation(time.Hour), s, s)
	p := h.serving()
	n := h.serving()
	n.hasPIDFile()
	if m := n.call("upgrade"); m.Err == nil || !slices.Contains(m.Err.Is, "ErrInProgress") {
		t.Errorf("upgrade within the probation: %+v", m.Err)
	}
	n.kill()
	p.hasFailed(0, "probation")
	p.hasPIDFile()
	h.hasFiles("pid", "sock", "take", "upgrade")
	p.serves()

	g := h.serving()
	g.kill()
	p.hasFailed(1, "probation")
	answer := request(t, s.Options.UpgradeSocket)
	g = h.proc()
	g.at("serving")
	g.begin(command{Verb: "stop"}) // within its probation: it is final then
	g.ended()
	if line, err := answer(); err != nil || line != g.line(1) {
		t.Errorf("upgrade: %q, %v", line, err)
	}
	p.ended()
	h.hasFiles()
}

// Older generations still drain while the newest is taken over, upgrades, or
// may not because there are too many.
func TestTakeoverDraining(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := h.taking()
	s.Options.MaxDraining = 1
	h.next(s)
	client := func(p *proc) net.Conn {
		c, err := net.Dial("unix", h.sock())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if pid, _, err := askOn(c); err != nil || pid != p.pid {
			t.Fatalf("process %d, %v", pid, err)
		}
		return c
	}
	p0 := h.serving()
	c0 := client(p0)
	p0.begin(command{Verb: "upgrade"})
	p1 := h.proc()
	p1.at("serving")
	c1 := client(p1)
	p2 := h.serving() // while p0 drains
	p2.is(2)
	c2 := client(p2)
	h.turnedAway("", "refuses", ecdysis.ErrDraining.Error(), "2 are alive", "MaxDraining is 1")
	p2.hasFailed(0, "", ecdysis.ErrDraining.Error())
	p2.serves()
	for p, c := range map[*proc]net.Conn{p0: c0, p1: c1} {
		if pid, _, err := askOn(c); err != nil || pid != p.pid {
			t.Errorf("a client of process %d: %d, %v", p.pid, pid, err)
		}
	}
	c0.Close()
	p0.ended()
	p3 := h.serving()
	p3.is(3)
	p3.serves()
	h.turnedAway("", ecdysis.ErrDraining.Error())
	c1.Close()
	p1.ended()
	p3.begin(command{Verb: "upgrade"}) // with p2 draining
	p4 := h.proc()
	p4.at("serving")
	p4.is(4)
	p3.ended()
	if pid, _, err := askOn(c2); err != nil || pid != p2.pid {
		t.Errorf("a client of process %d: %d, %v", p2.pid, pid, err)
	}
	c2.Close()
	p2.replaced(p3, 3)
	p4.serves()
}

// Nothing is left of takeovers, successful or not, in any process.
func TestTakeoverLeaks(t *testing.T) {
	t.Parallel()
	const many = 50
	h := newHub(t)
	s := h.taking()
	s.NoAccept = true
	h.next(s)
	p := h.serving()
	q := asks(t, h.take())
	q.hears('E')
	q.c.Close()
	p.hasFailed(0, "init")
	unchanged := p.settles((*proc).holdings)
	for n := range many {
		q := asks(t, h.take())
		switch n % 4 {
		case 0:
			q.hears('H')
		case 1:
			q.hears('E')
			say(t, q.c, frameOf('F', "reason=planned"))
			q.hears('A')
		case 2:
			q.hears('E')
			say(t, q.c, "garbage\r\n")
			q.hears('A')
		case 3:
			q.hears('H') // or it might have gone before anything began
			say(t, q.c, frameOf('K'))
		}
		q.c.Close()
		p.event(ecdysis.EventUpgradeFailed, n+1)
	}
	unchanged()
	if list := proctest.ChildrenOf(t, p.pid); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
	var first []string
	for n := range many {
		g := h.serving()
		p.replaced(g, n+1)
		if p = g; n == 0 {
			first = kindsOf(p.call("fds").Text)
		}
	}
	if last := kindsOf(p.call("fds").Text); !slices.Equal(last, first) {
		t.Errorf("after %d takeovers: %q; after one: %q", many, last, first)
	}
	if list := proctest.ChildrenOf(t, p.pid); len(list) > 0 {
		t.Errorf("children: %q", list)
	}
	h.hasFiles("pid", "sock", "take")
}
