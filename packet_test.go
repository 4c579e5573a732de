//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// The daemon's side.

// A dgramSpec is a socket for packets that a daemon asks for before Ready.
type dgramSpec struct {
	Network, Address string
	Config           listenConfig
}

// dgrams returns a spec with these sockets. Each is read by so many loops,
// which run before Ready, and answer with the process's ID, its generation and
// what came.
func dgrams(loops int, list ...dgramSpec) spec {
	b, err := json.Marshal(list)
	if err != nil {
		panic(err)
	}
	return spec{Extra: map[string]string{"dgrams": string(b), "dgram loops": strconv.Itoa(loops)}}
}

// A dgramSock is such a socket in a daemon.
type dgramSock struct {
	c net.PacketConn

	mu    sync.Mutex
	last  net.Addr // whom to answer
	reads map[string]*dgramRead
}

// A dgramRead is a read that runs, or has ended.
type dgramRead struct {
	goroutine string // as it is called in a stack trace
	done      chan struct{}
	b         []byte
	from      net.Addr
	err       error
}

var (
	dgramSocks []*dgramSock // of this process
	dgramMu    sync.Mutex   // guards it
	dgramLoops sync.WaitGroup
	dgramEnds  = make(chan string, 100) // the errors by which loops end
)

func (d *daemon) dgramListen(s dgramSpec) error {
	c, err := d.u.ListenPacketWith(ecdysis.ListenConfig{Backlog: s.Config.Backlog, Mode: s.Config.Mode, ReusePort: s.Config.ReusePort, KeepOnStop: s.Config.KeepOnStop}, s.Network, s.Address)
	if err != nil {
		return err
	}
	dgramMu.Lock()
	defer dgramMu.Unlock()
	dgramSocks = append(dgramSocks, &dgramSock{c: c, reads: make(map[string]*dgramRead)})
	return nil
}

func (d *daemon) dgramLoop(c net.PacketConn) {
	b := make([]byte, 512)
	for {
		n, from, err := c.ReadFrom(b)
		if err == nil {
			_, err = c.WriteTo(fmt.Appendf(nil, "%d %d %s", os.Getpid(), d.u.Generation(), b[:n]), from)
		}
		if err != nil {
			dgramEnds <- strings.Join(append(toErrMsg(err).Is, err.Error()), ": ")
			return
		}
	}
}

func rawRecv(c syscall.Conn, b []byte) (n int, from net.Addr, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, nil, err
	}
	var sa syscall.Sockaddr
	rerr := raw.Read(func(fd uintptr) bool {
		n, sa, err = syscall.Recvfrom(int(fd), b, syscall.MSG_DONTWAIT)
		return err != syscall.EAGAIN
	})
	if rerr != nil {
		return 0, nil, rerr
	}
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		from = net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)))
	case *syscall.SockaddrUnix:
		from = &net.UnixAddr{Name: sa.Name, Net: "unixgram"}
	}
	return n, from, err
}

// The ways to read. TestPacketMethods holds them against what net has.
var (
	udpReaders = map[string]func(*ecdysis.UDPConn, []byte) (int, net.Addr, error){
		"Read": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) {
			n, err := c.Read(b)
			return n, nil, err
		},
		"ReadFrom": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) { return c.ReadFrom(b) },
		"ReadFromUDP": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) {
			n, a, err := c.ReadFromUDP(b)
			return n, a, err
		},
		"ReadFromUDPAddrPort": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) {
			n, a, err := c.ReadFromUDPAddrPort(b)
			return n, net.UDPAddrFromAddrPort(a), err
		},
		"ReadMsgUDP": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) {
			n, _, _, a, err := c.ReadMsgUDP(b, nil)
			return n, a, err
		},
		"ReadMsgUDPAddrPort": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) {
			n, _, _, a, err := c.ReadMsgUDPAddrPort(b, nil)
			return n, net.UDPAddrFromAddrPort(a), err
		},
		"SyscallConn": func(c *ecdysis.UDPConn, b []byte) (int, net.Addr, error) { return rawRecv(c, b) },
	}
	unixgramReaders = map[string]func(*ecdysis.UnixgramConn, []byte) (int, net.Addr, error){
		"Read": func(c *ecdysis.UnixgramConn, b []byte) (int, net.Addr, error) {
			n, err := c.Read(b)
			return n, nil, err
		},
		"ReadFrom": func(c *ecdysis.UnixgramConn, b []byte) (int, net.Addr, error) { return c.ReadFrom(b) },
		"ReadFromUnix": func(c *ecdysis.UnixgramConn, b []byte) (int, net.Addr, error) {
			n, a, err := c.ReadFromUnix(b)
			return n, a, err
		},
		"ReadMsgUnix": func(c *ecdysis.UnixgramConn, b []byte) (int, net.Addr, error) {
			n, _, _, a, err := c.ReadMsgUnix(b, nil)
			return n, a, err
		},
		"SyscallConn": func(c *ecdysis.UnixgramConn, b []byte) (int, net.Addr, error) { return rawRecv(c, b) },
	}
)

