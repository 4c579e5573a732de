package httpdrain

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"math"
	"net"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// net/http sends one GOAWAY, which names the last stream that it has seen. It
// ignores streams that the client has opened meanwhile. RFC 9113, section 6.8,
// describes an earlier GOAWAY, which names the highest possible stream. It asks
// the client to open no more streams, and those opened before the client reads it
// are still served.
//
// This file sends the first GOAWAY, because net/http does not. HTTP/2 connections
// are served by an http.Server of the package. Its connections are frameConns,
// which know where a frame ends and write GOAWAY there.

// awayTime is the time from the first GOAWAY to the last one, in which the first
// can reach the client. net/http waits as long after its own GOAWAY before it
// closes a connection.
const awayTime = time.Second

// preface is what an HTTP/2 client sends first.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// prefaceTimeout is the time in which the preface must arrive, as in net/http.
const prefaceTimeout = 10 * time.Second

// Keys of http.Server.TLSNextProto. net/http uses the second one to pass on a
// connection without TLS, after it has read the preface. The connection is the
// UnencryptedNetConn of the connection that the tls.Conn wraps.
const (
	protoHTTP2            = "h2"
	protoUnencryptedHTTP2 = "unencrypted_http2"
)

// takeHTTP2 makes the server pass its HTTP/2 connections to serveHTTP2, unless
// the server has no HTTP/2 or another package serves it.
func (d *Drainer) takeHTTP2() {
	p := d.srv.Protocols
	if d.srv.TLSNextProto != nil || p != nil && !p.HTTP2() && !p.UnencryptedHTTP2() || !hasHTTP2() {
		return
	}
	d.srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
		protoHTTP2:            d.serveHTTP2,
		protoUnencryptedHTTP2: d.serveHTTP2,
	}
	d.http2 = new(http.Server)
	d.srv.RegisterOnShutdown(func() {
		// d.srv waits for the end of the connections.
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = d.http2.Shutdown(ctx)
	})
}

// hasHTTP2 reports whether net/http has HTTP/2 in this program. A build tag can
// leave it out, and GODEBUG can switch it off.
var hasHTTP2 = sync.OnceValue(func() bool {
	srv := &http.Server{Protocols: onlyUnencryptedHTTP2()}
	_ = srv.Serve(&oneConn{}) // sets up HTTP/2, and fails
	_, ok := srv.TLSNextProto[protoHTTP2]
	return ok
})

func onlyUnencryptedHTTP2() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// configureHTTP2 copies the settings of d.srv to d.http2.
func (d *Drainer) configureHTTP2() {
	from, to := reflect.ValueOf(d.srv).Elem(), reflect.ValueOf(d.http2).Elem()
	for i := range from.NumField() {
		if from.Type().Field(i).IsExported() {
			to.Field(i).Set(from.Field(i))
		}
	}
	d.http2.Protocols = onlyUnencryptedHTTP2()
	d.http2.TLSNextProto, d.http2.TLSConfig, d.http2.BaseContext = nil, nil, nil
	d.http2.ReadHeaderTimeout = prefaceTimeout // has no other use in this server
	d.http2.ConnContext = func(_ context.Context, nc net.Conn) context.Context {
		return nc.(*frameConn).c.ctx
	}
	d.http2.ConnState = func(nc net.Conn, state http.ConnState) {
		switch f := nc.(*frameConn); state {
		case http.StateNew: // d.srv has reported it
		case http.StateClosed: // d.srv reports it
			close(f.closed)
		default:
			d.connStateHook(f.c.nc, state)
		}
	}
	d.http2.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f := r.Context().Value(connKey{d}).(*conn).frames
		f.requested.Store(true)
		if d.isDraining() {
			f.away.Store(true) // GOAWAY is written with the answer, or before
		}
		// The Request is changed in place, because net/http cleans up after this
		// one and not after a copy.
		*r = *r.WithContext(context.WithValue(r.Context(), http.ServerContextKey, d.srv))
		f.h.ServeHTTP(w, r)
	})
}

// serveHTTP2 serves an HTTP/2 connection. See http.Server.TLSNextProto.
func (d *Drainer) serveHTTP2(_ *http.Server, tc *tls.Conn, h http.Handler) {
	f := &frameConn{Conn: tc, h: h, closed: make(chan struct{})}
	if in, ok := tc.NetConn().(interface{ UnencryptedNetConn() net.Conn }); ok {
		f.Conn, f.unread = in.UnencryptedNetConn(), preface
	}
	d.configure.Do(d.configureHTTP2)
	v, ok := d.conns.Load(f.Conn)
	if !ok { // ConnContext was replaced after New
		d.late.Store(true)
		f.Conn.Close()
		return
	}
	f.c = v.(*conn)
	f.c.mu.Lock()
	f.c.http2, f.c.frames = true, f
	f.c.mu.Unlock()
	ln := &oneConn{c: f}
	_ = d.http2.Serve(ln) // returns when it has accepted the connection
	if ln.c != nil {
		f.Conn.Close() // the server has been shut down
		return
	}
	<-f.closed
}

// oneConn is a listener that returns one connection, or none if c is nil.
type oneConn struct{ c net.Conn }

