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

// A conn is a client's connection.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func dial(network, address string) (conn, error) {
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return conn{}, err
	}
	return conn{c, bufio.NewReader(c)}, c.SetDeadline(time.Now().Add(patience))
}

// ask sends a line and wants it back.
func (c conn) ask(line string) error {
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	return c.answered(line)
}

func (c conn) answered(line string) error {
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

	mu       sync.Mutex // and for generation.Answered
	answered int
	failures []failure
}

type failure struct {
	generation *generation // that served
	began      time.Time   // before connecting
	err        error
}

// start runs clients over TCP and over the Unix socket: some connect for
// every request, some keep their connection for a while.
func (l *load) start() {
	for _, a := range [][2]string{{"tcp", l.d.tcp}, {"unix", l.d.unix}} {
		for range 3 {
			l.client(a[0], a[1], 1, 5*time.Millisecond)
		}
		for range 5 {
			l.client(a[0], a[1], 40, 20*time.Millisecond)
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
				l.count(g, began, err)
				continue
			}
			for i := 0; i < requests && err == nil && !l.over(); i++ {
				err = c.SetDeadline(time.Now().Add(patience))
				if err == nil {
					err = c.ask(fmt.Sprintf("request %d to generation %d", i, g.Number))
				}
				l.count(g, began, err)
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
func (l *load) count(g *generation, began time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		g.Answered++
		l.answered++
		return
	}
	l.failures = append(l.failures, failure{g, began, err})
}

func (l *load) totals() (answered, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answered, len(l.failures)
}

// queue connects n clients that nobody accepts yet. What it returns waits
// until they are answered, by g.
func (l *load) queue(n int) (answeredBy func(g *generation)) {
	type client struct {
		conn
		err  error
		line string
	}
	var clients []client
	began := time.Now()
	for i := range n {
		network, address := "tcp", l.d.tcp
		if i%2 == 1 {
			network, address = "unix", l.d.unix
		}
		c := client{line: fmt.Sprintf("queued %d", i)}
		if c.conn, c.err = dial(network, address); c.err == nil {
			_, c.err = fmt.Fprintln(c, c.line)
		}
		clients = append(clients, c)
	}
	return func(g *generation) {
		for _, c := range clients {
			if c.err == nil {
				c.err = c.answered(c.line)
				c.Close()
			}
			l.count(g, began, c.err)
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