// begin makes the call in a goroutine of its own.
func (s *dgramSock) begin(method string) *dgramRead {
	r := &dgramRead{done: make(chan struct{}), b: make([]byte, 512)}
	started := make(chan string)
	go func() {
		defer close(r.done)
		stack := make([]byte, 64) // "goroutine 7 [running]:…"
		started <- strings.Join(strings.Fields(string(stack[:runtime.Stack(stack, false)]))[:2], " ") + " ["
		n := 0
		switch c := s.c.(type) {
		case *ecdysis.UDPConn:
			n, r.from, r.err = udpReaders[method](c, r.b)
		case *ecdysis.UnixgramConn:
			n, r.from, r.err = unixgramReaders[method](c, r.b)
		}
		r.b = r.b[:max(n, 0)]
	}()
	r.goroutine = <-started
	return r
}

// state tells what the call does: it "waits" for the package, "reads", which
// is to wait for the system, or has "returned". It returns at one of those that
// are asked for, or when the call has.
func (r *dgramRead) state(want ...string) string {
	for stacks := make([]byte, 1<<20); ; time.Sleep(time.Millisecond) {
		now := ""
		all := "\n" + string(stacks[:runtime.Stack(stacks, true)])
		if _, mine, ok := strings.Cut(all, "\n"+r.goroutine); ok {
			mine, _, _ = strings.Cut(mine, "\n\n")
			switch {
			case strings.HasPrefix(mine, "select") && strings.Contains(mine, ".(*gate).sleep("):
				now = "waits"
			case strings.HasPrefix(mine, "IO wait"):
				now = "reads"
			}
		}
		select {
		case <-r.done:
			return "returned"
		default:
		}
		if now != "" && (len(want) == 0 || slices.Contains(want, now)) {
			return now
		}
	}
}

func init() {
	setUp = append(setUp, func(d *daemon) {
		if d.spec.Extra["dgrams"] == "" {
			return
		}
		var list []dgramSpec
		if err := json.Unmarshal([]byte(d.spec.Extra["dgrams"]), &list); err != nil {
			panic(err)
		}
		for _, s := range list {
			if err := d.dgramListen(s); err != nil {
				d.send(message{At: "listen failed", Err: toErrMsg(err)})
				fatal(d.u.Fail(err))
			}
		}
		loops, err := strconv.Atoi(d.spec.Extra["dgram loops"])
		if err != nil {
			panic(err)
		}
		for _, s := range dgramSocks {
			for range loops {
				dgramLoops.Go(func() { d.dgramLoop(s.c) })
			}
		}
	})
	// on makes a verb of a call on the socket that the first argument names.
	on := func(f func(*dgramSock, []string) message) func(*daemon, command) message {
		return func(d *daemon, c command) message {
			i, err := strconv.Atoi(c.Args[0])
			if err != nil {
				panic(err)
			}
			dgramMu.Lock()
			s := dgramSocks[i]
			dgramMu.Unlock()
			return f(s, c.Args[1:])
		}
	}
	verbs["dgram begin"] = on(func(s *dgramSock, args []string) message { // method
		r := s.begin(args[0])
		s.mu.Lock()
		s.reads[args[0]] = r
		s.mu.Unlock()
		return message{Text: []string{r.state()}}
	})
	verbs["dgram state"] = on(func(s *dgramSock, args []string) message { // method, the state to come
		s.mu.Lock()
		r := s.reads[args[0]]
		s.mu.Unlock()
		return message{Text: []string{r.state(args[1])}}
	})
	verbs["dgram end"] = on(func(s *dgramSock, args []string) message { // method
		s.mu.Lock()
		r := s.reads[args[0]]
		s.mu.Unlock()
		<-r.done
		m := message{Err: toErrMsg(r.err)}
		if r.err == nil {
			m.Text = []string{string(r.b), ""}
			if r.from != nil {
				m.Text[1] = r.from.String()
				s.mu.Lock()
				s.last = r.from
				s.mu.Unlock()
			}
		}
		return m
	})
	verbs["dgram answer"] = on(func(s *dgramSock, args []string) message { // text
		s.mu.Lock()
		defer s.mu.Unlock()
		_, err := s.c.WriteTo([]byte(args[0]), s.last)
		return message{Err: toErrMsg(err)}
	})
	verbs["dgram deadline"] = on(func(s *dgramSock, args []string) message { // of what, in how long; "": none
		var at time.Time
		if args[1] != "" {
			limit, err := time.ParseDuration(args[1])
			if err != nil {
				panic(err)
			}
			at = time.Now().Add(limit)
		}
		set := map[string]func(time.Time) error{"both": s.c.SetDeadline, "read": s.c.SetReadDeadline, "write": s.c.SetWriteDeadline}[args[0]]
		return message{Err: toErrMsg(set(at))}
	})
	verbs["dgram peek"] = on(func(s *dgramSock, args []string) message { // what is there to be read
		raw, err := s.c.(syscall.Conn).SyscallConn()
		if err != nil {
			return message{Err: toErrMsg(err)}
		}
		b, n := make([]byte, 512), 0
		cerr := raw.Control(func(fd uintptr) {
			n, _, err = syscall.Recvfrom(int(fd), b, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		})
		if cerr != nil || err != nil {
			return message{Err: toErrMsg(errors.Join(cerr, err))}
		}
		return message{Text: []string{string(b[:n])}}
	})
	verbs["dgram close"] = on(func(s *dgramSock, args []string) message {
		return message{Err: toErrMsg(s.c.Close())}
	})
	verbs["dgram addrs"] = func(*daemon, command) (m message) {
		dgramMu.Lock()
		defer dgramMu.Unlock()
		for _, s := range dgramSocks {
			m.Text = append(m.Text, s.c.LocalAddr().Network()+" "+s.c.LocalAddr().String())
		}
		return m
	}
	verbs["dgram finish"] = func(*daemon, command) (m message) { // ends the loops, after what they have read is answered
		dgramMu.Lock()
		for _, s := range dgramSocks {
			if err := s.c.SetReadDeadline(time.Unix(1, 0)); err != nil && !errors.Is(err, net.ErrClosed) {
				m.Err = toErrMsg(err)
			}
		}
		dgramMu.Unlock()
		dgramLoops.Wait()
		for len(dgramEnds) > 0 {
			m.Text = append(m.Text, <-dgramEnds)
		}
		return m
	}
	roles["dgram allocs"] = dgramAllocs
}

// The test's side.

// dgram makes a call that must succeed.
func (p *proc) dgram(verb string, args ...any) []string {
	p.t.Helper()
	m := p.dgramErr(verb, args...)
	if m.Err != nil {
		p.t.Fatalf("process %d: dgram %s %v: %+v", p.pid, verb, args, m.Err)
	}
	return m.Text
}

func (p *proc) dgramErr(verb string, args ...any) message {
	p.t.Helper()
	var list []string
	for _, a := range args {
		list = append(list, fmt.Sprint(a))
	}
	return p.call("dgram "+verb, list...)
}

// reads begins a read by method on socket i, which must come to this state.
func (p *proc) reads(i int, method, want string) {
	p.t.Helper()
	if got := p.dgram("begin", i, method); got[0] != want {
		p.t.Fatalf("process %d: %s of socket %d, begun: it %s; want that it %s", p.pid, method, i, got[0], want)
	}
}

// comesTo asserts that the read comes to this state.
func (p *proc) comesTo(i int, method, want string) {
	p.t.Helper()
	if got := p.dgram("state", i, method, want); got[0] != want {
		p.t.Fatalf("process %d: %s of socket %d: it %s; want that it %s", p.pid, method, i, got[0], want)
	}
}

// has asserts what the read has returned, and from whom.
func (p *proc) has(i int, method, text string, from net.Conn) {
	p.t.Helper()
	got := p.dgram("end", i, method)
	want := from.LocalAddr().String()
	if method == "Read" {
		want = ""
	}
	if got[0] != text || got[1] != want {
		p.t.Fatalf("process %d: %s of socket %d: %q; want %q from %q", p.pid, method, i, got, text, want)
	}
}

// is asserts that a call has failed so.
func (m message) is(t *testing.T, what, want string) {
	t.Helper()
	if m.Err == nil || !slices.Contains(m.Err.Is, want) {
		t.Fatalf("%s: %+v; want an error that is %q", what, m.Err, want)
	}
}

// holds asserts that this datagram is there, unread.
func (p *proc) holds(i int, text string) {
	p.t.Helper()
	if got := p.dgram("peek", i); got[0] != text {
		p.t.Fatalf("process %d: %q is in socket %d; want %q", p.pid, got[0], i, text)
	}
}

// dgramDial returns a client of p's socket i, bound to a path of its own where
// there are paths.
func (p *proc) dgramDial(i int) net.Conn {
	p.t.Helper()
	network, address, _ := strings.Cut(p.dgram("addrs")[i], " ")
	c, err := dgramDial(p.t, network, address)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

func dgramDial(t *testing.T, network, address string) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	if network == "unixgram" {
		own := filepath.Join(shortDir(t), "c")
		c, err = net.DialUnix(network, &net.UnixAddr{Name: own, Net: network}, &net.UnixAddr{Name: address, Net: network})
	} else {
		c, err = net.Dial(network, address)
	}
	if err == nil {
		t.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(time.Hour))
	}
	return c, err
}

