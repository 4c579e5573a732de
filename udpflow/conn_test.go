package udpflow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// These tests have one process. addOlder makes the socket of an older process.
// upgrade_test.go has real older processes.

// udpConn has the methods that *net.UDPConn and *Conn have in common.
type udpConn interface {
	net.Conn
	net.PacketConn
	ReadFromUDP([]byte) (int, *net.UDPAddr, error)
	ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error)
	ReadMsgUDP(b, oob []byte) (n, oobn, flags int, from *net.UDPAddr, err error)
	ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, from netip.AddrPort, err error)
	WriteToUDP([]byte, *net.UDPAddr) (int, error)
	WriteToUDPAddrPort([]byte, netip.AddrPort) (int, error)
	WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error)
	WriteMsgUDPAddrPort(b, oob []byte, to netip.AddrPort) (n, oobn int, err error)
	SyscallConn() (syscall.RawConn, error)
}

var _, _ udpConn = (*net.UDPConn)(nil), (*Conn)(nil)

// A result has the results of a read method.
type result struct {
	n     int
	b     string
	oob   string
	flags int
	from  any
	err   error
}

func (r result) String() string {
	return fmt.Sprintf("%d bytes %.20q, control %x, flags %#x, from %T %v, %v", r.n, r.b, r.oob, r.flags, r.from, r.from, r.err)
}

// methods are the read methods, with buffers of these sizes.
var methods = map[string]func(c udpConn, size, oobSize int) result{
	"Read": func(c udpConn, size, _ int) (r result) {
		b := make([]byte, size)
		r.n, r.err = c.Read(b)
		r.b = string(b[:r.n])
		return r
	},
	"ReadFrom": func(c udpConn, size, _ int) (r result) {
		b := make([]byte, size)
		var from net.Addr
		r.n, from, r.err = c.ReadFrom(b)
		r.b, r.from = string(b[:r.n]), from
		return r
	},
	"ReadFromUDP": func(c udpConn, size, _ int) (r result) {
		b := make([]byte, size)
		var from *net.UDPAddr
		r.n, from, r.err = c.ReadFromUDP(b)
		r.b, r.from = string(b[:r.n]), from
		return r
	},
	"ReadFromUDPAddrPort": func(c udpConn, size, _ int) (r result) {
		b := make([]byte, size)
		r.n, r.from, r.err = c.ReadFromUDPAddrPort(b)
		r.b = string(b[:r.n])
		return r
	},
	"ReadMsgUDP": func(c udpConn, size, oobSize int) (r result) {
		b, oob := make([]byte, size), make([]byte, oobSize)
		var oobn int
		var from *net.UDPAddr
		r.n, oobn, r.flags, from, r.err = c.ReadMsgUDP(b, oob)
		r.b, r.oob, r.from = string(b[:r.n]), string(oob[:oobn]), from
		return r
	},
	"ReadMsgUDPAddrPort": func(c udpConn, size, oobSize int) (r result) {
		b, oob := make([]byte, size), make([]byte, oobSize)
		var oobn int
		r.n, oobn, r.flags, r.from, r.err = c.ReadMsgUDPAddrPort(b, oob)
		r.b, r.oob = string(b[:r.n]), string(oob[:oobn])
		return r
	},
}

// wantControl makes the system return control data with each packet of a socket.
func wantControl(t testing.TB, c udpConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
	})
}

