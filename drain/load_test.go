package drain_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/drain"
)

// share returns another listener for the socket of ln, as a successor has one.
func share(t *testing.T, ln net.Listener) net.Listener {
	t.Helper()
	f, err := ln.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	shared, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	return shared
}

// A load is clients that come and go.
type load struct {
	clients sync.WaitGroup
	stop    atomic.Bool
	served  atomic.Int64 // clients that were served to their end

	mu     sync.Mutex
	failed []error
}

// start adds a client, which connects by dial again and again.
func (l *load) start(dial func() (net.Conn, error)) {
	l.clients.Go(func() {
		for i := 0; !l.stop.Load(); i++ {
			if err := l.session(dial, i); err != nil {
				l.mu.Lock()
				l.failed = append(l.failed, err)
				l.mu.Unlock()
				return
			}
			l.served.Add(1)
		}
	})
}

// session is one connection. It is short, begins late, or is long.
func (l *load) session(dial func() (net.Conn, error), i int) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	lines := 1
	switch i % 3 {
	case 1:
		time.Sleep(rand.N(2 * time.Millisecond))
	case 2:
		lines = 50
	}
	for n := range lines {
		if err := say(c, fmt.Sprintf("session %d, line %d", i, n)); err != nil {
			return fmt.Errorf("session %d, line %d of %d: %w", i, n, lines, err)
		}
	}
	if err := finish(c, lines); err != nil {
		return fmt.Errorf("session %d, after %d lines: %w", i, lines, err)
	}
	return nil
}

// more waits until n more sessions have ended, or one has failed.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	limit := time.Now().Add(patience)
	for want := l.served.Load() + n; l.served.Load() < want && !l.hasFailed(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%d sessions have ended; want %d", l.served.Load(), want)
		}
	}
}

func (l *load) hasFailed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.failed) > 0
}

const shutdowns = 20

// Twenty servers, one after the other, serve one socket under load. No client
// notices when one is shut down, and Shutdown returns when its last client has
// gone.
func TestShutdownsUnderLoad(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		root := listen(t, w.network)
		addr := root.Addr()
		type server struct {
			drain.Server
			result  <-chan error
			running atomic.Int64 // handlers
			handled atomic.Int64 // connections
		}
		begin := func() *server {
			s := new(server)
			s.result = w.start(&s.Server, share(t, root), func(c net.Conn) {
				s.running.Add(1)
				defer s.running.Add(-1)
				answer(c)
				s.handled.Add(1)
			})
			return s
		}
		s := begin()
		var l load
		for range 4 {
			l.start(func() (net.Conn, error) {
				c, err := net.DialTimeout(addr.Network(), addr.String(), patience)
				if err == nil {
					c = w.client(c)
				}
				return c, err
			})
		}
		var handled, during int64
		end := func(s *server) {
			during += int64(s.Connections())
			if err := s.Shutdown(within(t)); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			if n := s.running.Load(); n != 0 {
				t.Errorf("Shutdown has returned and %d handlers run", n)
			}
			w.closed(t, &s.Server, s.result)
			handled += s.handled.Load()
		}
		for range shutdowns {
			l.more(t, 6)
			next := begin()
			end(s)
			s = next
		}
		l.more(t, 6)
		l.stop.Store(true)
		l.clients.Wait()
		end(s)
		t.Logf("%d sessions, %d connections open when Shutdown was called, %d failed", l.served.Load(), during, len(l.failed))
		for _, err := range l.failed {
			t.Error(err)
		}
		if n := l.served.Load(); n != handled {
			t.Errorf("%d sessions have ended well; the servers have handled %d", n, handled)
		}
		if during == 0 {
			t.Error("no connection was open when a server was shut down")
		}
	})
}

