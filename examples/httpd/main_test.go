package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// build returns the path of the real program.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "httpd")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// A daemon is an httpd and its successors.
type daemon struct {
	*proctest.Program
	pidFile string
	control string // the directory of the control sockets
	url     string
}

func start(t *testing.T, scheme string, args ...string) *daemon {
	t.Helper()
	d := &daemon{pidFile: filepath.Join(t.TempDir(), "pid"), control: proctest.ShortDir(t)}
	d.Program = proctest.Run(t, exec.Command(build(t), append([]string{"-addr", "127.0.0.1:0", "-pidfile", d.pidFile, "-control", d.control}, args...)...))
	d.url = scheme + "://" + d.Await(`listening on (\S+)`)[1]
	return d
}

// ready returns the process ID of the generation that becomes ready next.
func (d *daemon) ready(generation int) int {
	d.T.Helper()
	return d.Ready(generation).Pid
}

func (d *daemon) signal(pid int, s syscall.Signal) {
	d.T.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		d.T.Fatal(err)
	}
}

// request runs httpd -request, as an operator does. It returns what the command
// prints and, unless it is 0, the exit status.
func (d *daemon) request(name string) string {
	d.T.Helper()
	out, err := exec.Command(d.Cmd.Path, "-request", filepath.Join(d.control, name)).CombinedOutput()
	if err != nil {
		out = append(out, err.Error()...)
	}
	return string(out)
}

// answer is what httpd -request prints after a success.
func answer(pid, generation int) string {
	return fmt.Sprintf("ok pid=%d generation=%d\n", pid, generation)
}

// ended returns when the process has logged that it has drained.
func (d *daemon) ended(pid int) {
	d.T.Helper()
	d.Await(`httpd\[` + strconv.Itoa(pid) + `\] (all clients are served)`)
}

// stop tells pid to end, and waits until all processes have ended. Signals to stop
// are caught once Upgrader.Wait runs. stop sees this by an upgrade that fails
// because there is no program.
func (d *daemon) stop(pid int) {
	d.T.Helper()
	if err := os.Remove(d.Cmd.Path); err != nil {
		d.T.Fatal(err)
	}
	d.signal(pid, syscall.SIGHUP)
	d.Await(`(upgrade failed) by signal hangup: .*failed at start: .*no such file`)
	d.signal(pid, syscall.SIGTERM)
	d.Await(`(stopping) by signal terminated: pid=` + strconv.Itoa(pid))
	d.leavesNothing(pid)
}

// leavesNothing asserts that the last process, which is pid, drains and ends,
// and that no file is left.
func (d *daemon) leavesNothing(pid int) {
	d.T.Helper()
	d.ended(pid)
	d.End()
	for _, path := range []string{d.pidFile, filepath.Join(d.control, "upgrade"), filepath.Join(d.control, "stop")} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			d.T.Errorf("%s is left: %v", path, err)
		}
	}
}

// client returns a client with connections of its own.
func client(t *testing.T) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: proctest.Patience}
}

func ask(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(b), err
}

