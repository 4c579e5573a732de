package servertest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A Server is a program and its successors, as the test sees them.
type Server struct {
	T     testing.TB
	Addrs []string // the addresses that the first process has passed to Listening

	dir        string
	p          *proctest.Program
	serving    *os.Process
	generation int

	stop  chan struct{}
	wg    sync.WaitGroup
	mu    sync.Mutex
	kinds []*kind
	sent  []string // tokens
	ended bool
}

// A kind is a group of clients that do the same.
type kind struct {
	name     string
	answered int
	failures []error
}

// Start starts the server of the test binary, which listens at n addresses.
func Start(t testing.TB, n int) *Server {
	t.Helper()
	s := &Server{T: t, dir: proctest.ShortDir(t), stop: make(chan struct{})}
	cmd := role.Command()
	cmd.Env = append(cmd.Env, dirVar+"="+s.dir)
	s.p = proctest.Run(t, cmd)
	for range n {
		s.Addrs = append(s.Addrs, s.p.Await(`listening at (\S+)$`)[1])
	}
	s.serving = s.p.Ready(0)
	t.Cleanup(s.end)
	return s
}

// A Client uses the server until the test is over.
type Client struct {
	s *Server
	k *kind
}

// Clients starts n clients. Each calls f again and again, until the test is
// over. An error of f is a failure of the server. For a session that outlives
// upgrades, f returns when Over returns true.
func (s *Server) Clients(name string, n int, f func(c *Client) error) {
	k := &kind{name: name}
	s.mu.Lock()
	s.kinds = append(s.kinds, k)
	s.mu.Unlock()
	for range n {
		c := &Client{s, k}
		s.wg.Go(func() {
			for !c.Over() {
				if err := f(c); err != nil {
					s.mu.Lock()
					k.failures = append(k.failures, err)
					s.mu.Unlock()
				}
			}
		})
	}
}

// Over reports whether the client must end.
func (c *Client) Over() bool {
	select {
	case <-c.s.stop:
		return true
	default:
		return false
	}
}

// Token returns a new token for one request. The server must pass the token to
// Processed.
func (c *Client) Token() string {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	token := fmt.Sprintf("%s-%d", c.k.name, len(c.s.sent))
	c.s.sent = append(c.s.sent, token)
	return token
}

// Answered records that the request with this token was answered.
func (c *Client) Answered() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.k.answered++
}

// More returns when each kind of client has had n more answers.
func (s *Server) More(n int) {
	s.T.Helper()
	s.mu.Lock()
	want := map[*kind]int{}
	for _, k := range s.kinds {
		want[k] = k.answered + n
	}
	s.mu.Unlock()
	limit := time.Now().Add(proctest.Patience)
	for {
		late := ""
		s.mu.Lock()
		for k, n := range want {
			if k.answered < n {
				late = fmt.Sprintf("%d answers for clients %q; want %d; failures: %v", k.answered, k.name, n, errors.Join(k.failures...))
			}
		}
		s.mu.Unlock()
		switch {
		case late == "":
			return
		case time.Now().After(limit):
			s.T.Fatal(late)
		}
		time.Sleep(time.Millisecond)
	}
}

func (s *Server) signal(sig os.Signal) {
	s.T.Helper()
	if err := s.serving.Signal(sig); err != nil {
		s.T.Fatal(err)
	}
}

// Upgrade replaces the process that serves.
func (s *Server) Upgrade() {
	s.T.Helper()
	s.signal(syscall.SIGHUP)
	s.generation++
	s.serving = s.p.Ready(s.generation)
	s.p.Await(`upgraded by signal`)
}

func (s *Server) fault(what string) {
	s.T.Helper()
	if err := os.WriteFile(s.dir+"/"+fault, []byte(what), 0o600); err != nil {
		s.T.Fatal(err)
	}
}

// more is how many answers each kind of client has between two upgrades.
const more = 20

// Upgrades makes five upgrades, one that fails, and one that is taken back
// because the successor has ended within its probation. Then it ends the
// clients and the server, and fails the test if a request was lost or processed
// twice.
func (s *Server) Upgrades() {
	s.T.Helper()
	s.More(more)
	for i := range 5 {
		if i == 4 {
			s.fault(standsBy)
		}
		s.Upgrade()
		s.More(more)
	}

	s.fault(exits)
	s.signal(syscall.SIGHUP)
	s.p.Await(`upgrade failed .*exit status 3`)
	s.More(more)

	s.signal(syscall.SIGHUP)
	successor := s.p.Ready(s.generation + 1)
	s.More(more)
	if err := successor.Signal(syscall.SIGUSR1); err != nil {
		s.T.Fatal(err)
	}
	s.p.Await(`resumed`)
	s.p.Await(`upgrade failed .*probation`)
	s.More(more)
	s.End()
}

// Failures ends the clients and returns the number of failed requests of each kind.
func (s *Server) Failures() map[string]int {
	s.end()
	n := map[string]int{}
	for _, k := range s.kinds {
		n[k.name] = len(k.failures)
	}
	return n
}

// End ends the clients, stops the server, and fails the test if a request was
// lost or processed twice.
func (s *Server) End() {
	s.T.Helper()
	s.end()
	s.signal(syscall.SIGTERM)
	if state := s.p.End(); !state.Success() {
		s.T.Errorf("the first process: %v", state)
	}
	for _, line := range s.p.Said() {
		if strings.Contains(line, "failed: ") && !strings.Contains(line, "upgrade failed") || strings.Contains(line, "panic") {
			s.T.Errorf("a process has ended with %s", line)
		}
	}
	for _, k := range s.kinds {
		if n := len(k.failures); n > 0 {
			s.T.Errorf("clients %q: %d failures, %d answers; the first failure: %v", k.name, n, k.answered, k.failures[0])
		} else {
			s.T.Logf("clients %q: %d answers", k.name, k.answered)
		}
	}
	for token, n := range s.processed() {
		if n != 1 {
			s.T.Errorf("request %s was processed %d times", token, n)
		}
	}
}

// end ends the clients.
func (s *Server) end() {
	s.mu.Lock()
	first := !s.ended
	s.ended = true
	s.mu.Unlock()
	if first {
		close(s.stop)
	}
	s.wg.Wait()
}

// processed returns how often each request was processed.
func (s *Server) processed() map[string]int {
	b, err := os.ReadFile(s.dir + "/" + processed)
	if err != nil {
		s.T.Error(err)
	}
	n := map[string]int{}
	for _, token := range s.sent {
		n[token] = 0
	}
	for _, token := range strings.Fields(string(b)) {
		n[token]++
	}
	return n
}