// Each method returns what net's method returns, for a packet from the socket and
// for a packet from the inbox.
func TestReadMethods(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		plain, err := net.ListenPacket("udp", address)
		if err != nil {
			if strings.Contains(address, "::1") {
				t.Logf("no IPv6 here: %v", err)
				continue
			}
			t.Fatal(err)
		}
		defer plain.Close()
		c := listen(t, "udp", address, Config{})
		older := addOlder(t, c, 1)
		wantControl(t, plain.(*net.UDPConn))
		wantControl(t, c)
		at := address
		if at == ":0" { // the socket has the mapped address of this IPv4 client
			at = "127.0.0.1:0"
		}
		client, err := net.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		from := client.LocalAddr().(*net.UDPAddr).AddrPort()
		key, _ := from.MarshalBinary()
		send := func(to udpConn, b string) {
			t.Helper()
			a := to.LocalAddr().(*net.UDPAddr).AddrPort()
			if a.Addr().IsUnspecified() {
				a = netip.AddrPortFrom(from.Addr(), a.Port())
			}
			if _, err := client.(*net.UDPConn).WriteToUDPAddrPort([]byte(b), a); err != nil {
				t.Fatal(err)
			}
		}
		for name, read := range methods {
			for _, size := range []struct{ packet, buf, oob int }{{100, 200, 200}, {100, 100, 64}, {100, 50, 0}, {0, 100, 200}, {100, 200, 10}, {9000, 9000, 64}} {
				packet := strings.Repeat("x", size.packet)
				send(plain.(udpConn), packet)
				want := read(plain.(udpConn), size.buf, size.oob)
				c.Claim(key)
				send(c, packet)
				if got := read(c, size.buf, size.oob); got.String() != want.String() {
					t.Errorf("%s at %s, %+v: %v; want %v", name, address, size, got, want)
				}
				// Forwarded, as ReadMsgUDP has received it. Another flow's packet
				// ends the call that forwards.
				older.Claim(key)
				send(c, packet)
				end := dial(t, c)
				if _, err := end.Write([]byte("end")); err != nil {
					t.Fatal(err)
				}
				if got := methods["ReadMsgUDP"](c, size.buf, size.oob); got.b != "end" {
					t.Fatalf("the older process's packet was returned: %v", got)
				}
				if got := read(older, size.buf, size.oob); got.String() != want.String() {
					t.Errorf("%s at %s, %+v, forwarded: %v; want %v", name, address, size, got, want)
				}
			}
		}
	}
}

type xnetMessage struct {
	Buffers [][]byte
	OOB     []byte
	Addr    net.Addr
	N       int
	NN      int
	Flags   int
}

// A batch of packets of this process and of older ones is sorted correctly.
func TestReadBatch(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	older := []*Conn{addOlder(t, c, 1), addOlder(t, c, 2)}
	wantControl(t, c)
	clients := []net.Conn{dial(t, c), dial(t, c), dial(t, c)}
	older[0].Claim(keyOf(clients[1]))
	older[1].Claim(keyOf(clients[2]))
	const rounds = 100
	var sent [3][]string
	next := 0
	for i := range rounds {
		b := fmt.Sprint(i, strings.Repeat("-", i))
		if _, err := clients[i*i%3].Write([]byte(b)); err != nil {
			t.Fatal(err)
		}
		sent[i*i%3] = append(sent[i*i%3], b)
		if _, err := clients[i%2*2].Write([]byte(b)); err != nil {
			t.Fatal(err)
		}
		sent[i%2*2] = append(sent[i%2*2], b)
		next += 2
	}
	for i, conn := range append([]*Conn{c}, older...) {
		b := BatchConn[xnetMessage]{conn}
		ms := make([]xnetMessage, 7)
		for j := range ms { // a packet may be in two buffers
			ms[j] = xnetMessage{Buffers: [][]byte{make([]byte, 1+j), make([]byte, 5), make([]byte, 300)}, OOB: make([]byte, 100)}
		}
		var got []string
		for len(got) < len(sent[i]) {
			n, err := b.ReadBatch(ms, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range ms[:n] {
				all := bytes.Join(m.Buffers, nil)[:m.N]
				got = append(got, string(all))
				if m.Addr.String() != clients[i].LocalAddr().String() || m.NN == 0 || m.Flags != 0 {
					t.Fatalf("from %v, %d bytes of control data, flags %#x; want %v and control data", m.Addr, m.NN, m.Flags, clients[i].LocalAddr())
				}
			}
			// More to come for those whose packets were all before it.
			if i == 0 && len(got) == len(sent[0]) {
				if _, err := clients[0].Write([]byte("end")); err != nil {
					t.Fatal(err)
				}
				if n, err := b.ReadBatch(ms, 0); n != 1 || err != nil {
					t.Fatalf("%d, %v; want the last packet", n, err)
				}
			}
		}
		if !slices.Equal(got, sent[i]) {
			t.Errorf("client %d: got %q; want %q", i, got, sent[i])
		}
	}
	if _, err := (BatchConn[xnetMessage]{c}).ReadBatch(make([]xnetMessage, 1), unix.MSG_PEEK); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("with flags: %v; want errors.ErrUnsupported", err)
	}
	if s := c.Stats(); s.Own != uint64(len(sent[0]))+1 || s.Forwarded != uint64(len(sent[1])+len(sent[2])) || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}

