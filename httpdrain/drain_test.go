package httpdrain_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/httpdrain"
)

// long is a grace longer than any test.
const long = time.Hour

var discard = log.New(io.Discard, "", 0)

// A site is a server in this process.
type site struct {
	t      *testing.T
	srv    *http.Server
	d      *httpdrain.Drainer
	addr   string
	served chan error // the result of Serve
}

// newSite serves h on ln, or on a listener of its own.
func newSite(t *testing.T, grace time.Duration, srv *http.Server, ln net.Listener) *site {
	t.Helper()
	s := &site{t: t, srv: srv, d: httpdrain.New(srv), served: make(chan error, 1)}
	s.d.Grace = grace
	if ln == nil {
		ln = listen(t)
	}
	s.addr = ln.Addr().String()
	wrapped := s.d.Listener(ln)
	go func() { s.served <- srv.Serve(wrapped) }()
	t.Cleanup(func() { srv.Close() })
	return s
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func (s *site) dial() *rawConn { return dial(s.t, s.addr) }

func dial(t *testing.T, addr string) *rawConn {
	t.Helper()
	c, err := dialRaw(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// get requires the answer "ok", and that the answer says close, or does not.
func get(t *testing.T, c *rawConn, wantClose bool, header ...string) {
	t.Helper()
	closed, err := c.get("/", "ok", header...)
	if err != nil || closed != wantClose {
		t.Fatalf("an answer that says close: %v, %v; want %v", closed, err, wantClose)
	}
}

// ends requires the server to close c cleanly.
func ends(t *testing.T, c *rawConn) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.r.ReadByte(); err != io.EOF {
		t.Fatalf("reading: %v; want EOF", err)
	}
}

// shutdown calls Shutdown and waits until draining has begun.
func (s *site) shutdown() (result chan error) {
	s.t.Helper()
	result = make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.t.Cleanup(cancel)
	go func() { result <- s.d.Shutdown(ctx) }()
	receive(s.t, s.d.Draining(), "draining")
	return result
}

// over requires Shutdown to return nil, and Serve to return after it.
func (s *site) over(result chan error) {
	s.t.Helper()
	if err := receive(s.t, result, "the end of Shutdown"); err != nil {
		s.t.Fatal(err)
	}
	if err := receive(s.t, s.served, "the end of Serve"); err != http.ErrServerClosed {
		s.t.Fatalf("Serve: %v; want ErrServerClosed", err)
	}
}

func (s *site) counts(want httpdrain.Counts) {
	s.t.Helper()
	eventually(s.t, fmt.Sprint(want), func() (string, bool) {
		got := s.d.Counts()
		return fmt.Sprint(got), got == want
	})
}

func receive[T any](t *testing.T, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("waiting for %s", what)
	}
	return v
}

// eventually calls f until it returns true.
func eventually(t *testing.T, want string, ask func() (got string, ok bool)) {
	t.Helper()
	for limit := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		got, ok := ask()
		if ok {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("%s; want %s", got, want)
		}
	}
}

var ok = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") })

// An idle connection gets one more answer, which says close. Shutdown waits for
// nothing else.
func TestIdleIsAnswered(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{Handler: ok}, nil)
	idle, fresh := s.dial(), s.dial()
	get(t, idle, false)
	get(t, idle, false)
	select {
	case <-s.d.Draining():
		t.Fatal("draining before Shutdown")
	default:
	}
	s.counts(httpdrain.Counts{New: 1, Idle: 1})
	result := s.shutdown()
	get(t, idle, true)
	get(t, fresh, true)
	s.over(result)
	if c, err := net.Dial("tcp", s.addr); err == nil {
		c.Close()
		t.Error("the listener is open")
	}
}

