package proctest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func (a Addr) String() string { return a.Network + " " + a.Address }

func (a Addr) packets() bool { return strings.HasPrefix(a.Network, "udp") || a.Network == "unixgram" }

// Dial connects. A Unix datagram socket is bound, so that it can get answers.
func (a Addr) Dial() (net.Conn, error) {
	if a.Network != "unixgram" {
		return net.DialTimeout(a.Network, a.Address, Patience)
	}
	dir, err := os.MkdirTemp("", "ecd")
	if err != nil {
		return nil, err
	}
	c, err := net.DialUnix(a.Network, &net.UnixAddr{Net: a.Network, Name: filepath.Join(dir, "client")}, &net.UnixAddr{Net: a.Network, Name: a.Address})
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return unixgramConn{c, dir}, nil
}

// A unixgramConn has its file in a directory that Close removes.
type unixgramConn struct {
	*net.UnixConn
	dir string
}

func (c unixgramConn) Close() error { return errors.Join(c.UnixConn.Close(), os.RemoveAll(c.dir)) }

// Ask connects, sends a line or packet, and returns the process that answers.
func (a Addr) Ask() (pid, generation int, err error) {
	c, err := a.Dial()
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	return Ask(c)
}

// Ask is Addr.Ask on an existing connection.
func Ask(c net.Conn) (pid, generation int, err error) {
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		return 0, 0, err
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return 0, 0, err
	}
	var line [64]byte
	n := 0
	for n == 0 || line[n-1] != '\n' {
		m, err := c.Read(line[n:])
		if err != nil {
			return 0, 0, err
		}
		n += m
	}
	_, err = fmt.Sscan(string(line[:n]), &pid, &generation)
	return pid, generation, err
}

func refused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
}

// Clients says how a Load's clients behave.
type Clients struct {
	N        int // clients for each address; 0 means 1
	Requests int // on one connection, before the client closes it; 0 means 1

	// Resumes says that an older generation may serve again after a newer one has
	// served.
	Resumes bool
	// Killed says how many processes are killed. Each may take one connection
	// or packet of each client with it. No client may be refused, and none of a
	// connection may be left waiting.
	Killed int
}

// A Load is clients that connect again and again. They notice each request
// that fails, and each answer of an older generation to a client that began to
// connect after a newer generation had answered.
type Load struct {
	T testing.TB

	clients Clients
	addrs   []Addr
	n       int // clients in all
	stop    chan struct{}
	end     sync.Once
	wg      sync.WaitGroup

	mu       sync.Mutex
	answered int64
	newest   int // generation that has answered
	cut      int
	failures []string
	overlaps []string
	waiters  map[chan struct{}]int64 // closed at this number of answers
}

// Load starts n clients for each of p's addresses.
func (p *Proc) Load(n int) *Load {
	p.T.Helper()
	return StartLoad(p.T, Clients{N: n}, p.Addrs()...)
}

// StartLoad starts clients for each address. They end with the test.
func StartLoad(t testing.TB, c Clients, addrs ...Addr) *Load {
	t.Helper()
	c.N, c.Requests = max(c.N, 1), max(c.Requests, 1)
	l := &Load{T: t, clients: c, addrs: addrs, n: c.N * len(addrs), stop: make(chan struct{}), waiters: make(map[chan struct{}]int64)}
	for _, a := range addrs {
		for range c.N {
			l.wg.Go(func() {
				for !l.ended() {
					l.client(a)
				}
			})
		}
	}
	t.Cleanup(l.End)
	return l
}

// Addrs are the addresses to which the clients connect.
func (l *Load) Addrs() []Addr { return l.addrs }

func (l *Load) ended() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// client makes one connection.
func (l *Load) client(a Addr) {
	l.mu.Lock()
	newest := l.newest
	l.mu.Unlock()
	c, err := a.Dial()
	if err != nil {
		l.fail(a, err)
		return
	}
	defer c.Close()
	for i := range l.clients.Requests {
		_, g, err := Ask(c)
		if err != nil {
			l.lose(a, err)
			return
		}
		l.count(a, g, newest, i == 0 || a.packets())
		if l.ended() {
			return
		}
	}
}

func (l *Load) fail(a Addr, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, fmt.Sprintf("%v: %v", a, err))
}

// lose counts a connection that was accepted by the system and not served. Of a
// packet that a killed process had received, its client hears nothing.
func (l *Load) lose(a Addr, err error) {
	if l.clients.Killed == 0 || errors.Is(err, os.ErrDeadlineExceeded) && !a.packets() {
		l.fail(a, err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut++
}

// count counts an answer of generation g to a client for which generation
// newest had answered before it connected. Later requests of a connection stay
// with the generation that has it.
func (l *Load) count(a Addr, g, newest int, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if first && g < newest && !l.clients.Resumes && l.clients.Killed == 0 {
		l.overlaps = append(l.overlaps, fmt.Sprintf("%v: generation %d answered after generation %d had", a, g, newest))
	}
	l.newest = max(l.newest, g)
	l.answered++
	for ch, n := range l.waiters {
		if l.answered >= n {
			close(ch)
			delete(l.waiters, ch)
		}
	}
}

// More returns when n more requests were answered.
func (l *Load) More(n int) {
	l.T.Helper()
	ch := make(chan struct{})
	l.mu.Lock()
	l.waiters[ch] = l.answered + int64(n)
	l.mu.Unlock()
	select {
	case <-ch:
	case <-time.After(Patience):
		l.mu.Lock()
		defer l.mu.Unlock()
		l.T.Fatalf("%d requests were answered in all, and not %d more within %v; failures: %q", l.answered, n, Patience, l.failures)
	}
}

// Answered returns the number of requests that were answered.
func (l *Load) Answered() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int(l.answered)
}

// Newest returns the newest generation that has answered.
func (l *Load) Newest() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.newest
}

// End ends the clients.
func (l *Load) End() {
	l.end.Do(func() { close(l.stop) })
	l.wg.Wait()
}

// Check ends the clients, and fails the test unless each request was answered,
// by one generation at a time.
func (l *Load) Check() {
	l.T.Helper()
	l.End()
	if n := len(l.failures); n > 0 {
		l.T.Errorf("%d of %d requests failed, the first one: %s", n, l.answered+int64(n), l.failures[0])
	}
	if n := len(l.overlaps); n > 0 {
		l.T.Errorf("at %d moments two generations accepted, the first one: %s", n, l.overlaps[0])
	}
	if most := l.clients.Killed * l.n; l.cut > most {
		l.T.Errorf("%d connections were cut; want %d at most, with %d clients and %d processes killed", l.cut, most, l.n, l.clients.Killed)
	}
}