// says sends a datagram.
func says(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

// hears asserts that this is the next datagram that comes.
func hears(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, 512)
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != text {
		t.Fatalf("the client got %q, %v; want %q", b[:n], err, text)
	}
}

// answersDgram asserts that p's loops answer.
func (p *proc) answersDgram(generation int, c net.Conn) {
	p.t.Helper()
	says(p.t, c, "who")
	hears(p.t, c, fmt.Sprintf("%d %d who", p.pid, generation))
}

// A dgramLoad is clients that send numbered datagrams, each with so many
// unanswered that no buffer overflows.
type dgramLoad struct {
	t       *testing.T
	clients []*dgramClient
	wg      sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond
	stopped bool
	paused  bool
	idle    int // clients without an unanswered datagram, while paused
	sent    int
	by      map[int]int // answers of each process
	newest  int         // generation that has answered
	wrong   []string
}

type dgramClient struct {
	l      *dgramLoad
	c      net.Conn
	name   string
	next   int
	window int
	open   map[int]int // number of an unanswered datagram -> newest generation when it was sent
}

// startDgrams runs n clients for each of p's sockets.
func startDgrams(p *proc, n, window int) *dgramLoad {
	p.t.Helper()
	l := &dgramLoad{t: p.t, by: make(map[int]int)}
	l.changed = sync.NewCond(&l.mu)
	for i, a := range p.dgram("addrs") {
		for j := range n {
			l.clients = append(l.clients, &dgramClient{l: l, c: p.dgramDial(i), name: fmt.Sprintf("client %d of %s", j, a), window: window, open: make(map[int]int)})
		}
	}
	for _, c := range l.clients {
		l.wg.Go(c.run)
	}
	p.t.Cleanup(func() {
		for _, c := range l.clients {
			c.c.Close()
		}
		l.end()
	})
	return l
}