// A connection on which nothing happens is closed after its grace, and not
// before.
func TestGrace(t *testing.T) {
	t.Parallel()
	for grace, want := range map[time.Duration]time.Duration{
		300 * time.Millisecond: 300 * time.Millisecond,
		0:                      httpdrain.DefaultGrace,
		-1:                     0,
	} {
		t.Run(grace.String(), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, grace, &http.Server{Handler: ok}, nil)
			idle, silent, part := s.dial(), s.dial(), s.dial()
			get(t, idle, false)
			if _, err := io.WriteString(part, "GET / HTTP/1.1\r\nHo"); err != nil {
				t.Fatal(err)
			}
			s.counts(httpdrain.Counts{New: 2, Idle: 1})
			began := time.Now()
			result := s.shutdown()
			for _, c := range []*rawConn{idle, silent, part} {
				b, err := io.ReadAll(c.r)
				if err != nil || len(b) > 0 && c != part { // net/http may answer a client whose header was cut
					t.Errorf("%q, %v; want EOF", b, err)
				}
				if passed := time.Since(began); passed < want {
					t.Errorf("closed after %v; want %v", passed, want)
				}
			}
			s.over(result)
		})
	}
}

// A gate is a handler that reports each call, and waits.
type gate struct {
	called chan struct{}
	open   chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, 100), make(chan struct{})} }

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.called <- struct{}{}
	<-g.open
	ok(w, r)
}

// The grace of a connection that was busy begins with the end of its request.
// Its answer, begun before draining, does not say close.
func TestGraceAfterAnswer(t *testing.T) {
	t.Parallel()
	const grace = 300 * time.Millisecond
	g := newGate()
	s := newSite(t, grace, &http.Server{Handler: g}, nil)
	silent, busy := s.dial(), s.dial()
	if err := busy.send("/"); err != nil {
		t.Fatal(err)
	}
	receive(t, g.called, "the handler")
	s.counts(httpdrain.Counts{New: 1, Active: 1, Handlers: 1})
	result := s.shutdown()
	ends(t, silent) // its grace is over
	began := time.Now()
	close(g.open)
	if closed, err := busy.receive("ok"); closed || err != nil {
		t.Fatalf("closed %v, %v", closed, err)
	}
	ends(t, busy)
	if passed := time.Since(began); passed < grace {
		t.Errorf("closed %v after the answer; want %v", passed, grace)
	}
	s.over(result)
}

// A connection that was accepted and not reported yet is not lost, although the
// server calls ConnContext before ConnState.
func TestAcceptedIsServed(t *testing.T) {
	t.Parallel()
	at, goOn := make(chan struct{}), make(chan struct{})
	s := newSite(t, -1, &http.Server{Handler: ok, ConnContext: func(ctx context.Context, c net.Conn) context.Context {
		at <- struct{}{}
		<-goOn
		return ctx
	}}, nil)
	c := s.dial()
	if err := c.send("/"); err != nil {
		t.Fatal(err)
	}
	receive(t, at, "ConnContext")
	result := s.shutdown()
	select {
	case err := <-result:
		t.Fatalf("Shutdown has not waited: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	if closed, err := c.receive("ok"); !closed || err != nil {
		t.Fatalf("closed %v, %v", closed, err)
	}
	s.over(result)
}

// A hooked connection calls a test's functions at a read or a new deadline.
type hookedConn struct {
	*net.TCPConn
	read     func() // before a read
	done     func() // after a read
	deadline func(set func(time.Time) error, t time.Time) error
}

func (c *hookedConn) Read(b []byte) (int, error) {
	if c.read != nil {
		c.read()
	}
	n, err := c.TCPConn.Read(b)
	if c.done != nil {
		c.done()
	}
	return n, err
}

func (c *hookedConn) SetReadDeadline(t time.Time) error {
	if c.deadline != nil {
		return c.deadline(c.TCPConn.SetReadDeadline, t)
	}
	return c.TCPConn.SetReadDeadline(t)
}

// A hookedListener hooks the first connection.
type hookedListener struct {
	net.Listener
	once sync.Once
	hook *hookedConn
}

func (l *hookedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.once.Do(func() {
			l.hook.TCPConn = c.(*net.TCPConn)
			c = l.hook
		})
	}
	return c, err
}

func isPast(t time.Time) bool { return !t.IsZero() && t.Before(time.Now().Add(-time.Hour)) }

