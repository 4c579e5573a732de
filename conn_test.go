//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// The test's side of a connection.

// dialled lets p dial the test, and returns the test's end.
func dialled(p *proc, key, network string) net.Conn {
	p.t.Helper()
	address := "127.0.0.1:0"
	if strings.HasPrefix(network, "unix") {
		address = filepath.Join(shortDir(p.t), "peer")
	}
	if network == "udp" {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { c.Close() })
		local := p.thing("dial", key, network, c.LocalAddr().String())[0]
		to, err := net.ResolveUDPAddr("udp", local)
		if err != nil {
			p.t.Fatal(err)
		}
		// Connected, so that it hears when the other end has gone.
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) {
				err = syscall.Connect(int(fd), &syscall.SockaddrInet4{Addr: [4]byte(to.IP.To4()), Port: to.Port})
			})
			err = errors.Join(cerr, err)
		}
		if err != nil {
			p.t.Fatal(err)
		}
		return c.(*net.UDPConn)
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		p.t.Fatal(err)
	}
	defer ln.Close()
	p.thing("dial", key, network, ln.Addr().String())
	c, err := ln.Accept()
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

func say(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("got %q, %v; want %q", b[:n], err, text)
	}
}

// converse lets p, and the test at the other end, each say something.
func converse(p *proc, key string, c net.Conn) {
	p.t.Helper()
	p.thing("write", key, "question")
	hear(p.t, c, "question")
	say(p.t, c, "answer")
	p.gives("answer", "read", key, "6")
}

// ends asserts that no process has the other end of c any more.
func ends(t *testing.T, c net.Conn) {
	t.Helper()
	if _, ok := c.(*net.UDPConn); ok && runtime.GOOS == "linux" {
		_, _ = c.Write([]byte("anybody?")) // the answer comes to the read
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	_, err := c.Read(make([]byte, 1))
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the other end is still open: %v", err)
	}
}

// connNetworks are the networks whose connections move, and what they are then.
func connNetworks() map[string]string {
	m := map[string]string{"tcp": "*net.TCPConn", "unix": "*net.UnixConn", "udp": "*net.UDPConn"}
	if runtime.GOOS != "darwin" {
		m["unixpacket"] = "*ecdysis.SeqpacketConn"
	}
	return m
}

// A connection moves with what is unread, whenever the caller closes it, and
// no copy stays behind.
func TestConnMoves(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		for _, when := range []string{"closed at once", "closed after the upgrade"} {
			t.Run(network+" "+when, func(t *testing.T) {
				t.Parallel()
				p := newHub(t, spec{}, holding()).serving()
				peer := dialled(p, "c", network)
				converse(p, "c", peer)
				old := []*proc{p}
				for range 2 {
					p.thing("AddConn", "the name", "c")
					if when == "closed at once" {
						p.thing("close", "c")
					}
					say(t, peer, "unread")
					s := p.succeed(func(s *proc) { s.gives(typ, "Conn", "the name", "c") })
					s.unclaimed()
					if when != "closed at once" {
						p.thing("close", "c")
					}
					s.gives("unread", "read", "c", "6")
					converse(s, "c", peer)
					p, old = s, append(old, s)
				}
				p.thing("close", "c")
				ends(t, peer)
				for _, q := range old { // and all of them live
					q.call("generation")
				}
			})
		}
	}
}

// A client that was accepted moves, and one that waits in the backlog is
// accepted by the successor.
func TestConnMovesAccepted(t *testing.T) {
	t.Parallel()
	s := tcp()
	s.NoAccept = true
	next := s
	next.Do = map[string]string{"new": "hold"}
	p := newHub(t, s, next).serving()
	network, address := p.addr(0)
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p.gives("*net.TCPConn", "accept client", "c")
	p.thing("AddConn", "client", "c")
	say(t, c, "half a re")
	waits, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	g := p.succeed(func(s *proc) { s.gives("*net.TCPConn", "Conn", "client", "c") })
	p.thing("close", "c")
	say(t, c, "quest")
	g.gives("half a request", "read", "c", "14")
	g.gives("*net.TCPConn", "accept client", "c2")
	converse(g, "c2", waits)
	g.thing("close", "c", "c2")
	ends(t, c)
	ends(t, waits)
}

