package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	plain "github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Servers that take an error of Accept for something else than the end of their
// listener, as libraries do. In each, an error that came with an upgrade would
// cut clients. Each is replaced thirty times under load.

const upgradesOfServers = 30

// A server is what a library does with a listener, and how its program ends it
// after the upgrade.
type server struct {
	serve  func(d *proctest.Daemon, ln net.Listener)
	finish func(net.Listener)
}

var served server // by this process

// define returns calls that start a server on the daemon's first listener, and
// that let it finish and exit.
func define(name string, make func() server) (serve, finish proctest.Call[proctest.None, proctest.None]) {
	serve = proctest.Define("serve "+name, func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
		served = make()
		go served.serve(d, d.Listener(0))
		return proctest.None{}, nil
	})
	finish = proctest.Define("finish "+name, func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
		served.finish(d.Listener(0))
		os.Exit(0)
		return proctest.None{}, nil
	})
	return serve, finish
}

// A loop is an accept loop and its clients.
type loop struct {
	ending  atomic.Bool // the program closes the listener
	ended   chan struct{}
	clients sync.WaitGroup
}

// finish ends the loop first, because it may be about to count a client that
// Accept has returned.
func (l *loop) finish(ln net.Listener) {
	l.ending.Store(true)
	ln.Close()
	<-l.ended
	l.clients.Wait()
}

// closesAll closes all of its clients when Accept fails before the program
// closes the listener.
var serveClosesAll, finishClosesAll = define("closing all clients when Accept fails", func() server {
	var mu sync.Mutex
	clients := map[net.Conn]bool{}
	l := loop{ended: make(chan struct{})}
	return server{
		serve: func(d *proctest.Daemon, ln net.Listener) {
			defer close(l.ended)
			for {
				c, err := ln.Accept()
				if err != nil && l.ending.Load() {
					return
				}
				if err != nil {
					mu.Lock()
					defer mu.Unlock()
					for c := range clients {
						c.Close()
					}
					return
				}
				mu.Lock()
				clients[c] = true
				mu.Unlock()
				l.clients.Go(func() {
					d.Serve(c)
					mu.Lock()
					defer mu.Unlock()
					delete(clients, c)
				})
			}
		},
		finish: l.finish,
	}
})

// goesOn exits with status 1 if Accept fails before the program closes the
// listener.
var serveGoesOn, finishGoesOn = define("going on after errors", func() server {
	l := loop{ended: make(chan struct{})}
	return server{
		serve: func(d *proctest.Daemon, ln net.Listener) {
			defer close(l.ended)
			for {
				c, err := ln.Accept()
				if err != nil && l.ending.Load() {
					return
				}
				if err != nil {
					fmt.Fprintln(os.Stderr, "Accept failed before the program closed the listener:", err)
					os.Exit(1)
				}
				l.clients.Go(func() { d.Serve(c) })
			}
		},
		finish: l.finish,
	}
})

// returns is a library whose Serve returns when Accept fails, whereupon its
// program exits. Package drain counts its connections.
var serveReturns, finishReturns = define("returning when Accept fails", func() server {
	srv := &plain.Server{}
	var d atomic.Pointer[proctest.Daemon]
	return server{
		serve: func(daemon *proctest.Daemon, ln net.Listener) {
			d.Store(daemon)
			counted := srv.Listener(ln)
			for {
				c, err := counted.Accept()
				if err != nil {
					os.Exit(1) // the last clients are cut
				}
				go d.Load().Serve(c)
			}
		},
		finish: func(net.Listener) {
			if err := srv.Shutdown(context.Background()); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		},
	}
})

func TestServersThatEndOnErrors(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		serve, finish proctest.Call[proctest.None, proctest.None]
		clients       proctest.Clients
	}{
		"closes all clients": {serveClosesAll, finishClosesAll, proctest.Clients{N: 2}},
		"goes on":            {serveGoesOn, finishGoesOn, proctest.Clients{N: 2}},
		"short sessions":     {serveReturns, finishReturns, proctest.Clients{N: 2, Requests: 5}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := proctest.TCP.At(proctest.AtListened, c.serve.Do())
			spec.NoAccept = true
			p := proctest.Start(t, spec)
			l := proctest.StartLoad(t, c.clients, p.Addrs()...)
			for range upgradesOfServers {
				l.More(5)
				s := p.Upgrade()
				c.finish.Begin(p)
				p.Ended()
				p = s
			}
			l.More(5)
			l.Check()
			t.Log(l.Answered(), "requests")
		})
	}
}

// A program that takes any error of http.Server.Serve but ErrServerClosed for
// fatal, and that shuts down some time after it was replaced.
var serveHTTP, finishHTTP = define("net/http", func() server {
	srv := &http.Server{}
	var d *httpdrain.Drainer
	return server{
		serve: func(daemon *proctest.Daemon, ln net.Listener) {
			srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprintln(w, os.Getpid(), daemon.U.Generation())
			})
			d = httpdrain.New(srv)
			d.Grace = proctest.Patience // no connection is quiet
			if err := srv.Serve(d.Listener(ln)); !errors.Is(err, http.ErrServerClosed) {
				fmt.Fprintln(os.Stderr, "fatal:", err)
				os.Exit(1)
			}
		},
		finish: func(net.Listener) {
			time.Sleep(50 * time.Millisecond) // what a program may do meanwhile
			if err := d.Shutdown(context.Background()); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		},
	}
})

func TestHTTPServerThatIsFatalOnErrors(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP.At(proctest.AtListened, serveHTTP.Do())
	spec.NoAccept = true
	p := proctest.Start(t, spec)
	url := "http://" + p.Addr(0).Address
	var answered atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 2 {
		clients.Go(func() {
			c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := c.Get(url)
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				if err != nil {
					t.Errorf("a request was lost: %v", err)
				}
				answered.Add(1)
			}
		})
	}
	defer clients.Wait()
	defer close(stop)
	for range upgradesOfServers {
		s := p.Upgrade()
		finishHTTP.Begin(p)
		p.Ended()
		p = s
	}
	t.Log(answered.Load(), "requests")
}