// A request that has arrived within the grace is served, however late the server
// reads it.
func TestUnreadIsServed(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprint(secure), func(t *testing.T) {
			t.Parallel()
			at, goOn := make(chan struct{}, 100), make(chan struct{})
			var answered atomic.Bool
			var ln net.Listener = &hookedListener{Listener: listen(t), hook: &hookedConn{read: func() {
				if answered.Load() {
					at <- struct{}{}
					<-goOn
				}
			}}}
			if secure {
				cert, _ := certificate(t)
				ln = tls.NewListener(ln, tlsConfig(t, cert))
			}
			s := newSite(t, 10*time.Millisecond, &http.Server{Handler: ok, ConnState: func(c net.Conn, state http.ConnState) {
				answered.CompareAndSwap(false, state == http.StateIdle)
			}}, ln)
			c := s.dial()
			if secure {
				tc := tls.Client(c.Conn, &tls.Config{InsecureSkipVerify: true})
				c = &rawConn{tc, bufio.NewReader(tc)}
			}
			get(t, c, false)
			receive(t, at, "the server's read")
			silent := s.dial()
			s.counts(httpdrain.Counts{New: 1, Idle: 1})
			if err := c.send("/"); err != nil {
				t.Fatal(err)
			}
			result := s.shutdown()
			ends(t, silent) // the grace is over
			time.Sleep(50 * time.Millisecond)
			close(goOn)
			if closed, err := c.receive("ok"); !closed || err != nil {
				t.Fatalf("closed %v, %v", closed, err)
			}
			s.over(result)
		})
	}
}

// A listener whose connections are all hooked.
type hookingListener struct {
	net.Listener
	deadline func(c *net.TCPConn, t time.Time)
}

func (l hookingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := nc.(*net.TCPConn)
	return &hookedConn{TCPConn: c, deadline: func(set func(time.Time) error, t time.Time) error {
		l.deadline(c, t)
		return set(t)
	}}, nil
}

// A request that arrives just before its connection is closed is served,
// including its body.
func TestLateIsServed(t *testing.T) {
	t.Parallel()
	var clients sync.Map // address to *rawConn
	called, late := make(chan struct{}, 1), make(chan *rawConn, 1)
	var once sync.Once
	s := newSite(t, 10*time.Millisecond, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		called <- struct{}{}
		if b, err := io.ReadAll(r.Body); err != nil || string(b) != "body" {
			t.Errorf("body %q, %v", b, err)
		}
		ok(w, r)
	})}, hookingListener{listen(t), func(c *net.TCPConn, d time.Time) {
		if !isPast(d) {
			return
		}
		once.Do(func() { // for the first of the two connections; the other is next
			clients.Range(func(addr, client any) bool {
				if addr == c.RemoteAddr().String() {
					return true
				}
				other := client.(*rawConn)
				if _, err := io.WriteString(other, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n"); err != nil {
					t.Error(err)
				}
				receive(t, called, "the handler")
				late <- other
				return false
			})
		})
	}})
	for range 2 {
		c := s.dial()
		clients.Store(c.LocalAddr().String(), c)
	}
	s.counts(httpdrain.Counts{New: 2})
	result := s.shutdown()
	c := receive(t, late, "the late request")
	time.Sleep(20 * time.Millisecond)
	if _, err := io.WriteString(c, "body"); err != nil {
		t.Fatal(err)
	}
	if closed, err := c.receive("ok"); !closed || err != nil {
		t.Fatalf("closed %v, %v", closed, err)
	}
	s.over(result)
}

