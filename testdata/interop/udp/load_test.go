package udp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
	"golang.org/x/net/ipv4"
)

// A session begins with a packet that has no cookie. Its process answers with
// one, which it alone knows, and expects it in all further packets, whose
// numbers must rise by one. Each answer repeats the number and the cookie, and
// says which process gives it.
//
//	packet: number 8, cookie 8
//	answer: number 8, cookie 8, process ID 8, verdict 1
const (
	packetSize = 16
	answerSize = 25

	good      = 0
	unknown   = 1 // this process has no session with that cookie
	reordered = 2
	missing   = 3
)

// sessions are those of a process.
type sessions struct {
	mu sync.Mutex
	m  map[netip.AddrPort]*session
}

type session struct{ cookie, last uint64 }

// answer writes the answer to a packet to b.
func (s *sessions) answer(packet []byte, from netip.AddrPort, b []byte) []byte {
	if len(packet) != packetSize {
		return nil
	}
	number, cookie := binary.BigEndian.Uint64(packet), binary.BigEndian.Uint64(packet[8:])
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.m[from]
	verdict := byte(good)
	switch {
	case cookie == 0:
		x = &session{cookie: rand.Uint64() | 1, last: number}
		s.m[from] = x
	case x == nil || x.cookie != cookie:
		verdict = unknown
		x = &session{}
	case number <= x.last:
		verdict = reordered
	default:
		if number != x.last+1 {
			verdict = missing
		}
		x.last = number
	}
	b = binary.BigEndian.AppendUint64(b[:0], number)
	b = binary.BigEndian.AppendUint64(b, x.cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(os.Getpid()))
	return append(b, verdict)
}

// serveSessions is planned for AtNew. It serves until the process ends.
var serveSessions = proctest.Define("serve sessions", func(d *proctest.Daemon, how string) (proctest.None, error) {
	s := &sessions{m: map[netip.AddrPort]*session{}}
	if how == "plain" {
		c, err := d.U.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			d.Fatal(d.U.Fail(err))
		}
		d.Keep(c)
		go serveSingle(s, c.(singleConn))
		return proctest.None{}, nil
	}
	c := listen(d, udpflow.Config{})
	if how == "batches" {
		go serveBatches(s, c)
	} else {
		go serveSingle(s, c)
	}
	return proctest.None{}, nil
})

type singleConn interface {
	ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort([]byte, netip.AddrPort) (int, error)
}

func serveSingle(s *sessions, c singleConn) {
	b, out := make([]byte, 1500), make([]byte, answerSize)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			panic(err)
		}
		if a := s.answer(b[:n], from, out); a != nil {
			_, _ = c.WriteToUDPAddrPort(a, from)
		}
	}
}

func serveBatches(s *sessions, c *udpflow.Conn) {
	in, out := udpflow.BatchConn[ipv4.Message]{Conn: c}, ipv4.NewPacketConn(c)
	ms := make([]ipv4.Message, 32)
	for i := range ms {
		ms[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 1500)}, OOB: make([]byte, 128)}
	}
	for {
		n, err := in.ReadBatch(ms, 0)
		if err != nil {
			panic(err)
		}
		var answers []ipv4.Message
		for _, m := range ms[:n] {
			if a := s.answer(m.Buffers[0][:m.N], m.Addr.(*net.UDPAddr).AddrPort(), make([]byte, answerSize)); a != nil {
				answers = append(answers, ipv4.Message{Buffers: [][]byte{a}, Addr: m.Addr})
			}
		}
		for len(answers) > 0 {
			n, err := out.WriteBatch(answers, 0)
			if err != nil {
				panic(err)
			}
			answers = answers[n:]
		}
	}
}

// A load is clients with a session each.
type load struct {
	t    testing.TB
	to   string
	stop atomic.Bool
	wg   sync.WaitGroup

	answered, sessions, lost, moved, misplaced, outOfOrder atomic.Int64

	mu    sync.Mutex
	first string // what went wrong first
}

func (l *load) wrong(n *atomic.Int64, format string, args ...any) {
	n.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == "" {
		l.first = fmt.Sprintf(format, args...)
	}
}

// client has sessions of so many packets, one after the other; 0 is one session
// to the end.
func (l *load) client(packets uint64) {
	for !l.stop.Load() {
		l.session(packets)
	}
}