// A socket for packets of this package moves as a connection.
func TestConnMovesPackets(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	p.gives("*ecdysis.UDPConn", "ListenPacket", "u", "udp", "127.0.0.1:0")
	c, err := net.Dial("udp", p.thing("addr", "u")[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p.thing("AddConn", "u", "u")
	say(t, c, "unread")
	s := p.succeed(func(s *proc) { s.gives("*net.UDPConn", "Conn", "u", "u") })
	s.unclaimed("udp 127.0.0.1:0") // which is the same socket
	p.thing("close", "u")
	s.gives("unread", "read", "u", "6")
	s.thing("serve", "u")
	if pid, _, err := askOn(c); err != nil || pid != s.pid {
		t.Errorf("process %d answers, %v; want %d", pid, err, s.pid)
	}
	s.thing("close", "u")
	ends(t, c)
}

// After an upgrade that has failed the old process goes on with its
// connection, and the next successor gets it.
func TestConnFailedUpgrade(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := newHub(t, spec{}, holding()).serving()
			peer := dialled(p, "c", network)
			p.thing("AddConn", "c", "c")
			p.perish(func(s *proc) { s.gives(typ, "Conn", "c", "c") })
			converse(p, "c", peer)
			p.perish(func(s *proc) {}) // which does not ask for it
			converse(p, "c", peer)
			p.thing("close", "c")
			say(t, peer, "unread")
			s := p.succeed(func(s *proc) { s.gives(typ, "Conn", "c", "c") })
			s.gives("unread", "read", "c", "6")
			converse(s, "c", peer)
			s.thing("close", "c")
			ends(t, peer)
			p.call("generation")
		})
	}
}

// A successor that ends within its probation leaves the connection to the old
// process, which has kept it, and to the next.
func TestConnProbation(t *testing.T) {
	t.Parallel()
	h := newHub(t, spec{Options: options{Probation: time.Minute}}, holding())
	p := h.serving()
	peer := dialled(p, "c", "tcp")
	p.thing("AddConn", "c", "c")
	p.thing("pipe", "p", "blocking")
	p.thing("AddFile", "p", "p.r")
	p.thing("DatagramPair", "d", "d")
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("new")
	s.gives("*net.TCPConn", "Conn", "c", "c")
	s.gives("*net.UnixConn", "DatagramPair", "d", "d")
	s.resume()
	s.at("serving") // which closes what it has not asked for
	s.unclaimed("file p")
	converse(s, "c", peer)
	s.kill()
	checkErr(t, answer().Err, "probation", "unexpected EOF")
	converse(p, "c", peer)
	p.thing("write", "d.down", "to the next")
	p.thing("write", "p.w", "unread")
	answer = p.begin(command{Verb: "upgrade"})
	s = h.proc()
	s.at("new")
	s.gives("*net.TCPConn", "Conn", "c", "c")
	s.gives("*os.File", "File", "p", "p")
	s.gives("*net.UnixConn", "DatagramPair", "d", "d")
	s.resume()
	s.at("serving")
	s.call("stop") // ends the probation
	if m := answer(); m.Err != nil {
		t.Fatalf("%+v", m.Err)
	}
	p.thing("close", "c")
	converse(s, "c", peer)
	s.gives("unread", "read", "p", "6")
	s.gives("to the next", "read", "d.up", "11")
}

// Conn takes the copy back in the process that has made it.
func TestConnTakenBack(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := newHub(t, spec{}, holding()).serving()
			peer := dialled(p, "c", network)
			p.thing("AddConn", "c", "c")
			p.gives(typ, "Conn", "c", "copy")
			p.gives("nil", "Conn", "c", "none")
			converse(p, "c", peer)
			p.thing("close", "c")
			converse(p, "copy", peer)
			s := p.succeed(func(s *proc) { s.gives("nil", "Conn", "c", "none") })
			s.unclaimed()
			converse(p, "copy", peer)
			p.thing("close", "copy")
			ends(t, peer)
		})
	}
}

