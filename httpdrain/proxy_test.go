package httpdrain_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// haproxyConf takes a frontend, a server, and the settings of HTTP/2 to the
// server. HAProxy drops requests that wait for a connection when GOAWAY arrives
// there, and closes the connections of their clients without an answer. The
// second condition of retry-on makes HAProxy send these requests again.
const haproxyConf = `
defaults
	mode http
	timeout connect 30s
	timeout client 30s
	timeout server 30s
	http-reuse always
	retry-on conn-failure empty-response
frontend f
	bind unix@%s
	default_backend b
backend b
	server s %s %s
`

// Clients notice no upgrade behind a proxy that multiplexes their requests over
// HTTP/2. No request is processed twice.
func TestHAProxy(t *testing.T) {
	path, err := exec.LookPath("haproxy")
	if err != nil {
		path = "/usr/sbin/haproxy"
		if _, err := os.Stat(path); err != nil && (os.Getenv("CI") == "" || runtime.GOOS != "linux") {
			t.Skip("there is no haproxy")
		}
	}
	for name, way := range map[string]string{"TLS": "ssl verify none alpn h2", "h2c": "proto h2"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const upgrades, clients = 10, 16
			s := startServer(t, byDrainer, testGrace, h2cVar+"=1")
			server := s.plain
			if name == "TLS" {
				server = s.secure
			}
			front := startHAProxy(t, path, server, way)

			var sent, answered atomic.Int64
			stop := make(chan struct{})
			var wg sync.WaitGroup
			failures := make(chan error, 10000)
			for range clients {
				wg.Go(func() {
					transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
						return new(net.Dialer).DialContext(ctx, "unix", front)
					}}
					defer transport.CloseIdleConnections()
					for {
						select {
						case <-stop:
							return
						default:
						}
						if err := postOnce(transport, sent.Add(1)); err != nil {
							failures <- err
						}
						answered.Add(1)
					}
				})
			}
			more := func() {
				want := answered.Load() + 100
				eventually(t, fmt.Sprint(want, " answers"), func() (string, bool) {
					n := answered.Load()
					return fmt.Sprint(n), n >= want
				})
			}
			more()
			for range upgrades {
				s.upgrade()
				more()
			}
			close(stop)
			wg.Wait()
			s.stop()

			close(failures)
			for err := range failures {
				t.Error(err)
			}
			times := map[string]int{}
			for _, line := range s.Said() {
				if _, once, ok := strings.Cut(line, "] once "); ok {
					times[once]++
				}
			}
			for i := range sent.Load() {
				if token := fmt.Sprintf("%d <nil>", i+1); times[token] != 1 {
					t.Errorf("request %s was processed %d times", token, times[token])
				}
			}
			t.Logf("%d requests, %d upgrades", sent.Load(), upgrades)
		})
	}
}

// postOnce makes a request that must not be repeated.
func postOnce(transport *http.Transport, token int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("http://test/once?%d", token), strings.NewReader("body"))
	if err != nil {
		return err
	}
	req.GetBody = nil
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if want := fmt.Sprintf("once %d", token); err != nil || resp.StatusCode != http.StatusOK || string(got) != want {
		return fmt.Errorf("%s %q, %v; want %q", resp.Status, got, err, want)
	}
	return nil
}

// startHAProxy starts HAProxy and returns the path of its socket.
func startHAProxy(t *testing.T, program, server, way string) string {
	t.Helper()
	dir := shortDir(t)
	front, conf := filepath.Join(dir, "front"), filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, haproxyConf, front, server, way), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-db", "-f", conf)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("haproxy: %s", said.String())
		}
	})
	eventually(t, "haproxy", func() (string, bool) {
		c, err := net.DialTimeout("unix", front, time.Second)
		if err != nil {
			return err.Error(), false
		}
		c.Close()
		return "", true
	})
	return front
}
