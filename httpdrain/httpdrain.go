// Package httpdrain ends a net/http server without losing a request.
//
// [http.Server.Shutdown] drops connections that were accepted and not yet read,
// closes idle ones while their clients are about to use them again, and drops
// requests that it has read in that moment. That does not matter much to a
// program that ends for good. It does to one that has been replaced: its
// clients have no reason to see anything. A Drainer goes about it in the way
// that HTTP provides:
//
//	srv := &http.Server{Handler: mux}
//	d := httpdrain.New(srv)
//	go srv.Serve(d.Listener(ln))
//	… // until this process has been replaced or is to stop
//	err := d.Shutdown(ctx)
//
// From the start of Shutdown on, every answer says "Connection: close": the
// client makes its next request on a new connection, which is the next
// process's. A connection on which nothing is going on is left open for a while,
// Drainer.Grace, for its client to make the request that is answered so. Only
// one that stays quiet for all of that time is closed.
//
// Over HTTP/2 the client is sent GOAWAY twice, as RFC 9113, section 6.8, has it.
// The first one asks it to open no more streams, and those that cross it are
// served. The last one, which net/http sends, follows a second later.
//
// What cannot be promised, by anybody who speaks HTTP:
//
//   - A request that is sent after Grace, while the close is on its way to its
//     client, is lost; so is one whose header is still incomplete then.
//   - Pipelined requests behind an answer that says close are not read. Their
//     client has to send them again (RFC 9112, section 9.3.2).
//   - An HTTP/2 client that opens a stream a second after it was asked not to has
//     to send that request again. HAProxy also gives up requests that it has not
//     sent yet when the first GOAWAY comes, and sends them again if it is told
//     to: "retry-on conn-failure empty-response".
//   - A hijacked connection is waited for as long as its handler runs. One whose
//     handler has returned is the program's own.
//
// The package uses the standard library alone, and works with any listener; it
// is made for those of package ecdysis, but does not import it. It builds on
// every system. On those that are not Unix a request may be lost that arrives
// just before the grace of its connection is over.
package httpdrain

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// DefaultGrace is the grace of a Drainer whose Grace is zero.
const DefaultGrace = 5 * time.Second

// ErrMisused is wrapped by the error of a Shutdown that could not see all
// connections or requests of its server, because New or Listener was not used
// as it must be. The error says which. The server has been shut down by its own
// Shutdown, and requests may have been lost. Serve returns such an error at
// once if the Handler was replaced after New.
var ErrMisused = errors.New("httpdrain: not all connections of the server are known")

// A Drainer ends one http.Server. It is made by New and must not be copied. Its
// methods may be called from several goroutines at once.
type Drainer struct {
	// Grace is the time that a connection without a request has, from the
	// start of Shutdown, or from when it was accepted or its last answer was
	// sent if that is later, to deliver the complete header of one. After it,
	// the connection is closed. 0: DefaultGrace. Below 0: none. It must not be
	// changed once Shutdown has been called.
	//
	// It should be longer than a client thinks between two requests, and
	// shorter than a client takes to give up.
	Grace time.Duration

	srv         *http.Server
	http2       *http.Server // serves the HTTP/2 connections of srv; nil: srv does
	configure   sync.Once    // http2
	handler     http.Handler // srv's own; nil: http.DefaultServeMux
	connState   func(net.Conn, http.ConnState)
	connContext func(context.Context, net.Conn) context.Context
	baseContext func(net.Listener) context.Context

	conns    sync.Map // net.Conn to *conn: those that are not closed or hijacked
	handlers atomic.Int64
	draining chan struct{} // closed under mu

	accepted, reported atomic.Int64 // connections: by Accept, as StateNew
	hijacked           atomic.Bool  // ever
	late               atomic.Bool  // a connection was there before New

	probing sync.Mutex               // held while probed is in use by baseContextHook
	probed  atomic.Pointer[listener] // whose Addr was called last

	mu        sync.Mutex // guards what follows, and the fields of listeners
	began     time.Time  // of draining; zero: not yet
	wrapped   bool       // Listener was called
	listeners map[*listener]struct{}
	strays    int // calls of Serve with a listener that is not one of ours
}