// One name stands for many, in their order, and every kind has names of its
// own.
func TestConnNames(t *testing.T) {
	t.Parallel()
	odd := "a=b kind=file \x00\n\t" + strings.Repeat("ü", 500)
	p := newHub(t, spec{}, holding()).serving()
	add := func(name, text string) {
		t.Helper()
		p.thing("socketpair", "s", "stream")
		p.thing("write", "s.b", text)
		if strings.HasPrefix(text, "file") {
			p.thing("AddFile", name, "s.a")
		} else {
			p.thing("conn of", "c", "s.a")
			p.thing("AddConn", name, "c")
			p.thing("close", "c")
		}
		p.thing("close", "s.a", "s.b")
	}
	add("x", "conn x 0")
	add("x", "file x 0")
	add(odd, "conn o 0")
	add("x", "conn x 1")
	add("x ", "conn _ 0")
	add("x", "file x 1")
	add("x", "conn x 2")
	s := p.succeed(func(s *proc) {
		take := func(call, name, want string) {
			t.Helper()
			if want == "" {
				s.gives("nil", call, name, "c")
				return
			}
			s.thing(call, name, "c")
			s.gives(want, "read", "c", "8")
			s.thing("close", "c")
		}
		take("Conn", "X", "")
		take("Conn", "", "")
		take("Listener", "x", "")
		take("PacketConn", "x", "")
		take("Conn", odd, "conn o 0")
		take("Conn", odd, "")
		take("Conn", "x", "conn x 0")
		take("Conn", "x", "conn x 1")
		take("File", "x", "file x 0")
		take("File", "x", "file x 1")
		take("File", "x", "conn x 2") // a connection can be had as a file
		take("File", "x", "")
		take("Conn", "x", "")
		take("Conn", "x ", "conn _ 0")
	})
	s.unclaimed()
}

// What cannot move is refused, and the error says why.
func TestAddRefuses(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	before := p.call("fds").Text
	peer := dialled(p, "tcp", "tcp")
	p.thing("tls", "tls", "tcp")
	p.noThing("", []string{`"name"`, "*tls.Conn", "has no descriptor", "want a connection of TCP, UDP or Unix"}, "AddConn", "name", "tls")
	p.thing("net.Pipe", "pipe")
	p.noThing("", []string{`"name"`, "*net.pipe", "has no descriptor"}, "AddConn", "name", "pipe")
	p.noThing("", []string{`"name"`, "<nil>", "has no descriptor"}, "AddConn", "name", "no conn")
	p.thing("file conn", "file conn")
	p.noThing("", []string{`"name"`, "getsockopt", "socket operation on non-socket"}, "AddConn", "name", "file conn")
	p.thing("nil", "nil")
	p.noThing("", []string{"invalid argument"}, "AddFile", "name", "nil")
	p.thing("open", "null", os.DevNull)
	long := strings.Repeat("x", 1025)
	p.noThing("", []string{"add connection", "name is empty"}, "AddConn", "", "tcp")
	p.noThing("", []string{"add connection", "1025 bytes", "1024"}, "AddConn", long, "tcp")
	p.noThing("", []string{"add file", "name is empty"}, "AddFile", "", "null")
	p.noThing("", []string{"add file", "1025 bytes", "1024"}, "AddFile", long, "null")
	p.noThing("", []string{"name is empty"}, "DatagramPair", "", "none")
	p.noThing("", []string{"1025 bytes", "1024"}, "DatagramPair", long, "none")
	converse(p, "tcp", peer)
	p.thing("close", "tcp", "null")
	ends(t, peer)
	p.noThing("closed", []string{`"name"`}, "AddConn", "name", "tcp")
	p.noThing("os.ErrClosed", []string{`"name"`}, "AddFile", "name", "null")
	if os.Getuid() == 0 && runtime.GOOS == "linux" {
		p.thing("dial", "ip", "ip4:icmp", "127.0.0.1")
		p.noThing("", []string{"*net.IPConn", "a kind that net has no connections for", "AddFile"}, "AddConn", "name", "ip")
		p.thing("close", "ip")
	}
	if runtime.GOOS == "linux" { // none of these has left a descriptor
		p.thing("close", "file conn")
		if now := p.call("fds").Text; !slices.Equal(now, before) {
			t.Errorf("descriptors: %q; before: %q", now, before)
		}
	}
	p.succeed(func(s *proc) {}).unclaimed()
}

