// Package httpdrain ends a net/http server without losing a request.
//
// [http.Server.Shutdown] drops connections that were accepted and not yet read. It
// closes idle connections while their clients are about to use them again, and
// drops requests that it has read in that moment. That hardly matters if the service
// ends for good. It matters if the process has been replaced, because clients
// should not notice that. A Drainer uses what HTTP provides for this:
//
//	srv := &http.Server{Handler: mux}
//	d := httpdrain.New(srv)
//	go srv.Serve(d.Listener(ln))
//	… // until this process is replaced or stopped
//	err := d.Shutdown(ctx)
//
// From the start of Shutdown on, every answer says "Connection: close". The
// client then makes its next request on a new connection, which the next process
// accepts. A connection without a request stays open for Drainer.Grace, so that
// its client can make one more request and gets this answer. The connection is
// closed only if it stays quiet for all of that time.
//
// An HTTP/2 client is sent GOAWAY twice, as RFC 9113, section 6.8, describes. The
// first GOAWAY asks the client to open no more streams. Streams that it opens
// before it reads the GOAWAY are served. A second later net/http sends the last
// GOAWAY.
//
// HTTP itself sets these limits:
//
//   - A request is lost if it is sent after Grace, while the close is on its way
//     to the client. So is a request whose header is still incomplete when Grace
//     is over.
//   - Pipelined requests behind an answer that says close are not read. Their
//     client has to send them again (RFC 9112, section 9.3.2).
//   - An HTTP/2 client has to send a request again if it opens a stream later than
//     a second after the first GOAWAY.
//   - HAProxy drops requests that it has not sent yet when the first GOAWAY
//     arrives. With "retry-on conn-failure empty-response" it sends them again.
//   - Shutdown waits for a hijacked connection as long as its handler runs. After
//     that the connection is the program's own.
//
// The package uses the standard library alone, and works with any listener. It
// is made for those of package ecdysis, but does not import it. It builds on
// every system. On systems other than Unix a request may be lost if it arrives
// just before the grace of its connection is over.
//
// docs/web.md is a guide, and says what to set in proxies.
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

// ErrMisused means that Shutdown could not see all connections or requests of its
// server, because New or Listener was not used correctly. The error of Shutdown
// wraps it, and its text names the mistake. The server has been shut down by its own
// Shutdown, and requests may have been lost. If the Handler was replaced after
// New, Serve also returns an error that wraps ErrMisused, at once.
var ErrMisused = errors.New("httpdrain: not all connections of the server are known")

// A Drainer ends one http.Server. It is made by New and must not be copied. Its
// methods may be called from several goroutines at once.
type Drainer struct {
	// Grace is the time in which a connection without a request may deliver the
	// complete header of one. After it, the connection is closed. The time starts
	// with Shutdown, or when the connection was accepted or its last answer was
	// sent, if that is later. Zero means DefaultGrace, and a negative value means
	// no grace. It must not be changed once Shutdown has been called.
	//
	// Grace should be longer than a client waits between two requests, and
	// shorter than a client waits before it gives up.
	Grace time.Duration

	srv         *http.Server
	http2       *http.Server // serves the HTTP/2 connections of srv; nil if srv does
	configure   sync.Once    // of http2
	handler     http.Handler // srv's own; nil means http.DefaultServeMux
	connState   func(net.Conn, http.ConnState)
	connContext func(context.Context, net.Conn) context.Context
	baseContext func(net.Listener) context.Context

	conns    sync.Map // from net.Conn to *conn, without those that were closed or hijacked
	handlers atomic.Int64
	draining chan struct{} // closed under mu

	accepted, reported atomic.Int64 // connections that Accept returned, and that were reported as StateNew
	hijacked           atomic.Bool  // a connection was hijacked
	late               atomic.Bool  // a connection was there before New

	probing sync.Mutex               // held while baseContextHook uses probed
	probed  atomic.Pointer[listener] // the listener whose Addr was called last

	mu        sync.Mutex // guards the fields below, and those of listeners
	began     time.Time  // when draining began, or zero
	wrapped   bool       // Listener was called
	listeners map[*listener]struct{}
	strays    int // calls of Serve with a listener that Listener has not returned
}

