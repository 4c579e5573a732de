package drain_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ecdysis-go/ecdysis/drain"
)

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
		if w.library { // the library's loop has called Accept again
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

// Serve and a library's Accept return a lasting error of Accept unchanged. So they
// do if other code has closed the listener. Clients are still served.
func TestAcceptFails(t *testing.T) {
	t.Parallel()
	for _, want := range []error{
		errors.New("fake"),
		&net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EINVAL)},
		&net.OpError{Op: "accept", Err: net.ErrClosed},
		&net.OpError{Op: "accept", Err: os.ErrDeadlineExceeded}, // its Temporary returns true
	} {
		t.Run(want.Error(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, w way) {
				srv := drain.Server{AcceptError: func(err error) { t.Errorf("AcceptError is told %v", err) }}
				f := newFake()
				handler := func(c net.Conn) { _, _ = io.Copy(c, c) }
				var result <-chan error
				if w.library { // here it does not close its clients
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

// Errors that pass are waited out with growing pauses, and reported.
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

		// A connection resets the pause. Shutdown ends a pause.
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

// A listener is closed once. Shutdown and Close return its error, unless other code
// has closed the listener before.
func TestListenerDoesNotClose(t *testing.T) {
	t.Parallel()
	srv := drain.Server{Handler: answer}
	bad, gone, good := newFake(), newFake(), newFake()
	bad.err, gone.err = errors.New("it does not close"), net.ErrClosed
	for _, f := range []*fake{bad, gone, good} {
		srv.Listener(f)
	}
	before := newFake()
	before.err = errors.New("known already")
	if err := srv.Listener(before).Close(); err != before.err {
		t.Errorf("Close of a listener: %v; want %v", err, before.err)
	}
	for range 2 {
		if err := srv.Shutdown(ended()); errors.Is(err, before.err) || !errors.Is(err, bad.err) || errors.Is(err, net.ErrClosed) {
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

// A library that is between two calls of Accept and has no connection has nothing
// for which Shutdown waits.
func TestBetweenConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var srv drain.Server
		f := newFake()
		ln := srv.Listener(f)
		accept := func() net.Conn {
			_, server := pipe(t)
			go func() { f.accept <- server }()
			c, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		accept().Close()
		c := accept()
		down := make(chan error, 1)
		go func() { down <- srv.Shutdown(context.Background()) }()
		synctest.Wait()
		if len(down) > 0 {
			t.Errorf("Shutdown returns %v with a connection", <-down)
		}
		c.Close()
		if err := <-down; err != nil {
			t.Error(err)
		}
	})
}
