package httpdrain_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// benchServer serves ok, with a Drainer or without one. It returns the address,
// and a function that ends the server.
func benchServer(b *testing.B, drained bool, grace time.Duration) (addr string, shutdown func(context.Context) error) {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr = ln.Addr().String()
	srv := &http.Server{Handler: ok}
	shutdown = srv.Shutdown
	if drained {
		d := httpdrain.New(srv)
		d.Grace = grace
		ln, shutdown = d.Listener(ln), d.Shutdown
	}
	go func() { _ = srv.Serve(ln) }()
	b.Cleanup(func() { srv.Close() })
	return addr, shutdown
}

// BenchmarkRequest measures a request over a kept connection on the loopback
// interface, with a Drainer and without one. The two take turns. It reports the
// median of each, and what the Drainer adds.
func BenchmarkRequest(b *testing.B) {
	const round = 500
	var conns [2]*rawConn
	for i := range conns {
		addr, _ := benchServer(b, i == 1, 0)
		c, err := dialRaw(addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Time{})
		conns[i] = c
	}
	answer := make([]byte, 4096)
	var took [2][]time.Duration
	for b.Loop() {
		for i, c := range conns {
			began := time.Now()
			for range round {
				if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: test\r\n\r\n"); err != nil {
					b.Fatal(err)
				}
				if n, err := c.Read(answer); err != nil || string(answer[n-2:n]) != "ok" {
					b.Fatalf("%q, %v", answer[:n], err)
				}
			}
			took[i] = append(took[i], time.Since(began)/round)
		}
	}
	bare, drained := median(took[0]), median(took[1])
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(bare), "bare-ns/request")
	b.ReportMetric(float64(drained), "drained-ns/request")
	proctest.Ratio(b, float64(drained)/float64(bare), 1.1, "×bare")
}

// The same without a network and without parsing shows what the handler, the
// states and the context of a request add.
func BenchmarkHooks(b *testing.B) {
	run := func(b *testing.B, srv *http.Server) {
		c, peer := net.Pipe()
		defer c.Close()
		defer peer.Close()
		if srv.ConnContext != nil {
			_ = srv.ConnContext(context.Background(), c)
			srv.ConnState(c, http.StateNew)
		}
		w, r := &nobody{}, &http.Request{Method: "GET", ProtoMajor: 1, Header: http.Header{}}
		b.ReportAllocs()
		for b.Loop() {
			if srv.ConnState != nil {
				srv.ConnState(c, http.StateActive)
			}
			srv.Handler.ServeHTTP(w, r)
			if srv.ConnState != nil {
				srv.ConnState(c, http.StateIdle)
			}
		}
	}
	nothing := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	b.Run("bare", func(b *testing.B) { run(b, &http.Server{Handler: nothing}) })
	b.Run("drained", func(b *testing.B) {
		srv := &http.Server{Handler: nothing}
		httpdrain.New(srv)
		run(b, srv)
	})
}

type nobody struct{ http.ResponseWriter }

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// idleClients connects to a server, over and over, makes a request each time,
// says "ready", and keeps the connections until its standard input ends.
func idleClients(addr string, n int) error {
	conns := make([]*rawConn, n)
	for i := range conns {
		c, err := dialRaw(addr)
		if err == nil {
			_, err = c.get("/", "ok")
		}
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		conns[i] = c
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(conns)
	return err
}

// A server with 10,000 idle connections is timed from the end of the grace to
// the end of Shutdown. http.Server.Shutdown, which drops as many, is timed for
// comparison. The clients are in another process because of the limit of
// descriptors, which the Go runtime raises as far as it may.
func BenchmarkIdle(b *testing.B) {
	const grace = 2 * time.Second
	n := 10000
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	if most := int(min(uint64(limit.Cur), 1<<20)) - 100; n > most {
		n = most
		b.Logf("%d connections, for want of descriptors", n)
	}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	var took [2]time.Duration
	for b.Loop() {
		for i := range took {
			addr, shutdown := benchServer(b, i == 1, grace)
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), roleVar+"=idle "+addr+" "+strconv.Itoa(n))
			cmd.Stderr = os.Stderr
			stdin, err := cmd.StdinPipe()
			if err != nil {
				b.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				b.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
				b.Fatalf("%q, %v", line, err)
			}
			began := time.Now()
			if err := shutdown(context.Background()); err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(began)
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				b.Fatal(err)
			}
		}
	}
	loops := time.Duration(b.N)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(n), "conns")
	b.ReportMetric(float64((took[0] / loops).Milliseconds()), "plain-ms")
	b.ReportMetric(float64((took[1]/loops - grace).Milliseconds()), "ms-after-grace")
}

// A thousand idle connections all end cleanly when their grace is over.
func TestManyIdle(t *testing.T) {
	t.Parallel()
	const n, grace = 1000, 300 * time.Millisecond
	s := newSite(t, grace, &http.Server{Handler: ok}, nil)
	var conns []*rawConn
	for i := range n {
		c := s.dial()
		if conns = append(conns, c); i%2 == 0 {
			get(t, c, false)
		}
	}
	s.counts(httpdrain.Counts{New: n / 2, Idle: n / 2})
	began := time.Now()
	result := s.shutdown()
	for _, c := range conns {
		ends(t, c)
		if passed := time.Since(began); passed < grace {
			t.Fatalf("closed after %v; want %v", passed, grace)
		}
	}
	s.over(result)
}
