package drain_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// patience is how long a test waits for what must happen.
const patience = proctest.Patience

// within returns a context that ends with the test's patience.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// ended is a context that has ended.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// receive returns what comes from c.
func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing has come")
		panic("not reached")
	}
}

func listen(t *testing.T, network string) net.Listener {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "drain") // t.TempDir may be too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func dial(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(addr.Network(), addr.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// certificate is one for tests, and who trusts it is their clients.
var certificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"test"},
		NotBefore:    time.Unix(0, 0), // a synctest bubble has the year 2000
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
})

func serverTLS() *tls.Config {
	cert, _ := certificate()
	return &tls.Config{Certificates: []tls.Certificate{cert}}
}

func clientTLS() *tls.Config {
	_, pool := certificate()
	return &tls.Config{RootCAs: pool, ServerName: "test"}
}

// A halfCloser is what connections can do that say so.
type halfCloser interface{ CloseWrite() error }

// answer sends each line back. When its client has ended its side, it says how
// many there were, and ends its own.
func answer(c net.Conn) {
	lines := 0
	for r := bufio.NewReader(c); ; lines++ {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
	fmt.Fprintf(c, "%d lines\n", lines)
	_ = c.(halfCloser).CloseWrite()
}

// say sends a line and wants it back.
func say(c net.Conn, line string) error {
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return err
	}
	back := make([]byte, len(line)+1)
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if string(back) != line+"\n" {
		return fmt.Errorf("sent %q, got %q back", line, back)
	}
	return nil
}

// finish ends the client's side and wants the answer to lines lines.
func finish(c net.Conn, lines int) error {
	if err := c.(halfCloser).CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(c)
	if want := fmt.Sprintf("%d lines\n", lines); err != nil || string(rest) != want {
		return fmt.Errorf("at the end: %q, %v; want %q", rest, err, want)
	}
	return nil
}

// serve starts Serve and returns where its result comes.
func serve(srv *drain.Server, ln net.Listener) <-chan error {
	result := make(chan error, 1)
	go func() { result <- srv.Serve(ln) }()
	return result
}

// library starts an accept loop as libraries have it, which is ended by any
// error of Accept, and closes its clients then.
func library(ln net.Listener, handler func(net.Conn)) <-chan error {
	result := make(chan error, 1)
	go func() {
		var mu sync.Mutex
		clients := make(map[net.Conn]bool)
		for {
			c, err := ln.Accept()
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				for c := range clients {
					c.Close()
				}
				result <- err
				return
			}
			mu.Lock()
			clients[c] = true
			mu.Unlock()
			go func() {
				defer c.Close()
				handler(c)
				mu.Lock()
				defer mu.Unlock()
				delete(clients, c)
			}()
		}
	}()
	return result
}

// A way is how connections get to their handler.
type way struct {
	name    string
	network string
	start   func(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error
	secure  bool
	library bool
}

// client returns what a client makes of its connection.
func (w way) client(c net.Conn) net.Conn {
	if w.secure {
		return secure(c)
	}
	return c
}

func (w way) dial(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	return w.client(dial(t, addr))
}

func secure(c net.Conn) net.Conn { return tls.Client(c, clientTLS()) }

func byServe(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	if srv.Handler == nil {
		srv.Handler = handler
	}
	return serve(srv, ln)
}

func byServeTLS(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return byServe(srv, tls.NewListener(ln, serverTLS()), handler)
}

func byLibrary(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return library(srv.Listener(ln), handler)
}

func byLibraryTLS(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return library(tls.NewListener(srv.Listener(ln), serverTLS()), handler)
}

var ways = []way{
	{"TCP", "tcp", byServe, false, false},
	{"Unix", "unix", byServe, false, false},
	{"TLS", "tcp", byServeTLS, true, false},
	{"library, TCP", "tcp", byLibrary, false, true},
	{"library, Unix", "unix", byLibrary, false, true},
	{"library, TLS", "tcp", byLibraryTLS, true, true},
}

// inBubble runs test in a synctest bubble, by Serve and by a library. Its
// listeners are fakes.
func inBubble(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range ways {
		if w.network == "tcp" && !w.secure {
			t.Run(w.name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { test(t, w) })
			})
		}
	}
}

func eachWay(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			test(t, w)
		})
	}
}

