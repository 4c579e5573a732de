// Package drain serves connections with a handler function, and ends the server
// without cutting a client off. A Server is for plain connections what
// net/http.Server is for HTTP:
//
//	srv := &drain.Server{Handler: serve} // func serve(c net.Conn)
//	go srv.Serve(ln)
//	u.Wait() // until this process is replaced or stopped
//	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
//	defer cancel()
//	err := srv.Shutdown(ctx)
//
// Shutdown waits for every connection that an Accept call has returned, or
// returns after Shutdown has begun. Connections still in the system's queue stay
// there for the process that accepts next. The system resets them when the last
// process closes the socket.
//
// A library with an accept loop of its own gets its listener from
// Server.Listener, and its connections are counted like those of Serve.
//
// The package uses the standard library alone and works with any listener. It
// logs nothing, and has no goroutine apart from those that run Handler.
//
// docs/servers.md shows how to use it with several libraries.
package drain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// ErrServerClosed is returned by Serve after a call of Shutdown or Close.
var ErrServerClosed = errors.New("drain: server closed")

const (
	lastSecond  = time.Second           // from the end of Shutdown's ctx until the remaining connections are closed
	readsEnding = 50 * time.Millisecond // how often reads are ended in that second
	maxPause    = time.Second           // the longest pause after errors of Accept that pass
)

// A Server serves the connections of its listeners. Its zero value is ready for
// use, except that Serve needs a Handler. It must not be copied. Its methods may
// be called by several goroutines at once.
type Server struct {
	// Handler serves one connection. Each call runs on a goroutine of its own,
	// and c is the value that Accept returned, of the same type. The Server
	// closes c when Handler returns, so no goroutine may use c after that.
	// Handler may close c itself.
	//
	// A panic in Handler ends the program, as it does on any goroutine. A
	// Handler that has to survive its panics recovers and reports them itself.
	//
	// Handler must not be changed after the first call of Serve. It must not
	// wait for Shutdown, because Shutdown waits for it.
	Handler func(c net.Conn)

	// AcceptError, if not nil, is called with each error of Accept after which
	// the Server tries again. It runs on the goroutine that accepts, before the
	// pause, and must not be changed after the first call of Serve or Listener.
	AcceptError func(error)

	mu        sync.Mutex
	listeners map[*listener]struct{} // not closed yet
	conns     map[*conn]struct{}     // not ended yet
	accepting int                    // Accept calls in flight; none begins after draining
	cut       bool                   // a connection accepted now is closed at once
	closed    bool                   // Close was called
	draining  chan struct{}          // closed when Shutdown or Close begins
	ended     chan struct{}          // closed when draining, and neither accepting nor conns are left
}

// Server.mu guards the unexported fields of Server, and the closing of channels,
// those of listeners included. It is held over no call that blocks, and over none
// of the program's functions. The channels are made before any goroutine can wait
// for them, so receiving needs no lock. All other fields are set once. The only
// other lock is the one in listener.shut, by which a listener is closed once.
//
// Each call that blocks, and what wakes it:
//
//	ln.Accept in next         listener.shut, by begin or listener.Close
//	the pause in next         its timer, draining, listener.closed
//	listener.Accept           listener.closed, by its own Close or Server.Close
//	Shutdown                  ended, ctx, and the timer of the last second
//	Handler's I/O             the deadline that Shutdown sets, closeConns
//	Close of a TLS connection its own limit of 5 s, closeConns
//	ln.Close in shut          nothing here; a second caller of shut waits, too

// lock locks s.mu and completes a zero Server.
func (s *Server) lock() {
	s.mu.Lock()
	if s.draining == nil {
		s.draining, s.ended = make(chan struct{}), make(chan struct{})
		s.listeners, s.conns = make(map[*listener]struct{}), make(map[*conn]struct{})
	}
}

// Serve accepts connections from ln and calls Handler for each. It never returns
// nil. After Shutdown or Close it returns ErrServerClosed, and otherwise the
// unchanged error of Accept. Connections that it has accepted are served further,
// and the caller still has to call Shutdown and wait for it.
//
// Serve owns ln, and has closed it when it returns. It may be called for several
// listeners. For TLS, ln is the result of tls.NewListener.
//
// Errors of Accept that pass, such as running out of descriptors (EMFILE), do
// not end Serve. It goes on after a pause of 5 ms, which doubles up to a second
// while errors follow each other. A deadline of ln that passes does end it.
func (s *Server) Serve(ln net.Listener) error {
	l := s.add(ln)
	defer l.Close()
	if s.Handler == nil {
		return errors.New("drain: Server.Handler is nil")
	}
	for {
		c, err := l.next()
		if err != nil {
			return err
		}
		go func() {
			defer c.end()
			s.Handler(c.Conn)
		}()
	}
}