// A request that was read and not reported yet when its connection was about to
// be closed is served. Its body has the server's ReadTimeout.
func TestReadIsServed(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{0, patience} {
		t.Run(timeout.String(), func(t *testing.T) {
			t.Parallel()
			expired := make(chan struct{}, 100)
			var last atomic.Pointer[time.Time] // deadline
			var held atomic.Bool
			hook := &hookedConn{}
			hook.deadline = func(set func(time.Time) error, d time.Time) error {
				last.Store(&d)
				err := set(d)
				switch {
				case isPast(d):
					expired <- struct{}{}
				case held.Swap(false):
					// Go 1.26 sets a deadline between reading a request and
					// reporting it. The Drainer's deadline must come after that.
					// In Go 1.25 this deadline is the Drainer's next one.
					select {
					case <-expired:
					case <-time.After(200 * time.Millisecond):
					}
				}
				return err
			}
			var first sync.Once
			hook.done = func() {
				first.Do(func() {
					<-expired
					held.Store(true)
				})
			}
			body := make(chan string, 1)
			deadline := make(chan time.Time, 1)
			s := newSite(t, 200*time.Millisecond, &http.Server{ReadTimeout: timeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				deadline <- *last.Load()
				b, err := io.ReadAll(r.Body)
				body <- fmt.Sprint(string(b), err)
				ok(w, r)
			})}, &hookedListener{Listener: listen(t), hook: hook})
			c := s.dial()
			if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			s.counts(httpdrain.Counts{New: 1})
			result := s.shutdown()
			d := receive(t, deadline, "the handler")
			if d.IsZero() != (timeout == 0) || isPast(d) || d.After(time.Now().Add(timeout)) {
				t.Errorf("deadline %v in the handler with ReadTimeout %v", d, timeout)
			}
			if _, err := io.WriteString(c, "body"); err != nil {
				t.Fatal(err)
			}
			if got := receive(t, body, "the body"); got != "body<nil>" {
				t.Errorf("body: %s", got)
			}
			if closed, err := c.receive("ok"); !closed || err != nil {
				t.Fatalf("closed %v, %v", closed, err)
			}
			s.over(result)
		})
	}
}

// The server sets its own deadline after it has reported a connection idle.
func TestExpiryIsRepeated(t *testing.T) {
	t.Parallel()
	var times atomic.Int32
	s := newSite(t, 10*time.Millisecond, &http.Server{Handler: ok}, &hookedListener{Listener: listen(t), hook: &hookedConn{
		deadline: func(set func(time.Time) error, d time.Time) error {
			if isPast(d) && times.Add(1) == 1 {
				return nil // as if the server had set another deadline right after it
			}
			return set(d)
		},
	}})
	c := s.dial()
	s.counts(httpdrain.Counts{New: 1})
	result := s.shutdown()
	ends(t, c)
	s.over(result)
}

// A deadline that a handler has set is not changed.
func TestHandlersDeadline(t *testing.T) {
	t.Parallel()
	called, result := make(chan struct{}), make(chan error, 1)
	s := newSite(t, 10*time.Millisecond, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Error(err)
		}
		called <- struct{}{}
		_, err := io.ReadAll(r.Body)
		result <- err
	})}, nil)
	c := s.dial()
	if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	receive(t, called, "the handler")
	began := time.Now()
	s.shutdown()
	if err := receive(t, result, "the handler's deadline"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reading: %v; want a time-out", err)
	}
	if passed := time.Since(began); passed < 100*time.Millisecond {
		t.Errorf("timed out after %v", passed)
	}
}

// The answer to a request arrives before the close, even if the handler does not
// read the body.
func TestUnreadBody(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{Handler: ok}, nil)
	c := s.dial()
	get(t, c, false)
	result := s.shutdown()
	body := strings.Repeat("x", 200<<10)
	if _, err := fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
		t.Fatal(err)
	}
	if closed, err := c.receive("ok"); !closed || err != nil {
		t.Fatalf("closed %v, %v", closed, err)
	}
	s.over(result)
}

