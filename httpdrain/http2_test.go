package httpdrain_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/httpdrain"
)

// The ways in which a server gets TLS, and HTTP/2 without TLS.
var ways = map[string]func(s *site, cert string, ln net.Listener) error{
	"ServeTLS": func(s *site, cert string, ln net.Listener) error {
		return s.srv.ServeTLS(s.d.Listener(ln), cert, cert+".key")
	},
	"TLS outside": func(s *site, cert string, ln net.Listener) error {
		return s.srv.Serve(tls.NewListener(s.d.Listener(ln), tlsConfig(s.t, cert)))
	},
	"TLS inside": func(s *site, cert string, ln net.Listener) error {
		return s.srv.Serve(s.d.Listener(tls.NewListener(ln, tlsConfig(s.t, cert))))
	},
	"h2c": func(s *site, cert string, ln net.Listener) error {
		return s.srv.Serve(s.d.Listener(ln))
	},
}

func tlsConfig(t *testing.T, path string) *tls.Config {
	cert, err := tls.LoadX509KeyPair(path, path+".key")
	if err != nil {
		t.Error(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
}

// another is a server whose HTTP/2 is another package's.
const another = "another"

// anothersHTTP2 takes the HTTP/2 of another http.Server. A program would use that
// of golang.org/x/net/http2.
func anothersHTTP2(t *testing.T) map[string]func(*http.Server, *tls.Conn, http.Handler) {
	t.Helper()
	srv := new(http.Server)
	closed := listen(t)
	closed.Close()
	_ = srv.Serve(closed) // sets up HTTP/2
	if srv.TLSNextProto["h2"] == nil || runtime.Version() >= "go1.27" {
		t.Skip("this net/http keeps its HTTP/2 to itself, so that there is no other package's without a dependency")
	}
	return srv.TLSNextProto
}

// eachWay calls f for each of the ways, and for the additional ones.
func eachWay(t *testing.T, f func(t *testing.T, way string), more ...string) {
	t.Parallel()
	for way := range ways {
		more = append(more, way)
	}
	for _, way := range more {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			f(t, way)
		})
	}
}

func newTLSSite(t *testing.T, way string, grace time.Duration, h http.Handler) *site {
	t.Helper()
	cert, _ := certificate(t)
	s := &site{t: t, srv: &http.Server{Handler: h, ErrorLog: discard}, served: make(chan error, 1)}
	if way == "h2c" {
		s.srv.Protocols = new(http.Protocols)
		s.srv.Protocols.SetHTTP1(true)
		s.srv.Protocols.SetUnencryptedHTTP2(true)
	}
	serve := ways[way]
	if way == another {
		s.srv.TLSNextProto = anothersHTTP2(t)
		serve = ways["ServeTLS"]
	}
	s.d = httpdrain.New(s.srv)
	s.d.Grace = grace
	ln := listen(t)
	s.addr = ln.Addr().String()
	go func() { s.served <- serve(s, cert, ln) }()
	t.Cleanup(func() { s.srv.Close() })
	return s
}

// dialTLS connects, and makes the handshake if the way has one.
func (s *site) dialTLS(way, proto string) *rawConn {
	s.t.Helper()
	c := s.dial()
	if way == "h2c" {
		return c
	}
	tc := tls.Client(c.Conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{proto}})
	if err := tc.Handshake(); err != nil {
		s.t.Fatal(err)
	}
	return &rawConn{tc, bufio.NewReader(tc)}
}

// HTTP/1 is drained over TLS as without TLS.
func TestTLS(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		s := newTLSSite(t, way, 500*time.Millisecond, ok)
		idle, fresh, quiet := s.dialTLS(way, "http/1.1"), s.dialTLS(way, "http/1.1"), s.dialTLS(way, "http/1.1")
		silent := s.dial() // without a handshake
		get(t, idle, false)
		s.counts(httpdrain.Counts{New: 3, Idle: 1})
		result := s.shutdown()
		get(t, idle, true)
		get(t, fresh, true)
		ends(t, quiet)
		ends(t, silent)
		s.over(result)
	})
}

