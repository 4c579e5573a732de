package httpdrain_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A load is a set of clients of many kinds. Each opens a new connection when the
// protocol tells it to. None repeats a request that has failed.
type load struct {
	s     *server
	grace time.Duration
	stop  chan struct{}  // when it is closed, clients begin nothing new
	short sync.WaitGroup // clients that end by themselves when stop is closed
	long  sync.WaitGroup // clients that end when the server drains

	mu   sync.Mutex
	done map[string]int
	bad  map[string][]error
}

func startLoad(s *server, grace time.Duration) *load {
	l := &load{s: s, grace: grace, stop: make(chan struct{}), done: map[string]int{}, bad: map[string][]error{}}
	for range 5 {
		l.client(&l.short, "short", l.shortConn)
	}
	for range 2 {
		l.client(&l.short, "busy", func() error { return l.keepAlive("busy", "/hello", 0) })
		l.client(&l.short, "pieces", l.pieces)
		l.client(&l.short, "handshake", l.handshake)
		l.client(&l.short, "upload", l.upload)
		l.client(&l.long, "events", l.events)
		l.client(&l.long, "hijacked", l.hijacked)
	}
	for range 10 {
		l.client(&l.short, "thinking", func() error { return l.keepAlive("thinking", "/hello", 15*time.Millisecond) })
		l.client(&l.short, "slow", func() error { return l.keepAlive("slow", "/slow", 0) })
		l.client(&l.short, "chunked", func() error { return l.keepAlive("chunked", "/chunked", 0) })
	}
	for range 2 {
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
		for range 3 {
			l.client(&l.short, "HTTP/2", func() error { return l.http2(transport) })
		}
	}
	return l
}

// client calls f again and again.
func (l *load) client(wg *sync.WaitGroup, kind string, f func() error) {
	wg.Go(func() {
		for !l.over() {
			l.enter(kind, f())
		}
	})
}

// quiet adds a client that never sends a byte.
func (l *load) quiet() { l.long.Go(func() { l.enter("silent", l.silent()) }) }

func (l *load) enter(kind string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done[kind]++; err != nil {
		l.done[kind]--
		l.bad[kind] = append(l.bad[kind], err)
	}
}

func (l *load) over() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

var (
	working = []string{"short", "busy", "thinking", "slow", "pieces", "handshake", "upload", "chunked", "HTTP/2"}
	staying = []string{"silent", "events", "hijacked"}

	everyKind = slices.Concat(working, staying)
)

// failed returns the number of requests of these kinds that have failed, and the
// kinds that have no failed request.
func (l *load) failed(kinds ...string) (n int, spared []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, kind := range kinds {
		if n += len(l.bad[kind]); len(l.bad[kind]) == 0 {
			spared = append(spared, kind)
		}
	}
	return n, spared
}

// more returns when every kind of client that works has n more answers or
// failures.
func (l *load) more(n int) {
	l.s.T.Helper()
	goal := map[string]int{}
	l.mu.Lock()
	for _, kind := range working {
		goal[kind] = l.done[kind] + len(l.bad[kind]) + n
	}
	l.mu.Unlock()
	limit := time.Now().Add(patience)
	for {
		l.mu.Lock()
		maps.DeleteFunc(goal, func(kind string, n int) bool { return l.done[kind]+len(l.bad[kind]) >= n })
		l.mu.Unlock()
		if len(goal) == 0 {
			return
		}
		if time.Now().After(limit) {
			l.s.T.Fatalf("no answers for %v", goal)
		}
		time.Sleep(time.Millisecond) // no event reports a change of the counters
	}
}

// end stops the clients and the server.
func (l *load) end() {
	l.s.T.Helper()
	close(l.stop)
	l.short.Wait()
	l.s.stop()
	l.long.Wait()
}

// report logs what the clients saw.
func (l *load) report(t *testing.T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, kind := range everyKind {
		t.Logf("%-9s %6d answered, %4d failed", kind, l.done[kind], len(l.bad[kind]))
		for i, err := range l.bad[kind] {
			if i == 3 {
				break
			}
			t.Logf("          %v", err)
		}
	}
}

// A rawConn is a plain client connection, which does nothing by itself.
type rawConn struct {
	net.Conn
	r *bufio.Reader
}

func dialRaw(addr string) (*rawConn, error) {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	return &rawConn{c, bufio.NewReader(c)}, c.SetDeadline(time.Now().Add(patience))
}

// get makes a request and requires this answer. It reports whether the answer
// says close, and then requires the server to close the connection.
func (c *rawConn) get(path, want string, header ...string) (closed bool, err error) {
	if err := c.send(path, header...); err != nil {
		return false, err
	}
	return c.receive(want)
}

func (c *rawConn) send(path string, header ...string) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: test\r\n"+strings.Join(append(header, "\r\n"), "\r\n"))
	return err
}