// New returns a Drainer for srv. It wraps srv's Handler, ConnState,
// ConnContext and BaseContext, which go on working as they are: a handler gets
// the server's own ResponseWriter. So New is called when srv is configured, and
// before Serve, ServeTLS or any other call on it; those fields must not be
// replaced afterwards.
//
// If srv's TLSNextProto is nil, and HTTP/2 is not switched off, New sets that
// field, too: HTTP/2 is served by net/http as before, through connections on
// which the first GOAWAY can be sent. Its settings are srv's, but that
// SetKeepAlivesEnabled has no effect on it. The HTTP/2 of another package, which
// has set TLSNextProto, sends its only GOAWAY with the first answer while
// draining; there a handler gets a ResponseWriter that has all of the methods of
// net/http's.
//
// A Drainer has no goroutine of its own. Shutdown starts one for each HTTP/2
// connection, which ends when GOAWAY is written or the connection is closed.
func New(srv *http.Server) *Drainer {
	d := &Drainer{
		srv:         srv,
		handler:     srv.Handler,
		connState:   srv.ConnState,
		connContext: srv.ConnContext,
		baseContext: srv.BaseContext,
		draining:    make(chan struct{}),
		listeners:   make(map[*listener]struct{}),
	}
	srv.Handler = handler{d}
	srv.ConnState = d.connStateHook
	srv.ConnContext = d.connContextHook
	srv.BaseContext = d.baseContextHook
	d.takeHTTP2()
	return d
}

// Listener returns the listener that srv.Serve or srv.ServeTLS must get in the
// place of ln, or that tls.NewListener must get whose result goes to Serve. ln
// may also be the result of tls.NewListener. A server with several listeners
// needs a call for each.
//
// The connections are ln's own, of a comparable type, as pointers are. Accept
// returns ln's errors, but for that of its end: when ln is closed, by Shutdown
// or by anyone else, Accept waits until the server is shut down or closed. So
// Serve does not return because a process was replaced; it returns
// http.ErrServerClosed near the end of Shutdown. Closing the returned listener
// closes ln.
func (d *Drainer) Listener(ln net.Listener) net.Listener {
	l := &listener{Listener: ln, d: d, closed: make(chan struct{})}
	d.mu.Lock()
	d.wrapped = true
	d.listeners[l] = struct{}{}
	begun := !d.began.IsZero()
	d.mu.Unlock()
	if begun {
		_ = l.shut()
	}
	return l
}

// Draining returns a channel that is closed when Shutdown begins. A handler
// that does not end by itself, such as one for server-sent events or for
// WebSocket, ends when it is. Functions registered by srv.RegisterOnShutdown
// run later, when all connections without HTTP/2 are through.
func (d *Drainer) Draining() <-chan struct{} { return d.draining }

// Shutdown closes the listeners, lets every client that is connected make its
// way to another process, and returns when no connection is left and no handler
// runs. That takes as long as the handlers that run, Grace if a connection is
// quiet, and two or three seconds if an HTTP/2 client does not close its
// connection by itself. srv.Shutdown is a part of it.
//
// If ctx ends before that, srv.Shutdown is called at once, which closes what is
// idle, and the error wraps ctx's and tells what was left. A connection with a
// request is still served then; srv.Close ends it, and Shutdown may be called
// again to wait for it. An error that wraps ErrMisused tells of a mistake in
// the program. Any other comes from closing a listener.
//
// Shutdown may be called more than once, also at the same time.
func (d *Drainer) Shutdown(ctx context.Context) error {
	d.begin()
	err := d.wait(ctx, d.look)
	if err != nil && errors.Is(err, ctx.Err()) {
		_ = d.srv.Shutdown(ctx)
		return err
	}
	if serr := d.srv.Shutdown(ctx); serr != nil {
		if errors.Is(serr, ctx.Err()) {
			return errors.Join(err, d.ended(ctx))
		}
		err = errors.Join(err, fmt.Errorf("httpdrain: %w", serr))
	}
	return errors.Join(err, d.wait(ctx, d.handlersDone))
}