// wants requests the front page, and requires the answer of this process.
func (d *daemon) wants(c *http.Client, pid, generation int) {
	d.T.Helper()
	got, err := ask(c, d.url)
	if want := fmt.Sprintf("pid=%d generation=%d\n", pid, generation); err != nil || got != want {
		d.T.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

// A client on a kept connection and a stream of events reach the next process. No
// request is lost meanwhile.
func TestUpgradeAndStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ scheme, by string }{{"http", "signal"}, {"https", "signal"}, {"http", "socket"}} {
		scheme := c.scheme
		t.Run(scheme+" by "+c.by, func(t *testing.T) {
			t.Parallel()
			args := []string{"-grace", "10s"}
			if scheme == "https" {
				cert, key := certificate(t)
				args = append(args, "-cert", cert, "-key", key)
			}
			d := start(t, scheme, args...)
			pid := d.ready(0)
			kept, streaming := client(t), client(t)

			stop := make(chan struct{})
			var load sync.WaitGroup
			for range 4 {
				c := client(t)
				load.Go(func() {
					defer c.CloseIdleConnections()
					for {
						select {
						case <-stop:
							return
						default:
						}
						if _, err := ask(c, d.url); err != nil {
							t.Error(err)
						}
					}
				})
			}
			for generation := range 3 {
				d.wants(kept, pid, generation)
				resp, err := streaming.Get(d.url + "/events")
				if err != nil {
					t.Fatal(err)
				}
				events := bufio.NewReader(resp.Body)
				if line, err := events.ReadString('\n'); line != fmt.Sprintf("data: pid=%d generation=%d\n", pid, generation) {
					t.Fatalf("event %q, %v", line, err)
				}
				out := ""
				if c.by == "signal" {
					d.signal(pid, syscall.SIGHUP)
				} else {
					out = d.request("upgrade")
				}
				next := d.ready(generation + 1)
				if want := answer(next, generation+1); c.by == "socket" && out != want {
					t.Errorf("httpd -request prints %q; want %q", out, want)
				}
				if _, err := io.ReadAll(events); err != nil {
					t.Fatalf("the end of the events: %v", err)
				}
				resp.Body.Close()
				streaming.CloseIdleConnections()
				if scheme == "http" {
					d.wants(kept, pid, generation) // the last answer on this connection
				} else { // HTTP/2 requests go here until the client has read GOAWAY
					page := func(pid, generation int) string { return fmt.Sprintf("pid=%d generation=%d\n", pid, generation) }
					for got := ""; got != page(next, generation+1); {
						if got, err = ask(kept, d.url); err != nil || got != page(pid, generation) && got != page(next, generation+1) {
							t.Fatalf("got %q, %v; want an answer of process %d or %d", got, err, pid, next)
						}
					}
				}
				d.wants(kept, next, generation+1)
				d.ended(pid)
				pid = next
			}
			close(stop)
			load.Wait()
			kept.CloseIdleConnections()
			if c.by == "signal" {
				d.stop(pid)
			} else {
				if out, want := d.request("stop"), answer(pid, 3); out != want {
					t.Errorf("httpd -request prints %q; want %q", out, want)
				}
				d.leavesNothing(pid)
				if out := d.request("stop"); !strings.Contains(out, "no such file") || !strings.Contains(out, "exit status 1") {
					t.Errorf("httpd -request without a running process prints %q", out)
				}
			}
			if state := d.Wait(); !state.Success() {
				t.Errorf("the first process: %v", state)
			}
			_, addr, _ := strings.Cut(d.url, "://")
			d.Refused("tcp", addr)
		})
	}
}

// certificate returns the paths of a certificate for 127.0.0.1 and of its key.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// A client that never closes its connection does not keep the old process for ever.
// The process exits with an error that says what was left.
func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	d := start(t, "http", "-grace", "1h", "-drain", "300ms")
	first := d.ready(0)
	kept := client(t)
	d.wants(kept, first, 0)
	d.signal(first, syscall.SIGHUP)
	second := d.ready(1)
	d.Await(`httpd\[` + strconv.Itoa(first) + `\] (httpdrain: context deadline exceeded; left: 0 new, 0 active and 1 idle)`)
	d.wants(kept, second, 1)
}

func TestBadFlags(t *testing.T) {
	t.Parallel()
	path := build(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"extra"}, "no arguments but flags"},
		{[]string{"-grace", "0s"}, "above 0"},
		{[]string{"-drain", "-1s"}, "above 0"},
		{[]string{"-addr", "127.0.0.1:none"}, "127.0.0.1:none"},
		{[]string{"-addr", "127.0.0.1:0", "-cert", "/nonexistent"}, "no such file"},
	} {
		out, err := exec.Command(path, c.args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), c.want) {
			t.Errorf("httpd %q: %v, %q; want status 1 and %q", c.args, err, out, c.want)
		}
	}
}
