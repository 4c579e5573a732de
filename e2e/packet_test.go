package e2e

import (
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What sockets for packets alone have: reads that wait for Ready, answers that
// come late, and a deadline each for reading and for writing.

// A packetState is what a daemon knows of one of its sockets.
type packetState struct {
	c net.PacketConn

	mu    sync.Mutex
	last  net.Addr // whom to answer
	reads map[string]*packetRead
}

// A packetRead is a read that runs, or has ended.
type packetRead struct {
	goroutine string // as it is called in a stack trace
	done      chan struct{}
	b         []byte
	from      net.Addr
	err       error
}

var packetStates = struct {
	mu sync.Mutex
	m  map[int]*packetState
}{m: make(map[int]*packetState)}

// packetStateOf returns what is known of the i-th socket.
func packetStateOf(d *proctest.Daemon, i int) *packetState {
	packetStates.mu.Lock()
	defer packetStates.mu.Unlock()
	s := packetStates.m[i]
	if s == nil {
		s = &packetState{c: d.PacketConn(i), reads: make(map[string]*packetRead)}
		packetStates.m[i] = s
	}
	return s
}

func (s *packetState) read(method string) *packetRead {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reads[method]
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
func (s *packetState) begin(method string) *packetRead {
	r := &packetRead{done: make(chan struct{}), b: make([]byte, 512)}
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
func (r *packetRead) state(want ...string) string {
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

// The arguments of calls: a socket by its index, and what is done with it.
type (
	readArg struct {
		Socket        int
		Method, State string
	}
	answerArg struct {
		Socket int
		Text   string
	}
	deadlineArg struct {
		Socket int
		Of     string
		In     time.Duration
	}
	packetGot struct{ Text, From string }
)

var (
	beginRead = proctest.Define("begin a read", func(d *proctest.Daemon, a readArg) (string, error) {
		s := packetStateOf(d, a.Socket)
		r := s.begin(a.Method)
		s.mu.Lock()
		s.reads[a.Method] = r
		s.mu.Unlock()
		return r.state(), nil
	})
	// stateOfRead waits for a.State, or until the read has returned.
	stateOfRead = proctest.Define("state of a read", func(d *proctest.Daemon, a readArg) (string, error) {
		return packetStateOf(d, a.Socket).read(a.Method).state(a.State), nil
	})
	endRead = proctest.Define("end of a read", func(d *proctest.Daemon, a readArg) (got packetGot, err error) {
		s := packetStateOf(d, a.Socket)
		r := s.read(a.Method)
		if <-r.done; r.err != nil {
			return got, r.err
		}
		got.Text = string(r.b)
		if r.from != nil {
			got.From = r.from.String()
			s.mu.Lock()
			s.last = r.from
			s.mu.Unlock()
		}
		return got, nil
	})
	// answerLast answers the client of which something was read last.
	answerLast = proctest.Define("answer", func(d *proctest.Daemon, a answerArg) (proctest.None, error) {
		s := packetStateOf(d, a.Socket)
		s.mu.Lock()
		defer s.mu.Unlock()
		_, err := s.c.WriteTo([]byte(a.Text), s.last)
		return proctest.None{}, err
	})
	setPacketDeadline = proctest.Define("deadline for packets", func(d *proctest.Daemon, a deadlineArg) (proctest.None, error) {
		c := d.PacketConn(a.Socket)
		var at time.Time
		if a.In != 0 {
			at = time.Now().Add(a.In)
		}
		switch a.Of {
		case "read":
			return proctest.None{}, c.SetReadDeadline(at)
		case "write":
			return proctest.None{}, c.SetWriteDeadline(at)
		}
		return proctest.None{}, c.SetDeadline(at)
	})
	// peekPacket returns what is there to be read.
	peekPacket = proctest.Define("peek", func(d *proctest.Daemon, i int) (string, error) {
		raw, err := d.PacketConn(i).(syscall.Conn).SyscallConn()
		if err != nil {
			return "", err
		}
		b, n := make([]byte, 512), 0
		cerr := raw.Control(func(fd uintptr) {
			n, _, err = syscall.Recvfrom(int(fd), b, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		})
		return string(b[:max(n, 0)]), errors.Join(cerr, err)
	})
)

// A packetSock is the i-th socket of a process, as the test sees it.
type packetSock struct {
	p *proctest.Proc
	i int
}

func sock(p *proctest.Proc, i int) packetSock { return packetSock{p, i} }

// A packetClient is a client of a packetSock.
type packetClient struct {
	net.Conn
	t testing.TB
}

// dial returns a client, bound to a path of its own where there are paths.
func (s packetSock) dial() packetClient {
	s.p.T.Helper()
	c, err := socketAddr.On(s.p, s.i).Dial()
	if err != nil {
		s.p.T.Fatal(err)
	}
	s.p.T.Cleanup(func() { c.Close() })
	return packetClient{c, s.p.T}
}

// says sends a datagram.
func (c packetClient) says(text string) {
	c.t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		c.t.Fatal(err)
	}
}

// hears asserts that this is the next datagram that comes.
func (c packetClient) hears(text string) {
	c.t.Helper()
	b := make([]byte, 512)
	if err := c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
		c.t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != text {
		c.t.Fatalf("the client got %q, %v; want %q", b[:n], err, text)
	}
}

// begin begins a read, and returns its state.
func (s packetSock) begin(method string) string {
	s.p.T.Helper()
	return beginRead.On(s.p, readArg{s.i, method, ""})
}

// begins begins a read, which must come to this state.
func (s packetSock) begins(method, want string) {
	s.p.T.Helper()
	if got := s.begin(method); got != want {
		s.p.T.Fatalf("process %d: %s of socket %d, begun: it %s; want that it %s", s.p.PID, method, s.i, got, want)
	}
}

// comesTo asserts that the read comes to this state.
func (s packetSock) comesTo(method, want string) {
	s.p.T.Helper()
	if got := stateOfRead.On(s.p, readArg{s.i, method, want}); got != want {
		s.p.T.Fatalf("process %d: %s of socket %d: it %s; want that it %s", s.p.PID, method, s.i, got, want)
	}
}

// has asserts what the read has returned, and from whom.
func (s packetSock) has(method, text string, from packetClient) {
	s.p.T.Helper()
	want := packetGot{text, from.LocalAddr().String()}
	if method == "Read" {
		want.From = ""
	}
	if got := endRead.On(s.p, readArg{s.i, method, ""}); got != want {
		s.p.T.Fatalf("process %d: %s of socket %d: %q; want %q", s.p.PID, method, s.i, got, want)
	}
}

// fails asserts that the read has failed with this error.
func (s packetSock) fails(method, what string, target error) {
	s.p.T.Helper()
	if err := endRead.Err(s.p, readArg{s.i, method, ""}); !errors.Is(err, target) {
		s.p.T.Fatalf("process %d: %s: %v; want %v", s.p.PID, what, err, target)
	}
}

// holds asserts that this datagram is there, unread.
func (s packetSock) holds(text string) {
	s.p.T.Helper()
	if got := peekPacket.On(s.p, s.i); got != text {
		s.p.T.Fatalf("process %d: %q is in socket %d; want %q", s.p.PID, got, s.i, text)
	}
}

func (s packetSock) answer(text string) error {
	s.p.T.Helper()
	return answerLast.Err(s.p, answerArg{s.i, text})
}

func (s packetSock) answers(text string) {
	s.p.T.Helper()
	if err := s.answer(text); err != nil {
		s.p.T.Fatalf("process %d: WriteTo of socket %d: %v", s.p.PID, s.i, err)
	}
}

// setDeadline sets the deadline to read, to write or for both. "" is none.
func (s packetSock) setDeadline(of, in string) error {
	s.p.T.Helper()
	a := deadlineArg{Socket: s.i, Of: of}
	if in != "" {
		var err error
		if a.In, err = time.ParseDuration(in); err != nil {
			s.p.T.Fatal(err)
		}
	}
	return setPacketDeadline.Err(s.p, a)
}

func (s packetSock) deadline(of, in string) {
	s.p.T.Helper()
	if err := s.setDeadline(of, in); err != nil {
		s.p.T.Fatalf("process %d: the deadline of socket %d: %v", s.p.PID, s.i, err)
	}
}

func (s packetSock) close() {
	s.p.T.Helper()
	if err := s.p.Close(s.i); err != nil {
		s.p.T.Fatalf("process %d: Close of socket %d: %v", s.p.PID, s.i, err)
	}
}

// isClosed asserts that a further Close is an error.
func (s packetSock) isClosed() {
	s.p.T.Helper()
	proctest.Want(s.p.T, s.p.Close(s.i), net.ErrClosed)
}

// packetNetworks runs f for UDP and for Unix datagrams, with a new address for
// each socket.
func packetNetworks(t *testing.T, f func(t *testing.T, network string, address func() string)) {
	for _, network := range []string{"udp", "unixgram"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			n := 0
			f(t, network, func() string {
				if network == "udp" {
					return "127.0.0.1:0"
				}
				n++
				return fmt.Sprint("$DIR/packets", n)
			})
		})
	}
}

// methodsOf are the ways to read from a socket of this network.
func methodsOf(network string) []string {
	if network == "udp" {
		return slices.Sorted(maps.Keys(udpReaders))
	}
	return slices.Sorted(maps.Keys(unixgramReaders))
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
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		methods := methodsOf(network)
		plain := proctest.Spec{NoAccept: true} // with a socket for each method
		for range methods {
			plain = plain.And(network, address())
		}
		p := proctest.New(t, plain.Hold(proctest.AtListened)).Launch()
		p.At(proctest.AtListened)
		var clients []packetClient
		for i, method := range methods {
			client := sock(p, i).dial()
			clients = append(clients, client)
			client.says("first " + method)
			sock(p, i).begins(method, "waits")
			sock(p, i).holds("first " + method)
		}
		p.Resume()
		p.At(proctest.AtServing)
		for i, method := range methods {
			sock(p, i).has(method, "first "+method, clients[i])
			sock(p, i).begins(method, "reads")
		}
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtListened)
		for i, method := range methods {
			sock(s, i).begins(method, "waits")
			clients[i].says("second " + method)
			sock(p, i).has(method, "second "+method, clients[i])
			sock(s, i).comesTo(method, "waits")
			sock(p, i).begins(method, "reads")
		}
		s.Resume()
		a.OK()
		for i, method := range methods {
			sock(p, i).comesTo(method, "waits")
			sock(p, i).close()
			sock(p, i).fails(method, method+" that waited when the socket was closed", net.ErrClosed)
			clients[i].says("third " + method)
			sock(s, i).has(method, "third "+method, clients[i])
			sock(p, i).begins(method, "returned")
			sock(p, i).fails(method, method+" of a closed socket in a process that was replaced", net.ErrClosed)
		}
	})
}