func (l *oneConn) Accept() (c net.Conn, err error) {
	if l.c == nil {
		return nil, net.ErrClosed
	}
	c, l.c = l.c, nil
	return c, nil
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// A frameConn is a connection to which a server writes HTTP/2 frames.
type frameConn struct {
	net.Conn // hides the methods that would make net/http take it for a tls.Conn
	c        *conn
	h        http.Handler
	closed   chan struct{}
	unread   string // is read before the bytes from Conn

	requested atomic.Bool // a request has arrived
	away      atomic.Bool // GOAWAY is wanted

	mu  sync.Mutex // guards out, and is held while frames are written
	out frames
}

func (f *frameConn) Read(b []byte) (int, error) {
	if f.unread == "" {
		return f.Conn.Read(b)
	}
	n := copy(b, f.unread)
	f.unread = f.unread[n:]
	return n, nil
}

func (f *frameConn) Write(b []byte) (n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away.Load() {
		if n, err = f.put(b[:f.out.rest(b)]); err != nil {
			return n, err
		}
		f.sayAway()
	}
	m, err := f.put(b[n:])
	if err == nil {
		f.sayAway()
	}
	return n + m, err
}

// sendAway asks the client to open no more streams. It blocks while the
// connection takes no bytes.
func (f *frameConn) sendAway() {
	f.away.Store(true)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sayAway()
}

// sayAway writes GOAWAY if it is wanted, was not written, and no frame is
// incomplete. If a frame is incomplete, a later Write sends GOAWAY. f.mu is held.
func (f *frameConn) sayAway() {
	if !f.away.Load() || !f.out.between || f.out.goAway {
		return
	}
	b := binary.BigEndian.AppendUint32(nil, 8<<8|frameGoAway)
	b = append(b, 0, 0, 0, 0, 0) // no flags, and the stream of the connection
	b = binary.BigEndian.AppendUint32(b, math.MaxInt32)
	b = binary.BigEndian.AppendUint32(b, 0) // no error
	if _, err := f.put(b); err != nil {
		f.Conn.Close() // a frame may be incomplete, so the connection is useless
	}
}

func (f *frameConn) put(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := f.Conn.Write(b)
	f.out.pass(b[:n])
	return n, err
}

const (
	headerSize  = 9
	frameGoAway = 7
)

// frames follows the frames that are written on a connection. See RFC 9113,
// section 4.1.
type frames struct {
	between bool // a frame has ended, and none has begun
	goAway  bool // GOAWAY was written
	header  [headerSize]byte
	have    int // bytes of header that were written
	left    int // bytes of the payload that are still to be written
}

// rest returns how many bytes at the start of b belong to a frame that began
// before b.
func (s *frames) rest(b []byte) int {
	if s.have == 0 {
		return 0
	}
	after := *s
	for n := 0; n < len(b); {
		n += after.step(b[n:])
		if after.between {
			return n
		}
	}
	return len(b)
}

// pass records that b was written.
func (s *frames) pass(b []byte) {
	for len(b) > 0 {
		b = b[s.step(b):]
	}
}

// step records the part of b that belongs to one header or one payload, and
// returns its length.
func (s *frames) step(b []byte) (n int) {
	s.between = false
	if s.have < headerSize {
		n = copy(s.header[s.have:], b)
		if s.have += n; s.have < headerSize {
			return n
		}
		s.left = int(binary.BigEndian.Uint32(s.header[:]) >> 8)
		s.goAway = s.goAway || s.header[3] == frameGoAway
	} else {
		n = min(s.left, len(b))
		s.left -= n
	}
	if s.left == 0 {
		s.have, s.between = 0, true
	}
	return n
}

// http2Writer has the methods of net/http's ResponseWriter for HTTP/2.
type http2Writer interface {
	http.ResponseWriter
	http.Flusher
	http.Pusher
	io.StringWriter
	CloseNotify() <-chan bool
	EnableFullDuplex() error
	FlushError() error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// A goAwayWriter makes the server send GOAWAY with the answer. It sets the field
// "Connection: close", which makes the server send GOAWAY and which the server
// removes from the header. A header with a status below 200 must not have the
// field, because the server would not remove it there.
type goAwayWriter struct {
	http2Writer
	said bool
}

func (w *goAwayWriter) sayClose() {
	if !w.said {
		w.said = true
		w.Header().Set("Connection", "close")
	}
}

func (w *goAwayWriter) WriteHeader(status int) {
	if status >= 200 {
		w.sayClose()
	}
	w.http2Writer.WriteHeader(status)
}

func (w *goAwayWriter) Write(b []byte) (int, error) {
	w.sayClose()
	return w.http2Writer.Write(b)
}

func (w *goAwayWriter) WriteString(s string) (int, error) {
	w.sayClose()
	return w.http2Writer.WriteString(s)
}

func (w *goAwayWriter) Flush() {
	w.sayClose()
	w.http2Writer.Flush()
}

func (w *goAwayWriter) FlushError() error {
	w.sayClose()
	return w.http2Writer.FlushError()
}

// Unwrap is for http.ResponseController.
func (w *goAwayWriter) Unwrap() http.ResponseWriter { return w.http2Writer }
