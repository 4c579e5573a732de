package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// unknown is the generation that serves a client before it has said so.
const unknown = -1

// A conn is a client's connection.
type conn struct {
	net.Conn
	r  *bufio.Reader
	by int // generation that serves it
}

func dial(network, address string) (*conn, error) {
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return nil, err
	}
	return &conn{c, bufio.NewReader(c), unknown}, c.SetDeadline(time.Now().Add(patience))
}

// ask sends a line and wants it back.
func (c *conn) ask(line string) error {
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	return c.answered(line)
}

// answered reads what echod says first, which is who serves, and then a line.
func (c *conn) answered(line string) error {
	if c.by == unknown {
		var pid, generation int
		if _, err := fmt.Fscanf(c.r, "pid=%d generation=%d\n", &pid, &generation); err != nil {
			return err
		}
		c.by = generation
	}
	got, err := c.r.ReadString('\n')
	if err == nil && got != line+"\n" {
		err = fmt.Errorf("sent %q, got %q back", line, got)
	}
	return err
}

// A load is clients of a daemon.
type load struct {
	d       *daemon
	stopped chan struct{}
	once    sync.Once
	wg      sync.WaitGroup

	mu       sync.Mutex
	answers  []answer
	failures []failure
}

// An answer is one that a client has got.
type answer struct {
	at      time.Time
	network string
	by      int // generation
}

type failure struct {
	generation *generation // that served when the client began
	by         int         // the generation that has accepted the connection, or unknown
	began      time.Time   // before connecting
	err        error
}

// start runs clients over TCP and over the Unix socket: some connect for
// every request, some keep their connection for a while, each for another one.
func (l *load) start() {
	for _, a := range [][2]string{{"tcp", l.d.tcp}, {"unix", l.d.unix}} {
		for range 3 {
			l.client(a[0], a[1], 1, 5*time.Millisecond)
		}
		for i := range 5 {
			l.client(a[0], a[1], 20+10*i, 20*time.Millisecond)
		}
	}
}

// client connects again and again, for so many requests each time.
func (l *load) client(network, address string, requests int, pause time.Duration) {
	l.wg.Go(func() {
		for !l.over() {
			g, began := l.d.serving.Load(), time.Now()
			c, err := dial(network, address)
			if err != nil {
				l.fail(failure{g, unknown, began, err})
				continue
			}
			for i := 0; i < requests && err == nil && !l.over(); i++ {
				err = c.SetDeadline(time.Now().Add(patience))
				if err == nil {
					err = c.ask(fmt.Sprintf("request %d to generation %d", i, g.Number))
				}
				l.count(network, c, g, began, err)
				time.Sleep(pause)
			}
			c.Close()
		}
	})
}

func (l *load) over() bool {
	select {
	case <-l.stopped:
		return true
	default:
		return false
	}
}

// count enters the outcome of one request.
func (l *load) count(network string, c *conn, g *generation, began time.Time, err error) {
	if err != nil {
		l.fail(failure{g, c.by, began, err})
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers = append(l.answers, answer{time.Now(), network, c.by})
}

func (l *load) fail(f failure) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, f)
}

func (l *load) totals() (answered, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.answers), len(l.failures)
}

// queue connects n clients that nobody accepts yet. What it returns waits
// until they are answered, by g.
func (l *load) queue(n int) (answeredBy func(g *generation)) {
	type client struct {
		*conn
		network, line string
	}
	var clients []client
	began := time.Now()
	for i := range n {
		network, address := "tcp", l.d.tcp
		if i%2 == 1 {
			network, address = "unix", l.d.unix
		}
		c, err := dial(network, address)
		line := fmt.Sprintf("queued %d", i)
		if err == nil {
			_, err = fmt.Fprintln(c, line)
		}
		if err != nil {
			l.fail(failure{l.d.serving.Load(), unknown, began, err})
			continue
		}
		clients = append(clients, client{c, network, line})
	}
	return func(g *generation) {
		for _, c := range clients {
			err := c.answered(c.line)
			if err == nil && c.by != g.Number {
				err = fmt.Errorf("generation %d answers; want %d", c.by, g.Number)
			}
			l.count(c.network, c.conn, g, began, err)
			c.Close()
		}
	}
}

// more returns when n more requests were answered.
func (l *load) more(ctx context.Context, n int) error {
	answered, _ := l.totals()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for want := answered + n; answered < want; answered, _ = l.totals() {
		select {
		case <-tick.C:
		case <-limit:
			return errors.New("the clients are not answered any more")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// end stops the clients, which finish what they are at.
func (l *load) end() {
	l.once.Do(func() { close(l.stopped) })
	l.wg.Wait()
}