// While nobody may read nobody does, writing goes on, and after an upgrade that
// fails every call that waited reads.
func TestPacketQuiet(t *testing.T) {
	t.Parallel()
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		methods := methodsOf(network)
		plain := proctest.Spec{NoAccept: true}
		for range methods {
			plain = plain.And(network, address())
		}
		handover := proctest.On(ecdysis.EventHandover)
		p := proctest.Start(t, plain.Hold(handover), plain)
		var clients []packetClient
		for i := range methods {
			client := sock(p, i).dial()
			clients = append(clients, client)
			client.says("hello")
			sock(p, i).begins("ReadFrom", "returned") // learns whom to answer
			sock(p, i).has("ReadFrom", "hello", client)
		}
		// An upgrade for each method, because the hook has five seconds.
		for i, method := range methods {
			if i%2 == 0 {
				sock(p, i).begins(method, "reads")
			}
			a := p.BeginUpgrade()
			s := a.Successor()
			p.AtAgain(handover, i)
			if i%2 == 0 { // in flight since before
				sock(p, i).comesTo(method, "waits")
				clients[i].says(method)
			} else {
				clients[i].says(method)
				sock(p, i).begins(method, "waits")
			}
			sock(p, i).answers("while quiet")
			clients[i].hears("while quiet")
			sock(p, i).comesTo(method, "waits")
			sock(p, i).holds(method)
			s.Kill()
			p.Resume()
			a.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
			sock(p, i).has(method, method, clients[i])
		}

		// The predecessor is past COMMIT, and the successor does not serve yet.
		p.Chain.Specs(plain.Hold(proctest.On(ecdysis.EventReady)))
		sock(p, 0).begins("ReadFrom", "reads")
		a := p.BeginUpgrade()
		s := a.Successor()
		p.AtAgain(handover, len(methods))
		p.Resume()
		s.At(proctest.On(ecdysis.EventReady))
		sock(s, 0).begins("ReadFrom", "waits")
		sock(p, 0).comesTo("ReadFrom", "waits")
		clients[0].says("last")
		sock(p, 0).answers("still there")
		clients[0].hears("still there")
		sock(p, 0).holds("last")
		sock(s, 0).comesTo("ReadFrom", "waits")
		s.Resume()
		a.OK()
		sock(s, 0).has("ReadFrom", "last", clients[0])
		sock(p, 0).comesTo("ReadFrom", "waits")
		sock(p, 0).close()
		sock(p, 0).fails("ReadFrom", "ReadFrom of the predecessor, after Close", net.ErrClosed)
	})
}