// closed asserts what Serve or a library's loop ends with. That of a library
// ends when the server is closed, and not before.
func (w way) closed(t *testing.T, srv *drain.Server, result <-chan error) {
	t.Helper()
	want := drain.ErrServerClosed
	if w.library {
		select {
		case err := <-result:
			t.Errorf("Accept of a library has failed by Shutdown: %v", err)
			return
		default:
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		want = net.ErrClosed
	}
	if err := receive(t, result); !errors.Is(err, want) {
		t.Errorf("accepting ends with %v; want %v", err, want)
	}
}

// A client that is there when Shutdown begins is served to its end, half-close
// included, and nobody is accepted any more.
func TestShutdown(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		var srv drain.Server
		ln := listen(t, w.network)
		result := w.start(&srv, ln, answer)
		c, quick := w.dial(t, ln.Addr()), w.dial(t, ln.Addr())
		for _, c := range []net.Conn{c, quick} {
			if err := say(c, "before"); err != nil {
				t.Fatal(err)
			}
		}
		if n := srv.Connections(); n != 2 {
			t.Errorf("%d connections; want 2", n)
		}
		if err := finish(quick, 1); err != nil {
			t.Fatal(err)
		}

		down := make(chan error, 1)
		go func() { down <- srv.Shutdown(within(t)) }()
		<-srv.Draining()
		for { // until the listener is closed
			late, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
			if err != nil {
				break
			}
			late.Close()
		}
		for range 3 {
			if err := say(c, "after"); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-down:
			t.Fatalf("Shutdown returns %v with a client that is served", err)
		default:
		}
		if n := srv.Connections(); n < 1 {
			t.Errorf("%d connections; want 1", n)
		}
		if err := finish(c, 4); err != nil {
			t.Fatal(err)
		}
		if err := receive(t, down); err != nil {
			t.Fatal(err)
		}
		if n := srv.Connections(); n != 0 {
			t.Errorf("%d connections after Shutdown", n)
		}
		w.closed(t, &srv, result)
		if err := srv.Shutdown(ended()); err != nil {
			t.Errorf("Shutdown called again: %v", err)
		}
	})
}