// Handlers get the server's own writer over HTTP/1, and their answer to an
// Upgrade or CONNECT is not changed.
func TestWriter(t *testing.T) {
	t.Parallel()
	type seen struct{ writer, connection string }
	for _, draining := range []bool{false, true} {
		for request, want := range map[string]string{
			"GET / HTTP/1.1\r\nHost: test\r\n\r\n":                                                       "close",
			"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n":                                           "close",
			"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n":                "close",
			"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n":          "",
			"GET / HTTP/1.1\r\nHost: test\r\nConnection: keep-alive, upgrade\r\nUpgrade: chat/1\r\n\r\n": "",
			"CONNECT host:80 HTTP/1.1\r\nHost: host:80\r\n\r\n":                                          "",
		} {
			t.Run(fmt.Sprintf("%v %.60q", draining, request), func(t *testing.T) {
				t.Parallel()
				got := make(chan seen, 1)
				s := newSite(t, long, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					got <- seen{fmt.Sprintf("%T", w), w.Header().Get("Connection")}
					c, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					c.Close()
				})}, nil)
				c := s.dial()
				s.counts(httpdrain.Counts{New: 1})
				if draining {
					s.shutdown()
				} else {
					want = ""
				}
				if _, err := io.WriteString(c, request); err != nil {
					t.Fatal(err)
				}
				if got := receive(t, got, "the handler"); got != (seen{"*http.response", want}) {
					t.Errorf("%+v; want Connection %q", got, want)
				}
			})
		}
	}
}

// Shutdown waits for a handler that has hijacked its connection. When the handler
// has returned, the connection is the program's.
func TestHijacked(t *testing.T) {
	t.Parallel()
	called, goOn := make(chan struct{}), make(chan struct{})
	var kept net.Conn
	s := newSite(t, long, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
		}
		kept = c
		called <- struct{}{}
		<-goOn
	})}, nil)
	c := s.dial()
	if err := c.send("/"); err != nil {
		t.Fatal(err)
	}
	receive(t, called, "the handler")
	s.counts(httpdrain.Counts{Handlers: 1})
	result := s.shutdown()
	receive(t, s.served, "the end of Serve") // srv.Shutdown has begun
	select {
	case err := <-result:
		t.Fatalf("Shutdown has not waited for the handler: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	if err := receive(t, result, "the end of Shutdown"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(kept, "still there\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := c.r.ReadString('\n'); line != "still there\n" {
		t.Errorf("%q, %v", line, err)
	}
	kept.Close()
}

// When the context ends, Shutdown has closed idle connections and reports what is
// left. Another call waits for the rest.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	g := newGate()
	s := newSite(t, long, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			g.ServeHTTP(w, r)
			return
		}
		ok(w, r)
	})}, nil)
	idle, busy := s.dial(), s.dial()
	get(t, idle, false)
	if err := busy.send("/wait"); err != nil {
		t.Fatal(err)
	}
	receive(t, g.called, "the handler")
	s.counts(httpdrain.Counts{Idle: 1, Active: 1, Handlers: 1})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.d.Shutdown(ctx) }()
	receive(t, s.d.Draining(), "draining")
	cancel()
	err := receive(t, result, "the end of Shutdown")
	if !errors.Is(err, context.Canceled) || errors.Is(err, httpdrain.ErrMisused) ||
		!strings.Contains(err.Error(), "0 new, 1 active and 1 idle connections, 1 handlers") {
		t.Errorf("Shutdown: %v", err)
	}
	ends(t, idle)
	again := s.shutdown()
	close(g.open)
	if closed, err := busy.receive("ok"); !closed || err != nil {
		t.Fatalf("closed %v, %v", closed, err)
	}
	s.over(again)
}

// Shutdown may be called several times, at the same time and one after the other.
func TestShutdownTwice(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{Handler: ok}, nil)
	c := s.dial()
	get(t, c, false)
	first, second := s.shutdown(), s.shutdown()
	get(t, c, true)
	s.over(first)
	if err := receive(t, second, "the second Shutdown"); err != nil {
		t.Error(err)
	}
	if err := s.d.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if err := s.srv.Serve(s.d.Listener(listen(t))); err != http.ErrServerClosed {
		t.Errorf("Serve afterwards: %v", err)
	}
}

