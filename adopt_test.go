//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Sockets made elsewhere, which AddFile brings in.

// An adoptee is a socket that a daemon has made behind the package's back.
type adoptee struct {
	network, address string
	others           [][2]string // what else it can be asked for as
	bound            string      // what the system has its address as, if that is another
}

func (a adoptee) packets() bool { return a.network == "udp" || a.network == "unixgram" }

// call is the package's method for the socket's kind.
func (a adoptee) call(packets, listener string) string {
	if a.packets() {
		return packets
	}
	return listener
}

// adoptees are the kinds of sockets, each with a function that lets a daemon
// make one.
func adoptees() map[string]func(p *proc) adoptee {
	m := make(map[string]func(p *proc) adoptee)
	for _, network := range []string{"tcp", "udp"} {
		m[network] = func(p *proc) adoptee {
			at := p.thing("listen", "made", network, "127.0.0.1:0")[0]
			_, port, _ := net.SplitHostPort(at)
			return adoptee{network: network, address: at, others: [][2]string{{network + "4", at}, {network, "localhost:" + port}}}
		}
		m[network+" everywhere"] = func(p *proc) adoptee {
			at := p.thing("listen", "made", network, ":0")[0] // [::], where that means both versions of IP
			_, port, _ := net.SplitHostPort(at)
			return adoptee{network: network, address: at, others: [][2]string{{network, ":" + port}, {network, "0.0.0.0:" + port}}}
		}
	}
	if ln, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		ln.Close()
		m["tcp6"] = func(p *proc) adoptee {
			_, port, _ := net.SplitHostPort(p.thing("listen", "made", "tcp6", "[::]:0")[0])
			return adoptee{network: "tcp6", address: "[::]:" + port, others: [][2]string{{"tcp6", ":" + port}}}
		}
	}
	for _, network := range []string{"unix", "unixpacket", "unixgram"} {
		if network == "unixpacket" && runtime.GOOS == "darwin" {
			continue
		}
		m[network] = func(p *proc) adoptee {
			path := filepath.Join(p.h.dir, "s")
			p.thing("listen", "made", network, path)
			return adoptee{network: network, address: path, others: [][2]string{{network, p.h.dir + "/../" + filepath.Base(p.h.dir) + "/./s"}}}
		}
		if runtime.GOOS == "linux" && network != "unixpacket" {
			m[network+" abstract"] = func(p *proc) adoptee {
				name := "@ecdysis-adopt-" + filepath.Base(p.h.dir)
				p.thing("listen", "made", network, name)
				return adoptee{network: network, address: name, others: [][2]string{{network, "\x00" + name[1:]}}}
			}
		}
	}
	m["unix relative"] = func(p *proc) adoptee {
		p.call("chdir", p.h.dir)
		p.thing("listen", "made", "unix", "s")
		p.call("chdir", "/")
		path := filepath.Join(p.h.dir, "s")
		return adoptee{network: "unix", address: path, bound: "s"}
	}
	return m
}

// adopts lets p make a socket and bring it in.
func (p *proc) adopts(add func(p *proc) adoptee) adoptee {
	p.t.Helper()
	a := add(p)
	p.thing("file of", "file", "made")
	p.thing("close", "made")
	p.bringsIn(a, "file")
	return a
}

// bringsIn lets p add the socket's file, which it closes.
func (p *proc) bringsIn(a adoptee, key string) {
	p.t.Helper()
	if a.bound != "" {
		p.call("chdir", filepath.Dir(a.address)) // where it was made
	}
	p.thing("AddFile", "socket", key)
	if a.bound != "" {
		p.call("chdir", "/")
	}
	p.thing("close", key)
}

// asks finds the socket in p, as "name", "words" or "other words".
func (p *proc) asks(a adoptee, how string) {
	p.t.Helper()
	want := "*ecdysis.listener"
	switch a.network {
	case "udp":
		want = "*ecdysis.UDPConn"
	case "unixgram":
		want = "*ecdysis.UnixgramConn"
	case "unixpacket":
		want = "*ecdysis.SeqpacketListener"
	}
	switch how {
	case "name":
		p.gives(want, a.call("PacketConn", "Listener"), "socket", "sock")
	case "words":
		p.gives(want, a.call("ListenPacket", "Listen"), "sock", a.network, a.address)
	default:
		n := 0
		_, _ = fmt.Sscanf(how, "other words %d", &n)
		p.gives(want, a.call("ListenPacket", "Listen"), "sock", a.others[n][0], a.others[n][1])
	}
	p.gives("nil", a.call("PacketConn", "Listener"), "socket", "none")
	p.thing("serve", "sock")
}