// Control data of up to 128 bytes is forwarded. Longer control data is cut, and
// the flags say so.
func TestControlForwarded(t *testing.T) {
	one := unix.UnixRights(1)
	for n := range 20 {
		m := &message{from: netip.MustParseAddrPort("127.0.0.1:1"), control: bytes.Repeat(one, n), n: 3}
		all := m.control
		b := append(append(recordBytes(m), m.control...), "abc"...)
		got, x := &message{oob: make([]byte, 200), bufs: [][]byte{make([]byte, 10)}}, &message{}
		if rest, ok := x.decode(b); !ok || len(rest) != 0 {
			t.Fatalf("%d bytes are left, %v", len(rest), ok)
		}
		got.take(x)
		want := min(n, 128/len(one)) * len(one)
		if string(got.oob[:got.oobn]) != string(all[:want]) || (got.flags&unix.MSG_CTRUNC != 0) != (len(all) > 128) || string(got.bufs[0][:got.n]) != "abc" {
			t.Errorf("%d bytes: %d, flags %#x; want %d", len(all), got.oobn, got.flags, want)
		}
	}
}

// FuzzRecord decodes what another process may have sent.
func FuzzRecord(f *testing.F) {
	m := &message{from: netip.MustParseAddrPort("[2001:db8::1]:1"), control: unix.UnixRights(1), n: 3}
	f.Add(append(append(recordBytes(m), m.control...), "abc"...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		left := len(b)
		for b, ok := b, true; ok; {
			var x message
			if b, ok = x.decode(b); !ok {
				return
			}
			if used := recordSize + len(x.control) + x.n; left-len(b) != used || x.n != len(x.first()) {
				t.Fatalf("%d bytes for a record of %d", left-len(b), used)
			}
			left = len(b)
			got := &message{oob: make([]byte, 50), bufs: [][]byte{make([]byte, 7), make([]byte, 9)}}
			got.take(&x)
		}
	})
}

// mustRead returns the next packet of c.
func mustRead(t testing.TB, c udpConn) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func mustWrite(t testing.TB, c net.Conn, b string) {
	t.Helper()
	if _, err := c.Write([]byte(b)); err != nil {
		t.Fatal(err)
	}
}

// The deadline and Close end each read method.
func TestDeadlineAndClose(t *testing.T) {
	for _, source := range []string{"socket", "inbox"} {
		for name, read := range methods {
			c := listen(t, "udp", "127.0.0.1:0", Config{})
			if source == "inbox" {
				c.handOver()
			}
			ended := func(want error, do func()) {
				t.Helper()
				done := make(chan result)
				for range 3 { // several readers
					go func() { done <- read(c, 10, 10) }()
				}
				do()
				for range 3 {
					r := <-done
					var op *net.OpError
					if !errors.Is(r.err, want) || !errors.As(r.err, &op) || op.Op != "read" || op.Net != "udp" {
						t.Errorf("%s from the %s: %v; want a net.OpError of %v", name, source, r.err, want)
					}
				}
			}
			soon := func() {
				if err := c.SetReadDeadline(time.Now().Add(5 * time.Millisecond)); err != nil {
					t.Error(err)
				}
			}
			ended(os.ErrDeadlineExceeded, soon)
			if err := c.SetDeadline(time.Time{}); err != nil {
				t.Error(err)
			}
			ended(os.ErrDeadlineExceeded, soon)
			if err := c.SetReadDeadline(time.Time{}); err != nil {
				t.Error(err)
			}
			ended(net.ErrClosed, func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
			ended(net.ErrClosed, func() {})
			for what, err := range map[string]error{"Close": c.Close(), "SetReadDeadline": c.SetReadDeadline(time.Now()), "SetDeadline": c.SetDeadline(time.Now()), "Drained": c.Drained(context.Background())} {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s after Close: %v; want net.ErrClosed", what, err)
				}
			}
			c.Claim([]byte("must not touch what is unmapped"))
		}
	}
}