// One server has several listeners, and Shutdown waits for the clients of each.
func TestSeveralListeners(t *testing.T) {
	t.Parallel()
	var srv drain.Server
	type at struct {
		w      way
		result <-chan error
		client net.Conn
	}
	var all []at
	for _, w := range ways {
		ln := listen(t, w.network)
		a := at{w: w, result: w.start(&srv, ln, answer)}
		a.client = w.dial(t, ln.Addr())
		if err := say(a.client, w.name); err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	down := make(chan error, 2)
	for range cap(down) {
		go func() { down <- srv.Shutdown(within(t)) }()
	}
	<-srv.Draining()
	for i, a := range all {
		if n := srv.Connections(); n < len(all)-i {
			t.Fatalf("%d connections; want %d", n, len(all)-i)
		}
		select {
		case err := <-down:
			t.Fatalf("Shutdown returns %v before the end of %s", err, a.w.name)
		default:
		}
		if err := errors.Join(say(a.client, "again"), finish(a.client, 2)); err != nil {
			t.Fatalf("%s: %v", a.w.name, err)
		}
	}
	for range cap(down) {
		if err := receive(t, down); err != nil {
			t.Error(err)
		}
	}
	for _, a := range all {
		if a.w.library && len(a.result) > 0 {
			t.Errorf("%s: Accept has failed by Shutdown: %v", a.w.name, <-a.result)
		}
	}
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
	for _, a := range all {
		want := drain.ErrServerClosed
		if a.w.library {
			want = net.ErrClosed
		}
		if err := receive(t, a.result); !errors.Is(err, want) {
			t.Errorf("%s: accepting ends with %v; want %v", a.w.name, err, want)
		}
	}
}

// The handler gets what Accept has returned, and a library what it can take
// that from.
func TestConcreteType(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		var srv drain.Server
		ln := &recorder{Listener: listen(t, w.network)}
		got := make(chan net.Conn, 1)
		w.start(&srv, ln, func(c net.Conn) {
			if tc, ok := c.(*tls.Conn); ok {
				_ = tc.Handshake()
				c = tc.NetConn()
			}
			got <- c
			_, _ = io.Copy(io.Discard, c)
		})
		c := w.dial(t, ln.Addr())
		if tc, ok := c.(*tls.Conn); ok {
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
		}
		nc := receive(t, got)
		if w.library {
			if _, ok := nc.(halfCloser); !ok {
				t.Errorf("a %T for a library has no CloseWrite", nc)
			}
			if _, ok := nc.(syscall.Conn); !ok {
				t.Errorf("a %T for a library has no SyscallConn", nc)
			}
			if _, ok := nc.(io.ReaderFrom); !ok && w.network == "tcp" {
				t.Errorf("a %T for a library has no ReadFrom", nc)
			}
			nc = nc.(interface{ NetConn() net.Conn }).NetConn()
		}
		if ln.last() != nc {
			t.Errorf("the handler has a %T that Accept has not returned", nc)
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A recorder knows which connection it has returned last.
type recorder struct {
	net.Listener
	mu sync.Mutex
	c  net.Conn
}

func (r *recorder) Accept() (net.Conn, error) {
	c, err := r.Listener.Accept()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.c = c
	return c, err
}

func (r *recorder) last() net.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.c
}

// A library gets connections of other types, too, and reaches what they are.
func TestOtherType(t *testing.T) {
	t.Parallel()
	var srv drain.Server
	ln := listen(t, "tcp")
	result := library(srv.Listener(tls.NewListener(ln, serverTLS())), func(c net.Conn) {
		answer(c.(interface{ NetConn() net.Conn }).NetConn().(*tls.Conn))
	})
	c := secure(dial(t, ln.Addr()))
	if err := errors.Join(say(c, "hello"), finish(c, 1)); err != nil {
		t.Fatal(err)
	}
	if err := srv.Shutdown(within(t)); err != nil {
		t.Error(err)
	}
	way{library: true}.closed(t, &srv, result)
}

// A fake is a listener under the control of a test: Accept returns what comes
// from the channel.
type fake struct {
	accept chan any // a net.Conn or an error
	closed chan struct{}
	err    error // of Close
	once   sync.Once
	holds  bool // Accept does not look at closed
}

func newFake() *fake { return &fake{accept: make(chan any), closed: make(chan struct{})} }

func (f *fake) Accept() (net.Conn, error) {
	closed := f.closed
	if f.holds {
		closed = nil
	}
	select {
	case v := <-f.accept:
		if c, ok := v.(net.Conn); ok {
			return c, nil
		}
		return nil, v.(error)
	case <-closed:
		return nil, &net.OpError{Op: "accept", Net: "fake", Err: net.ErrClosed}
	}
}

func (f *fake) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.err
}

func (f *fake) Addr() net.Addr { return &net.UnixAddr{Net: "fake", Name: "fake"} }

// pipe returns the two ends of a connection, that of the client first.
func pipe(t *testing.T) (client, server net.Conn) {
	client, server = net.Pipe()
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// A connection that Accept returns after Shutdown has begun, and has closed the
// listener, is served to its end.
func TestAcceptedLate(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, w way) {
		var srv drain.Server
		f := newFake()
		f.holds = true
		result := w.start(&srv, f, func(c net.Conn) {
			line, _ := bufio.NewReader(c).ReadString('\n')
			time.Sleep(time.Hour)
			_, _ = io.WriteString(c, line)
		})
		synctest.Wait() // Accept is called
		down := make(chan error, 1)
		go func() { down <- srv.Shutdown(context.Background()) }()
		synctest.Wait()
		if !isClosed(f.closed) {
			t.Error("Shutdown has not closed the listener")
		}
		client, server := pipe(t)
		f.accept <- server
		synctest.Wait()
		if len(down) > 0 {
			t.Errorf("Shutdown returns %v with a client that was accepted", <-down)
			down <- nil
		}
		if err := say(client, "late"); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if w.library { // its loop has called Accept again
			select {
			case f.accept <- net.ErrClosed:
				t.Error("Accept is called once Shutdown has begun")
			default:
			}
		}
		if err := <-down; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if n := srv.Connections(); n != 0 {
			t.Errorf("%d connections after Shutdown", n)
		}
		w.closed(t, &srv, result)
	})
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Shutdown waits for an Accept call in flight, whatever it returns.
func TestAcceptInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		srv := drain.Server{Handler: answer}
		f := newFake()
		f.holds = true
		result := serve(&srv, f)
		synctest.Wait()
		down := make(chan error, 1)
		go func() { down <- srv.Shutdown(context.Background()) }()
		synctest.Wait()
		if len(down) > 0 {
			t.Fatalf("Shutdown returns %v while Accept is called", <-down)
		}
		f.accept <- errors.New("over")
		if err := <-result; err != drain.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
		if err := <-down; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// When its context ends, Shutdown ends reading, waits for one more second, and
// closes the rest. The times are exact, as those of a bubble are.
func TestReadsEnd(t *testing.T) {
	t.Parallel()
	inBubble(t, readsEnd)
}

func readsEnd(t *testing.T, w way) {
	var srv drain.Server
	f := newFake()
	began := time.Now()
	passed := func() time.Duration { return time.Since(began) }
	stuck := make(chan struct{})
	type end struct {
		kind string
		at   time.Duration
		err  error
	}
	ends := make(chan end, 10)
	result := w.start(&srv, f, func(c net.Conn) {
		kind := make([]byte, 1)
		_, err := io.ReadFull(c, kind)
		read := func() {
			if err == nil {
				_, err = c.Read(make([]byte, 1))
			}
		}
		switch string(kind) {
		case "i": // idle
			read()
		case "d": // idle, with deadlines of its own
			for err == nil {
				err = c.SetReadDeadline(time.Now().Add(time.Minute))
				read()
			}
		case "e": // sets a later deadline after its reads were ended
			time.Sleep(10*time.Second + 10*time.Millisecond - passed())
			err = c.SetReadDeadline(time.Now().Add(time.Minute))
			read()
		case "a": // answers while reads are ended
			time.Sleep(10*time.Second + 900*time.Millisecond - passed())
			_, err = io.WriteString(c, "answer")
		case "w": // writes what nobody reads
			_, err = c.Write(kind)
		case "s": // ignores all errors
			<-stuck
		}
		ends <- end{string(kind), passed(), err}
	})
	clients := make(map[string]net.Conn)
	for _, kind := range []string{"i", "d", "e", "a", "w", "s"} {
		client, server := pipe(t)
		f.accept <- server
		if _, err := io.WriteString(client, kind); err != nil {
			t.Fatal(err)
		}
		clients[kind] = client
	}
	answered := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(clients["a"])
		answered <- string(b)
	}()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := srv.Shutdown(ctx)
	if got, want := passed(), 11*time.Second; got != want {
		t.Errorf("Shutdown returns after %v; want %v", got, want)
	}
	var e *drain.ShutdownError
	if !errors.As(err, &e) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Shutdown: %v", err)
	}
	if want := (drain.ShutdownError{Open: 6, Closed: 2, Err: context.DeadlineExceeded}); *e != want {
		t.Errorf("Shutdown: %+v; want %+v", *e, want)
	}
	const text = "drain: context deadline exceeded; open connections: 6, closed a second later: 2"
	if err.Error() != text {
		t.Errorf("Shutdown: %v; want %s", err, text)
	}
	if got := <-answered; got != "answer" {
		t.Errorf("the client whose answer was under way gets %q", got)
	}
	synctest.Wait()
	if n := srv.Connections(); n != 1 {
		t.Errorf("%d connections, after all but that of the stuck handler were closed", n)
	}
	for _, want := range []end{
		{"i", 10 * time.Second, os.ErrDeadlineExceeded},
		{"d", 10 * time.Second, os.ErrDeadlineExceeded},
		{"e", 10*time.Second + 50*time.Millisecond, os.ErrDeadlineExceeded},
		{"a", 10*time.Second + 900*time.Millisecond, nil},
		{"w", 11 * time.Second, io.ErrClosedPipe},
	} {
		found := false
		for range len(ends) {
			got := <-ends
			if got.kind == want.kind {
				found = true
				if got.at != want.at || !errors.Is(got.err, want.err) {
					t.Errorf("handler %s ends after %v with %v; want %v, %v", got.kind, got.at, got.err, want.at, want.err)
				}
				break
			}
			ends <- got
		}
		if !found {
			t.Errorf("handler %s has not ended", want.kind)
		}
	}
	if _, err := clients["s"].Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the client of the stuck handler reads %v; want EOF", err)
	}

	// Called again, Shutdown waits for the handler that is left.
	down := make(chan error, 1)
	go func() { down <- srv.Shutdown(context.Background()) }()
	synctest.Wait()
	if len(down) > 0 {
		t.Errorf("Shutdown, called again, returns %v with a handler that runs", <-down)
	}
	err = srv.Shutdown(ended())
	if !errors.As(err, &e) || e.Open != 1 || e.Closed != 1 || e.Err != context.Canceled {
		t.Errorf("Shutdown, called with a context that has ended: %v", err)
	}
	close(stuck)
	if err := <-down; err != nil {
		t.Errorf("Shutdown, called again: %v", err)
	}
	if err := srv.Shutdown(ended()); err != nil {
		t.Errorf("Shutdown, at last: %v", err)
	}
	w.closed(t, &srv, result)
}