var clients atomic.Int64

// ask connects to the socket and returns who answers.
func (a adoptee) ask(dir string) (pid, generation int, err error) {
	switch a.network {
	case "unixgram":
		name := filepath.Join(dir, fmt.Sprint("c", clients.Add(1)))
		c, err := net.DialUnix("unixgram", &net.UnixAddr{Net: "unixgram", Name: name}, &net.UnixAddr{Net: "unixgram", Name: a.address})
		if err != nil {
			return 0, 0, err
		}
		defer os.Remove(name)
		defer c.Close()
		return askOn(c)
	case "tcp", "udp", "tcp6":
		_, port, _ := net.SplitHostPort(a.address)
		switch {
		case a.network == "tcp6":
			return ask(a.network, "[::1]:"+port)
		case strings.HasPrefix(a.address, "[::]"), strings.HasPrefix(a.address, "0.0.0.0"):
			return ask(a.network, "127.0.0.1:"+port)
		}
	}
	return ask(a.network, a.address)
}

func (a adoptee) answeredBy(p *proc) {
	p.t.Helper()
	if pid, _, err := a.ask(p.h.dir); err != nil || pid != p.pid {
		p.t.Fatalf("%s %s: process %d answers, %v; want %d", a.network, a.address, pid, err, p.pid)
	}
}

// underLoad asks again and again until what it returns is called.
func (a adoptee) underLoad(t *testing.T, dir string) (more, check func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	var n, newest atomic.Int64
	var failure atomic.Value
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			_, g, err := a.ask(dir)
			if err == nil && int64(g) < newest.Load() {
				err = fmt.Errorf("generation %d answered after %d had", g, newest.Load())
			}
			if err != nil {
				failure.CompareAndSwap(nil, err)
				return
			}
			newest.Store(int64(g))
			n.Add(1)
		}
	}()
	more = func() {
		t.Helper()
		want := n.Load() + 20
		for end := time.Now().Add(patience); n.Load() < want && failure.Load() == nil; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d requests answered; want %d", n.Load(), want)
			}
		}
	}
	end := func() {
		select {
		case <-stop:
		default:
			close(stop)
		}
		<-done
	}
	t.Cleanup(end)
	return more, func() {
		t.Helper()
		if end(); failure.Load() != nil {
			t.Errorf("after %d requests: %v", n.Load(), failure.Load())
		}
	}
}

// hows are the ways to find a socket.
func (a adoptee) hows() []string {
	list := []string{"words", "name"}
	for i := range a.others {
		list = append(list, fmt.Sprint("other words ", i))
	}
	return list
}

// hasFile asserts that the file of a Unix socket is there.
func (a adoptee) hasFile(t *testing.T) {
	t.Helper()
	if filepath.IsAbs(a.address) {
		if _, err := os.Lstat(a.address); err != nil {
			t.Errorf("the file: %v", err)
		}
	}
}

// A socket that was made elsewhere is found by its name and by every word for
// its address, where it was brought in and in each generation, is served
// without a gap, and its file belongs to somebody else.
func TestAdopted(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t, spec{}, holding())
			p := h.serving()
			a := p.adopts(add)
			p.asks(a, "name")
			for _, how := range a.hows() {
				p.thing("file of", "file", "sock")
				p.thing("close", "sock")
				a.hasFile(t)
				p.bringsIn(a, "file")
				p.asks(a, how)
				a.answeredBy(p)
			}
			more, check := a.underLoad(t, h.dir)
			first := p
			for _, how := range append(a.hows(), "name") {
				more()
				s := p.succeed(func(s *proc) { s.asks(a, how) })
				s.unclaimed()
				a.answeredBy(s)
				p = s
			}
			more()
			check()
			p.thing("close", "sock")
			a.hasFile(t)
			if !a.packets() { // those stay open where they were read
				if _, _, err := a.ask(h.dir); err == nil {
					t.Error("it is still open")
				}
			}
			first.call("generation")
		})
	}
}