// Listener returns a listener for a library that accepts by itself. It accepts
// from ln, waits out the same errors as Serve, and closes ln when it is closed.
// The caller still has to close it, if the library does not.
//
// Its connections count from Accept until they are closed, so Shutdown waits for
// them. They wrap the connections of ln, which their method NetConn() net.Conn
// returns. A *net.TCPConn or *net.UnixConn keeps all of its methods in the
// wrapper, such as CloseWrite. For TLS, the result of Listener goes to
// tls.NewListener.
//
// Shutdown closes ln, but the library's Accept does not fail, because libraries
// take that as a reason to close their clients. Accept then waits until the
// returned listener is closed, by its Close method or by Server.Close, and
// returns an error that wraps net.ErrClosed. Other errors of ln are passed on.
func (s *Server) Listener(ln net.Listener) net.Listener {
	l := s.add(ln)
	if isClosed(s.Draining()) {
		_ = l.shut()
	}
	return l
}

// Draining returns a channel that is closed when Shutdown or Close begins. A
// Handler whose clients stay connected should return then, between two answers.
func (s *Server) Draining() <-chan struct{} {
	s.lock()
	defer s.mu.Unlock()
	return s.draining
}

// Connections returns the number of connections that have not ended. A
// connection of Serve ends when Handler has returned, and one of Listener when
// the library has closed it.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Shutdown closes the listeners, and waits until all connections have ended. It
// returns nil then, or the errors of closing the listeners. ctx does not bound the
// time that a listener takes to close.
//
// If ctx ends before the connections do, their reads fail from then on with
// os.ErrDeadlineExceeded, also if a Handler sets later deadlines. Answers that
// are being made or sent have one more second. Then the connections that are
// left are closed, and Shutdown returns without waiting for their Handlers. The
// error wraps a *ShutdownError and the error of ctx, also if all connections
// have ended within the second.
//
// Shutdown may be called again, and by several goroutines at once. A later call
// waits for the Handlers that still run. The first ctx that ends counts for all.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.begin()
	select {
	case <-s.ended:
		return err
	case <-ctx.Done():
	}
	second := time.NewTimer(lastSecond)
	defer second.Stop()
	again := time.NewTicker(readsEnding)
	defer again.Stop()
	e := &ShutdownError{Err: ctx.Err()}
	for {
		open := s.open()
		e.Open = max(e.Open, len(open))
		for _, c := range open {
			_ = c.SetReadDeadline(past)
		}
		select {
		case <-s.ended:
			if e.Open == 0 {
				return err
			}
			return errors.Join(err, e)
		case <-second.C:
			e.Closed, e.Accepting = s.closeConns()
			return errors.Join(err, e)
		case <-again.C:
		}
	}
}

// Close closes the listeners and all connections at once, and waits for no
// Handler. It returns the errors of closing the listeners. Shutdown, called
// afterwards, waits for the Handlers.
func (s *Server) Close() error {
	err := s.begin()
	s.closeConns()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for l := range s.listeners {
		l.release()
	}
	return err
}

// A ShutdownError tells what Shutdown did when its ctx ended too early.
type ShutdownError struct {
	Open      int   // connections at the end of ctx, whose reads were ended
	Closed    int   // connections that were left a second later, and were closed
	Accepting int   // calls of Accept that had not returned by then, although their listener was closed
	Err       error // the error of ctx
}

func (e *ShutdownError) Error() string {
	text := fmt.Sprintf("drain: %v; open connections: %d, closed a second later: %d", e.Err, e.Open, e.Closed)
	if e.Accepting > 0 {
		text += fmt.Sprintf(", Accept calls left: %d", e.Accepting)
	}
	return text
}

func (e *ShutdownError) Unwrap() error { return e.Err }

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// begin starts draining and closes the listeners.
func (s *Server) begin() error {
	s.lock()
	if !isClosed(s.draining) {
		close(s.draining)
	}
	s.settle()
	var open []*listener
	for l := range s.listeners {
		open = append(open, l)
	}
	s.mu.Unlock()
	var errs []error
	for _, l := range open {
		errs = append(errs, l.shut())
	}
	return errors.Join(errs...)
}

// settle closes s.ended if draining has begun and nothing is left. The caller
// holds s.mu.
func (s *Server) settle() {
	if isClosed(s.draining) && s.accepting == 0 && len(s.conns) == 0 && !isClosed(s.ended) {
		close(s.ended)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// open returns the connections that have not ended.
func (s *Server) open() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	open := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		open = append(open, c)
	}
	return open
}