// With all reads ended in time nothing is closed, and Shutdown says so.
func TestAllReadsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		srv := drain.Server{Handler: answer}
		f := newFake()
		serve(&srv, f)
		for range 3 {
			client, server := pipe(t)
			f.accept <- server
			if err := say(client, "here to stay"); err != nil {
				t.Fatal(err)
			}
		}
		err := srv.Shutdown(ended())
		var e *drain.ShutdownError
		if !errors.As(err, &e) || *e != (drain.ShutdownError{Open: 3, Err: context.Canceled}) {
			t.Errorf("Shutdown: %v", err)
		}
		if err := srv.Shutdown(ended()); err != nil {
			t.Errorf("Shutdown, called again: %v", err)
		}
	})
}

// A server that has nothing to wait for is shut down, whatever the context.
func TestNothingToWaitFor(t *testing.T) {
	t.Parallel()
	for range 50 {
		var unused drain.Server
		if err := unused.Shutdown(ended()); err != nil {
			t.Fatalf("of a Server that was not used: %v", err)
		}
		srv := drain.Server{Handler: answer}
		result := serve(&srv, listen(t, "tcp"))
		if err := srv.Shutdown(ended()); err != nil {
			t.Fatalf("of one without clients: %v", err)
		}
		if err := receive(t, result); err != drain.ErrServerClosed {
			t.Fatal(err)
		}
	}
}