// New returns a Drainer for srv. It wraps srv's Handler, ConnState, ConnContext
// and BaseContext, which work as before. A handler gets the server's own
// ResponseWriter. Call New when srv is configured, and before Serve, ServeTLS or
// any other call on it. The wrapped fields must not be replaced afterwards.
//
// New also sets srv's TLSNextProto, if that is nil and HTTP/2 is not switched
// off. net/http serves HTTP/2 as before, through connections on which the first
// GOAWAY can be sent. It has srv's settings, except that SetKeepAlivesEnabled has
// no effect on it.
//
// If another package has set TLSNextProto, HTTP/2 is that package's. It then
// sends its only GOAWAY with the first answer while draining. A handler gets a
// ResponseWriter with all the methods of net/http's.
//
// A Drainer has no goroutine of its own. Shutdown starts one for each HTTP/2
// connection. It ends when GOAWAY is written or the connection is closed.
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

// Listener returns a listener that wraps ln. Pass it to srv.Serve or
// srv.ServeTLS in the place of ln, or to tls.NewListener, whose result goes to
// Serve. ln may also be the result of tls.NewListener. A server with several
// listeners needs a call for each.
//
// Accept returns ln's own connections, whose type must be comparable, as that of
// a pointer is. It returns ln's errors, except when ln is closed, by Shutdown or
// by another call. Accept then waits until the server is shut down or closed. So
// Serve does not return because a process was replaced. It returns
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
// that does not end by itself should return then, for example one for
// server-sent events or WebSocket. Functions registered by
// srv.RegisterOnShutdown run later, when all connections without HTTP/2 have
// ended.
func (d *Drainer) Draining() <-chan struct{} { return d.draining }

// Shutdown closes the listeners, and lets each connected client go on to the
// next process. It returns when no connection is left and no handler runs. That
// takes as long as the running handlers take, and Grace if a connection is quiet.
// It takes two or three seconds if an HTTP/2 client does not close its connection
// by itself. Shutdown calls srv.Shutdown.
//
// If ctx ends first, Shutdown calls srv.Shutdown at once, which closes idle
// connections. The error wraps ctx's error and says what was left. A connection
// with a request is still served after that. srv.Close ends it, or another call
// of Shutdown waits for it.
//
// An error that wraps ErrMisused reports a mistake in the program. Any other
// error comes from closing a listener.
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
	New    int // connections that have not sent a request yet
	Active int // connections with a request
	Idle   int // connections between two requests

	// Handlers is the number of calls of the handler that run. An HTTP/2
	// connection may have several. A hijacked connection is counted here alone.
	Handlers int
}

// String returns c as a part of a sentence.
func (c Counts) String() string {
	return fmt.Sprintf("%d new, %d active and %d idle connections, %d handlers", c.New, c.Active, c.Idle, c.Handlers)
}

// Counts returns what the server has left at this moment, by state. It may be
// called at any time. Its cost grows with the number of connections.
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
		_ = l.shut() // srv.Shutdown returns the error
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

// wait calls look until look is done or fails, or ctx ends. It polls, so that
// the hooks, which run for every request, need not signal anything.
func (d *Drainer) wait(ctx context.Context, look func(context.Context) (done bool, err error)) error {
	for {
		began := time.Now()
		if done, err := look(ctx); done || err != nil {
			return err
		}
		// A look takes long when there are many connections. Looks are then less
		// frequent, and the end is seen a little later.
		if !sleep(ctx, min(max(5*time.Millisecond, 10*time.Since(began)), 100*time.Millisecond)) {
			return d.ended(ctx)
		}
	}
}

func (d *Drainer) ended(ctx context.Context) error {
	return fmt.Errorf("httpdrain: %w; left: %v", ctx.Err(), d.Counts())
}

// sleep sleeps for t. It returns false if ctx ends first.
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