func (c *dgramClient) run() {
	l := c.l
	defer func() {
		l.mu.Lock()
		l.idle++ // for whoever waits for it, if it has failed
		l.changed.Broadcast()
		l.mu.Unlock()
	}()
	for {
		l.mu.Lock()
		for l.paused && !l.stopped && len(c.open) == 0 {
			l.idle++
			l.changed.Broadcast()
			l.changed.Wait()
			l.idle--
		}
		more := !l.paused && !l.stopped && len(c.open) < c.window
		if l.stopped && len(c.open) == 0 {
			l.mu.Unlock()
			return
		}
		number := c.next
		if more {
			c.next++
			c.open[number] = l.newest
			l.sent++
		}
		l.mu.Unlock()
		if more {
			if _, err := c.c.Write(strconv.AppendInt(nil, int64(number), 10)); err != nil {
				l.blame("%s: %v", c.name, err)
				return
			}
			continue
		}
		if !c.receive() {
			return
		}
	}
}

// receive takes one answer.
func (c *dgramClient) receive() bool {
	l := c.l
	b := make([]byte, 512)
	if err := c.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		l.blame("%s: %v", c.name, err)
		return false
	}
	n, err := c.c.Read(b)
	if err != nil {
		l.blame("%s: %v are not answered: %v", c.name, slices.Sorted(maps.Keys(c.open)), err)
		return false
	}
	var pid, generation, number int
	if _, err := fmt.Sscan(string(b[:n]), &pid, &generation, &number); err != nil {
		l.blame("%s: answer %q", c.name, b[:n])
		return false
	}
	newest, ok := c.open[number]
	if !ok {
		l.blame("%s: another answer to %d, by process %d of generation %d", c.name, number, pid, generation)
		return true
	}
	delete(c.open, number)
	if generation < newest {
		l.blame("%s: generation %d answers %d, which was sent after one of generation %d had answered", c.name, generation, number, newest)
	}
	l.mu.Lock()
	l.by[pid]++
	l.newest = max(l.newest, generation)
	l.changed.Broadcast()
	l.mu.Unlock()
	return true
}

func (l *dgramLoad) blame(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
	l.changed.Broadcast()
}

// until returns when f, called with l.mu held, is true.
func (l *dgramLoad) until(what string, f func() bool) {
	l.t.Helper()
	timer := time.AfterFunc(patience, l.changed.Broadcast)
	defer timer.Stop()
	end := time.Now().Add(patience)
	l.mu.Lock()
	defer l.mu.Unlock()
	for !f() {
		if len(l.wrong) > 0 {
			l.t.Fatalf("%d errors, the first one: %s", len(l.wrong), l.wrong[0])
		}
		if !time.Now().Before(end) {
			l.t.Fatal("not within patience: ", what)
		}
		l.changed.Wait()
	}
}

// answered returns when p has answered n more.
func (l *dgramLoad) answered(p *proc, n int) {
	l.t.Helper()
	l.mu.Lock()
	want := l.by[p.pid] + n
	l.mu.Unlock()
	l.until(fmt.Sprintf("%d answers by process %d", n, p.pid), func() bool { return l.by[p.pid] >= want })
}

// pause returns when all that was sent is answered, and no more is sent.
func (l *dgramLoad) pause() {
	l.t.Helper()
	l.mu.Lock()
	l.paused = true
	l.mu.Unlock()
	l.until("all answers", func() bool { return l.idle == len(l.clients) })
}

// goOn ends a pause. An older generation may answer again from here.
func (l *dgramLoad) goOn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused, l.newest = false, 0
	l.changed.Broadcast()
}

func (l *dgramLoad) end() {
	l.mu.Lock()
	l.stopped = true
	l.changed.Broadcast()
	l.mu.Unlock()
	l.wg.Wait()
}

// check asserts that each datagram was answered once. All processes but last
// have ended: what they have sent is there, before what the last one sends now.
func (l *dgramLoad) check(last *proc) {
	l.t.Helper()
	l.end()
	for _, c := range l.clients {
		l.sent++
		c.open[c.next] = 0
		if _, err := c.c.Write(strconv.AppendInt(nil, int64(c.next), 10)); err != nil {
			l.t.Fatal(err)
		}
		for len(c.open) > 0 && c.receive() {
		}
	}
	answers := 0
	for _, n := range l.by {
		answers += n
	}
	if len(l.wrong) > 0 {
		l.t.Errorf("%d errors, the first one: %s", len(l.wrong), l.wrong[0])
	}
	if answers != l.sent {
		l.t.Errorf("%d datagrams were sent, %d answered", l.sent, answers)
	}
	l.t.Logf("%d datagrams, each answered once, by %d processes", l.sent, len(l.by))
}

// finishes asserts that p's loops have ended as they should, and ends p.
func (p *proc) finishes() {
	p.t.Helper()
	for _, s := range p.dgram("finish") {
		if !strings.HasPrefix(s, "deadline: ") {
			p.t.Errorf("process %d: a loop ended with %s; want os.ErrDeadlineExceeded", p.pid, s)
		}
	}
	p.begin(command{Verb: "exit"})
	p.ended()
}