// An Accept call that does not end is named by the error. What it returns later
// is closed.
func TestAcceptDoesNotEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		srv := drain.Server{Handler: func(net.Conn) { t.Error("the handler is called after all") }}
		f := newFake()
		f.holds = true
		result := serve(&srv, f)
		synctest.Wait()
		err := srv.Shutdown(ended())
		const text = "drain: context canceled; open connections: 0, closed a second later: 0, Accept calls left: 1"
		if err == nil || err.Error() != text {
			t.Errorf("Shutdown: %v; want %s", err, text)
		}
		client, server := pipe(t)
		f.accept <- server
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the late client reads %v; want EOF", err)
		}
		if err := <-result; err != drain.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
}

// Close ends all at once, and leaves waiting for handlers to Shutdown.
func TestClose(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		var srv drain.Server
		ln := listen(t, w.network)
		hold, failed := make(chan struct{}), make(chan error, 1)
		result := w.start(&srv, ln, func(c net.Conn) {
			_, err := io.Copy(c, c)
			failed <- err
			<-hold
		})
		c := w.dial(t, ln.Addr())
		if err := say(c, "before"); err != nil {
			t.Fatal(err)
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		if !isClosed(srv.Draining()) {
			t.Error("not draining")
		}
		if err := receive(t, failed); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the handler reads %v; want net.ErrClosed", err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the client can still read")
		}
		want := drain.ErrServerClosed
		if w.library {
			want = net.ErrClosed
		}
		if err := receive(t, result); !errors.Is(err, want) {
			t.Errorf("accepting ends with %v; want %v", err, want)
		}
		if !w.library { // one that closes its clients itself has no handlers to wait for
			down := make(chan error, 1)
			go func() { down <- srv.Shutdown(within(t)) }()
			runtime.Gosched()
			if len(down) > 0 {
				t.Errorf("Shutdown after Close returns %v with a handler that runs", <-down)
			}
			close(hold)
			if err := receive(t, down); err != nil {
				t.Error(err)
			}
			return
		}
		close(hold)
		if err := srv.Shutdown(within(t)); err != nil {
			t.Error(err)
		}
	})
}

