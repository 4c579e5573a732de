package e2e

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Upgrades while datagrams come: each is answered, by one process and once.

// echo serves all sockets for packets. Each is read by three loops, which run
// before Ready, and answer with the process's ID, its generation and what came.
var echo = proctest.Define("echo", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	for i := range d.Spec.Listen {
		c := d.PacketConn(i)
		for range 3 {
			echoes.loops.Go(func() {
				b := make([]byte, 512)
				for {
					n, from, err := c.ReadFrom(b)
					if err == nil {
						_, err = c.WriteTo(fmt.Appendf(nil, "%d %d %s", os.Getpid(), d.U.Generation(), b[:n]), from)
					}
					if err != nil {
						echoes.mu.Lock()
						defer echoes.mu.Unlock()
						echoes.ends = append(echoes.ends, err)
						return
					}
				}
			})
		}
	}
	return proctest.None{}, nil
})

var echoes struct { // of this process
	loops sync.WaitGroup
	mu    sync.Mutex
	ends  []error // by which loops have ended
}

// finishEcho ends the loops when what they have read is answered, and returns
// errors other than that of the deadline.
var finishEcho = proctest.Define("finish echo", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	for i := range d.Spec.Listen {
		if err := d.PacketConn(i).SetReadDeadline(time.Unix(1, 0)); err != nil {
			return proctest.None{}, err
		}
	}
	echoes.loops.Wait()
	return proctest.None{}, errors.Join(slices.DeleteFunc(echoes.ends, func(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) })...)
})

// echoing is a daemon that echoes.
func echoing(network, address string) proctest.Spec {
	return proctest.Spec{NoAccept: true}.And(network, address).At(proctest.AtListened, echo.Do())
}

// finishes asserts that p's loops end as they should, and ends p.
func finishes(p *proctest.Proc) {
	p.T.Helper()
	if err := finishEcho.Err(p); err != nil {
		p.T.Errorf("process %d: a loop ended with %v; want os.ErrDeadlineExceeded", p.PID, err)
	}
	p.Exit(0)
}

// A packetLoad is clients that send numbered datagrams, each with so many
// unanswered that no buffer overflows.
type packetLoad struct {
	t       testing.TB
	clients []*loadClient
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

type loadClient struct {
	l      *packetLoad
	c      net.Conn
	name   string
	next   int
	window int
	open   map[int]int // number of an unanswered datagram -> newest generation when it was sent
}

// startPackets runs n clients for each of p's sockets.
func startPackets(p *proctest.Proc, n, window int) *packetLoad {
	p.T.Helper()
	l := &packetLoad{t: p.T, by: make(map[int]int)}
	l.changed = sync.NewCond(&l.mu)
	for i, a := range p.Addrs() {
		for j := range n {
			l.clients = append(l.clients, &loadClient{l: l, c: sock(p, i).dial(), name: fmt.Sprintf("client %d of %s", j, a), window: window, open: make(map[int]int)})
		}
	}
	for _, c := range l.clients {
		l.wg.Go(c.run)
	}
	p.T.Cleanup(func() {
		for _, c := range l.clients {
			c.c.Close()
		}
		l.end()
	})
	return l
}

func (c *loadClient) run() {
	l := c.l
	defer func() {
		l.mu.Lock()
		l.idle++ // so that pause returns if this client has failed
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
func (c *loadClient) receive() bool {
	l := c.l
	b := make([]byte, 512)
	if err := c.c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
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

func (l *packetLoad) blame(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
	l.changed.Broadcast()
}

// until returns when f, called with l.mu held, is true.
func (l *packetLoad) until(what string, f func() bool) {
	l.t.Helper()
	timer := time.AfterFunc(proctest.Patience, l.changed.Broadcast)
	defer timer.Stop()
	end := time.Now().Add(proctest.Patience)
	l.mu.Lock()
	defer l.mu.Unlock()
	for !f() {
		if len(l.wrong) > 0 {
			l.t.Fatalf("%d errors, the first one: %s", len(l.wrong), l.wrong[0])
		}
		if !time.Now().Before(end) {
			l.t.Fatal("not within proctest.Patience: ", what)
		}
		l.changed.Wait()
	}
}

// answered returns when p has answered n more.
func (l *packetLoad) answered(p *proctest.Proc, n int) {
	l.t.Helper()
	l.mu.Lock()
	want := l.by[p.PID] + n
	l.mu.Unlock()
	l.until(fmt.Sprintf("%d answers by process %d", n, p.PID), func() bool { return l.by[p.PID] >= want })
}

// pause returns when all that was sent is answered, and no more is sent.
func (l *packetLoad) pause() {
	l.t.Helper()
	l.mu.Lock()
	l.paused = true
	l.mu.Unlock()
	l.until("all answers", func() bool { return l.idle == len(l.clients) })
}

// goOn ends a pause. An older generation may answer again from here.
func (l *packetLoad) goOn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused, l.newest = false, 0
	l.changed.Broadcast()
}

func (l *packetLoad) end() {
	l.mu.Lock()
	l.stopped = true
	l.changed.Broadcast()
	l.mu.Unlock()
	l.wg.Wait()
}

// check asserts that each datagram was answered once. All processes but last
// have ended: what they have sent is there, before what the last one sends now.
func (l *packetLoad) check(last *proctest.Proc) {
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

// Every datagram is answered by one process, over upgrades that succeed and
// upgrades that fail.
func TestPacketUpgrades(t *testing.T) {
	t.Parallel()
	const upgrades = 30
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		// A Unix socket's queue may have no more than ten.
		clients, window := 4, 8
		if network == "unixgram" {
			clients, window = 2, 4
		}
		plain := echoing(network, address())
		p := proctest.Start(t, plain)
		l := startPackets(p, clients, window)
		l.answered(p, 20)
		for i := range upgrades {
			switch i % 10 {
			case 3: // it ends before it is ready
				p.Chain.Specs(plain.At(proctest.AtListened, echo.Do(), proctest.Exit(3)), plain)
				p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
				l.answered(p, 20)
			case 7: // it ends when the predecessor reads no more
				p.Chain.Specs(plain.At(proctest.On(ecdysis.EventReady), proctest.Kill), plain)
				p.FailUpgrade(ecdysis.StepHandover, io.ErrUnexpectedEOF)
				l.answered(p, 20)
			}
			s := p.Upgrade()
			l.answered(s, 20)
			finishes(p)
			p = s
		}
		l.check(p)
		if n := len(l.by); n != upgrades+1 {
			t.Errorf("%d processes have answered; want %d", n, upgrades+1)
		}
	})
}

// A successor that is killed within its probation leaves what it has not read
// to the predecessor.
func TestPacketProbation(t *testing.T) {
	t.Parallel()
	packetNetworks(t, func(t *testing.T, network string, address func() string) {
		clients, window := 4, 8
		if network == "unixgram" {
			clients, window = 2, 4
		}
		const rounds = 5
		p := proctest.Start(t, echoing(network, address()).Probation(time.Minute))
		l := startPackets(p, clients, window)
		l.answered(p, 20)
		for range rounds {
			a := p.BeginUpgrade()
			s := a.Successor()
			l.answered(s, 50)
			// What a process has read dies with it: it is killed when it has
			// read nothing that it has not answered.
			l.pause()
			s.Kill()
			l.goOn()
			a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
			l.answered(p, 50)
		}
		l.check(p)
		if n := len(l.by); n != rounds+1 {
			t.Errorf("%d processes have answered; want %d", n, rounds+1)
		}
	})
}