// Readers change to the inbox and back. They empty the inbox before they read the
// socket again.
func TestHandOverAndResume(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	client := dial(t, c)
	for i := range 50 {
		mustWrite(t, client, "served")
		if got := mustRead(t, c); got != "served" {
			t.Fatal(got)
		}
		c.handOver()
		inject(t, c, "forwarded 1")
		mustWrite(t, client, "in the socket")
		inject(t, c, "forwarded 2")
		inject(t, c, "forwarded 3")
		if got := mustRead(t, c); got != "forwarded 1" {
			t.Fatal(got)
		}
		// Some of the other packets may be in the stash, which makes no difference.
		c.resume()
		for _, want := range []string{"forwarded 2", "forwarded 3", "in the socket"} {
			if got := mustRead(t, c); got != want {
				t.Fatalf("round %d: %q; want %q", i, got, want)
			}
		}

		// Readers that wait change from the socket to the inbox and back, too.
		got := make(chan string, 3)
		for range 3 {
			go func() {
				b := make([]byte, 100)
				n, err := c.Read(b)
				got <- fmt.Sprint(string(b[:n]), err)
			}()
		}
		next := func(want string) {
			t.Helper()
			select {
			case s := <-got:
				if s != want+"<nil>" {
					t.Fatalf("round %d: %q; want %q", i, s, want)
				}
			case <-time.After(proctest.Patience):
				t.Fatalf("round %d: no reader has got %q", i, want)
			}
		}
		if i%2 == 0 {
			mustWrite(t, client, "to one of them")
			next("to one of them")
		}
		c.handOver()
		inject(t, c, "to another")
		next("to another")
		c.resume()
		mustWrite(t, client, "to the last")
		next("to the last")
		if i%2 != 0 {
			mustWrite(t, client, "to one of them")
			next("to one of them")
		}
	}
}

// A deadline applies to the socket and to the inbox.
func TestDeadlineAcrossHandover(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	for range 20 {
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() {
			_, err := c.Read(make([]byte, 10))
			done <- err
		}()
		for range 3 {
			c.handOver()
			c.resume()
		}
		c.handOver()
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		c.resume()
		if _, err := c.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
}

// inject puts a packet into c's inbox, as a successor does.
func inject(t testing.TB, c *Conn, text string) {
	t.Helper()
	u, err := testUpgrader()
	if err != nil {
		t.Fatal(err)
	}
	w, err := u.File(c.self.name)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := u.AddFile(c.self.name, w); err != nil {
		t.Fatal(err)
	}
	m := &message{from: netip.MustParseAddrPort("127.0.0.1:9"), n: len(text)}
	if _, err := w.Write(append(recordBytes(m), text...)); err != nil {
		t.Fatal(err)
	}
}

func TestFlowsStay(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{IdleTimeout: time.Hour})
	client := dial(t, c)
	mustWrite(t, client, "first")
	mustRead(t, c)
	hash := c.g.table.hash(keyOf(client))
	s, state := c.g.table.find(hash, c.g.clock.now())
	if s == nil || ownerOf(state) != c.self.owner {
		t.Fatal("a flow that has begun is not in the table")
	}
	// A flow whose process has ended is taken over with its next packet.
	older := addOlder(t, c, 1)
	older.Claim(keyOf(client))
	older.inbox.Close()
	mustWrite(t, client, "second")
	if got := mustRead(t, c); got != "second" {
		t.Fatal(got)
	}
	if _, state := c.g.table.find(hash, c.g.clock.now()); ownerOf(state) != c.self.owner {
		t.Error("the flow of a process that has ended still belongs to it")
	}
	// So is a flow whose owner is unknown.
	other := dial(t, c)
	c.g.table.claim(c.g.table.hash(keyOf(other)), 12345, c.g.clock.now(), c.g.clock.now()+1e6)
	mustWrite(t, other, "third")
	if got := mustRead(t, c); got != "third" {
		t.Fatal(got)
	}
	if s := c.Stats(); s != (Stats{Own: 3, TakenOver: 2}) {
		t.Errorf("%+v", s)
	}
}