// Adding and taking have the errors of Listen.
func TestAddPhases(t *testing.T) {
	t.Parallel()
	next := holding()
	next.Do["listened"] = "hold"
	h := newHub(t, holding(), next)
	p := h.start()
	check := func(p *proc, want string) {
		t.Helper()
		before := p.call("fds").Text
		for _, got := range p.thing("all calls") {
			call, _, _ := strings.Cut(got, " ")
			if got != call+" "+want {
				t.Errorf("%s; want %s", got, want)
			}
		}
		if want == "<nil>" || runtime.GOOS != "linux" {
			return
		}
		if now := p.call("fds").Text; !slices.Equal(now, before) {
			t.Errorf("%s left descriptors behind: %q; before: %q", want, now, before)
		}
	}
	p.at("new")
	check(p, "<nil>")
	p.resume()
	p.at("serving")
	answer := p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("new")
	check(p, "ErrInProgress")
	for _, call := range []string{"Conn", "File"} {
		s.thing(call, "x", "x")
	}
	s.thing("DatagramPair", "x", "x")
	s.resume()
	s.at("listened")
	check(p, "ErrInProgress")
	s.kill()
	checkErr(t, answer().Err, "init", "unexpected EOF")
	h.next(holding())
	s = p.succeed(func(s *proc) {})
	s.unclaimed("conn x", "file x", "pair x")
	check(p, "ErrUpgraded")
	check(s, "<nil>")
	s.call("stop")
	check(s, "ErrStopped")

	// A successor that was given up.
	h = newHub(t, spec{}, holding())
	p = h.serving()
	answer = p.begin(command{Verb: "upgrade"})
	s = h.proc()
	s.at("new")
	m := s.call("thing fail and call")
	if m.Err != nil {
		t.Fatalf("%+v", m.Err)
	}
	for _, got := range m.Text {
		if !strings.HasSuffix(got, " ErrAborted") {
			t.Errorf("after Fail: %s", got)
		}
	}
	checkErr(t, answer().Err, "init", "")
}

func init() {
	// The old process ends one that fails soon after.
	verbs["thing fail and call"] = func(d *daemon, c command) message {
		_ = d.u.Fail(errors.New("planned"))
		text, err := thingVerbs["all calls"](d, nil)
		return message{Text: text, Err: toErrMsg(err)}
	}
}

// Prepare may still add.
func TestAddInPrepare(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{Do: map[string]string{"prepare": "call thing all calls"}}, holding()).serving()
	s := p.succeed(func(s *proc) {
		s.gives("*net.UDPConn", "Conn", "x", "c")
		s.gives("*os.File", "File", "x", "f")
		s.gives("*net.UnixConn", "DatagramPair", "x", "p")
	})
	s.unclaimed()
	for _, got := range p.at("prepare thing all calls").Text {
		if !strings.HasSuffix(got, " <nil>") {
			t.Error(got)
		}
	}
}

