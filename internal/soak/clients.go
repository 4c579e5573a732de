//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A load is clients over TCP, the Unix socket, HTTP and UDP.
type load struct {
	addrs   atomic.Pointer[addresses]
	stopped chan struct{}
	wg      sync.WaitGroup

	// A connection has the read lock from before it is made until after it is
	// closed. So there is none while the write lock is held.
	connected sync.RWMutex
	resting   atomic.Bool

	mu       sync.Mutex
	answered int
	killed   int       // that ended with a killed process
	refused  int       // that came during a stop
	failures []failure // that nothing excuses
	excuses  []*excuse
}

// A failure is a request that was not answered.
type failure struct {
	client string
	pid    int // that has answered on this connection before; 0: none
	began  time.Time
	at     time.Time
	err    error
}

// An excuse is a process that was killed, or a stop of the daemon.
type excuse struct {
	pid         int       // 0: a stop
	begin, over time.Time // over is zero until it is known
}

// covers reports whether the request may fail. A killed process takes its
// connections with it, and those that nobody has answered yet may be its own. A
// stop lets connections be refused or reset that nobody has accepted.
func (e *excuse) covers(f failure) bool {
	if f.pid != 0 {
		return f.pid == e.pid
	}
	const hands = 5 * time.Second // longest time that a request may be in the hands of a process
	return f.at.After(e.begin) && f.began.After(e.begin.Add(-hands)) && (e.over.IsZero() || f.began.Before(e.over))
}

// excuse lets requests fail from now on until the function that it returns is
// called. It comes before the kill or the stop.
func (l *load) excuse(pid int) (over func()) {
	e := &excuse{pid: pid, begin: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.excuses = append(l.excuses, e)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		e.over = time.Now()
	}
}

// start runs the clients: of each kind some that connect for every request, and
// some that keep their connection.
func (l *load) start() {
	for range 2 {
		l.client("tcp", 1, func() (asker, error) { return dialLines("tcp", l.addrs.Load().tcp) })
		l.client("tcp, kept", 50, func() (asker, error) { return dialLines("tcp", l.addrs.Load().tcp) })
		l.client("unix", 1, func() (asker, error) { return dialLines("unix", l.addrs.Load().unix) })
		l.client("unix, kept", 50, func() (asker, error) { return dialLines("unix", l.addrs.Load().unix) })
		l.client("http", 1, func() (asker, error) { return dialHTTP(l.addrs.Load().http) })
		l.client("http, kept", 50, func() (asker, error) { return dialHTTP(l.addrs.Load().http) })
		l.client("udp", 1, func() (asker, error) { return l.dialUDP(l.addrs.Load().udp) })
	}
}

// An asker is a client's connection.
type asker interface {
	// ask makes a request, and returns the process that has answered, and
	// whether the connection ends with the answer.
	ask(text string) (pid int, last bool, err error)
	Close() error
}

func (l *load) over() bool {
	select {
	case <-l.stopped:
		return true
	default:
		return false
	}
}

// client connects again and again, for so many requests each time.
func (l *load) client(name string, requests int, dial func() (asker, error)) {
	const pause = 10 * time.Millisecond
	l.wg.Go(func() {
		for !l.over() {
			l.connected.RLock()
			began := time.Now()
			pid := 0
			c, err := dial()
			if err == nil {
				for i, last := 0, false; i < requests && !last && !l.over() && !l.resting.Load(); i++ {
					if i > 0 {
						time.Sleep(pause)
					}
					var p int
					if p, last, err = c.ask(fmt.Sprint("request-", i)); err != nil {
						break
					}
					l.count()
					if pid == 0 {
						pid = p
					} else if p != pid {
						err = fmt.Errorf("process %d answers on a connection to process %d", p, pid)
						break
					}
				}
				c.Close()
			}
			if err != nil {
				l.fail(failure{name, pid, began, time.Now(), err})
			}
			l.connected.RUnlock()
			time.Sleep(pause)
		}
	})
}

func (l *load) count() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answered++
}

func (l *load) total() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answered
}

func (l *load) fail(f failure) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch e := l.excuseOf(f); {
	case e == nil:
		l.failures = append(l.failures, f)
	case e.pid == 0:
		l.refused++
	default:
		l.killed++
	}
}

// excuseOf returns what lets the request fail, or nil. The lock is held.
func (l *load) excuseOf(f failure) *excuse {
	for _, e := range l.excuses {
		if e.covers(f) {
			return e
		}
	}
	return nil
}

// mayBeLost reports whether a request may fail by now.
func (l *load) mayBeLost(began time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.excuseOf(failure{began: began, at: time.Now()}) != nil
}

// failed returns the requests that have failed and must not.
func (l *load) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []error
	for _, f := range l.failures[:min(len(l.failures), 5)] {
		list = append(list, fmt.Errorf("a request over %s failed after %v: %w", f.client, f.at.Sub(f.began).Round(time.Millisecond), f.err))
	}
	return errors.Join(list...)
}

// rest runs f while there are no clients.
func (l *load) rest(f func() error) error {
	l.resting.Store(true)
	l.connected.Lock()
	defer l.connected.Unlock()
	defer l.resting.Store(false)
	return f()
}

func (l *load) end() {
	close(l.stopped)
	l.wg.Wait()
}

// A lines is a connection on which lines come back with the process's number.
type lines struct {
	net.Conn
	r *bufio.Reader
}

func dialLines(network, address string) (asker, error) {
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return nil, err
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // or the ports of very many connections would wait
	}
	return lines{c, bufio.NewReader(c)}, nil
}

func (c lines) ask(text string) (pid int, last bool, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, false, err
	}
	if _, err := io.WriteString(c, text+"\n"); err != nil {
		return 0, false, err
	}
	s, err := c.r.ReadString('\n')
	if err != nil {
		return 0, false, err
	}
	pid, err = parse(s, text)
	return pid, false, err
}

// parse takes the process's number from an answer.
func parse(answer, want string) (pid int, err error) {
	var text string
	if _, err := fmt.Sscan(answer, &pid, &text); err != nil || text != want {
		return 0, fmt.Errorf("sent %q, got %q back", want, answer)
	}
	return pid, nil
}

type httpConn struct{ lines }

func dialHTTP(address string) (asker, error) {
	c, err := dialLines("tcp", address)
	if err != nil {
		return nil, err
	}
	return httpConn{c.(lines)}, nil
}

func (c httpConn) ask(text string) (pid int, last bool, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, false, err
	}
	if _, err := fmt.Fprintf(c, "GET /%s HTTP/1.1\r\nHost: soak\r\n\r\n", text); err != nil {
		return 0, false, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return 0, false, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, false, err
	}
	pid, err = parse(string(body), "/"+text)
	return pid, resp.Close, err
}

// A packets is a client over UDP. Nobody says that a packet was lost: after a
// moment it is given up if it may be.
type packets struct {
	net.Conn
	l *load
}

func (l *load) dialUDP(address string) (asker, error) {
	c, err := net.Dial("udp", address)
	if err != nil {
		return nil, err
	}
	return packets{c, l}, nil
}

func (c packets) ask(text string) (pid int, last bool, err error) {
	if _, err := io.WriteString(c, text); err != nil {
		return 0, false, err
	}
	b := make([]byte, 100)
	n := 0
	for began := time.Now(); ; {
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return 0, false, err
		}
		n, err = c.Read(b)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > patience || c.l.mayBeLost(began) {
			return 0, false, err
		}
	}
	pid, err = parse(strings.TrimSpace(string(b[:n])), text)
	return pid, false, err
}