// A socket forgets what it remembers of a client when the flow changes its owner
// or expires.
func TestRememberedFlow(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{IdleTimeout: time.Hour})
	older := addOlder(t, c, 1)
	client := dial(t, c)
	for range 3 {
		for range 3 {
			mustWrite(t, client, "own")
			mustRead(t, c)
		}
		older.Claim(keyOf(client))
		mustWrite(t, client, "the older one's")
		other := dial(t, c)
		mustWrite(t, other, "own") // ends the read that forwards
		mustRead(t, c)
		if got := mustRead(t, older); got != "the older one's" {
			t.Fatalf("the older socket got %q", got)
		}
		c.Claim(keyOf(client))
	}

	c = listen(t, "udp", "127.0.0.1:0", Config{IdleTimeout: 400 * time.Millisecond})
	client = dial(t, c)
	expiry := func() uint64 {
		_, state := c.g.table.find(c.g.table.hash(keyOf(client)), c.g.clock.now())
		return expiryOf(state)
	}
	mustWrite(t, client, "first")
	mustRead(t, c)
	for range 2 {
		for first, end := expiry(), time.Now().Add(proctest.Patience); expiry() == first; {
			mustWrite(t, client, "again")
			mustRead(t, c)
			if time.Now().After(end) {
				t.Fatal("the flow of a client that is remembered is not refreshed")
			}
		}
	}
}

// A process that does not read loses the packets for which its inbox has no room.
// Other processes are not affected.
func TestInboxFull(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{Buffer: 16 << 10})
	older := addOlder(t, c, 1)
	slow, own := dial(t, c), dial(t, c)
	older.Claim(keyOf(slow))
	const packets = 500
	for i := range packets {
		mustWrite(t, slow, fmt.Sprint(i))
		if i%10 == 0 {
			mustWrite(t, own, "own")
			if got := mustRead(t, c); got != "own" {
				t.Fatal(got)
			}
		}
	}
	mustWrite(t, own, "end")
	mustRead(t, c)
	s := c.Stats()
	if s.Dropped == 0 || s.Forwarded == 0 || s.Forwarded+s.Dropped != packets {
		t.Fatalf("%+v; want that %d were forwarded or dropped", s, packets)
	}
	last := -1
	for range s.Forwarded {
		var n int
		if _, err := fmt.Sscan(mustRead(t, older), &n); err != nil || n <= last {
			t.Fatalf("packet %d after %d, %v", n, last, err)
		}
		last = n
	}
	if r := older.Stats().Received; r != s.Forwarded {
		t.Errorf("%d received; %d forwarded", r, s.Forwarded)
	}
}

// Several goroutines read at once. Each packet is returned by one process, once.
func TestSeveralReaders(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	older := addOlder(t, c, 1)
	const clients, packets = 20, 100
	var mu sync.Mutex
	seen := map[string]int{}
	var wg sync.WaitGroup
	for _, conn := range []*Conn{c, older} {
		for range 4 {
			wg.Go(func() {
				b := make([]byte, 100)
				for {
					n, err := conn.Read(b)
					if err != nil {
						if !errors.Is(err, os.ErrDeadlineExceeded) {
							t.Error(err)
						}
						return
					}
					text := string(b[:n])
					mu.Lock()
					seen[text]++
					if strings.HasPrefix(text, "old") != (conn == older) {
						t.Errorf("%q was returned by the wrong process", text)
					}
					mu.Unlock()
				}
			})
		}
	}
	var senders sync.WaitGroup
	for i := range clients {
		client := dial(t, c)
		name := "new"
		if i%2 == 0 {
			older.Claim(keyOf(client))
			name = "old"
		}
		senders.Go(func() {
			for j := range packets {
				mustWrite(t, client, fmt.Sprint(name, " ", i, " ", j))
				for { // at most 100 packets are on their way, for which the socket has room
					mu.Lock()
					n := seen[fmt.Sprint(name, " ", i, " ", j-5)]
					mu.Unlock()
					if j < 5 || n > 0 || t.Failed() {
						break
					}
					time.Sleep(100 * time.Microsecond)
				}
			}
		})
	}
	senders.Wait()
	limit := time.Now().Add(proctest.Patience)
	for {
		mu.Lock()
		n := len(seen)
		mu.Unlock()
		if n == clients*packets || time.Now().After(limit) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	_ = c.SetReadDeadline(past)
	_ = older.inbox.SetReadDeadline(past)
	older.mu.Lock()
	older.deadline = past
	older.mu.Unlock()
	wg.Wait()
	if len(seen) != clients*packets {
		t.Errorf("%d packets have come; want %d", len(seen), clients*packets)
	}
	for text, n := range seen {
		if n != 1 {
			t.Errorf("%q has come %d times", text, n)
		}
	}
}

func TestExpiry(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{IdleTimeout: 80 * time.Millisecond})
	older := addOlder(t, c, 1)
	client := dial(t, c)
	older.Claim(keyOf(client))
	begun := time.Now()
	if err := older.Drained(context.Background()); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begun); d < 80*time.Millisecond {
		t.Errorf("the flow expired after %v; want 80 ms", d)
	}
	mustWrite(t, client, "hello") // now goes to the newest process
	if got := mustRead(t, c); got != "hello" {
		t.Fatal(got)
	}
	if s := c.Stats(); s != (Stats{Own: 1}) {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	reason := errors.New("no time")
	c.Claim([]byte("a flow"))
	cancel(reason)
	if err := c.Drained(ctx); !errors.Is(err, reason) {
		t.Errorf("Drained: %v; want %v", err, reason)
	}
	if err := c.Drained(context.Background()); err != nil {
		t.Error(err)
	}
}