// Stop closes the copies, and so does what follows a successful upgrade, which
// leaves the old process with the stream to its successor alone.
func TestCopiesAreClosed(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	for _, how := range []string{"stop", "partial stop", "upgrade", "unclaimed", "stop before Ready", "stop of a successor"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			first := spec{Options: options{PartialStopSignals: []syscall.Signal{syscall.SIGUSR2}}}
			if how == "stop before Ready" {
				first = holding()
			}
			h := newHub(t, first, holding())
			p := h.start()
			if how == "stop before Ready" {
				p.at("new")
			} else {
				p.at("serving")
			}
			before := p.call("fds").Text
			var peers []net.Conn
			for network := range connNetworks() {
				peers = append(peers, dialled(p, "c", network))
				p.thing("AddConn", network, "c")
				p.thing("close", "c")
			}
			p.thing("pipe", "pipe", "blocking")
			p.thing("AddFile", "pipe", "pipe.r")
			p.thing("close", "pipe.r")
			p.thing("DatagramPair", "pair", "pair")
			p.thing("close", "pair.down")
			p.thing("listen", "ln", "tcp", "127.0.0.1:0")
			p.thing("file of", "f", "ln")
			p.thing("AddFile", "socket", "f")
			p.thing("close", "ln", "f")
			after := kindsOf(before)
			switch how {
			case "stop", "stop before Ready":
				p.call("stop")
			case "partial stop":
				answer := p.begin(command{Verb: "thing wait"})
				p.call("inwait")
				p.signal(syscall.SIGUSR2)
				if got := answer().Text[0]; got != "partial stop" {
					t.Fatalf("Wait returned %q", got)
				}
			case "upgrade":
				s := p.succeed(func(s *proc) {
					for network := range connNetworks() {
						s.thing("Conn", network, network)
					}
					s.gives("*os.File", "File", "pipe", "pipe")
					s.gives("*net.UnixConn", "DatagramPair", "pair", "pair")
					s.gives("*os.File", "File", "socket", "socket")
				})
				s.unclaimed()
				for network := range connNetworks() {
					s.thing("close", network)
				}
				s.thing("close", "pipe")
				after = append(after, "socket:[N]") // the stream
			case "unclaimed":
				s := p.succeed(func(s *proc) {})
				if got := len(s.event(ecdysis.EventReady, 0).Unclaimed); got != len(peers)+3 {
					t.Errorf("%d unclaimed; want %d", got, len(peers)+3)
				}
				after = append(after, "socket:[N]")
			case "stop of a successor": // of what it has and of what it has not asked for
				s := p.succeed(func(s *proc) {
					for network := range connNetworks() {
						s.thing("Conn", network, "c")
						s.thing("AddConn", network, "c")
						s.thing("close", "c")
					}
				})
				s.call("stop")
				after = append(after, "socket:[N]")
			}
			for _, peer := range peers {
				ends(t, peer)
			}
			p.noThing("", []string{"broken pipe"}, "write", "pipe.w", "x")
			p.thing("close", "pipe.w")
			slices.Sort(after)
			if now := kindsOf(p.call("fds").Text); !slices.Equal(now, after) {
				t.Errorf("descriptors: %q; want %q", now, after)
			}
		})
	}
}

// What nobody has asked for is named and closed.
func TestUnclaimedIsNamed(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{Extra: map[string]string{"state": "size 10"}}, holding()).serving()
	peer := dialled(p, "c", "tcp")
	p.thing("AddConn", "x", "c")
	other := dialled(p, "c2", "tcp")
	p.thing("AddConn", "x", "c2")
	p.thing("close", "c", "c2")
	p.thing("pipe", "p", "blocking")
	p.thing("AddFile", "y", "p.r")
	p.thing("close", "p.r")
	p.thing("DatagramPair", "z", "z")
	at := p.thing("listen", "ln", "tcp", "127.0.0.1:0")[0]
	p.thing("file of", "f", "ln")
	p.thing("AddFile", "socket", "f")
	p.thing("close", "f", "ln")
	s := p.succeed(func(s *proc) { s.gives("*net.TCPConn", "Conn", "x", "c") })
	s.unclaimed("conn x", "file y", "pair z", "tcp "+at, "state")
	if line := s.event(ecdysis.EventReady, 0).Line; !strings.HasSuffix(line, " unclaimed=conn x,file y,pair z,tcp "+at+",state") {
		t.Errorf("the event's line: %s", line)
	}
	converse(s, "c", peer)
	ends(t, other)
	p.noThing("", []string{"broken pipe"}, "write", "p.w", "x")
	p.noThing("", nil, "write", "z.down", "x")
	if _, err := net.Dial("tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the unclaimed listener: %v", err)
	}
	// And nothing of it comes back.
	g := s.succeed(func(g *proc) {
		for _, call := range []string{"Conn", "File", "Listener", "DatagramPair"} {
			for _, name := range []string{"x", "y", "z", "socket"} {
				if call != "DatagramPair" || name == "z" {
					g.gives("nil", call, name, "none")
				}
			}
		}
	})
	g.unclaimed()
}