func (c *rawConn) receive(want string) (closed bool, err error) {
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return false, fmt.Errorf("reading the answer's header: %w", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || string(body) != want {
		return false, fmt.Errorf("answer %s with %d bytes, %.50q: %v", resp.Status, len(body), body, err)
	}
	if !resp.Close {
		return false, nil
	}
	if _, err := c.r.ReadByte(); err != io.EOF {
		return true, fmt.Errorf("after an answer that says close: %v", err)
	}
	return true, nil
}

func (l *load) shortConn() error {
	time.Sleep(time.Millisecond) // without a pause the ports would run out
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	closed, err := c.get("/hello?short", "hello short", "Connection: close")
	if err == nil && !closed {
		err = errors.New("the connection was not closed")
	}
	return err
}

var chunkedBody = func() string {
	var b strings.Builder
	for i := range chunks {
		fmt.Fprintf(&b, "chunk %d\n", i)
	}
	return b.String()
}()

// keepAlive uses a connection until an answer says close. It pauses between two
// requests.
func (l *load) keepAlive(kind, path string, think time.Duration) error {
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	want := map[string]string{"/hello": "hello q", "/slow": "slow q", "/chunked": chunkedBody}[path]
	for {
		closed, err := c.get(path+"?q", want)
		if err != nil || closed || l.over() {
			return err
		}
		l.enter(kind, nil)
		time.Sleep(think)
	}
}

// pieces sends the header in four pieces.
func (l *load) pieces() error {
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		for _, piece := range []string{"GE", "T /hello?pieces HT", "TP/1.1\r\nHost: te", "st\r\n\r\n"} {
			time.Sleep(3 * time.Millisecond)
			if _, err := io.WriteString(c, piece); err != nil {
				return err
			}
		}
		closed, err := c.receive("hello pieces")
		if err != nil || closed || l.over() {
			return err
		}
		l.enter("pieces", nil)
	}
}

// A lateConn pauses before each write.
type lateConn struct{ net.Conn }

func (c lateConn) Write(b []byte) (int, error) {
	time.Sleep(2 * time.Millisecond)
	return c.Conn.Write(b)
}

// handshake makes a slow TLS handshake and a few requests over HTTP/1.
func (l *load) handshake() error {
	raw, err := net.DialTimeout("tcp", l.s.secure, patience)
	if err != nil {
		return err
	}
	tc := tls.Client(lateConn{raw}, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	c := &rawConn{tc, bufio.NewReader(tc)}
	defer c.Close()
	for range 3 {
		closed, err := c.get("/hello?tls", "hello tls")
		if err != nil || closed || l.over() {
			return err
		}
		l.enter("handshake", nil)
	}
	return nil
}

// upload sends a body after the server has answered 100 Continue.
func (l *load) upload() error {
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	body := bytes.Repeat([]byte("0123456789abcdef"), 32<<10) // 512 KiB
	want := fmt.Sprintf("%d %x <nil>", len(body), sha256.Sum256(body))
	for {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c, "POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(body)); err != nil {
			return err
		}
		resp, err := http.ReadResponse(c.r, nil)
		if err != nil {
			return fmt.Errorf("waiting for 100 Continue: %w", err)
		}
		if resp.StatusCode != http.StatusContinue {
			return fmt.Errorf("%s; want 100 Continue", resp.Status)
		}
		for part := range slices.Chunk(body, 128<<10) {
			time.Sleep(3 * time.Millisecond)
			if _, err := c.Write(part); err != nil {
				return err
			}
		}
		closed, err := c.receive(want)
		if err != nil || closed || l.over() {
			return err
		}
		l.enter("upload", nil)
	}
}

// http2 makes a request of each kind on a connection that it shares with other
// clients. The transport sends a request again if it crosses GOAWAY and was not
// processed, as the protocol says.
func (l *load) http2(transport *http.Transport) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	body := strings.Repeat("0123456789abcdef", 1<<10)
	for _, q := range []struct{ method, path, body, want string }{
		{"GET", "/hello?2", "", "hello 2"},
		{"GET", "/slow?2", "", "slow 2"},
		{"POST", "/upload", body, fmt.Sprintf("%d %x <nil>", len(body), sha256.Sum256([]byte(body)))},
		{"GET", "/chunked", "", chunkedBody},
	} {
		req, err := http.NewRequestWithContext(ctx, q.method, "https://"+l.s.secure+q.path, strings.NewReader(q.body))
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.ProtoMajor != 2 || resp.StatusCode != http.StatusOK || string(got) != q.want {
			return fmt.Errorf("%s %s: %s %s with %d bytes, %.50q: %v", q.method, q.path, resp.Proto, resp.Status, len(got), got, err)
		}
		l.enter("HTTP/2", nil)
	}
	return nil
}

// silent never sends a byte. It requires the connection to stay open for all of
// the grace, and to end then.
func (l *load) silent() error {
	began := time.Now()
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Time{})
	if _, err := c.r.ReadByte(); err != io.EOF {
		return fmt.Errorf("reading: %v; want EOF", err)
	}
	if passed := time.Since(began); passed < l.grace {
		return fmt.Errorf("closed after %v; want %v or more", passed, l.grace)
	}
	return nil
}

// events reads a stream until the server says that it drains.
func (l *load) events() error {
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.send("/events"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return err
	}
	last := ""
	for s := bufio.NewScanner(deadlineReader{c, resp.Body}); ; {
		if !s.Scan() {
			if s.Err() != nil || last != "data: bye" {
				return fmt.Errorf("the events ended with %q: %v", last, s.Err())
			}
			return nil
		}
		if line := s.Text(); line != "" {
			last = line
		}
	}
}

// A deadlineReader sets a new deadline before each read.
type deadlineReader struct {
	c net.Conn
	r io.Reader
}

func (d deadlineReader) Read(b []byte) (int, error) {
	_ = d.c.SetReadDeadline(time.Now().Add(patience))
	return d.r.Read(b)
}

// hijacked sends lines and expects them back, until the server says goodbye.
func (l *load) hijacked() error {
	c, err := dialRaw(l.s.plain)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.send("/hijack", "Connection: Upgrade", "Upgrade: lines"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Connection") != "Upgrade" {
		return fmt.Errorf("%s %v", resp.Status, resp.Header)
	}
	for {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "line\n"); err != nil {
			return err
		}
		switch got, err := c.r.ReadString('\n'); {
		case err != nil:
			return err
		case got == "bye\n":
			return nil
		case got != "line\n":
			return fmt.Errorf("got %q back", got)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