// Nobody need ask for it in the process that brings it in. Whoever ends it leaves
// its file alone.
func TestAdoptedUnasked(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		for _, end := range []string{"dropped", "stopped", "stopped where it was made"} {
			t.Run(name+" "+end, func(t *testing.T) {
				t.Parallel()
				p := newHub(t, spec{}, holding()).serving()
				a := p.adopts(add)
				if end == "stopped where it was made" {
					p.call("stop")
					if _, _, err := a.ask(p.h.dir); err == nil {
						t.Error("it is still open")
					}
					a.hasFile(t)
					return
				}
				how := "name"
				if end == "stopped" {
					how, a.bound = "words", ""
				}
				p.perish(func(s *proc) { s.asks(a, how) })
				s := p.succeed(func(s *proc) { s.asks(a, how) })
				s.unclaimed()
				a.answeredBy(s)
				if end == "dropped" {
					s.succeed(func(*proc) {}).unclaimed(a.network + " " + cmp.Or(a.bound, a.address))
				} else {
					s.call("stop")
				}
				if a.packets() {
					s.thing("close", "sock") // where it is read no more, and kept for answers
				}
				if _, _, err := a.ask(p.h.dir); err == nil {
					t.Error("it is still open")
				}
				a.hasFile(t)
			})
		}
	}
}

// The order among sockets of one name, and of one address.
func TestAdoptedOrder(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	var at []string
	for i := range 4 {
		at = append(at, p.thing("listen", "made", "tcp", "127.0.0.1:0")[0])
		p.thing("file of", "f", "made")
		p.thing("AddFile", "socket", "f")
		p.thing("close", "made", "f")
		if i == 0 { // one is asked for here, and goes on being the first
			p.gives("*ecdysis.listener", "Listener", "socket", "ln")
		}
	}
	s := p.succeed(func(s *proc) {
		s.gives("*ecdysis.listener", "Listen", "ln", "tcp", at[2])
		s.thing("keep", "ln")
		for range 3 {
			s.gives("*ecdysis.listener", "Listener", "socket", "ln")
			s.thing("keep", "ln")
		}
		s.gives("nil", "Listener", "socket", "none")
		s.gives("*ecdysis.listener", "Listen", "new", "tcp", "127.0.0.1:0")
	})
	s.unclaimed()
	for i, n := range []int{2, 0, 1, 3} {
		if _, a := s.addr(i); a != at[n] {
			t.Errorf("socket %d: %s; want %s", i, a, at[n])
		}
	}
}

// A file is found by a path with a symbolic link in it, as one of this
// package's own is.
func TestAdoptedByLink(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"here", "in the successor"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			h := newHub(t, spec{}, holding())
			p := h.serving()
			link(t, h.dir, filepath.Join(h.dir, "link"))
			a := p.adopts(adoptees()["unix"])
			b := adoptee{network: "unix", address: filepath.Join(h.dir, "link", "s")}
			if where == "here" {
				p.asks(b, "words")
				b.answeredBy(p)
				return
			}
			s := p.succeed(func(s *proc) { s.asks(b, "words") })
			s.unclaimed()
			a.answeredBy(s)
			s.thing("close", "sock")
			if _, err := os.Lstat(a.address); err != nil {
				t.Errorf("the file: %v", err)
			}
		})
	}
}

// What is no socket for clients is a file.
func TestNotAdopted(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	tcp, udp := dialled(p, "tcp", "tcp"), dialled(p, "udp", "udp")
	p.thing("open", "null", os.DevNull)
	p.thing("file of", "tcp file", "tcp")
	p.thing("file of", "udp file", "udp")
	p.thing("socketpair", "stream", "stream")
	p.thing("socketpair", "dgram", "dgram")
	p.thing("bound", "bound")
	keys := []string{"null", "tcp file", "udp file", "stream.a", "dgram.a"}
	if runtime.GOOS == "linux" || runtime.GOOS == "freebsd" {
		keys = append(keys, "bound") // where the system tells
	}
	check := func(p *proc) {
		t.Helper()
		for _, key := range keys {
			p.gives("nil", "Listener", key, "none")
			p.gives("nil", "PacketConn", key, "none")
			p.gives("nil", "Conn", key, "none")
		}
	}
	for _, key := range keys {
		p.thing("AddFile", key, key)
	}
	check(p)
	s := p.succeed(func(s *proc) {
		check(s)
		for _, key := range keys {
			s.gives("*os.File", "File", key, key)
		}
	})
	s.unclaimed()
	s.thing("conn of", "c", "tcp file")
	converse(s, "c", tcp)
	s.thing("conn of", "c", "udp file")
	converse(s, "c", udp)
}

