package drain_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ecdysis-go/ecdysis/drain"
)

// When its context ends, Shutdown ends reads, waits for one more second, and closes
// the connections that are left. The times are exact because the test runs in a
// bubble.
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
		case "w": // writes to a client that does not read
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

// If all reads end in time, no connection is closed, and the error says so.
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

// Closing a TLS connection whose peer does not read takes 5 s, unless Shutdown
// closes it.
func TestStuckTLS(t *testing.T) {
	t.Parallel()
	certificate() // outside the bubble, which must not wait for another test's call
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