// These clients notice a server that is ended by Close instead.
func TestLoadNotices(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w way) {
		root := listen(t, w.network)
		addr := root.Addr()
		var l load
		for range 4 {
			l.start(func() (net.Conn, error) {
				c, err := net.DialTimeout(addr.Network(), addr.String(), patience)
				if err == nil {
					c = w.client(c)
				}
				return c, err
			})
		}
		limit := time.Now().Add(patience)
		for !l.hasFailed() && time.Now().Before(limit) {
			var srv drain.Server
			result := w.start(&srv, share(t, root), answer)
			l.more(t, 6)
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
			receive(t, result)
			if err := srv.Shutdown(within(t)); err != nil {
				t.Error(err)
			}
		}
		if !l.hasFailed() {
			t.Error("nobody has noticed")
		}
		l.stop.Store(true)
		root.Close() // resets the clients in its queue
		l.clients.Wait()
	})
}

// A server that has ended leaves neither goroutine nor descriptor. The test is not
// parallel because it counts those of the process.
func TestLeavesNothing(t *testing.T) {
	descriptors := func() int {
		list, err := os.ReadDir("/dev/fd")
		if err != nil {
			t.Skip("the system does not tell which descriptors are open: ", err)
		}
		return len(list)
	}
	round := func(w way, cut bool) {
		var srv drain.Server
		ln := listen(t, w.network)
		result := w.start(&srv, ln, answer)
		for range 5 {
			c := w.dial(t, ln.Addr())
			defer c.Close()
			if err := say(c, "hello"); err != nil {
				t.Fatal(err)
			}
			if !cut {
				if err := finish(c, 1); err != nil {
					t.Fatal(err)
				}
			}
		}
		if cut {
			var e *drain.ShutdownError
			if err := srv.Shutdown(ended()); !errors.As(err, &e) {
				t.Fatalf("Shutdown: %v", err)
			}
		}
		if err := srv.Shutdown(within(t)); err != nil {
			t.Fatal(err)
		}
		w.closed(t, &srv, result)
	}
	for _, w := range ways { // before counting, because some descriptors and goroutines are made only once
		round(w, false)
	}
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for _, w := range ways {
		for _, cut := range []bool{false, true} {
			round(w, cut)
		}
	}
	limit := time.Now().Add(patience)
	for runtime.NumGoroutine() > goroutines || descriptors() > files {
		if time.Now().After(limit) {
			stacks := make([]byte, 1<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			t.Fatalf("%d goroutines and %d descriptors; there were %d and %d\n%s", runtime.NumGoroutine(), descriptors(), goroutines, files, stacks)
		}
		time.Sleep(time.Millisecond)
	}
}

// The hooks and methods may be used by many goroutines at once. Run it with -race.
func TestAllAtOnce(t *testing.T) {
	t.Parallel()
	for range 20 {
		srv := drain.Server{Handler: func(c net.Conn) { _, _ = io.Copy(c, c) }}
		var all sync.WaitGroup
		for range 3 {
			ln := listen(t, "tcp")
			all.Go(func() {
				if err := srv.Serve(ln); err != drain.ErrServerClosed {
					t.Errorf("Serve: %v", err)
				}
			})
			all.Go(func() {
				if c, err := net.Dial("tcp", ln.Addr().String()); err == nil {
					_ = say(c, "hello")
					c.Close()
				}
			})
			inner := listen(t, "tcp")
			all.Go(func() {
				wrapped := srv.Listener(inner)
				all.Go(func() { wrapped.Close() })
				if c, err := wrapped.Accept(); err == nil {
					c.Close()
				}
			})
			all.Go(func() {
				if c, err := net.Dial("tcp", inner.Addr().String()); err == nil {
					c.Close()
				}
			})
			all.Go(func() { _ = srv.Connections() })
			all.Go(func() { <-srv.Draining() })
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), rand.N(time.Millisecond))
				defer cancel()
				_ = srv.Shutdown(ctx)
			})
		}
		all.Go(func() {
			time.Sleep(rand.N(2 * time.Millisecond))
			_ = srv.Close()
		})
		all.Wait()
		if err := srv.Shutdown(within(t)); err != nil {
			t.Error(err)
		}
	}
}