// A frameConn is a minimal HTTP/2 client.
type frameConn struct {
	t    *testing.T
	c    *rawConn
	last []uint32 // the last stream that each GOAWAY has named
	// These are called with the payload of such a frame, if they are not nil.
	data, settings func(b []byte)
}

// away reports whether GOAWAY has arrived.
func (f *frameConn) away() bool { return len(f.last) > 0 }

// anyStream is the last stream that the first GOAWAY names.
const anyStream = 1<<31 - 1

// wantLast requires the connection to end with two GOAWAYs, of which the first
// names anyStream and the second the last stream. A connection that never had a
// request gets the second alone.
func (f *frameConn) wantLast(last uint32) {
	f.t.Helper()
	want := []uint32{anyStream, last}
	if last == 0 {
		want = want[1:]
	}
	if !slices.Equal(f.last, want) {
		f.t.Errorf("GOAWAY for the streams %d; want %d", f.last, want)
	}
}

func (s *site) dialFrames(way string) *frameConn {
	s.t.Helper()
	f := &frameConn{t: s.t, c: s.dialTLS(way, "h2")}
	if _, err := io.WriteString(f.c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	f.write(4, 0, 0, nil)                    // SETTINGS
	if _, err := f.c.r.Peek(9); err != nil { // the server has accepted when its SETTINGS arrive
		s.t.Fatal(err)
	}
	return f
}

func (f *frameConn) write(kind, flags byte, stream uint32, payload []byte) {
	f.t.Helper()
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	b = binary.BigEndian.AppendUint32(append(b, flags), stream)
	if _, err := f.c.Write(append(b, payload...)); err != nil {
		f.t.Fatal(err)
	}
}

// request sends GET for a path, with END_STREAM and END_HEADERS.
func (f *frameConn) request(stream uint32, path string) {
	f.t.Helper()
	header := append([]byte{0x82, 0x87, 0x41, 4}, "test"...) // RFC 7541, appendix A
	header = append(append(header, 0x44, byte(len(path))), path...)
	f.write(1, 0x1|0x4, stream, header)
}

// until reads frames to the end of the stream, or to the end of the connection if
// stream is 0.
func (f *frameConn) until(stream uint32) {
	f.t.Helper()
	f.read(stream, 0)
}

// read is until, but also returns after that many GOAWAY frames if the number is
// not 0.
func (f *frameConn) read(stream uint32, aways int) {
	f.t.Helper()
	for aways == 0 || len(f.last) < aways {
		h := make([]byte, 9)
		_ = f.c.SetDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(f.c.r, h); err == io.EOF && stream == 0 {
			return
		} else if err != nil {
			f.t.Fatalf("reading a frame: %v", err)
		}
		payload := make([]byte, binary.BigEndian.Uint32(h)>>8)
		if _, err := io.ReadFull(f.c.r, payload); err != nil {
			f.t.Fatalf("reading a frame: %v", err)
		}
		switch kind, flags, on := h[3], h[4], binary.BigEndian.Uint32(h[5:]); kind {
		case 0, 1: // DATA, HEADERS
			if kind == 0 && f.data != nil {
				f.data(payload)
			}
			if on == stream && stream != 0 && flags&0x1 != 0 { // END_STREAM
				return
			}
		case 3: // RST_STREAM
			f.t.Fatalf("stream %d was reset", on)
		case 4: // SETTINGS
			if f.settings != nil {
				f.settings(payload)
			}
		case 6, 8: // PING, WINDOW_UPDATE
		case 7: // GOAWAY
			if code := binary.BigEndian.Uint32(payload[4:]); code != 0 {
				f.t.Fatalf("GOAWAY with error %d", code)
			}
			f.last = append(f.last, binary.BigEndian.Uint32(payload))
		default:
			f.t.Fatalf("a frame of type %d", kind)
		}
	}
}

// answers are handlers that answer in different ways.
var answers = map[string]func(w http.ResponseWriter){
	"nothing":     func(w http.ResponseWriter) {},
	"status":      func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
	"Write":       func(w http.ResponseWriter) { _, _ = w.Write([]byte("ok")) },
	"WriteString": func(w http.ResponseWriter) { _, _ = w.(io.StringWriter).WriteString("ok") },
	"Flush":       func(w http.ResponseWriter) { w.(http.Flusher).Flush() },
	"FlushError":  func(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() },
}

// A client is asked by GOAWAY to open no more streams. Streams that cross the
// GOAWAY are served, and Shutdown does not wait for the grace. A new client gets
// GOAWAY with the answer to its first request, however the handler answers.
func TestHTTP2Answer(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		s := newTLSSite(t, way, long, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answers[r.URL.Path[1:]](w)
		}))
		conns, fresh := map[string]*frameConn{}, map[string]*frameConn{}
		for name := range answers {
			f := s.dialFrames(way)
			f.request(1, "/"+name)
			if f.until(1); f.away() {
				t.Error("GOAWAY before Shutdown")
			}
			conns[name], fresh[name] = f, s.dialFrames(way)
		}
		s.counts(httpdrain.Counts{Idle: 2 * len(answers)})
		result := s.shutdown()
		for name, f := range fresh {
			f.request(1, "/"+name)
			if f.until(1); !f.away() {
				t.Errorf("no GOAWAY before the end of an answer by %s", name)
			}
		}
		for name, f := range conns {
			f.read(0, 1)
			f.request(3, "/"+name)
			f.until(3)
		}
		for name := range answers {
			conns[name].until(0)
			conns[name].wantLast(3)
			fresh[name].until(0)
			fresh[name].wantLast(1)
		}
		s.over(result)
	})
}