// dgramNetworks runs f for UDP and for Unix datagrams, with a new address for
// each socket.
func dgramNetworks(t *testing.T, f func(t *testing.T, network string, address func() string)) {
	for _, network := range []string{"udp", "unixgram"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			dir, n := "", 0
			f(t, network, func() string {
				if network == "udp" {
					return "127.0.0.1:0"
				}
				if n++; n == 1 {
					dir = shortDir(t)
				}
				return filepath.Join(dir, fmt.Sprint("d", n))
			})
		})
	}
}

// Every datagram is answered by one process, over upgrades that succeed and
// upgrades that fail.
func TestPacketUpgrades(t *testing.T) {
	t.Parallel()
	const upgrades = 50
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		// A Unix socket's queue may have no more than ten.
		clients, window := 4, 8
		if network == "unixgram" {
			clients, window = 2, 4
		}
		plain := dgrams(3, dgramSpec{Network: network, Address: address()})
		h := newHub(t, plain)
		p := h.serving()
		l := startDgrams(p, clients, window)
		l.answered(p, 20)
		for i := range upgrades {
			switch i % 10 {
			case 3: // it ends before it is ready
				h.next(plain.do("listened", "exit 3"), plain)
				p.failUpgrade(command{}, "init", "unexpected EOF")
				h.proc()
				l.answered(p, 20)
			case 7: // it ends when the old one reads no more
				h.next(plain.do("event ready", "kill"), plain)
				p.failUpgrade(command{}, "handover", "unexpected EOF")
				h.proc()
				l.answered(p, 20)
			}
			s := p.upgrade()
			l.answered(s, 20)
			p.finishes()
			p = s
		}
		l.check(p)
		if n := len(l.by); n != upgrades+1 {
			t.Errorf("%d processes have answered; want %d", n, upgrades+1)
		}
	})
}

// A successor that is killed within its probation leaves what it has not read
// to the old process.
func TestPacketProbation(t *testing.T) {
	t.Parallel()
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		clients, window := 4, 8
		if network == "unixgram" {
			clients, window = 2, 4
		}
		const rounds = 5
		first := dgrams(3, dgramSpec{Network: network, Address: address()}).probation(time.Minute)
		h := newHub(t, first)
		p := h.serving()
		l := startDgrams(p, clients, window)
		l.answered(p, 20)
		for range rounds {
			answer := p.begin(command{Verb: "upgrade"})
			s := h.proc()
			l.answered(s, 50)
			// What a process has read dies with it: it is killed when it has
			// read nothing that it has not answered.
			l.pause()
			s.kill()
			l.goOn()
			checkErr(t, answer().Err, "probation", "unexpected EOF")
			l.answered(p, 50)
		}
		l.check(p)
		if n := len(l.by); n != rounds+1 {
			t.Errorf("%d processes have answered; want %d", n, rounds+1)
		}
	})
}

// No method that reads is net's own.
func TestPacketMethods(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		net, ours reflect.Type
		readers   []string
	}{
		{reflect.TypeFor[*net.UDPConn](), reflect.TypeFor[*ecdysis.UDPConn](), slices.Sorted(maps.Keys(udpReaders))},
		{reflect.TypeFor[*net.UnixConn](), reflect.TypeFor[*ecdysis.UnixgramConn](), slices.Sorted(maps.Keys(unixgramReaders))},
	} {
		var names []string
		for i := range c.net.NumMethod() {
			if name := c.net.Method(i).Name; strings.HasPrefix(name, "Read") || name == "SyscallConn" {
				names = append(names, name)
			}
		}
		if !slices.Equal(names, c.readers) {
			t.Errorf("%v reads by %q; of these %v must wait, and TestPacketReadsWait sees to %q", c.net, names, c.ours, c.readers)
		}
		for _, name := range append(names, "SetDeadline", "SetReadDeadline", "Close") {
			m, ok := c.ours.MethodByName(name)
			if !ok {
				t.Errorf("%v has no %s", c.ours, name)
				continue
			}
			// What is promoted has no line of its own.
			pc := m.Func.Pointer()
			if file, _ := runtime.FuncForPC(pc).FileLine(pc); filepath.Base(file) != "packet.go" {
				t.Errorf("%v.%s is that of the embedded connection (%s)", c.ours, name, file)
			}
		}
	}
}