// The hooks that the program has set still work.
func TestHooks(t *testing.T) {
	t.Parallel()
	type key string
	var mu sync.Mutex
	var states []string
	ln := listen(t)
	answer := make(chan string, 1)
	s := newSite(t, long, &http.Server{
		BaseContext: func(ln net.Listener) context.Context {
			return context.WithValue(context.Background(), key("base"), ln.Addr().String())
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, key("conn"), fmt.Sprintf("%T", c))
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			mu.Lock()
			defer mu.Unlock()
			states = append(states, fmt.Sprintf("%T %v", c, state))
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx := r.Context()
			answer <- fmt.Sprint(ctx.Value(key("base")), " ", ctx.Value(key("conn")), " ", ctx.Value(http.ServerContextKey) != nil)
			ok(w, r)
		}),
	}, ln)
	c := s.dial()
	get(t, c, false)
	if got, want := <-answer, s.addr+" *net.TCPConn true"; got != want {
		t.Errorf("contexts %q; want %q", got, want)
	}
	result := s.shutdown()
	get(t, c, true)
	s.over(result)
	mu.Lock()
	defer mu.Unlock()
	got := strings.Join(states, ", ")
	if want := strings.ReplaceAll("T new, T active, T idle, T active, T closed", "T", "*net.TCPConn"); got != want {
		t.Errorf("states %s; want %s", got, want)
	}
}

func init() { http.Handle("/default", ok) } // in init, because the tests may run several times

// Without a Handler the server has http.DefaultServeMux.
func TestNilHandler(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{}, nil)
	c := s.dial()
	if closed, err := c.get("/default", "ok"); closed || err != nil {
		t.Fatal(closed, err)
	}
	result := s.shutdown()
	if closed, err := c.get("/default", "ok"); !closed || err != nil {
		t.Fatal(closed, err)
	}
	s.over(result)
}

// A handler that panics counts as ended.
func TestPanic(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })}, nil)
	c := s.dial()
	if err := c.send("/"); err != nil {
		t.Fatal(err)
	}
	ends(t, c)
	s.over(s.shutdown())
}

// A listener may close by itself when the process is replaced. Serve does not
// return before Shutdown because of that.
func TestListenerEnds(t *testing.T) {
	t.Parallel()
	ln := listen(t)
	s := newSite(t, long, &http.Server{Handler: ok}, ln)
	idle, fresh := s.dial(), s.dial()
	get(t, idle, false)
	s.counts(httpdrain.Counts{New: 1, Idle: 1})
	ln.Close()
	get(t, idle, false)
	select {
	case err := <-s.served:
		t.Fatalf("Serve: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	result := s.shutdown()
	get(t, idle, true)
	get(t, fresh, true)
	s.over(result)
}

// A badListener's Accept fails with an error that the test sends.
type badListener struct {
	net.Listener
	fail  chan error
	ended chan struct{} // closed by Close
}

func (l badListener) Accept() (net.Conn, error) {
	select {
	case err := <-l.fail:
		return nil, err
	case <-l.ended:
		return nil, io.ErrUnexpectedEOF
	}
}

func (l badListener) Close() error { close(l.ended); return errors.New("close failed") }

// An error of Accept reaches Serve unchanged, unless the listener was closed. An
// error of Close is returned by Shutdown.
func TestListenerFails(t *testing.T) {
	t.Parallel()
	ln := badListener{listen(t), make(chan error, 1), make(chan struct{})}
	s := newSite(t, long, &http.Server{Handler: ok}, ln)
	failed := &net.OpError{Op: "accept", Err: syscall.EBADF}
	ln.fail <- failed
	if err := receive(t, s.served, "the end of Serve"); err != failed {
		t.Errorf("Serve: %v; want %v", err, failed)
	}
	receive(t, ln.ended, "Close")

	ln = badListener{listen(t), make(chan error, 1), make(chan struct{})}
	s = newSite(t, long, &http.Server{Handler: ok}, ln)
	s.counts(httpdrain.Counts{})
	errs := 0
	eventually(t, "Serve to accept", func() (string, bool) { // Shutdown closes the listener that is served
		select {
		case ln.fail <- syscall.EMFILE: // a temporary error
			errs++
		default:
		}
		return "", errs == 2 // the channel has room for one error, so Accept has taken the first
	})
	if err := receive(t, s.shutdown(), "the end of Shutdown"); err == nil || !strings.Contains(err.Error(), "close failed") {
		t.Errorf("Shutdown: %v; want the error of Close", err)
	}
	if err := receive(t, s.served, "the end of Serve"); err != http.ErrServerClosed {
		t.Errorf("Serve: %v", err)
	}
}

// srv.Close ends everything at once, including a Shutdown that waits.
func TestClose(t *testing.T) {
	t.Parallel()
	for _, draining := range []bool{false, true} {
		t.Run(fmt.Sprint(draining), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, long, &http.Server{Handler: ok}, nil)
			c := s.dial()
			get(t, c, false)
			var result chan error
			if draining {
				result = s.shutdown()
			}
			if err := s.srv.Close(); err != nil {
				t.Fatal(err)
			}
			ends(t, c)
			if !draining {
				result = s.shutdown()
			}
			s.over(result)
		})
	}
}

