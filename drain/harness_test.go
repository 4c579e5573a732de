package drain_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// patience is how long a test waits for what must happen.
var patience = proctest.Patience

// within returns a context that ends with the test's patience.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// ended is a context that has ended.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// receive returns the next value from c.
func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing has come")
		panic("not reached")
	}
}

func listen(t *testing.T, network string) net.Listener {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "drain") // t.TempDir may be too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func dial(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(addr.Network(), addr.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// certificate returns a certificate for servers, and a pool that makes clients
// trust it.
var certificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"test"},
		NotBefore:    time.Unix(0, 0), // a synctest bubble has the year 2000
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
})

func serverTLS() *tls.Config {
	cert, _ := certificate()
	return &tls.Config{Certificates: []tls.Certificate{cert}}
}

func clientTLS() *tls.Config {
	_, pool := certificate()
	return &tls.Config{RootCAs: pool, ServerName: "test"}
}

// A halfCloser is a connection that can be closed for writing.
type halfCloser interface{ CloseWrite() error }

// answer sends each line back. When the client has closed its side, answer sends
// the number of lines and closes its own side.
func answer(c net.Conn) {
	lines := 0
	for r := bufio.NewReader(c); ; lines++ {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
	fmt.Fprintf(c, "%d lines\n", lines)
	_ = c.(halfCloser).CloseWrite()
}

// say sends a line, and requires it to come back.
func say(c net.Conn, line string) error {
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return err
	}
	back := make([]byte, len(line)+1)
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if string(back) != line+"\n" {
		return fmt.Errorf("sent %q, got %q back", line, back)
	}
	return nil
}

// finish closes the client's side, and requires the answer to this number of lines.
func finish(c net.Conn, lines int) error {
	if err := c.(halfCloser).CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(c)
	if want := fmt.Sprintf("%d lines\n", lines); err != nil || string(rest) != want {
		return fmt.Errorf("at the end: %q, %v; want %q", rest, err, want)
	}
	return nil
}

// serve starts Serve and returns a channel for its result.
func serve(srv *drain.Server, ln net.Listener) <-chan error {
	result := make(chan error, 1)
	go func() { result <- srv.Serve(ln) }()
	return result
}

// library starts an accept loop like those of libraries. Any error of Accept ends
// the loop, which then closes its clients.
func library(ln net.Listener, handler func(net.Conn)) <-chan error {
	result := make(chan error, 1)
	go func() {
		var mu sync.Mutex
		clients := make(map[net.Conn]bool)
		for {
			c, err := ln.Accept()
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				for c := range clients {
					c.Close()
				}
				result <- err
				return
			}
			mu.Lock()
			clients[c] = true
			mu.Unlock()
			go func() {
				defer c.Close()
				handler(c)
				mu.Lock()
				defer mu.Unlock()
				delete(clients, c)
			}()
		}
	}()
	return result
}

// A way is how connections get to their handler.
type way struct {
	name    string
	network string
	start   func(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error
	secure  bool
	library bool
}

// client wraps the client's end of a connection, for example in TLS.
func (w way) client(c net.Conn) net.Conn {
	if w.secure {
		return secure(c)
	}
	return c
}

func (w way) dial(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	return w.client(dial(t, addr))
}

func secure(c net.Conn) net.Conn { return tls.Client(c, clientTLS()) }

func byServe(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	if srv.Handler == nil {
		srv.Handler = handler
	}
	return serve(srv, ln)
}

func byServeTLS(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return byServe(srv, tls.NewListener(ln, serverTLS()), handler)
}

func byLibrary(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return library(srv.Listener(ln), handler)
}

func byLibraryTLS(srv *drain.Server, ln net.Listener, handler func(net.Conn)) <-chan error {
	return library(tls.NewListener(srv.Listener(ln), serverTLS()), handler)
}

var ways = []way{
	{"TCP", "tcp", byServe, false, false},
	{"Unix", "unix", byServe, false, false},
	{"TLS", "tcp", byServeTLS, true, false},
	{"library, TCP", "tcp", byLibrary, false, true},
	{"library, Unix", "unix", byLibrary, false, true},
	{"library, TLS", "tcp", byLibraryTLS, true, true},
}

// inBubble runs test in a synctest bubble, once with Serve and once with a library.
// The listeners are fakes.
func inBubble(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range ways {
		if w.network == "tcp" && !w.secure {
			t.Run(w.name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { test(t, w) })
			})
		}
	}
}

func eachWay(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			test(t, w)
		})
	}
}

// closed asserts the error with which Serve or a library's loop ends. A library's
// loop ends when the server is closed, and not before.
func (w way) closed(t *testing.T, srv *drain.Server, result <-chan error) {
	t.Helper()
	want := drain.ErrServerClosed
	if w.library {
		select {
		case err := <-result:
			t.Errorf("Accept of a library has failed by Shutdown: %v", err)
			return
		default:
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		want = net.ErrClosed
	}
	if err := receive(t, result); !errors.Is(err, want) {
		t.Errorf("accepting ends with %v; want %v", err, want)
	}
}

// A fake is a listener that a test controls. Accept returns what the test sends to
// the channel.
type fake struct {
	accept chan any // a net.Conn or an error
	closed chan struct{}
	err    error // the result of Close
	holds  bool  // Close does not end Accept
}

func newFake() *fake { return &fake{accept: make(chan any), closed: make(chan struct{})} }

func (f *fake) Accept() (net.Conn, error) {
	closed := f.closed
	if f.holds {
		closed = nil
	}
	select {
	case v := <-f.accept:
		if c, ok := v.(net.Conn); ok {
			return c, nil
		}
		return nil, v.(error)
	case <-closed:
		return nil, &net.OpError{Op: "accept", Net: "fake", Err: net.ErrClosed}
	}
}

// Close may be called only once, as Close of many listeners.
func (f *fake) Close() error {
	close(f.closed)
	return f.err
}

func (f *fake) Addr() net.Addr { return &net.UnixAddr{Net: "fake", Name: "fake"} }

// pipe returns the two ends of a connection, that of the client first.
func pipe(t *testing.T) (client, server net.Conn) {
	client, server = net.Pipe()
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