// After Shutdown and Close, Serve does not begin, and a library's Accept waits
// or fails, as if it had begun before. The listener is closed in any case.
func TestAfterTheEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*drain.Server) error{
		"Shutdown": func(srv *drain.Server) error { return srv.Shutdown(ended()) },
		"Close":    (*drain.Server).Close,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				srv := drain.Server{Handler: answer}
				if err := end(&srv); err != nil {
					t.Fatal(err)
				}
				f := newFake()
				if err := srv.Serve(f); err != drain.ErrServerClosed || !isClosed(f.closed) {
					t.Errorf("Serve: %v, closed: %v", err, isClosed(f.closed))
				}
				f = newFake()
				ln := srv.Listener(f)
				if !isClosed(f.closed) {
					t.Error("the listener for a library is open")
				}
				result := library(ln, answer)
				synctest.Wait()
				if name == "Shutdown" {
					if len(result) > 0 {
						t.Errorf("Accept: %v", <-result)
					}
					if err := ln.Close(); err != nil {
						t.Error(err)
					}
				}
				err := <-result
				var op *net.OpError
				if !errors.Is(err, net.ErrClosed) || !errors.As(err, &op) || op.Net != "fake" || op.Addr == nil {
					t.Errorf("Accept: %v", err)
				}
			})
		})
	}
}

// A lasting error of Accept is Serve's, and a library's, as it is. So is that of
// a listener which somebody else has closed. Clients are served on.
func TestAcceptFails(t *testing.T) {
	t.Parallel()
	for _, want := range []error{
		errors.New("fake"),
		&net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EINVAL)},
		&net.OpError{Op: "accept", Err: net.ErrClosed},
		&net.OpError{Op: "accept", Err: os.ErrDeadlineExceeded}, // says Temporary
	} {
		t.Run(want.Error(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, w way) {
				srv := drain.Server{AcceptError: func(err error) { t.Errorf("AcceptError is told %v", err) }}
				f := newFake()
				handler := func(c net.Conn) { _, _ = io.Copy(c, c) }
				var result <-chan error
				if w.library { // which does not close its clients
					ln := srv.Listener(f)
					got := make(chan error, 1)
					go func() {
						c, err := ln.Accept()
						for err == nil {
							go func() {
								handler(c)
								c.Close()
							}()
							_, err = ln.Accept()
						}
						got <- err
					}()
					result = got
				} else {
					result = w.start(&srv, f, handler)
				}
				client, server := pipe(t)
				f.accept <- server
				if err := say(client, "before"); err != nil {
					t.Error(err)
				}
				f.accept <- want
				if err := <-result; err != want {
					t.Errorf("%v; want %v", err, want)
				}
				if !w.library && !isClosed(f.closed) {
					t.Error("Serve has returned and not closed the listener")
				}
				down := make(chan error, 1)
				go func() { down <- srv.Shutdown(context.Background()) }()
				synctest.Wait()
				if len(down) > 0 {
					t.Errorf("Shutdown returns %v with a client that is served", <-down)
				}
				if err := say(client, "after"); err != nil {
					t.Error(err)
				}
				client.Close()
				if err := <-down; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Errors that pass are waited out, longer and longer, and told.
func TestAcceptErrorsPass(t *testing.T) {
	t.Parallel()
	passing := []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ECONNRESET,
		syscall.ENOBUFS, syscall.ENOMEM, syscall.EPROTO, syscall.EMFILE, syscall.EMFILE, syscall.EMFILE}
	inBubble(t, func(t *testing.T, w way) {
		f := newFake()
		var told []error
		srv := drain.Server{AcceptError: func(err error) { told = append(told, err) }}
		result := w.start(&srv, f, func(c net.Conn) { _, _ = io.Copy(c, c) })
		pause := 5 * time.Millisecond
		began := time.Now()
		for i, errno := range passing {
			err := &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", errno)}
			f.accept <- err
			if i > 0 {
				if got := time.Since(began); got != pause {
					t.Errorf("pause %d is %v; want %v", i, got, pause)
				}
				pause = min(2*pause, time.Second)
			}
			began = time.Now()
			synctest.Wait()
			if len(told) != i+1 || told[i] != err {
				t.Fatalf("AcceptError was told %v", told)
			}
		}
		client, server := pipe(t)
		f.accept <- server
		if err := say(client, "hello"); err != nil {
			t.Error(err)
		}
		client.Close()

		// A connection ends the series. Shutdown ends a pause.
		f.accept <- syscall.EMFILE
		began = time.Now()
		f.accept <- syscall.EMFILE
		if got, want := time.Since(began), 5*time.Millisecond; got != want {
			t.Errorf("the first pause after a connection is %v; want %v", got, want)
		}
		synctest.Wait()
		began = time.Now()
		if err := srv.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		w.closed(t, &srv, result)
		if got := time.Since(began); got != 0 {
			t.Errorf("Shutdown takes %v", got)
		}
	})
}

// A library that closes its listener ends a pause, and its Accept fails.
func TestCloseInPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var srv drain.Server
		f := newFake()
		ln := srv.Listener(f)
		result := library(ln, answer)
		for range 10 {
			f.accept <- syscall.EMFILE
		}
		synctest.Wait()
		began := time.Now()
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		if err := <-result; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if got := time.Since(began); got != 0 {
			t.Errorf("the pause has gone on for %v", got)
		}
		if err := errors.Join(ln.Close(), srv.Shutdown(ended())); err != nil {
			t.Error(err)
		}
	})
}