// A mistake is reported. Draining is then no worse than srv.Shutdown, which still
// serves the running request.
func TestMisuse(t *testing.T) {
	t.Parallel()
	type use struct {
		srv *http.Server
		d   *httpdrain.Drainer
		ln  net.Listener
	}
	serve := func(u *use, ln net.Listener) {
		go func() { _ = u.srv.Serve(ln) }()
	}
	for name, c := range map[string]struct {
		do   func(u *use)
		want string
	}{
		"no Listener": {func(u *use) {
			u.d = httpdrain.New(u.srv)
			serve(u, u.ln)
		}, "a listener that Drainer.Listener has not returned"},
		"one of two": {func(u *use) {
			u.d = httpdrain.New(u.srv)
			serve(u, u.d.Listener(listen(t)))
			serve(u, u.ln)
		}, "a listener that Drainer.Listener has not returned"},
		"Handler": {func(u *use) {
			h := u.srv.Handler
			u.srv.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
				u.srv.Handler = h // Serve has begun
				return ctx
			}
			u.d = httpdrain.New(u.srv)
			serve(u, u.d.Listener(u.ln))
		}, "Handler was replaced"},
		"ConnState": {func(u *use) {
			u.d = httpdrain.New(u.srv)
			u.srv.ConnState = func(net.Conn, http.ConnState) {}
			serve(u, u.d.Listener(u.ln))
		}, "ConnState was replaced"},
		"ConnContext": {func(u *use) {
			u.d = httpdrain.New(u.srv)
			u.srv.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return ctx }
			serve(u, u.d.Listener(u.ln))
		}, "before New"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGate()
			u := &use{srv: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/wait" {
					g.ServeHTTP(w, r)
					return
				}
				ok(w, r)
			})}, ln: listen(t)}
			c.do(u)
			t.Cleanup(func() { u.srv.Close() })
			busy := dial(t, u.ln.Addr().String())
			if err := busy.send("/wait"); err != nil {
				t.Fatal(err)
			}
			receive(t, g.called, "the handler")
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			result := make(chan error, 1)
			go func() { result <- u.d.Shutdown(ctx) }()
			receive(t, u.d.Draining(), "draining")
			close(g.open)
			if _, err := busy.receive("ok"); err != nil {
				t.Error(err)
			}
			err := receive(t, result, "the end of Shutdown")
			if !errors.Is(err, httpdrain.ErrMisused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Shutdown: %v; want %q", err, c.want)
			}
		})
	}
}

// Serve fails at once if the Handler was replaced after New.
func TestHandlerReplaced(t *testing.T) {
	t.Parallel()
	srv := new(http.Server)
	d := httpdrain.New(srv)
	srv.Handler = ok
	err := srv.Serve(d.Listener(listen(t)))
	if !errors.Is(err, httpdrain.ErrMisused) || !strings.Contains(err.Error(), "Handler was replaced") {
		t.Errorf("Serve: %v; want ErrMisused", err)
	}
}