// A packet that the program writes to a flow's address keeps the flow.
func TestWritesKeepFlows(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{IdleTimeout: time.Hour})
	client := dial(t, c)
	to := client.LocalAddr().(*net.UDPAddr)
	hash := c.g.table.hash(keyOf(client))
	expiry := func() int64 {
		s, state := c.g.table.find(hash, c.g.clock.now())
		if s == nil {
			return 0
		}
		return int64(expiryOf(state) - c.g.clock.now())
	}
	for name, write := range map[string]func() error{
		"WriteTo":             func() error { _, err := c.WriteTo([]byte("x"), to); return err },
		"WriteToUDP":          func() error { _, err := c.WriteToUDP([]byte("x"), to); return err },
		"WriteToUDPAddrPort":  func() error { _, err := c.WriteToUDPAddrPort([]byte("x"), to.AddrPort()); return err },
		"WriteMsgUDP":         func() error { _, _, err := c.WriteMsgUDP([]byte("x"), nil, to); return err },
		"WriteMsgUDPAddrPort": func() error { _, _, err := c.WriteMsgUDPAddrPort([]byte("x"), nil, to.AddrPort()); return err },
	} {
		if s, _ := c.g.table.find(hash, c.g.clock.now()); s != nil {
			s.state.Store(0)
		}
		if err := write(); err != nil {
			t.Fatal(err)
		}
		if got := expiry(); got != 0 {
			t.Errorf("%s has made a flow", name)
		}
		now := c.g.clock.now()
		c.g.table.open(hash, c.self.owner, now, now+uint64(time.Minute/time.Millisecond))
		if err := write(); err != nil {
			t.Fatal(err)
		}
		if got := expiry(); got < time.Hour.Milliseconds()-time.Minute.Milliseconds() {
			t.Errorf("after %s the flow has %d ms left; want an hour", name, got)
		}
	}
	// With another key it does not, because an address does not tell the key.
	d := listen(t, "udp", "127.0.0.1:0", Config{Key: func(b []byte, _ netip.AddrPort) []byte { return b }})
	if _, err := d.WriteTo([]byte("x"), to); err != nil {
		t.Error(err)
	}
}

func TestTableFull(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{MaxFlows: 1, Key: func(b []byte, _ netip.AddrPort) []byte {
		if len(b) > 4 {
			return nil
		}
		return b
	}})
	client := dial(t, c)
	for i := range uint32(100) {
		mustWrite(t, client, string(binary.BigEndian.AppendUint32(nil, i)))
		mustRead(t, c)
	}
	mustWrite(t, client, "no flow")
	mustRead(t, c)
	s := c.Stats()
	if s.Own != 101 || s.Untracked == 0 || s.Untracked >= 100 {
		t.Errorf("%+v; want all packets, and some untracked", s)
	}
}