// Counts is what a server has left.
type Counts struct {
	New      int // connections that have not sent a request yet
	Active   int // connections with a request
	Idle     int // connections between two requests
	Handlers int // calls of the handler that run: several on an HTTP/2 connection, and those that have hijacked one
}

// String returns c as a part of a sentence.
func (c Counts) String() string {
	return fmt.Sprintf("%d new, %d active and %d idle connections, %d handlers", c.New, c.Active, c.Idle, c.Handlers)
}

// Counts returns what the server has left at this moment, by state. It may be
// called at any time, and looks at each connection.
func (d *Drainer) Counts() Counts {
	n := Counts{Handlers: int(d.handlers.Load())}
	d.conns.Range(func(_, v any) bool {
		c := v.(*conn)
		c.mu.Lock()
		defer c.mu.Unlock()
		switch c.state {
		case http.StateNew:
			n.New++
		case http.StateActive:
			n.Active++
		case http.StateIdle:
			n.Idle++
		}
		return true
	})
	return n
}

// begin starts draining, unless it has begun.
func (d *Drainer) begin() {
	d.mu.Lock()
	if d.began.IsZero() {
		d.began = time.Now()
		close(d.draining)
	}
	var open []*listener
	for l := range d.listeners {
		open = append(open, l)
	}
	d.mu.Unlock()
	for _, l := range open {
		_ = l.shut() // its error is srv.Shutdown's
	}
}

func (d *Drainer) isDraining() bool {
	select {
	case <-d.draining:
		return true
	default:
		return false
	}
}

// wait calls look until it is done, fails, or ctx ends. It asks again and again
// so that the hooks, which run for every request, have nobody to tell.
func (d *Drainer) wait(ctx context.Context, look func(context.Context) (done bool, err error)) error {
	for {
		began := time.Now()
		if done, err := look(ctx); done || err != nil {
			return err
		}
		// A look takes its time when there are many connections: then others
		// are fewer, and the end is a little late.
		if !sleep(ctx, min(max(5*time.Millisecond, 10*time.Since(began)), 100*time.Millisecond)) {
			return d.ended(ctx)
		}
	}
}

func (d *Drainer) ended(ctx context.Context) error {
	return fmt.Errorf("httpdrain: %w; left: %v", ctx.Err(), d.Counts())
}