// Every method waits until this process is ready, in the first process and in
// a successor, reads while it serves, and fails when it is replaced.
func TestPacketReadsWait(t *testing.T) {
	t.Parallel()
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		methods := slices.Sorted(maps.Keys(udpReaders))
		if network == "unixgram" {
			methods = slices.Sorted(maps.Keys(unixgramReaders))
		}
		var list []dgramSpec // a socket for each method
		for range methods {
			list = append(list, dgramSpec{Network: network, Address: address()})
		}
		plain := dgrams(0, list...)
		h := newHub(t, plain.do("listened", "hold"))
		p := h.start()
		p.at("listened")
		var clients []net.Conn
		for i, method := range methods {
			c := p.dgramDial(i)
			clients = append(clients, c)
			says(t, c, "first "+method)
			p.reads(i, method, "waits")
			p.holds(i, "first "+method)
		}
		p.resume()
		p.at("serving")
		for i, method := range methods {
			p.has(i, method, "first "+method, clients[i])
			p.reads(i, method, "reads")
		}
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		s.at("listened")
		for i, method := range methods {
			s.reads(i, method, "waits")
			says(t, clients[i], "second "+method)
			p.has(i, method, "second "+method, clients[i])
			s.comesTo(i, method, "waits")
			p.reads(i, method, "reads")
		}
		s.resume()
		if m := answer(); m.Err != nil {
			t.Fatal(m.Err)
		}
		for i, method := range methods {
			p.comesTo(i, method, "waits")
			p.dgram("close", i)
			p.dgramErr("end", i, method).is(t, method+" that waited when the socket was closed", "closed")
			says(t, clients[i], "third "+method)
			s.has(i, method, "third "+method, clients[i])
			p.reads(i, method, "returned")
			p.dgramErr("end", i, method).is(t, method+" of a closed socket in a process that was replaced", "closed")
		}
	})
}

// While nobody may read nobody does, writing goes on, and after an upgrade that
// fails every call that waited reads.
func TestPacketQuiet(t *testing.T) {
	t.Parallel()
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		methods := slices.Sorted(maps.Keys(udpReaders))
		if network == "unixgram" {
			methods = slices.Sorted(maps.Keys(unixgramReaders))
		}
		var list []dgramSpec
		for range methods {
			list = append(list, dgramSpec{Network: network, Address: address()})
		}
		plain := dgrams(0, list...)
		h := newHub(t, plain.do("event handover", "call holdonce"), plain)
		p := h.serving()
		var clients []net.Conn
		for i := range methods {
			c := p.dgramDial(i)
			clients = append(clients, c)
			says(t, c, "hello")
			p.reads(i, "ReadFrom", "returned") // learns whom to answer
			p.has(i, "ReadFrom", "hello", c)
			if i%2 == 0 {
				p.reads(i, methods[i], "reads")
			}
		}
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		p.at("event handover")
		for i, method := range methods {
			if i%2 == 0 { // in flight since before
				p.comesTo(i, method, "waits")
				says(t, clients[i], method)
			} else {
				says(t, clients[i], method)
				p.reads(i, method, "waits")
			}
			p.dgram("answer", i, "while quiet")
			hears(t, clients[i], "while quiet")
			p.comesTo(i, method, "waits")
			p.holds(i, method)
		}
		s.kill()
		p.call("release")
		checkErr(t, answer().Err, "handover", "unexpected EOF")
		for i, method := range methods {
			p.has(i, method, method, clients[i])
		}

		// The old one has given its word, the new one does not serve yet.
		h.next(plain.do("event ready", "hold"))
		p.reads(0, "ReadFrom", "reads")
		answer = p.begin(command{Verb: "upgrade"})
		s = h.proc()
		s.at("event ready")
		s.reads(0, "ReadFrom", "waits")
		p.comesTo(0, "ReadFrom", "waits")
		says(t, clients[0], "last")
		p.dgram("answer", 0, "still there")
		hears(t, clients[0], "still there")
		p.holds(0, "last")
		s.comesTo(0, "ReadFrom", "waits")
		s.resume()
		if m := answer(); m.Err != nil {
			t.Fatal(m.Err)
		}
		s.has(0, "ReadFrom", "last", clients[0])
		p.comesTo(0, "ReadFrom", "waits")
		p.dgram("close", 0)
		p.dgramErr("end", 0, "ReadFrom").is(t, "ReadFrom of the old process, after Close", "closed")
	})
}

// A datagram that the old process has read is its own to answer, whenever.
func TestPacketLateAnswer(t *testing.T) {
	t.Parallel()
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		one := dgramSpec{Network: network, Address: address()}
		h := newHub(t, dgrams(0, one), dgrams(1, one))
		p := h.serving()
		c := p.dgramDial(0)
		says(t, c, "question")
		p.reads(0, "ReadFrom", "returned")
		p.has(0, "ReadFrom", "question", c)
		other := p.dgramDial(0)
		s := p.upgrade()
		s.answersDgram(1, other)

		p.dgram("answer", 0, "answer")
		hears(t, c, "answer")
		for _, of := range []string{"both", "write", "read"} {
			for _, in := range []string{"", "1h", "-1h", "1h", ""} {
				p.dgram("deadline", 0, of, in)
				if in == "-1h" && of != "write" {
					p.reads(0, "ReadFrom", "returned")
					p.dgramErr("end", 0, "ReadFrom").is(t, "ReadFrom after its deadline", "deadline")
				}
				if in == "-1h" && of != "read" {
					p.dgramErr("answer", 0, "too late").is(t, "WriteTo after its deadline", "deadline")
					continue
				}
				p.dgram("answer", 0, of+" "+in)
				hears(t, c, of+" "+in)
			}
		}
		p.dgram("close", 0)
		p.dgramErr("close", 0).is(t, "a second Close", "closed")
		p.dgramErr("answer", 0, "no more").is(t, "WriteTo after Close", "closed")
		for _, of := range []string{"both", "write", "read"} {
			p.dgramErr("deadline", 0, of, "1h").is(t, "a deadline after Close", "closed")
		}
		p.reads(0, "ReadFrom", "returned")
		p.dgramErr("end", 0, "ReadFrom").is(t, "ReadFrom after Close", "closed")
		s.answersDgram(1, c)
		s.answersDgram(1, s.dgramDial(0)) // a client that comes after it
	})
}

