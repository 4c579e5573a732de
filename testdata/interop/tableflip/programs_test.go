package interop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// upgrades is how many each program goes through.
const upgrades = 10

// TestPrograms builds each program with either import path and upgrades it under
// load. With ours nothing may be lost, and no older generation may answer after a
// newer one has.
func TestPrograms(t *testing.T) {
	for _, p := range []struct {
		program string
		args    []string
	}{
		{"echo", []string{"-pid-file", "DIR/pid"}},
		{"echo", []string{"-network", "unix", "-listen", "DIR/s"}},
		{"httpd", []string{"-pid-file", "DIR/pid"}},
		{"httpd", []string{"-drain"}},
		{"udp", nil},
		{"daemon", []string{"-unix", "DIR/s", "-lock", "DIR/lock", "-pid-file", "DIR/pid"}},
	} {
		for _, l := range []lib{theirs, ours} {
			t.Run(strings.Join(append([]string{p.program, string(l)}, p.args...), " "), func(t *testing.T) {
				t.Parallel()
				c := start(t, build(t, l, p.program), append([]string(nil), p.args...)...)
				load := func(addrs []proctest.Addr) *proctest.Load {
					return proctest.StartLoad(t, proctest.Clients{N: 2}, addrs...)
				}
				if p.program == "httpd" {
					load = func(addrs []proctest.Addr) *proctest.Load { return webLoad(t, addrs[0], p.args[0] == "-drain") }
				}
				upgradeUnderLoad(t, c, l, load)
			})
		}
	}
}

func upgradeUnderLoad(t *testing.T, c *chain, l lib, load func([]proctest.Addr) *proctest.Load) {
	pid, addrs := c.addrs(0)
	ld := load(addrs)
	var kept net.Conn
	if len(addrs) > 1 {
		kept = dial(t, addrs[0])
	}
	for gen := range upgrades {
		ld.More(20)
		if kept != nil {
			if got := keep(t, kept); got != gen {
				t.Errorf("the connection that is handed on was served by generation %d; want %d", got, gen)
			}
		}
		next, _ := c.upgrade(pid, gen)
		c.gone(pid) // or the next upgrade is refused
		pid = next
		ld.More(20)
	}
	if l == ours {
		ld.Check()
	} else {
		ld.End()
	}
	t.Logf("%d requests were answered", ld.Answered())
	if got := ld.Newest(); got != upgrades {
		t.Errorf("generation %d was the newest that has answered; want %d", got, upgrades)
	}
	if b, err := os.ReadFile(c.dir + "/pid"); err == nil && strings.TrimSpace(string(b)) != fmt.Sprint(pid) {
		t.Errorf("the PID file says %q; want %d", b, pid)
	}
}

// TestStub runs the tests of a program with the stand-in of either library.
func TestStub(t *testing.T) {
	for _, l := range []lib{theirs, ours} {
		t.Run(string(l), func(t *testing.T) {
			t.Parallel()
			out, err := goTool(l, "test", "-v", "-count=1", "./programs/stub")
			if err != nil || !strings.Contains(string(out), "PASS: TestServe") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// keep has a daemon hand on a connection, and returns the generation.
func keep(t *testing.T, conn net.Conn) (gen int) {
	t.Helper()
	_, err := io.WriteString(conn, "keep\n")
	if err == nil {
		gen, err = answer(conn)
	}
	if err != nil {
		t.Fatal(err)
	}
	return gen
}

// webLoad is clients of a web server. What the server's Shutdown drops, a request
// that comes on a connection which has been accepted just before, is net/http's
// own doing: at most one of each client in each upgrade is put up with, unless
// the program drains its clients.
func webLoad(t *testing.T, a proctest.Addr, drains bool) *proctest.Load {
	clients := proctest.Clients{N: 2}
	if !drains {
		clients.Killed = upgrades
	}
	return proctest.StartLoad(t, clients, overWeb(t, a))
}

// overWeb returns an address at which each line of a connection is answered by a
// request to a web server. Each request has a connection of its own, since the
// server's Shutdown may close one that is kept alive just when a request comes.
func overWeb(t *testing.T, a proctest.Addr) proctest.Addr {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := c.Read(make([]byte, 100)); err != nil {
					return
				}
				r, err := client.Get("http://" + a.Address)
				if err != nil {
					if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
						t.Error(err)
					}
					return // the client finds its connection cut, too
				}
				defer r.Body.Close()
				io.Copy(c, r.Body)
			}()
		}
	}()
	return proctest.Addr{Network: "tcp", Address: ln.Addr().String()}
}
