package httpdrain_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/httpdrain"
)

// The ways in which a server gets to TLS, and HTTP/2 without it.
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

func eachWay(t *testing.T, f func(t *testing.T, way string)) {
	t.Parallel()
	for way := range ways {
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
	s.d = httpdrain.New(s.srv)
	s.d.Grace = grace
	ln := listen(t)
	s.addr = ln.Addr().String()
	go func() { s.served <- ways[way](s, cert, ln) }()
	t.Cleanup(func() { s.srv.Close() })
	return s
}

// dialTLS connects and makes the handshake, if there is one to be made.
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

// Over TLS, HTTP/1 is drained as without it.
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

// A frameConn speaks HTTP/2, as little of it as is needed.
type frameConn struct {
	t    *testing.T
	c    *rawConn
	away bool // GOAWAY has come
}

func (s *site) dialFrames(way string) *frameConn {
	s.t.Helper()
	f := &frameConn{t: s.t, c: s.dialTLS(way, "h2")}
	if _, err := io.WriteString(f.c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	f.write(4, 0, 0, nil) // SETTINGS
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

// until reads frames to the end of a stream, or to that of the connection if
// it is 0.
func (f *frameConn) until(stream uint32) {
	f.t.Helper()
	for {
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
		switch kind, flags, on := h[3], h[4], binary.BigEndian.Uint32(h[5:]); {
		case kind == 7: // GOAWAY
			if code := binary.BigEndian.Uint32(payload[4:]); code != 0 {
				f.t.Fatalf("GOAWAY with error %d", code)
			}
			f.away = true
		case kind == 3: // RST_STREAM
			f.t.Fatalf("stream %d was reset", on)
		case kind <= 1 && on == stream && stream != 0 && flags&0x1 != 0: // DATA or HEADERS with END_STREAM
			return
		}
	}
}

// The answer to a request sends the client away: Shutdown does not wait for the
// grace. So it is whatever the handler does to answer.
func TestHTTP2Answer(t *testing.T) {
	answers := map[string]func(w http.ResponseWriter){
		"nothing":     func(w http.ResponseWriter) {},
		"status":      func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
		"Write":       func(w http.ResponseWriter) { _, _ = w.Write([]byte("ok")) },
		"WriteString": func(w http.ResponseWriter) { _, _ = w.(io.StringWriter).WriteString("ok") },
		"Flush":       func(w http.ResponseWriter) { w.(http.Flusher).Flush() },
		"FlushError":  func(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() },
	}
	eachWay(t, func(t *testing.T, way string) {
		s := newTLSSite(t, way, long, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answers[r.URL.Path[1:]](w)
		}))
		conns := map[string]*frameConn{}
		for name := range answers {
			f := s.dialFrames(way)
			f.request(1, "/"+name)
			if f.until(1); f.away {
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
			if f.until(0); !f.away {
				t.Errorf("no GOAWAY with an answer by %s", name)
			}
		}
		s.over(result)
	})
}

// A connection on which nothing happens is sent away at the end of its grace,
// even one that has never sent a request.
func TestHTTP2Grace(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		const grace = 200 * time.Millisecond
		s := newTLSSite(t, way, grace, ok)
		idle, fresh := s.dialFrames(way), s.dialFrames(way)
		idle.request(1, "/")
		idle.until(1)
		s.counts(httpdrain.Counts{Idle: 2})
		began := time.Now()
		result := s.shutdown()
		idle.until(0)
		if passed := time.Since(began); !idle.away || passed < grace {
			t.Errorf("closed after %v, with GOAWAY: %v", passed, idle.away)
		}
		fresh.until(0)
		if !fresh.away && way != "h2c" { // what it speaks has not been told there
			t.Error("without GOAWAY")
		}
		s.over(result)
	})
}

// A stream that is open when all else is done is finished.
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
		if err := receive(t, result, "the end of Shutdown"); err != nil || !f.away {
			t.Errorf("%v, GOAWAY %v", err, f.away)
		}
	})
}

// While draining, a handler can do all that it can at other times; and an
// answer before the answer has no field that HTTP/2 does not allow.
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
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, Protocols: new(http.Protocols)}
		defer transport.CloseIdleConnections()
		scheme := "https://"
		if transport.Protocols.SetHTTP2(true); way == "h2c" {
			scheme = "http://"
			transport.Protocols.SetHTTP2(false)
			transport.Protocols.SetUnencryptedHTTP2(true)
		}
		var result chan error
		for _, draining := range []bool{false, true} {
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
		}
		s.over(result)
	})
}