// sleep reports whether ctx lets it sleep for so long.
func sleep(ctx context.Context, t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// look is done when nothing is left that srv.Shutdown would break: when every
// accept loop has ended, which is the proof that every accepted connection has
// been reported, and there is no connection but for HTTP/2. It ends those whose
// grace is over.
func (d *Drainer) look(ctx context.Context) (done bool, err error) {
	if err := d.misuse(); err != nil {
		return false, err
	}
	d.mu.Lock()
	began := d.began
	done = true
	for l := range d.listeners {
		done = done && l.parked >= l.loops
	}
	d.mu.Unlock()
	if done && d.reported.Load() == 0 && d.accepted.Load() > 0 {
		return false, fmt.Errorf("%w: ConnState was replaced after New", ErrMisused)
	}

	grace := d.Grace
	if grace == 0 {
		grace = DefaultGrace
	}
	var over []*conn
	now := time.Now()
	d.conns.Range(func(_, v any) bool {
		c := v.(*conn)
		wait, expire := c.look(began, now, grace)
		done = done && !wait
		if expire {
			over = append(over, c)
		}
		return true
	})
	// The server resets deadlines when a connection becomes idle, so those that
	// are still there at the next look get another one. They do not all get it
	// at once: a server goroutine should close its connection soon after a look
	// at what has arrived on it.
	const batch, pace = 32, time.Millisecond
	for i, c := range over {
		if i%batch == batch-1 && !sleep(ctx, pace) {
			break // wait finds out
		}
		c.expire()
	}
	return done, nil
}

func (d *Drainer) handlersDone(context.Context) (done bool, err error) {
	return d.handlers.Load() == 0, nil
}

// misuse returns what is wrong with the use of d, as far as it is known.
func (d *Drainer) misuse() error {
	d.mu.Lock()
	strays, wrapped := d.strays, d.wrapped
	d.mu.Unlock()
	if err := d.checkHandler(); err != nil {
		return err
	}
	switch {
	case strays > 0:
		return fmt.Errorf("%w: Serve has got a listener that is not of Drainer.Listener", ErrMisused)
	case d.late.Load() || d.reported.Load() > d.accepted.Load():
		return fmt.Errorf("%w: Serve was called before New, or ConnContext was replaced after it", ErrMisused)
	case !wrapped:
		return fmt.Errorf("%w: Drainer.Listener was not called, and Serve not after New", ErrMisused)
	}
	return nil
}

func (d *Drainer) checkHandler() error {
	if d.srv.Handler != http.Handler(handler{d}) {
		return fmt.Errorf("%w: Handler was replaced after New", ErrMisused)
	}
	return nil
}

// The hooks that New puts in the place of the server's own, and around them.

func (d *Drainer) baseContextHook(ln net.Listener) context.Context {
	// Which of our listeners ln is, or is a wrapper of, shows when it is asked
	// for its address.
	d.probing.Lock()
	d.probed.Store(nil)
	_ = ln.Addr()
	l := d.probed.Load()
	d.probing.Unlock()

	d.mu.Lock()
	if l != nil {
		l.loops++
	} else {
		d.strays++
	}
	d.mu.Unlock()
	if d.baseContext != nil {
		return d.baseContext(ln)
	}
	return context.Background()
}

// connKey is the key of a *conn in the contexts of its requests.
type connKey struct{ d *Drainer }

func (d *Drainer) connContextHook(ctx context.Context, nc net.Conn) context.Context {
	if d.connContext != nil {
		if ctx = d.connContext(ctx, nc); ctx == nil {
			return nil
		}
	}
	c := &conn{d: d, nc: nc}
	c.ctx = context.WithValue(ctx, connKey{d}, c)
	d.conns.Store(nc, c)
	return c.ctx
}

func (d *Drainer) connStateHook(nc net.Conn, state http.ConnState) {
	d.note(nc, state)
	if d.connState != nil {
		d.connState(nc, state)
	}
}

func (d *Drainer) note(nc net.Conn, state http.ConnState) {
	v, ok := d.conns.Load(nc)
	if !ok {
		// Packages that serve a hijacked connection as HTTP/2 report it again.
		if !d.hijacked.Load() {
			d.late.Store(true)
		}
		return
	}
	c := v.(*conn)
	switch state {
	case http.StateHijacked:
		d.hijacked.Store(true)
		d.conns.Delete(nc)
	case http.StateClosed:
		d.conns.Delete(nc)
	case http.StateNew:
		d.reported.Add(1)
		c.enter(state)
	default:
		c.enter(state)
	}
}

// handler is the server's Handler.
type handler struct{ d *Drainer }

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.d.serveHTTP(w, r) }

func (d *Drainer) serveHTTP(w http.ResponseWriter, r *http.Request) {
	d.handlers.Add(1)
	defer d.handlers.Add(-1)
	h := d.handler
	if h == nil {
		h = http.DefaultServeMux
	}
	sentAway := false // by its connection
	if r.ProtoMajor == 2 {
		if c, ok := r.Context().Value(connKey{d}).(*conn); ok {
			if sentAway = c.frames != nil; !sentAway && r.TLS == nil {
				c.mu.Lock()
				c.http2 = true
				c.mu.Unlock()
			}
		}
	}
	if sentAway || !d.isDraining() {
		h.ServeHTTP(w, r)
		return
	}
	switch {
	case r.ProtoMajor == 2:
		if hw, ok := w.(http2Writer); ok {
			g := &goAwayWriter{http2Writer: hw}
			h.ServeHTTP(g, r)
			g.sayClose()
			return
		}
	case !switches(r):
		w.Header().Set("Connection", "close")
	}
	h.ServeHTTP(w, r)
}

// switches reports whether r, over HTTP/1, asks for another protocol on its
// connection. net/http refuses to upgrade to h2c, and so clients ask in vain.
func switches(r *http.Request) bool {
	up := r.Header.Get("Upgrade")
	return r.Method == http.MethodConnect || up != "" && !strings.EqualFold(up, "h2c")
}