// A packet names its generation modulo 256.
func TestGeneration(t *testing.T) {
	config := Config{
		Generation: func(b []byte) (byte, bool) {
			if len(b) == 0 {
				return 0, false
			}
			return b[0], b[0] != 'k'
		},
		Key:         func(b []byte, _ netip.AddrPort) []byte { return []byte("one key") },
		IdleTimeout: 50 * time.Millisecond,
	}
	c := listen(t, "udp", "127.0.0.1:0", config)
	for _, generation := range []int{5, 256, 300, 100000} {
		c.self.generation = generation
		older := map[int]*Conn{}
		for _, back := range []int{1, 2, 200, 255} {
			if back <= generation {
				older[back] = addOlder(t, c, back)
			}
		}
		ended := addOlder(t, c, 3)
		ended.inbox.Close()
		client := dial(t, c)
		named := func(back int) string {
			return string([]byte{byte(generation - back)}) + " of " + fmt.Sprint(generation)
		}
		for back, conn := range older {
			mustWrite(t, client, named(back))
			mustWrite(t, client, named(0))
			if got := mustRead(t, c); got != named(0) {
				t.Fatalf("generation %d: %q; want its own", generation, got)
			}
			if got := mustRead(t, conn); got != named(back) {
				t.Fatalf("%d before generation %d: %q", back, generation, got)
			}
			if conn.named.Load() == 0 {
				t.Error("it is not noted that the generation was named")
			}
		}
		for range 2 {
			mustWrite(t, client, named(3)) // a process that has ended
			if got := mustRead(t, c); got != named(3) {
				t.Fatalf("%q", got)
			}
		}
		mustWrite(t, client, named(77)) // a process that has never existed
		mustRead(t, c)
		mustWrite(t, client, "k")
		mustRead(t, c)
		if err := c.Drained(context.Background()); err != nil {
			t.Error(err)
		}
		for _, conn := range older {
			if err := conn.Drained(context.Background()); err != nil {
				t.Error(err)
			}
			conn.inbox.Close()
		}
		c.g.peers.Store(newPeers([]*peer{c.self}))
	}
}

// Claim makes a flow this process's.
func TestClaim(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{Key: func(b []byte, _ netip.AddrPort) []byte { return b[:min(1, len(b))] }})
	older := addOlder(t, c, 1)
	client := dial(t, c)
	older.Claim([]byte("a"))
	c.Claim([]byte("b"))
	older.Claim([]byte("b"))
	c.Claim([]byte("c"))
	for _, s := range []string{"a1", "b1", "c1"} {
		mustWrite(t, client, s)
	}
	if got := mustRead(t, c); got != "c1" {
		t.Errorf("%q; want c1", got)
	}
	for _, want := range []string{"a1", "b1"} {
		if got := mustRead(t, older); got != want {
			t.Errorf("%q; want %q", got, want)
		}
	}
}

func TestSyscallConn(t *testing.T) {
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	called := 0
	f := func(uintptr) bool { called++; return true }
	if err := raw.Read(f); !errors.Is(err, errors.ErrUnsupported) || called != 0 {
		t.Errorf("Read: %v, called %d times; want errors.ErrUnsupported", err, called)
	}
	if err := raw.Write(f); err != nil || called != 1 {
		t.Errorf("Write: %v, called %d times", err, called)
	}
	if err := raw.Control(func(uintptr) { called++ }); err != nil || called != 2 {
		t.Errorf("Control: %v, called %d times", err, called)
	}
}

func TestListenErrors(t *testing.T) {
	u, err := testUpgrader()
	if err != nil {
		t.Fatal(err)
	}
	key := func(b []byte, from netip.AddrPort) []byte { return b }
	c := listen(t, "udp", "127.0.0.1:0", Config{Key: key})
	for _, tt := range []struct {
		network, address string
		config           Config
		want             string
	}{
		{"tcp", "127.0.0.1:0", Config{}, "tcp"},
		{"udp", "127.0.0.1:0", Config{IdleTimeout: -1}, "IdleTimeout is -1ns"},
		{"udp", "127.0.0.1:0", Config{MaxFlows: -1}, "MaxFlows is -1"},
		{"udp", "127.0.0.1:0", Config{MaxFlows: 1 << 30}, "MaxFlows"},
		{"udp", "127.0.0.1:0", Config{Buffer: -1}, "Buffer is -1"},
		{"unixgram", t.TempDir() + "/s", Config{}, "UDP"},
		{"udp", c.LocalAddr().String(), Config{}, "address already in use"},
	} {
		if c, err := ListenPacket(u, tt.network, tt.address, tt.config); err == nil || !strings.HasPrefix(err.Error(), "udpflow: listen ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s %s %+v: %v, %v; want an error with %q", tt.network, tt.address, tt.config, c, err, tt.want)
		}
	}
	process.setUp.Store(false)
	_, err = ListenPacket(u, "udp", "127.0.0.1:0", Config{})
	process.setUp.Store(true)
	if err == nil || !strings.Contains(err.Error(), "Setup was not called") {
		t.Errorf("without Setup: %v", err)
	}
}

