//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// window is the time around each event in which requests are counted as its
// own. The event is in the middle.
const window = 500 * time.Millisecond

// A Request is one that a client has made: when, with all windows of its kind
// put together, and how long its answer took.
type Request struct{ At, Took time.Duration }

// A Latency is the requests around a number of events of one kind.
type Latency struct {
	Requests []Request
	Events   []time.Duration // when each began
	Failed   int
}

// quantile returns how long the answers took, but for a share of the slowest.
func (l Latency) quantile(q float64) time.Duration {
	var v []time.Duration
	for _, r := range l.Requests {
		v = append(v, r.Took)
	}
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[min(int(q*float64(len(v))), len(v)-1)]
}

// measureLatency keeps up a steady rate of requests, each on a connection of
// its own, while the daemon is upgraded, forks and execs its program, is
// upgraded, and so on, one event a window.
func measureLatency(ctx context.Context, program string, events, rate int) (upgrades, execs Latency, err error) {
	c, g, err := startChain(ctx, program, 1)
	if err != nil {
		return upgrades, execs, err
	}
	defer func() { err = errors.Join(err, c.end(g)) }()

	p := paced{addr: g.addr, start: time.Now(), stop: make(chan struct{})}
	p.wg.Go(func() { p.run(time.Second / time.Duration(rate)) })
	var at []time.Duration
	err = func() error {
		for i := range 2 * events {
			if err := sleep(ctx, window); err != nil {
				return err
			}
			at = append(at, time.Since(p.start))
			var d, quiet, began int64
			if i%2 == 1 {
				if err := g.order('x', &d); err != nil {
					return err
				}
				continue
			}
			if err := g.order('u', &d, &quiet, &began); err != nil {
				return err
			}
			s, err := c.next()
			if err != nil {
				return err
			}
			old := g
			g = s
			time.AfterFunc(window/4, func() { old.c.Close() }) // its clients are served long before
		}
		return sleep(ctx, window/2)
	}()
	close(p.stop)
	p.wg.Wait()
	if err != nil {
		return upgrades, execs, err
	}
	for i, t := range at {
		l := []*Latency{&upgrades, &execs}[i%2]
		l.add(t, time.Duration(i/2)*window+window/2, p.done)
	}
	return upgrades, execs, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// add enters an event and the requests around it, with the event at the moment
// as.
func (l *Latency) add(event, as time.Duration, all []outcome) {
	l.Events = append(l.Events, as)
	for _, o := range all {
		from := o.At - event
		switch {
		case from < -window/2 || from >= window/2:
		case o.err != nil:
			l.Failed++
		default:
			l.Requests = append(l.Requests, Request{as + from, o.Took})
		}
	}
}

// A paced is clients that make requests at a steady rate.
type paced struct {
	addr  string
	start time.Time
	stop  chan struct{}
	wg    sync.WaitGroup

	mu   sync.Mutex
	done []outcome
}

type outcome struct {
	Request
	err error
}

func (p *paced) run(pause time.Duration) {
	for i := time.Duration(0); ; i++ {
		select {
		case <-p.stop:
			return
		case <-time.After(time.Until(p.start.Add(i * pause))):
		}
		p.wg.Go(func() { // a request that takes long holds up no other
			began := time.Now()
			err := request(p.addr)
			took := time.Since(began)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.done = append(p.done, outcome{Request{began.Sub(p.start), took}, err})
		})
	}
}

func request(addr string) error {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.(*net.TCPConn).SetLinger(0) // or the ports of many requests would wait
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	s, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && s != "hello\n" {
		err = fmt.Errorf("sent hello, got %q back", s)
	}
	return err
}