// A conn is a connection of the server.
type conn struct {
	d   *Drainer
	nc  net.Conn
	ctx context.Context // of its requests

	// mu guards what follows, and the read deadline of a connection that is
	// not active. It is held over no call that blocks.
	mu      sync.Mutex
	state   http.ConnState
	since   time.Time  // became new or idle; zero: before draining
	http2   bool       // by what its handshake or a request has told
	frames  *frameConn // what is served, if it is HTTP/2 and this package's to serve
	away    time.Time  // when its client began to be sent away
	asked   bool       // the handshake has been asked
	expired bool       // expire has set the read deadline
}

// enter notes a state that the server's own goroutine reports.
func (c *conn) enter(state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = state
	if state != http.StateActive {
		if c.d.isDraining() {
			c.since = time.Now()
		}
		return
	}
	if c.expired {
		// The request was read just before: it has all its time.
		c.expired = false
		var t time.Time
		if limit := c.d.srv.ReadTimeout; limit > 0 {
			t = time.Now().Add(limit)
		}
		_ = c.nc.SetReadDeadline(t)
	}
}

// look returns whether Shutdown has to wait for c, and whether its grace is over
// and it is to be closed. It sends the client away that speaks HTTP/2.
func (c *conn) look(began, now time.Time, grace time.Duration) (wait, expire bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// For a new connection ConnectionState would wait until the handshake is
	// done.
	if tc, ok := c.nc.(*tls.Conn); ok && !c.asked && c.state != http.StateNew {
		c.asked = true
		c.http2 = tc.ConnectionState().NegotiatedProtocol == "h2"
	}
	if c.since.After(began) {
		began = c.since
	}
	within := now.Sub(began) < grace
	switch {
	case !c.http2 || c.state == http.StateNew:
		return true, c.state != http.StateActive && !within
	case c.frames == nil:
		return c.state != http.StateActive && within, false
	case !c.frames.requested.Load():
		return within, false
	}
	if c.away.IsZero() {
		c.away = now
		go c.frames.sendAway()
	}
	return now.Sub(c.away) < min(grace, awayTime), false
}

// expire makes the server's own goroutine, which waits for a request, close the
// connection. One that has just read a request reports it, and goes on.
func (c *conn) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == http.StateActive || hasUnread(c.nc) {
		return
	}
	c.expired = true
	_ = c.nc.SetReadDeadline(past)
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// A listener is what Serve gets. Its accept loops end when the server is shut
// down, and wait before that.
type listener struct {
	net.Listener
	d      *Drainer
	once   sync.Once
	err    error         // of closing, after once
	closed chan struct{} // closed under d.mu, when Close is called

	loops, parked int  // accept loops, and how many of them wait; guarded by d.mu
	entered       bool // Accept was called; guarded by d.mu
}

func (l *listener) Addr() net.Addr {
	l.d.probed.Store(l)
	return l.Listener.Addr()
}

func (l *listener) Accept() (net.Conn, error) {
	if err := l.enter(); err != nil {
		return nil, err
	}
	c, err := l.Listener.Accept()
	if err == nil {
		l.d.accepted.Add(1)
		return c, nil
	}
	if !errors.Is(err, net.ErrClosed) && !l.d.isDraining() {
		return nil, err
	}
	l.d.mu.Lock()
	l.parked++
	l.d.mu.Unlock()
	<-l.closed
	return nil, err
}

// enter begins a call of Accept. The first one notes that a listener which
// seemed to be foreign to baseContextHook was a wrapper of l, and fails if the
// server's Handler is not the Drainer's.
func (l *listener) enter() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	if l.loops == 0 {
		l.loops = 1
		l.d.strays = max(0, l.d.strays-1)
	}
	if l.entered {
		return nil
	}
	l.entered = true
	return l.d.checkHandler()
}

// shut closes what l wraps.
func (l *listener) shut() error {
	l.once.Do(func() {
		if err := l.Listener.Close(); !errors.Is(err, net.ErrClosed) {
			l.err = err
		}
	})
	return l.err
}

func (l *listener) Close() error {
	err := l.shut()
	l.d.mu.Lock()
	if _, open := l.d.listeners[l]; open {
		delete(l.d.listeners, l)
		close(l.closed)
	}
	l.d.mu.Unlock()
	return err
}