// A datagram that the predecessor has read is its own to answer, whenever.
func TestPacketLateAnswer(t *testing.T) {
	t.Parallel()
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		served := proctest.Spec{}.And(network, address())
		unserved := served
		unserved.NoAccept = true
		p := proctest.Start(t, unserved, served)
		c := sock(p, 0).dial()
		c.says("question")
		sock(p, 0).begins("ReadFrom", "returned")
		sock(p, 0).has("ReadFrom", "question", c)
		other := sock(p, 0).dial()
		s := p.Upgrade()
		s.Answers(other)

		sock(p, 0).answers("answer")
		c.hears("answer")
		for _, of := range []string{"both", "write", "read"} {
			for _, in := range []string{"", "1h", "-1h", "1h", ""} {
				sock(p, 0).deadline(of, in)
				if in == "-1h" && of != "write" {
					sock(p, 0).begins("ReadFrom", "returned")
					sock(p, 0).fails("ReadFrom", "ReadFrom after its deadline", os.ErrDeadlineExceeded)
				}
				if in == "-1h" && of != "read" {
					proctest.Want(t, sock(p, 0).answer("too late"), os.ErrDeadlineExceeded) // WriteTo after its deadline
					continue
				}
				sock(p, 0).answers(of + " " + in)
				c.hears(of + " " + in)
			}
		}
		sock(p, 0).close()
		sock(p, 0).isClosed()
		proctest.Want(t, sock(p, 0).answer("no more"), net.ErrClosed) // WriteTo after Close
		for _, of := range []string{"both", "write", "read"} {
			proctest.Want(t, sock(p, 0).setDeadline(of, "1h"), net.ErrClosed) // a deadline after Close
		}
		sock(p, 0).begins("ReadFrom", "returned")
		sock(p, 0).fails("ReadFrom", "ReadFrom after Close", net.ErrClosed)
		s.Answers(c)
		s.Answers(sock(s, 0).dial()) // a client that comes after it
	})
}