// look is done when nothing is left that srv.Shutdown would break. Then every
// accept loop is parked, which proves that every accepted connection has been
// reported. Also, Shutdown need not wait for any of the connections. look expires
// the connections whose grace is over.
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
	// The server resets the deadline when a connection becomes idle. So a
	// connection that is still there at the next look gets another deadline. They
	// get it in batches, because a server goroutine should close its connection
	// soon after expire has looked for unread bytes.
	const batch, pace = 32, time.Millisecond
	for i, c := range over {
		if i%batch == batch-1 && !sleep(ctx, pace) {
			break // wait sees that ctx has ended
		}
		c.expire()
	}
	return done, nil
}

func (d *Drainer) handlersDone(context.Context) (done bool, err error) {
	return d.handlers.Load() == 0, nil
}

// misuse returns an error if d is used wrongly, as far as that is known.
func (d *Drainer) misuse() error {
	d.mu.Lock()
	strays, wrapped := d.strays, d.wrapped
	d.mu.Unlock()
	if err := d.checkHandler(); err != nil {
		return err
	}
	switch {
	case strays > 0:
		return fmt.Errorf("%w: Serve was called with a listener that Drainer.Listener has not returned", ErrMisused)
	case d.late.Load() || d.reported.Load() > d.accepted.Load():
		return fmt.Errorf("%w: Serve was called before New, or ConnContext was replaced after it", ErrMisused)
	case !wrapped:
		return fmt.Errorf("%w: Drainer.Listener was not called, and Serve was not called after New", ErrMisused)
	}
	return nil
}

func (d *Drainer) checkHandler() error {
	if d.srv.Handler != http.Handler(handler{d}) {
		return fmt.Errorf("%w: Handler was replaced after New", ErrMisused)
	}
	return nil
}

// The hooks that New installs. Each calls the server's own hook.

func (d *Drainer) baseContextHook(ln net.Listener) context.Context {
	// ln is one of our listeners or may wrap one. A call of ln.Addr shows which
	// one, because it reaches listener.Addr.
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
		// A package that serves a hijacked connection as HTTP/2 reports it again.
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
	sentAway := false // the connection itself sends GOAWAY
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

// switches reports whether r, a request over HTTP/1, asks for another protocol
// on its connection. A request for h2c does not count, because net/http does not
// upgrade to h2c.
func switches(r *http.Request) bool {
	up := r.Header.Get("Upgrade")
	return r.Method == http.MethodConnect || up != "" && !strings.EqualFold(up, "h2c")
}

// A conn is a connection of the server.
type conn struct {
	d   *Drainer
	nc  net.Conn
	ctx context.Context // of its requests

	// mu guards the fields below, and the read deadline of a connection that is
	// not active. It is not held over a call that blocks.
	mu      sync.Mutex
	state   http.ConnState
	since   time.Time  // when it became new or idle; zero if that was before draining
	http2   bool       // HTTP/2, as far as the handshake or a request has shown
	frames  *frameConn // the connection that is served, if this package serves it as HTTP/2
	away    time.Time  // when the first GOAWAY was wanted
	asked   bool       // look has asked for the handshake's result
	expired bool       // expire has set the read deadline
}

// enter records a state that the server's own goroutine reports.
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
		// The request was read just before expire. It gets its full time.
		c.expired = false
		var t time.Time
		if limit := c.d.srv.ReadTimeout; limit > 0 {
			t = time.Now().Add(limit)
		}
		_ = c.nc.SetReadDeadline(t)
	}
}

// look reports whether Shutdown has to wait for c, and whether c's grace is over
// so that c must expire. If c is HTTP/2, look has the first GOAWAY sent.
func (c *conn) look(began, now time.Time, grace time.Duration) (wait, expire bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// On a new connection ConnectionState would wait for the end of the
	// handshake.
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

// expire makes the server's own goroutine close the connection if it still waits
// for a request. If the goroutine has just read a request, it reports the
// request and serves it.
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

// A listener is what Listener returns. After draining has begun, its accept loops
// wait until the server is shut down, and end then.
type listener struct {
	net.Listener
	d      *Drainer
	once   sync.Once
	err    error         // the result of closing, valid after once
	closed chan struct{} // closed under d.mu when Close is called

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

// enter begins a call of Accept. The first call fails if the server's Handler is
// not the Drainer's. If baseContextHook has taken a wrapper of l for another
// listener, the first call corrects that.
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