// A connection that has had a request gets GOAWAY at once. A connection without a
// request is ended when its grace is over.
func TestHTTP2Grace(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		const grace = 200 * time.Millisecond
		s := newTLSSite(t, way, grace, ok)
		idle, fresh := s.dialFrames(way), s.dialFrames(way)
		mute := s.dialTLS(way, "h2") // without the preface
		idle.request(1, "/")
		idle.until(1)
		s.counts(httpdrain.Counts{New: 1, Idle: 2})
		began := time.Now()
		result := s.shutdown()
		idle.until(0)
		idle.wantLast(1)
		fresh.until(0)
		if passed := time.Since(began); passed < grace {
			t.Errorf("closed after %v", passed)
		}
		fresh.wantLast(0)
		_ = mute.SetDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, mute); err != nil {
			t.Errorf("without a preface: %v", err)
		}
		s.over(result)
	})
}

// GOAWAY comes between two frames, also while the server keeps writing frames
// that are longer than its buffer.
func TestHTTP2Between(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		var s *site
		half := strings.Repeat("0123456789abcdef", 1<<16)
		writes := make(chan struct{}, 1)
		s = newTLSSite(t, way, long, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			writes <- struct{}{}
			_, _ = io.WriteString(w, half)
			<-s.d.Draining()
			_, _ = io.WriteString(w, half)
		}))
		f := s.dialFrames(way)
		got := new(bytes.Buffer)
		f.data = func(b []byte) { got.Write(b) }
		f.write(4, 0, 0, binary.BigEndian.AppendUint32([]byte{0, 4}, 1<<30)) // the window of each stream
		f.write(8, 0, 0, binary.BigEndian.AppendUint32(nil, 1<<30))          // and that of the connection
		f.request(1, "/")
		receive(t, writes, "the handler")
		result := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			result <- s.d.Shutdown(ctx)
		}()
		f.until(1)
		// A slow machine takes more than the second after which the last one comes.
		if len(f.last) == 0 || got.String() != half+half {
			t.Errorf("GOAWAY %d before the end of %d bytes; want one or two and %d", f.last, got.Len(), 2*len(half))
		}
		f.until(0)
		f.wantLast(1)
		s.over(result)
	})
}