// The deadline is the caller's: before Ready, while serving, while quiet, and
// after an upgrade that fails.
func TestPacketDeadline(t *testing.T) {
	t.Parallel()
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		const a, b, c = 0, 1, 2
		plain := proctest.Spec{NoAccept: true}.And(network, address()).And(network, address()).And(network, address())
		handover := proctest.On(ecdysis.EventHandover)
		p := proctest.New(t, plain.Hold(proctest.AtListened).Hold(handover), plain).Launch()
		p.At(proctest.AtListened)
		late := func(what string, i int) {
			t.Helper()
			sock(p, i).fails("ReadFrom", what, os.ErrDeadlineExceeded)
		}
		clients := []packetClient{sock(p, a).dial(), sock(p, b).dial(), sock(p, c).dial()}
		clients[a].says("one")

		// Before Ready: set before the call, and while it waits.
		sock(p, a).deadline("read", "1ms")
		sock(p, a).begin("ReadFrom")
		late("before Ready", a)
		sock(p, a).deadline("both", "")
		sock(p, a).begins("ReadFrom", "waits")
		sock(p, a).deadline("read", "1h")
		sock(p, a).comesTo("ReadFrom", "waits")
		sock(p, a).deadline("both", "1ms")
		late("before Ready, set while it waits", a)
		sock(p, a).deadline("both", "1h")
		sock(p, a).begins("ReadFrom", "waits")
		// What has passed before Ready has passed after it.
		sock(p, b).deadline("read", "-1h")
		clients[b].says("two")
		p.Resume()
		p.At(proctest.AtServing)
		sock(p, a).has("ReadFrom", "one", clients[a])
		sock(p, b).begins("ReadFrom", "returned")
		late("passed before Ready", b)
		sock(p, b).deadline("read", "")
		sock(p, b).begins("ReadFrom", "returned")
		sock(p, b).has("ReadFrom", "two", clients[b])

		// While serving.
		sock(p, a).begins("ReadFrom", "reads")
		sock(p, a).deadline("read", "1ms")
		late("while serving", a)
		sock(p, a).deadline("both", "-1h")
		proctest.Want(t, sock(p, a).answer("x"), os.ErrDeadlineExceeded) // WriteTo after its deadline
		sock(p, a).deadline("write", "")
		sock(p, a).answers("in time")
		clients[a].hears("in time")

		// a: its deadline has passed before the upgrade.
		// b: it passes while this process is quiet.
		sock(p, b).begins("ReadFrom", "reads")
		attempt := p.BeginUpgrade()
		s := attempt.Successor()
		p.AtAgain(handover, 0)
		sock(p, b).comesTo("ReadFrom", "waits")
		clients[a].says("three")
		clients[b].says("four")
		sock(p, a).begins("ReadFrom", "returned")
		late("passed before the upgrade", a)
		sock(p, b).deadline("both", "1ms")
		late("set while quiet", b)
		s.Kill()
		p.Resume()
		attempt.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
		for i, text := range []string{"three", "four"} {
			sock(p, i).begins("ReadFrom", "returned")
			late("passed before the upgrade failed", i)
			sock(p, i).holds(text)
			sock(p, i).deadline("both", "")
			sock(p, i).begins("ReadFrom", "returned")
			sock(p, i).has("ReadFrom", text, clients[i])
		}

		// c: none, and one that was far away when it began. It has an upgrade of its
		// own, because the hook has five seconds.
		sock(p, c).begins("ReadFrom", "reads")
		clients[c].says("hello")
		sock(p, c).has("ReadFrom", "hello", clients[c])
		sock(p, c).begins("ReadFrom", "reads")
		sock(p, c).deadline("both", "1h")
		attempt = p.BeginUpgrade()
		s = attempt.Successor()
		p.AtAgain(handover, 1)
		sock(p, c).comesTo("ReadFrom", "waits")
		// Writing has the deadline at once, and is not in the package's.
		sock(p, c).deadline("both", "-1h")
		proctest.Want(t, sock(p, c).answer("x"), os.ErrDeadlineExceeded) // WriteTo after a deadline set while quiet
		late("set while quiet", c)
		sock(p, c).deadline("write", "")
		sock(p, c).deadline("read", "")
		sock(p, c).answers("while quiet")
		clients[c].hears("while quiet")
		sock(p, c).begins("ReadFrom", "waits")
		s.Kill()
		p.Resume()
		attempt.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
		sock(p, c).comesTo("ReadFrom", "reads")
		clients[c].says("five")
		sock(p, c).has("ReadFrom", "five", clients[c])

		// In flight, with an hour left, over an upgrade that fails: the
		// package's deadline is not seen, and the caller's is there again.
		sock(p, c).deadline("read", "1h")
		sock(p, c).begins("ReadFrom", "reads")
		p.Chain.Specs(plain.At(proctest.On(ecdysis.EventReady), proctest.Exit(1)))
		p.Resume()
		p.FailUpgrade(ecdysis.StepHandover, io.ErrUnexpectedEOF)
		sock(p, c).comesTo("ReadFrom", "reads")
		sock(p, c).deadline("read", "1ms")
		late("after an upgrade that failed", c)
	})
}