// Shutdown tells that a listener could not be closed, and that of others is no
// matter.
func TestListenerDoesNotClose(t *testing.T) {
	t.Parallel()
	srv := drain.Server{Handler: answer}
	bad, gone, good := newFake(), newFake(), newFake()
	bad.err, gone.err = errors.New("it does not close"), net.ErrClosed
	for _, f := range []*fake{bad, gone, good} {
		srv.Listener(f)
	}
	for range 2 {
		if err := srv.Shutdown(ended()); !errors.Is(err, bad.err) || errors.Is(err, net.ErrClosed) {
			t.Errorf("Shutdown: %v; want %v", err, bad.err)
		}
	}
	if err := srv.Close(); !errors.Is(err, bad.err) || errors.Is(err, net.ErrClosed) {
		t.Errorf("Close: %v; want %v", err, bad.err)
	}
	for _, f := range []*fake{bad, gone, good} {
		if !isClosed(f.closed) {
			t.Error("a listener is left open")
		}
	}
}

func TestNoHandler(t *testing.T) {
	t.Parallel()
	var srv drain.Server
	f := newFake()
	err := srv.Serve(f)
	if err == nil || errors.Is(err, drain.ErrServerClosed) || !strings.Contains(err.Error(), "Handler") {
		t.Errorf("Serve without a Handler: %v", err)
	}
	if !isClosed(f.closed) {
		t.Error("Serve has returned and not closed the listener")
	}
}

// The connection is closed when the handler returns, ends its goroutine, or has
// closed it before.
func TestHandlerEnds(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]func(net.Conn){
		"return": func(net.Conn) {},
		"close":  func(c net.Conn) { c.Close() },
		"Goexit": func(net.Conn) { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := drain.Server{Handler: handler}
			ln := listen(t, "tcp")
			result := serve(&srv, ln)
			c := dial(t, ln.Addr())
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the client reads %v; want EOF", err)
			}
			if err := srv.Shutdown(within(t)); err != nil {
				t.Error(err)
			}
			if err := receive(t, result); err != drain.ErrServerClosed {
				t.Error(err)
			}
		})
	}
}

// Closing a TLS connection whose peer does not read takes 5 s, but for the
// closing by Shutdown.
func TestStuckTLS(t *testing.T) {
	t.Parallel()
	certificate() // not in the bubble, which must not wait for another's
	synctest.Test(t, func(t *testing.T) {
		returned := false
		srv := drain.Server{Handler: func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1))
			returned = true
		}}
		f := newFake()
		serve(&srv, tls.NewListener(f, serverTLS()))
		client, server := pipe(t)
		f.accept <- server
		if _, err := tls.Client(client, clientTLS()).Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !returned || srv.Connections() != 1 {
			t.Fatalf("the handler has returned: %v; %d connections; want one that is being closed", returned, srv.Connections())
		}
		began := time.Now()
		err := srv.Shutdown(ended())
		var e *drain.ShutdownError
		if !errors.As(err, &e) || e.Open != 1 || e.Closed != 1 {
			t.Errorf("Shutdown: %v", err)
		}
		if err := srv.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if got, want := time.Since(began), time.Second; got != want {
			t.Errorf("the connection is closed after %v; want %v", got, want)
		}
	})
}

// A library may close a connection again and again.
func TestCloseTwice(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		var srv drain.Server
		inner := listen(t, network)
		ln := srv.Listener(inner)
		dial(t, inner.Addr())
		dial(t, inner.Addr())
		first, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		second, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if err := first.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed again: %v", err)
		}
		if n := srv.Connections(); n != 1 {
			t.Errorf("%d connections; want 1", n)
		}
		second.Close()
		if err := srv.Shutdown(ended()); err != nil {
			t.Error(err)
		}
		first.Close()
	}
}