// The server's own Shutdown and Close do what they do without a Drainer.
func TestHTTP2WithoutDrainer(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		s := newTLSSite(t, way, long, ok)
		f := s.dialFrames(way)
		f.request(1, "/")
		f.until(1)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		result := make(chan error, 1)
		go func() { result <- s.srv.Shutdown(ctx) }()
		f.until(0)
		if !slices.Equal(f.last, []uint32{1}) {
			t.Errorf("GOAWAY for the streams %d; want 1", f.last)
		}
		if err := receive(t, result, "the end of Shutdown"); err != nil {
			t.Error(err)
		}

		g := newGate()
		s = newTLSSite(t, way, long, g)
		f = s.dialFrames(way)
		f.request(1, "/")
		receive(t, g.called, "the handler")
		if err := s.srv.Close(); err != nil {
			t.Error(err)
		}
		_ = f.c.SetDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, f.c.r); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after Close: %v", err)
		}
		close(g.open)
	})
}

// Handlers and hooks see the program's server, although another server reads the
// frames.
func TestHTTP2Context(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		type key struct{}
		var s *site
		cert, _ := certificate(t)
		accepted := make(chan net.Conn, 1)
		states := make(chan string, 20)
		seen := make(chan string, 1)
		s = &site{t: t, served: make(chan error, 1), srv: &http.Server{
			ErrorLog:       discard,
			MaxHeaderBytes: 1234,
			Protocols:      new(http.Protocols),
			ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
				accepted <- nc
				return context.WithValue(ctx, key{}, nc)
			},
			ConnState: func(nc net.Conn, state http.ConnState) { states <- fmt.Sprintf("%T %v", nc, state) },
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				nc, _ := r.Context().Value(key{}).(net.Conn)
				seen <- fmt.Sprint(r.Proto, nc == <-accepted, r.Context().Value(http.ServerContextKey) == s.srv,
					r.Context().Value(http.LocalAddrContextKey).(net.Addr).String() == s.addr, r.RemoteAddr == nc.RemoteAddr().String(),
					r.TLS != nil && r.TLS.NegotiatedProtocol == "h2")
			}),
		}}
		s.srv.Protocols.SetHTTP2(true)
		s.srv.Protocols.SetUnencryptedHTTP2(true)
		s.d = httpdrain.New(s.srv)
		ln := listen(t)
		s.addr = ln.Addr().String()
		go func() { s.served <- ways[way](s, cert, ln) }()
		t.Cleanup(func() { s.srv.Close() })
		f := s.dialFrames(way)
		settings := map[uint16]uint32{}
		f.settings = func(b []byte) {
			for ; len(b) > 0; b = b[6:] {
				settings[binary.BigEndian.Uint16(b)] = binary.BigEndian.Uint32(b[2:])
			}
		}
		f.request(1, "/")
		f.until(1)
		if got, want := receive(t, seen, "the handler"), fmt.Sprint("HTTP/2.0", true, true, true, true, way != "h2c"); got != want {
			t.Errorf("a handler sees %s; want %s", got, want)
		}
		if limit := settings[6]; limit < 1234 || limit > 4096 {
			t.Errorf("MaxHeaderBytes 1234 allows headers of %d bytes", limit)
		}
		conn := map[bool]string{false: "*tls.Conn", true: "*net.TCPConn"}[way == "h2c"]
		f.c.Close()
		s.over(s.shutdown())
		for _, want := range []string{"new", "active", "idle", "active", "idle", "closed"} {
			if got := receive(t, states, "a state"); got != conn+" "+want {
				t.Errorf("ConnState: %s; want %s %s", got, conn, want)
			}
		}
	})
}

// HTTP/2 of another package is left to that package. GOAWAY comes with an answer.
func TestHTTP2OfAnother(t *testing.T) {
	t.Parallel()
	s := newTLSSite(t, another, long, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answers[r.URL.Path[1:]](w)
	}))
	conns := map[string]*frameConn{}
	for name := range answers {
		f := s.dialFrames(another)
		f.request(1, "/"+name)
		if f.until(1); f.away() {
			t.Error("GOAWAY before Shutdown")
		}
		conns[name] = f
	}
	result := s.shutdown()
	for name, f := range conns {
		f.request(3, "/"+name)
		f.until(3)
	}
	for name, f := range conns {
		f.until(0)
		if !slices.Equal(f.last, []uint32{3}) {
			t.Errorf("after an answer by %s, GOAWAY for the streams %d; want 3", name, f.last)
		}
	}
	s.over(result)
}