// Stop ends reading, removes the files that are ours, and leaves what can be
// answered to be answered.
func TestPacketStop(t *testing.T) {
	t.Parallel()
	spec := proctest.Spec{NoAccept: true}.And("udp", "127.0.0.1:0").And("unixgram", "$DIR/ours").And("unixgram", "$DIR/theirs").
		And("udp", "127.0.0.1:0").And("unixgram", "$DIR/kept")
	spec.Listen[3].Config.KeepOnStop, spec.Listen[4].Config.KeepOnStop = true, true
	for _, upgraded := range []bool{false, true} { // what a socket's setting and file mean is handed on
		p := proctest.Start(t, spec)
		c := p.Chain
		if upgraded {
			predecessor := p
			p = p.Upgrade()
			predecessor.Kill()
		}
		var clients []packetClient
		for i := range 5 {
			client := sock(p, i).dial()
			clients = append(clients, client)
			client.says("question")
			sock(p, i).begins("ReadFrom", "returned")
			sock(p, i).has("ReadFrom", "question", client)
			sock(p, i).begins("ReadFrom", "reads")
		}
		if err := os.Remove(c.Path("theirs")); err != nil {
			t.Fatal(err)
		}
		other, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: c.Path("theirs"), Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		p.Stop()
		p.AwaitExit()
		for i := range 3 {
			sock(p, i).comesTo("ReadFrom", "waits")
			sock(p, i).deadline("both", "-1h")
			sock(p, i).fails("ReadFrom", "ReadFrom that ran while the process was stopped", os.ErrDeadlineExceeded)
			sock(p, i).begins("Read", "returned")
			sock(p, i).fails("Read", "Read after Stop", os.ErrDeadlineExceeded)
			sock(p, i).deadline("both", "1h")
			sock(p, i).answers("answer")
			clients[i].hears("answer")
		}
		c.HasFiles("kept", "theirs")
		for i := 3; i < 5; i++ {
			sock(p, i).comesTo("ReadFrom", "reads")
			clients[i].says("are you well")
			sock(p, i).has("ReadFrom", "are you well", clients[i])
			sock(p, i).answers("I drain")
			clients[i].hears("I drain")
			sock(p, i).begins("ReadFrom", "reads")
		}
		for i := range 5 {
			sock(p, i).close()
			sock(p, i).isClosed()
			if i >= 3 {
				sock(p, i).fails("ReadFrom", "ReadFrom of a socket that was kept, after Close", net.ErrClosed)
			}
		}
		c.HasFiles("theirs")
		for _, i := range []int{0, 3} { // nothing holds the ports
			c, err := net.ListenPacket("udp", p.Addr(i).Address)
			if err != nil {
				t.Errorf("the port after Close: %v", err)
				continue
			}
			c.Close()
		}
	}
}

// What a datagram costs in memory is what it costs with net.
func TestPacketAllocs(t *testing.T) {
	t.Parallel()
	out, err := packetAllocs.Command().CombinedOutput()
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

// packetAllocs prints for some ways to read, each after a write, the
// allocations with the package and with net.
var packetAllocs = proctest.DefineRole("allocations for packets", func() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	p, err := u.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	n, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
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
					log.Fatal(err)
				}
				if err := way.read(c); err != nil {
					log.Fatal(err)
				}
			}))
		}
		fmt.Println()
	}
})