// File takes a socket out, here and in the successor: it is nobody's listener
// then, and not handed on.
func TestAdoptedTakenOut(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newHub(t, spec{}, holding()).serving()
			a := p.adopts(add)
			s := p.succeed(func(s *proc) {
				s.gives("*os.File", "File", "socket", "f")
				s.gives("nil", a.call("PacketConn", "Listener"), "socket", "none")
				s.gives("nil", "File", "socket", "none")
			})
			s.unclaimed()
			s.noThing("EADDRINUSE", nil, a.call("ListenPacket", "Listen"), "none", a.network, a.address)
			s.thing("AddFile", "again", "f")
			s.gives("*os.File", "File", "again", "f2")
			g := s.succeed(func(g *proc) {
				g.gives("nil", "File", "again", "none")
				g.gives("nil", a.call("PacketConn", "Listener"), "again", "none")
			})
			g.unclaimed()
			g.noThing("EADDRINUSE", nil, a.call("ListenPacket", "Listen"), "none", a.network, a.address)
			s.thing("close", "f", "f2")
			if _, _, err := a.ask(p.h.dir); err == nil {
				t.Error("it is still open")
			}
		})
	}
}

// What is bound and not handed on is listed, with its descriptor.
func TestUnregistered(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the other systems do not say of every socket what it is")
	}
	h := newHub(t, spec{Listen: [][2]string{{"tcp", "127.0.0.1:0"}, {"tcp", ":0"}}, NoAccept: true}, holding())
	p := h.serving()
	p.gives("", "Unregistered")
	// None of these is in a successor's way.
	c, err := net.Dial("tcp", p.list()[0][1])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p.gives("*net.TCPConn", "accept client", "client")
	for network := range connNetworks() {
		dialled(p, network, network)
	}
	p.thing("socketpair", "stream", "stream")
	p.thing("socketpair", "dgram", "dgram")
	p.thing("pipe", "pipe", "blocking")
	p.thing("bound", "bound")
	p.thing("DatagramPair", "pair", "pair")
	p.thing("Listen", "u", "unix", filepath.Join(h.dir, "u"))
	p.thing("Listen", "q", "unixpacket", filepath.Join(h.dir, "q"))
	p.thing("ListenPacket", "d", "udp", "127.0.0.1:0")
	p.thing("ListenPacket", "g", "unixgram", filepath.Join(h.dir, "g"))
	p.adopts(adoptees()["tcp"])
	p.gives("", "Unregistered")
	p.gives("*ecdysis.listener", "Listener", "socket", "adopted")
	p.thing("file of", "copy", "d") // copies of ours
	p.gives("", "Unregistered")
	// And all of these are.
	var want []string
	for i, na := range [][2]string{{"tcp", "127.0.0.1:0"}, {"tcp", ":0"}, {"udp", "127.0.0.1:0"}, {"udp", ":0"},
		{"unix", filepath.Join(h.dir, "U")}, {"unixpacket", filepath.Join(h.dir, "Q")}, {"unixgram", filepath.Join(h.dir, "G")},
		{"unix", "@unregistered-" + filepath.Base(h.dir)}} {
		key := fmt.Sprint("made ", i)
		at := p.thing("listen", key, na[0], na[1])[0]
		want = append(want, fmt.Sprintf("%s %s (descriptor %s)", na[0], at, p.thing("descriptor", key)[0]))
	}
	got := p.thing("Unregistered")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("unregistered: %q\nwant %q", got, want)
	}
	// One that is brought in is no more.
	p.thing("file of", "f", "made 0")
	p.thing("AddFile", "now", "f")
	if n := len(p.thing("Unregistered")); n != len(want)-1 {
		t.Errorf("%d are unregistered; want %d", n, len(want)-1)
	}
	// One that was taken out is again.
	p.thing("File", "now", "f2")
	if n := len(p.thing("Unregistered")); n != len(want)+2 { // three descriptors of one socket
		t.Errorf("%d are unregistered; want %d", n, len(want)+2)
	}
	// What a successor has inherited and not asked for yet is not.
	p.thing("close", "f", "f2", "made 0")
	s := p.succeed(func(s *proc) { s.gives("", "Unregistered") })
	s.gives("", "Unregistered")
}