// The fingerprints distinguish functions by their results.
func TestPrints(t *testing.T) {
	a := Config{Key: func(b []byte, from netip.AddrPort) []byte { return b[:min(3, len(b))] }}
	b := Config{Key: func(b []byte, from netip.AddrPort) []byte { return bytes.Clone(b[:min(3, len(b))]) }}
	if a.prints() != b.prints() {
		t.Error("two functions with the same results are not the same")
	}
	var none prints
	all := map[prints]string{none: "none"}
	for name, c := range map[string]Config{
		"3 bytes": a,
		"4 bytes": {Key: func(b []byte, from netip.AddrPort) []byte { return b[:min(4, len(b))] }},
		"port":    {Key: func(b []byte, from netip.AddrPort) []byte { return []byte{byte(from.Port())} }},
		"address": {Key: func(b []byte, from netip.AddrPort) []byte { return from.Addr().AsSlice() }},
		"nil if one bit is set": {Key: func(b []byte, from netip.AddrPort) []byte {
			if len(b) > 7 && b[0]&0x80 != 0 && b[5]&1 != 0 {
				return nil
			}
			return b[:min(3, len(b))]
		}},
		"generation 0": {Generation: func(b []byte) (byte, bool) { return 0, true }},
		"first byte":   {Generation: func(b []byte) (byte, bool) { return append(b, 0)[0], len(b) > 0 }},
		"second byte":  {Generation: func(b []byte) (byte, bool) { return append(b, 0, 0)[1], len(b) > 1 }},
	} {
		p := c.prints()
		if other, ok := all[p]; ok {
			t.Errorf("%q is not told from %q", name, other)
		}
		all[p] = name
	}
}

func TestAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector makes sync.Pool drop what it holds")
	}
	c := listen(t, "udp", "127.0.0.1:0", Config{})
	older := addOlder(t, c, 1)
	own, other := dial(t, c), dial(t, c)
	older.Claim(keyOf(other))
	packet, b, oob := make([]byte, 100), make([]byte, 200), make([]byte, 100)
	wantControl(t, c)
	n := testing.AllocsPerRun(1000, func() {
		_, _ = other.Write(packet)
		_, _ = own.Write(packet)
		if _, _, err := c.ReadFromUDPAddrPort(b); err != nil {
			t.Fatal(err)
		}
		if _, _, _, _, err := older.ReadMsgUDPAddrPort(b, oob); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations for an own packet and a forwarded one; want none", n)
	}
}

// The table and the inboxes are closed with the last socket of an address.
func TestWithdrawn(t *testing.T) {
	u, err := testUpgrader()
	if err != nil {
		t.Fatal(err)
	}
	lc := ecdysis.ListenConfig{ReusePort: true}
	a := listen(t, "udp", "127.0.0.1:0", Config{Listen: lc})
	address := a.LocalAddr().String()
	b := listen(t, "udp", address, Config{Listen: lc})
	if a.g != b.g {
		t.Fatal("two sockets of one address have two tables")
	}
	if _, err := ListenPacket(u, "udp", address, Config{Listen: lc, Key: func(b []byte, _ netip.AddrPort) []byte { return b }}); err == nil || !strings.Contains(err.Error(), "Config.Key") {
		t.Errorf("a second socket with another Key: %v", err)
	}
	names := func(want int) {
		t.Helper()
		if got := u.FileNames("udpflow " + address + " "); len(got) != want {
			t.Errorf("%q is handed on; want %d files", got, want)
		}
	}
	names(3)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	names(2)
	b.Claim([]byte("it is still there"))
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	names(0)
	if n := len(process.groups); process.groups[address] != nil {
		t.Errorf("the group is left, one of %d", n)
	}
}