// A Drainer does not switch HTTP/2 on in a program that has switched it off.
func TestHTTP2Off(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^TestHTTP2Off$")
	if cmd.Env = append(os.Environ(), "GODEBUG=http2server=0", offVar+"=1"); os.Getenv(offVar) == "" {
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	s := newTLSSite(t, "ServeTLS", long, ok)
	tc := tls.Client(s.dial().Conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
	if err := tc.Handshake(); err != nil {
		t.Fatal(err)
	}
	if p := tc.ConnectionState().NegotiatedProtocol; p != "http/1.1" {
		t.Errorf("the server speaks %q", p)
	}
}

const offVar = "HTTPDRAIN_TEST_OFF"

// A stream that is open when everything else has ended is served to its end.
func TestHTTP2Active(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		g := newGate()
		s := newTLSSite(t, way, -1, g)
		f := s.dialFrames(way)
		f.request(1, "/")
		receive(t, g.called, "the handler")
		s.counts(httpdrain.Counts{Active: 1, Handlers: 1})
		result := s.shutdown()
		if err := receive(t, s.served, "the end of Serve"); err != http.ErrServerClosed { // srv.Shutdown runs
			t.Error(err)
		}
		select {
		case err := <-result:
			t.Fatalf("Shutdown: %v", err)
		default:
		}
		close(g.open)
		f.until(1)
		f.until(0)
		if err := receive(t, result, "the end of Shutdown"); err != nil || !f.away() {
			t.Errorf("%v, GOAWAY %v", err, f.away())
		}
	})
}

// While draining, a handler can do everything that it can do at other times. An
// informational answer has no field that HTTP/2 does not allow.
func TestHTTP2Writer(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		can := make(chan string, 1)
		s := newTLSSite(t, way, long, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, flusher := w.(http.Flusher)
			_, pusher := w.(http.Pusher)
			_, stringer := w.(io.StringWriter)
			_, notifier := w.(interface{ CloseNotify() <-chan bool })
			_, hijacker := w.(http.Hijacker)
			rc := http.NewResponseController(w)
			can <- fmt.Sprint(flusher, pusher, stringer, notifier, hijacker,
				rc.SetReadDeadline(time.Now().Add(patience)), rc.SetWriteDeadline(time.Now().Add(patience)), rc.EnableFullDuplex())
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Set("Trailer", "Sum")
			_, _ = io.WriteString(w, "ok")
			w.Header().Set("Sum", "42")
			if err := rc.Flush(); err != nil {
				t.Error(err)
			}
		}))
		conns := []*rawConn{s.dial(), s.dial()}
		s.counts(httpdrain.Counts{New: 2})
		result := make(chan error)
		for i, draining := range []bool{false, true} {
			transport := &http.Transport{
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
				Protocols:       new(http.Protocols),
				DialContext:     func(context.Context, string, string) (net.Conn, error) { return conns[i].Conn, nil },
			}
			scheme := "https://"
			if transport.Protocols.SetHTTP2(true); way == "h2c" {
				scheme = "http://"
				transport.Protocols.SetHTTP2(false)
				transport.Protocols.SetUnencryptedHTTP2(true)
			}
			if draining {
				result = s.shutdown()
			}
			var early []string
			ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
				Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
					early = append(early, fmt.Sprint(code, h))
					return nil
				},
			})
			req, err := http.NewRequestWithContext(ctx, "GET", scheme+s.addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || string(body) != "ok" || resp.ProtoMajor != 2 || resp.Trailer.Get("Sum") != "42" || resp.Header.Get("Connection") != "" {
				t.Errorf("%s %q %v %v: %v", resp.Proto, body, resp.Header, resp.Trailer, err)
			}
			if got := receive(t, can, "the handler"); got != "true true true true false <nil> <nil> <nil>" {
				t.Errorf("draining %v: a handler can %s", draining, got)
			}
			if got := fmt.Sprint(early); got != "[103 map[Link:[</style.css>; rel=preload]]]" {
				t.Errorf("draining %v: before the answer came %s", draining, got)
			}
			transport.CloseIdleConnections()
		}
		s.over(result)
	}, another)
}
