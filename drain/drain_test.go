package drain_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/drain"
)

// A client that is connected when Shutdown begins is served to its end, including
// half-close. No more clients are accepted.
func TestShutdown(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		var srv drain.Server
		ln := &observed{Listener: listen(t, w.network), closed: make(chan struct{})}
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
		receive(t, srv.Draining())
		receive(t, ln.closed)
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

// An observed listener shows that it was closed.
type observed struct {
	net.Listener
	closed chan struct{}
}

func (o *observed) Close() error {
	defer close(o.closed)
	return o.Listener.Close()
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

// The handler gets the connection that Accept has returned. A library gets a
// connection from which it can reach that one.
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

// A recorder is a listener that records the connection that it has returned last.
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

// A library also gets connections of other types, and reaches the original.
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

// Close ends everything at once. Only Shutdown waits for the handlers.
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
		if !w.library { // a library that closes its clients itself has no handlers to wait for
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

// The connection is closed when the handler returns or ends its goroutine. The
// handler may have closed it before.
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

// A library may close a connection several times.
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
