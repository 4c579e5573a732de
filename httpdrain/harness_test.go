package httpdrain_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The tests of upgrades run real processes. The test binary runs again as the
// server in serverMain, and so do its successors. They all write what they do to
// one standard error.

const (
	roleVar  = "HTTPDRAIN_TEST_ROLE" // how a server ends, see byShutdown
	graceVar = "HTTPDRAIN_TEST_GRACE"
	certVar  = "HTTPDRAIN_TEST_CERT" // path of the certificate; the key is beside it
	h2cVar   = "HTTPDRAIN_TEST_H2C"  // HTTP/2 without TLS, too, if it is not empty
)

// patience is how long a test waits for what must happen.
var patience = proctest.Patience

func TestMain(m *testing.M) {
	var err error
	switch role := strings.Fields(os.Getenv(roleVar)); {
	case len(role) == 0:
		os.Exit(m.Run())
	case role[0] == "example":
		address = "127.0.0.1:0"
		Example()
	case role[0] == "idle":
		n, _ := strconv.Atoi(role[2])
		err = idleClients(role[1], n)
	default:
		err = serverMain(role[0])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Getenv(roleVar), err)
		os.Exit(1)
	}
}

// The ways in which a server ends.
const (
	byDrainer  = "drainer"
	byShutdown = "shutdown" // http.Server.Shutdown, the usual way
	byClose    = "close"    // http.Server.Close, the worst way
)

func serverMain(end string) error {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify:         func(e ecdysis.Event) { say("event %v", e) },
	})
	if err != nil {
		return err
	}
	grace, err := time.ParseDuration(os.Getenv(graceVar))
	if err != nil {
		return u.Fail(err)
	}
	srv := &http.Server{ErrorLog: log.New(os.Stderr, fmt.Sprintf("[%d] ", os.Getpid()), 0)}
	if os.Getenv(h2cVar) != "" {
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetHTTP2(true)
		srv.Protocols.SetUnencryptedHTTP2(true)
	}
	wrap := func(ln net.Listener) net.Listener { return ln }
	ending := make(chan struct{})
	shutdown := srv.Shutdown
	var draining <-chan struct{} = ending
	srv.Handler = testHandler(func() <-chan struct{} { return draining })
	switch end {
	case byDrainer:
		d := httpdrain.New(srv)
		d.Grace = grace
		wrap, shutdown, draining = d.Listener, d.Shutdown, d.Draining()
	case byClose:
		shutdown = func(context.Context) error { return srv.Close() }
	default:
		srv.RegisterOnShutdown(func() { close(ending) })
	}
	plain, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	secure, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	cert := os.Getenv(certVar)
	go func() { say("serve: %v", srv.Serve(wrap(plain))) }()
	go func() { say("serve TLS: %v", srv.ServeTLS(wrap(secure), cert, cert+".key")) }()
	say("listening %s %s", plain.Addr(), secure.Addr())
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	err = shutdown(ctx)
	say("drained in %v: %v", time.Since(began).Round(time.Millisecond), err)
	return nil
}

// say writes one line, in one write.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "[%d] %s\n", os.Getpid(), fmt.Sprintf(format, args...))
}

// testHandler is what the test servers serve.
func testHandler(draining func() <-chan struct{}) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello "+r.URL.RawQuery)
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(30 * time.Millisecond)
		_, _ = io.WriteString(w, "slow "+r.URL.RawQuery)
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		fmt.Fprintf(w, "%d %x %v", n, h.Sum(nil), err)
	})
	mux.HandleFunc("/once", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		say("once %s %v", r.URL.RawQuery, err)
		_, _ = io.WriteString(w, "once "+r.URL.RawQuery)
	})
	mux.HandleFunc("/chunked", func(w http.ResponseWriter, r *http.Request) {
		for i := range chunks {
			fmt.Fprintf(w, "chunk %d\n", i)
			_ = http.NewResponseController(w).Flush()
			time.Sleep(2 * time.Millisecond)
		}
	})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			_, _ = io.WriteString(w, "data: tick\n\n")
			if http.NewResponseController(w).Flush() != nil {
				return
			}
			select {
			case <-tick.C:
			case <-draining():
				_, _ = io.WriteString(w, "data: bye\n\n")
				return
			}
		}
	})
	mux.HandleFunc("/hijack", func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n")
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			for {
				line, err := rw.ReadString('\n')
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, line)
			}
		}()
		select {
		case <-gone:
		case <-draining():
			_, _ = io.WriteString(c, "bye\n")
			<-gone // the client closes
		}
	})
	return mux
}

const chunks = 20

// A server is a chain of test servers.
type server struct {
	*proctest.Program
	plain, secure string      // addresses
	process       *os.Process // the process that serves
	generation    int
}

func startServer(t *testing.T, end string, grace time.Duration, env ...string) *server {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := certificate(t)
	cmd := exec.Command(self)
	cmd.Env = append(append(os.Environ(), roleVar+"="+end, graceVar+"="+grace.String(), certVar+"="+cert), env...)
	s := &server{Program: proctest.Run(t, cmd)}
	m := s.Await(`listening (\S+) (\S+)$`)
	s.plain, s.secure = m[1], m[2]
	s.process = s.Ready(0)
	return s
}

func (s *server) signal(sig syscall.Signal) {
	s.T.Helper()
	if err := s.process.Signal(sig); err != nil {
		s.T.Fatal(err)
	}
}

// upgrade replaces the process that serves. That process then drains.
func (s *server) upgrade() {
	s.T.Helper()
	s.signal(syscall.SIGHUP)
	s.generation++
	s.process = s.Ready(s.generation)
	s.Await(`upgraded by signal`)
}

// stop ends the last process and waits until all have ended.
func (s *server) stop() {
	s.T.Helper()
	s.signal(syscall.SIGTERM)
	if state := s.End(); !state.Success() {
		s.T.Errorf("the first server: %v", state)
	}
}

// certificate makes a certificate for 127.0.0.1. It returns the certificate's
// path and a pool that has it.
func certificate(t testing.TB) (path string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "test"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "cert")
	err = errors.Join(
		os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(cert)
	return path, pool
}