// A successor that finds an address in use learns why through the old one.
func TestUnregisteredIsBlamed(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the other systems do not say of every socket what it is")
	}
	h := newHub(t, tcp(), holding())
	p := h.serving()
	// fails makes an attempt whose successor does f, and returns the error.
	fails := func(f func(s *proc)) string {
		t.Helper()
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		s.at("new")
		f(s)
		m := answer()
		checkErr(t, m.Err, "init", "")
		return m.Err.Text
	}
	says := func(text string, want ...string) {
		t.Helper()
		for _, w := range want {
			if no, ok := strings.CutPrefix(w, "not "); ok == strings.Contains(text, no) {
				t.Errorf("%q; want %s%q", text, w[:len(w)-len(no)], no)
			}
		}
	}
	listenFails := func(network, address string, ours bool) func(s *proc) {
		return func(s *proc) {
			_ = s.begin(command{Verb: "thing fail to listen", Args: []string{network, address, fmt.Sprint(ours)}})
		}
	}
	// With nothing unregistered nothing is blamed, whatever the reason.
	_, own := p.addr(0)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	third := other.Addr().String()
	says(fails(listenFails("tcp", own, false)), "it says: ", "address already in use", "not descriptor")
	if runtime.GOOS == "linux" { // such a name is in nobody's way
		p.thing("listen", "autobound", "unix", "")
	}
	says(fails((*proc).kill), "without a call of Ready or Fail", "not descriptor")

	at := make(map[string]string)
	named := make(map[string]string)
	for _, network := range []string{"tcp", "udp", "unix"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(h.dir, "U")
		}
		at[network] = p.thing("listen", network, network, address)[0]
		named[network] = fmt.Sprintf("%s %s (descriptor %s)", network, at[network], p.thing("descriptor", network)[0])
	}
	for network, address := range at {
		for _, ours := range []bool{false, true} {
			text := fails(listenFails(network, address, ours))
			says(text, "it says: ", "address already in use", "; the cause is what this process has bound and does not hand on: "+named[network])
			for another := range at {
				if another != network {
					says(text, "not "+named[another])
				}
			}
		}
	}
	says(fails((*proc).kill), "without a call of Ready or Fail", "perhaps because of what this process has bound", named["tcp"], named["udp"], named["unix"])
	says(fails(func(s *proc) { _ = s.begin(command{Verb: "thing fail"}) }), "told to fail", "not descriptor", "not perhaps")
	// An address that somebody else has is no fault of this process.
	says(fails(listenFails("tcp", third, false)), "address already in use", "not the cause is", "not "+named["unix"])
	// And a port of one protocol is not that of another.
	_, port, _ := net.SplitHostPort(at["tcp"])
	if c, err := net.ListenPacket("udp", "127.0.0.1:"+port); err == nil { // it is free
		says(fails(listenFails("udp", "127.0.0.1:"+port, false)), "address already in use", "not the cause is", "not "+named["tcp"])
		c.Close()
	}
	p.serves()
	p.thing("close", "tcp", "udp", "unix")
	h.next(tcp())
	p.upgrade().serves()
}

func init() {
	verbs["thing fail"] = func(d *daemon, c command) message {
		fatal(d.u.Fail(errors.New("told to fail")))
		return message{}
	}
	verbs["thing fail to listen"] = func(d *daemon, c command) message {
		var err error
		switch network, address := c.Args[0], c.Args[1]; {
		case c.Args[2] == "false" && network == "udp":
			_, err = net.ListenPacket(network, address)
		case c.Args[2] == "false":
			_, err = net.Listen(network, address)
		case network == "udp":
			_, err = d.u.ListenPacket(network, address)
		default:
			_, err = d.u.Listen(network, address)
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("not what was planned: %w", err)
		}
		fatal(d.u.Fail(err))
		return message{}
	}
}