// session keeps two packets on the way.
func (l *load) session(packets uint64) {
	c, err := net.Dial("udp", l.to)
	if err != nil {
		l.t.Error(err)
		l.stop.Store(true)
		return
	}
	defer c.Close()
	l.sessions.Add(1)
	var cookie, pid, sent, got uint64
	b := make([]byte, 100)
	send := func() {
		sent++
		p := binary.BigEndian.AppendUint64(b[:0], sent)
		if _, err := c.Write(binary.BigEndian.AppendUint64(p, cookie)); err != nil {
			l.t.Error(err)
			l.stop.Store(true)
		}
	}
	send()
	for !l.stop.Load() || got < sent {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := c.Read(b)
		if err != nil || n != answerSize {
			l.wrong(&l.lost, "no answer to packet %d or %d: %v", got+1, sent, err)
			return
		}
		number, cookie1, pid1, verdict := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), b[24]
		if got == 0 {
			cookie, pid = cookie1, pid1
		}
		got++
		switch {
		case verdict == unknown:
			l.wrong(&l.moved, "packet %d: process %d does not know the session that process %d has begun", number, pid1, pid)
			return
		case pid1 != pid || cookie1 != cookie:
			l.wrong(&l.misplaced, "packet %d: process %d answers for process %d", number, pid1, pid)
			return
		case verdict == missing:
			l.wrong(&l.lost, "before packet %d one has not come", number)
			return
		case verdict == reordered || number != got:
			l.wrong(&l.outOfOrder, "answer %d to packet %d", got, number)
			return
		}
		l.answered.Add(1)
		if got == packets {
			return
		}
		for sent < got+2 && (packets == 0 || sent < packets) && !l.stop.Load() {
			send()
		}
	}
}

// more returns when n further answers have come.
func (l *load) more(n int64) {
	l.t.Helper()
	want, limit := l.answered.Load()+n, time.Now().Add(proctest.Patience)
	for l.answered.Load() < want {
		if time.Now().After(limit) {
			l.t.Fatalf("no more than %d answers; %s", l.answered.Load(), l.first)
		}
		time.Sleep(time.Millisecond)
	}
}

// socketDrops is how many packets the system has dropped because a socket that
// is bound to the port had no room.
func socketDrops(t testing.TB, address string) (n int) {
	if runtime.GOOS != "linux" {
		return 0
	}
	_, port, _ := net.SplitHostPort(address)
	var p uint16
	if _, err := fmt.Sscan(port, &p); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/net/udp")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) > 12 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", p)) {
			var drops int
			if _, err := fmt.Sscan(f[12], &drops); err != nil {
				t.Fatal(err)
			}
			n += drops
		}
	}
	return n
}

// run puts clients on a chain of processes that serve in this way, upgrades it
// so often, and returns the load when it has ended, and the last process.
func run(t *testing.T, how string, upgrades, clients int) (*load, []*proctest.Proc) {
	spec := proctest.Spec{NoAccept: true}.At(proctest.AtStart, setup.Do()).At(proctest.AtNew, serveSessions.Do(how))
	procs := []*proctest.Proc{proctest.Start(t, spec)}
	l := &load{t: t, to: procs[0].Addr(0).Address}
	defer l.wg.Wait()
	defer l.stop.Store(true)
	for range clients {
		l.wg.Go(func() { l.client(0) })
	}
	for range clients / 10 { // sessions that begin in each moment of an upgrade
		l.wg.Go(func() { l.client(20) })
	}
	l.more(int64(20 * clients))
	for range upgrades {
		procs = append(procs, procs[len(procs)-1].Upgrade())
		l.more(int64(20 * clients))
	}
	return l, procs
}

// 200 sessions, and more that begin and end meanwhile, live through 20
// upgrades.
func TestSessionsUnderLoad(t *testing.T) {
	for _, how := range []string{"single", "batches"} {
		t.Run(how, func(t *testing.T) {
			l, procs := run(t, how, 20, 200)
			drops := socketDrops(t, l.to)
			var forwarded, dropped uint64
			for _, p := range procs {
				s := stats.On(p)
				forwarded, dropped = forwarded+s.Forwarded, dropped+s.Dropped
			}
			t.Logf("%d packets of %d sessions answered by %d processes, %d packets forwarded; lost %d, dropped by the socket %d, by an inbox %d; moved %d, by the wrong process %d, out of order %d",
				l.answered.Load(), l.sessions.Load(), len(procs), forwarded, l.lost.Load(), drops, dropped, l.moved.Load(), l.misplaced.Load(), l.outOfOrder.Load())
			if l.lost.Load() > int64(drops) || l.moved.Load() != 0 || l.misplaced.Load() != 0 || l.outOfOrder.Load() != 0 || dropped != 0 {
				t.Errorf("something has happened to a session: %s", l.first)
			}
			if forwarded == 0 {
				t.Error("nothing was forwarded")
			}
		})
	}
}

// Without the package the same clients notice that their sessions move.
func TestSessionsWithoutUDPFlow(t *testing.T) {
	l, _ := run(t, "plain", 5, 200)
	t.Logf("%d packets of %d sessions answered; moved %d", l.answered.Load(), l.sessions.Load(), l.moved.Load())
	if l.moved.Load() == 0 {
		t.Error("no session has moved: this test is blind")
	}
}