// A call of New after Serve is reported, with connections and without any.
func TestNewTooLate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		wrap, shown bool
		want        string
	}{
		{false, false, "Serve was not called after New"},
		{false, true, "before New"},
		{true, true, "before New"},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			t.Parallel()
			states := make(chan http.ConnState, 10)
			srv := &http.Server{Handler: ok, ConnState: func(c net.Conn, state http.ConnState) { states <- state }}
			ln := listen(t)
			go func() { _ = srv.Serve(ln) }()
			t.Cleanup(func() { srv.Close() })
			client := dial(t, ln.Addr().String())
			get(t, client, false)
			for receive(t, states, "an idle connection") != http.StateIdle {
			} // the server must not read the fields while New writes them
			d := httpdrain.New(srv)
			if c.wrap {
				_ = d.Listener(listen(t))
			}
			if c.shown {
				get(t, client, false)
			}
			if err := d.Shutdown(context.Background()); !errors.Is(err, httpdrain.ErrMisused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Shutdown: %v; want %q", err, c.want)
			}
		})
	}
}

// A listener without a call of Serve is not a mistake. Shutdown closes it.
func TestUnserved(t *testing.T) {
	t.Parallel()
	d := httpdrain.New(&http.Server{Handler: ok})
	ln := listen(t)
	_ = d.Listener(ln)
	if err := d.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v; want net.ErrClosed", err)
	}
}

// A wrappedListener wraps the Drainer's listener and hides its address.
type wrappedListener struct {
	ln   net.Listener
	addr net.Addr
}

func (l wrappedListener) Accept() (net.Conn, error) { return l.ln.Accept() }
func (l wrappedListener) Close() error              { return l.ln.Close() }
func (l wrappedListener) Addr() net.Addr            { return l.addr }

func TestWrapper(t *testing.T) {
	t.Parallel()
	srv := &http.Server{Handler: ok}
	d := httpdrain.New(srv)
	ln := listen(t)
	go func() { _ = srv.Serve(wrappedListener{d.Listener(ln), ln.Addr()}) }()
	c := dial(t, ln.Addr().String())
	get(t, c, false)
	result := make(chan error, 1)
	go func() { result <- d.Shutdown(context.Background()) }()
	receive(t, d.Draining(), "draining")
	get(t, c, true)
	if err := receive(t, result, "the end of Shutdown"); err != nil {
		t.Error(err)
	}
}

// Several listeners are drained alike.
func TestSeveralListeners(t *testing.T) {
	t.Parallel()
	s := newSite(t, long, &http.Server{Handler: ok}, nil)
	path := shortDir(t) + "/s"
	second, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.srv.Serve(s.d.Listener(second)) }()
	first := s.dial()
	get(t, first, false)
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := &rawConn{nc, bufio.NewReader(nc)}
	get(t, c, false)
	result := s.shutdown()
	get(t, first, true)
	get(t, c, true)
	s.over(result)
	if err := receive(t, served, "the second Serve"); err != http.ErrServerClosed {
		t.Errorf("Serve: %v", err)
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A drained server leaves nothing behind. The test is not parallel because it
// counts the process's goroutines and descriptors.
func TestLeaks(t *testing.T) {
	round := func() {
		s := newSite(t, 20*time.Millisecond, &http.Server{Handler: ok}, nil)
		for range 10 {
			c := s.dial()
			get(t, c, false)
			s.dial()
		}
		s.counts(httpdrain.Counts{New: 10, Idle: 10})
		result := s.shutdown()
		s.over(result)
		s.counts(httpdrain.Counts{})
	}
	count := func() int {
		if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
			return len(entries)
		}
		return 0
	}
	t.Run("warm up", func(t *testing.T) { round() })
	goroutines, fds := runtime.NumGoroutine(), count()
	for range 3 {
		round()
	}
	eventually(t, fmt.Sprintf("%d goroutines", goroutines), func() (string, bool) {
		n := runtime.NumGoroutine()
		return fmt.Sprintf("%d goroutines", n), n <= goroutines
	})
	// The clients of three rounds are open until the end of the test.
	if n := count() - fds; n > 60 {
		t.Errorf("%d descriptors more; want the 60 of the clients", n)
	}
}