// closeConns closes the connections that have not ended, and those accepted from
// now on. It returns their number, and that of Accept calls in flight.
func (s *Server) closeConns() (closed, accepting int) {
	s.mu.Lock()
	s.cut, accepting = true, s.accepting
	s.mu.Unlock()
	open := s.open()
	for _, c := range open {
		// The innermost connection is closed, because closing a tls.Conn can wait
		// 5 s for its peer.
		nc := c.Conn
		for {
			outer, ok := nc.(interface{ NetConn() net.Conn })
			if !ok {
				break
			}
			nc = outer.NetConn()
		}
		_ = nc.Close()
	}
	return len(open), accepting
}

// A listener accepts from the embedded listener. Serve calls next. A library has
// the listener itself.
type listener struct {
	net.Listener
	s      *Server
	shut   func() error  // closes the embedded listener, once
	closed chan struct{} // closed by release
}

func (s *Server) add(ln net.Listener) *listener {
	l := &listener{Listener: ln, s: s, closed: make(chan struct{})}
	l.shut = sync.OnceValue(func() error {
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	s.lock()
	defer s.mu.Unlock()
	s.listeners[l] = struct{}{}
	if s.closed {
		l.release()
	}
	return l
}

// next returns the next connection. Its error is ErrServerClosed while draining.
// Otherwise it is an error of Accept that does not pass.
func (l *listener) next() (*conn, error) {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, maxPause) {
		if !l.s.enter() {
			return nil, ErrServerClosed
		}
		nc, err := l.Listener.Accept() // ended by shut
		c := l.s.leave(nc, err)
		switch {
		case c != nil:
			return c, nil
		case isClosed(l.s.draining):
			if err == nil { // accepted after the cut
				_ = nc.Close()
			}
			return nil, ErrServerClosed
		case !passes(err):
			return nil, err
		}
		if l.s.AcceptError != nil {
			l.s.AcceptError(err)
		}
		select {
		case <-time.After(pause):
		case <-l.s.draining:
		case <-l.closed:
		}
	}
}

// enter counts an Accept call. It returns false if draining has begun. Otherwise
// the caller must call leave after Accept.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if isClosed(s.draining) {
		return false
	}
	s.accepting++
	return true
}

// leave replaces a counted Accept call by the connection that the call returned.
// This is one step, so that Shutdown always sees one of the two. leave returns nil
// if there is nothing to serve.
func (s *Server) leave(nc net.Conn, err error) (c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepting--
	if err == nil && !s.cut {
		c = &conn{Conn: nc, s: s}
		s.conns[c] = struct{}{}
	}
	s.settle()
	return c
}

// passes reports whether Accept may succeed after err. It does if the system lacks
// something, or if a connection broke in the queue. See accept(2).
func passes(err error) bool {
	var t interface {
		Temporary() bool
		Timeout() bool
	}
	return errors.As(err, &t) && t.Temporary() && !t.Timeout() || // EMFILE, ENFILE, and errors of other listeners
		slices.ContainsFunc(passing, func(e error) bool { return errors.Is(err, e) })
}

// Accept is for libraries. It does not fail because of Shutdown.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.next()
	if err == ErrServerClosed {
		<-l.closed
		addr := l.Addr()
		return nil, &net.OpError{Op: "accept", Net: addr.Network(), Addr: addr, Err: net.ErrClosed}
	}
	if err != nil {
		return nil, err
	}
	switch nc := c.Conn.(type) {
	case *net.TCPConn:
		return tcpConn{nc, c}, nil
	case *net.UnixConn:
		return unixConn{nc, c}, nil
	}
	return c, nil
}

func (l *listener) Close() error {
	err := l.shut()
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.release()
	return err
}

// release lets Accept return. The caller holds l.s.mu.
func (l *listener) release() {
	if !isClosed(l.closed) {
		close(l.closed)
	}
	delete(l.s.listeners, l)
}

// A conn is a connection that is counted until it ends. Libraries get the conn
// itself, or a tcpConn or unixConn that wraps it.
type conn struct {
	net.Conn
	s *Server
}

// end closes c, and then removes it from the count.
func (c *conn) end() error {
	err := c.Conn.Close() // with TLS it may take 5 s, unless closeConns ends it
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	delete(c.s.conns, c)
	c.s.settle()
	return err
}

func (c *conn) Close() error      { return c.end() }
func (c *conn) NetConn() net.Conn { return c.Conn }

type tcpConn struct {
	*net.TCPConn
	c *conn
}

func (t tcpConn) Close() error      { return t.c.end() }
func (t tcpConn) NetConn() net.Conn { return t.TCPConn }

type unixConn struct {
	*net.UnixConn
	c *conn
}

func (u unixConn) Close() error      { return u.c.end() }
func (u unixConn) NetConn() net.Conn { return u.UnixConn }