// The deadline is the caller's: before Ready, while serving, while quiet, and
// after an upgrade that fails.
func TestPacketDeadline(t *testing.T) {
	t.Parallel()
	dgramNetworks(t, func(t *testing.T, network string, address func() string) {
		const a, b, c = 0, 1, 2
		plain := dgrams(0, dgramSpec{Network: network, Address: address()}, dgramSpec{Network: network, Address: address()}, dgramSpec{Network: network, Address: address()})
		h := newHub(t, spec{Extra: plain.Extra, Do: map[string]string{"listened": "hold", "event handover": "call holdonce"}}, plain)
		p := h.start()
		p.at("listened")
		late := func(what string, i int) {
			t.Helper()
			p.dgramErr("end", i, "ReadFrom").is(t, what, "deadline")
		}
		clients := []net.Conn{p.dgramDial(a), p.dgramDial(b), p.dgramDial(c)}
		says(t, clients[a], "one")

		// Before Ready: set before the call, and while it waits.
		p.dgram("deadline", a, "read", "1ms")
		p.dgram("begin", a, "ReadFrom")
		late("before Ready", a)
		p.dgram("deadline", a, "both", "")
		p.reads(a, "ReadFrom", "waits")
		p.dgram("deadline", a, "read", "1h")
		p.comesTo(a, "ReadFrom", "waits")
		p.dgram("deadline", a, "both", "1ms")
		late("before Ready, set while it waits", a)
		p.dgram("deadline", a, "both", "1h")
		p.reads(a, "ReadFrom", "waits")
		// What has passed before Ready has passed after it.
		p.dgram("deadline", b, "read", "-1h")
		says(t, clients[b], "two")
		p.resume()
		p.at("serving")
		p.has(a, "ReadFrom", "one", clients[a])
		p.reads(b, "ReadFrom", "returned")
		late("passed before Ready", b)
		p.dgram("deadline", b, "read", "")
		p.reads(b, "ReadFrom", "returned")
		p.has(b, "ReadFrom", "two", clients[b])

		// While serving.
		p.reads(a, "ReadFrom", "reads")
		p.dgram("deadline", a, "read", "1ms")
		late("while serving", a)
		p.dgram("deadline", a, "both", "-1h")
		p.dgramErr("answer", a, "x").is(t, "WriteTo after its deadline", "deadline")
		p.dgram("deadline", a, "write", "")
		p.dgram("answer", a, "in time")
		hears(t, clients[a], "in time")

		// a: its deadline has passed before the upgrade.
		// b: it passes while this process is quiet.
		// c: none, and one that was far away when it began.
		p.reads(b, "ReadFrom", "reads")
		p.reads(c, "ReadFrom", "reads")
		says(t, clients[c], "hello")
		p.has(c, "ReadFrom", "hello", clients[c])
		p.reads(c, "ReadFrom", "reads")
		p.dgram("deadline", c, "both", "1h")
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		p.at("event handover")
		p.comesTo(b, "ReadFrom", "waits")
		p.comesTo(c, "ReadFrom", "waits")
		says(t, clients[a], "three")
		says(t, clients[b], "four")
		p.reads(a, "ReadFrom", "returned")
		late("passed before the upgrade", a)
		p.dgram("deadline", b, "both", "1ms")
		late("set while quiet", b)
		// Writing has the deadline at once, and is not in the package's.
		p.dgram("deadline", c, "both", "-1h")
		p.dgramErr("answer", c, "x").is(t, "WriteTo after a deadline set while quiet", "deadline")
		late("set while quiet", c)
		p.dgram("deadline", c, "write", "")
		p.dgram("deadline", c, "read", "")
		p.dgram("answer", c, "while quiet")
		hears(t, clients[c], "while quiet")
		p.reads(c, "ReadFrom", "waits")
		s.kill()
		p.call("release")
		checkErr(t, answer().Err, "handover", "unexpected EOF")
		for i, text := range []string{"three", "four"} {
			p.reads(i, "ReadFrom", "returned")
			late("passed before the upgrade failed", i)
			p.holds(i, text)
			p.dgram("deadline", i, "both", "")
			p.reads(i, "ReadFrom", "returned")
			p.has(i, "ReadFrom", text, clients[i])
		}
		p.comesTo(c, "ReadFrom", "reads")
		says(t, clients[c], "five")
		p.has(c, "ReadFrom", "five", clients[c])

		// In flight, with an hour left, over an upgrade that fails: the
		// package's deadline is not seen, and the caller's is there again.
		p.dgram("deadline", c, "read", "1h")
		p.reads(c, "ReadFrom", "reads")
		h.next(plain.do("event ready", "exit 1"))
		p.failUpgrade(command{}, "handover", "unexpected EOF")
		p.comesTo(c, "ReadFrom", "reads")
		p.dgram("deadline", c, "read", "1ms")
		late("after an upgrade that failed", c)
	})
}

// Stop ends reading, removes the files that are ours, and leaves what can be
// answered to be answered.
func TestPacketStop(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	ours, theirs, kept := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs"), filepath.Join(dir, "kept")
	keep := listenConfig{KeepOnStop: true}
	sp := dgrams(0,
		dgramSpec{Network: "udp", Address: "127.0.0.1:0"},
		dgramSpec{Network: "unixgram", Address: ours},
		dgramSpec{Network: "unixgram", Address: theirs},
		dgramSpec{Network: "udp", Address: "127.0.0.1:0", Config: keep},
		dgramSpec{Network: "unixgram", Address: kept, Config: keep})
	p := newHub(t, sp).serving()
	for generation := range 2 { // KeepOnStop and what it means for the files are handed on
		if generation == 1 {
			old := newHub(t, sp).serving()
			p = old.upgrade()
			old.kill()
		}
		var clients []net.Conn
		for i := range 5 {
			c := p.dgramDial(i)
			clients = append(clients, c)
			says(t, c, "question")
			p.reads(i, "ReadFrom", "returned")
			p.has(i, "ReadFrom", "question", c)
			p.reads(i, "ReadFrom", "reads")
		}
		if err := os.Remove(theirs); err != nil {
			t.Fatal(err)
		}
		other, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: theirs, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		p.call("stop")
		p.call("awaitexit")
		for i := range 3 {
			p.comesTo(i, "ReadFrom", "waits")
			p.dgram("deadline", i, "both", "-1h")
			p.dgramErr("end", i, "ReadFrom").is(t, "ReadFrom that ran while the process was stopped", "deadline")
			p.reads(i, "Read", "returned")
			p.dgramErr("end", i, "Read").is(t, "Read after Stop", "deadline")
			p.dgram("deadline", i, "both", "1h")
			p.dgram("answer", i, "answer")
			hears(t, clients[i], "answer")
		}
		for path, want := range map[string]bool{ours: false, theirs: true, kept: true} {
			if _, err := os.Lstat(path); (err == nil) != want {
				t.Errorf("%s after Stop: %v", path, err)
			}
		}
		for i := 3; i < 5; i++ {
			p.comesTo(i, "ReadFrom", "reads")
			says(t, clients[i], "are you well")
			p.has(i, "ReadFrom", "are you well", clients[i])
			p.dgram("answer", i, "I drain")
			hears(t, clients[i], "I drain")
			p.reads(i, "ReadFrom", "reads")
		}
		addrs := p.dgram("addrs")
		for i := range 5 {
			p.dgram("close", i)
			p.dgramErr("close", i).is(t, "a second Close", "closed")
			if i >= 3 {
				p.dgramErr("end", i, "ReadFrom").is(t, "ReadFrom of a socket that was kept, after Close", "closed")
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "theirs" {
			t.Errorf("after Close: %v, %v", left, err)
		}
		for _, i := range []int{0, 3} { // nothing holds the ports
			_, address, _ := strings.Cut(addrs[i], " ")
			c, err := net.ListenPacket("udp", address)
			if err != nil {
				t.Errorf("the port after Close: %v", err)
				continue
			}
			c.Close()
		}
		other.Close()
		if err := os.Remove(theirs); err != nil {
			t.Fatal(err)
		}
	}
}

// What a datagram costs in memory is what it costs with net.
func TestPacketAllocs(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVar+"=dgram allocs")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 5 {
		t.Fatalf("%q", lines)
	}
	for _, line := range lines {
		var call string
		var ours, nets float64
		if _, err := fmt.Sscan(line, &call, &ours, &nets); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		t.Logf("%s: %v allocations, net's %v", call, ours, nets)
		if ours > nets {
			t.Errorf("%s: %v allocations, net's %v", call, ours, nets)
		}
	}
}

// dgramAllocs prints for some ways to read, each after a write, the
// allocations with the package and with net.
func dgramAllocs() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		fatal(err)
	}
	if err := u.Ready(); err != nil {
		fatal(err)
	}
	p, err := u.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fatal(err)
	}
	n, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fatal(err)
	}
	type conn interface {
		net.PacketConn
		Read([]byte) (int, error)
		ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error)
		ReadMsgUDP(b, oob []byte) (int, int, int, *net.UDPAddr, error)
		ReadMsgUDPAddrPort(b, oob []byte) (int, int, int, netip.AddrPort, error)
		WriteToUDPAddrPort([]byte, netip.AddrPort) (int, error)
	}
	b, oob := make([]byte, 100), make([]byte, 100)
	for _, way := range []struct {
		name string
		read func(conn) error
	}{
		{"Read", func(c conn) error { _, err := c.Read(b); return err }},
		{"ReadFrom", func(c conn) error { _, _, err := c.ReadFrom(b); return err }},
		{"ReadFromUDPAddrPort", func(c conn) error { _, _, err := c.ReadFromUDPAddrPort(b); return err }},
		{"ReadMsgUDP", func(c conn) error { _, _, _, _, err := c.ReadMsgUDP(b, oob); return err }},
		{"ReadMsgUDPAddrPort", func(c conn) error { _, _, _, _, err := c.ReadMsgUDPAddrPort(b, oob); return err }},
	} {
		fmt.Print(way.name)
		for _, c := range []conn{p.(conn), n.(conn)} {
			to := netip.MustParseAddrPort(c.LocalAddr().String())
			fmt.Print(" ", testing.AllocsPerRun(1000, func() {
				if _, err := c.WriteToUDPAddrPort(b, to); err != nil {
					fatal(err)
				}
				if err := way.read(c); err != nil {
					fatal(err)
				}
			}))
		}
		fmt.Println()
	}
}
