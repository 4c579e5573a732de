// Package compare upgrades the same small web server by several libraries, and
// reloads two proxies, under the same clients. docs/compare.md has the results.
package compare

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var upgrades = flag.Int("upgrades", 2, "how many `times` each server is upgraded under load")

// A server is one way to replace a server.
type server struct {
	name    string
	program string // of programs; empty: the command
	command func(t *testing.T, dir, addr string) *exec.Cmd
	signal  syscall.Signal
	fixed   bool                           // the signal goes to the first process, whoever serves
	spoil   func(t *testing.T, dir string) // makes the next upgrade fail
	repair  func(t *testing.T, dir string)
	settle  time.Duration // it takes no signal for so long after a start
}

var servers = []server{
	{name: "ecdysis", program: "ecdysis", signal: syscall.SIGHUP},
	{name: "tableflip", program: "tableflip", signal: syscall.SIGHUP},
	{name: "endless", program: "endless", signal: syscall.SIGHUP},
	{name: "overseer", program: "overseer", signal: syscall.SIGUSR2, fixed: true},
	{name: "nginx reload", command: nginx, signal: syscall.SIGHUP, fixed: true, spoil: spoilConfig, repair: repairConfig},
	{name: "HAProxy reload", command: haproxy, signal: syscall.SIGUSR2, fixed: true, spoil: spoilConfig, repair: repairConfig, settle: time.Second},
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func nginx(t *testing.T, dir, addr string) *exec.Cmd {
	t.Helper()
	path := find(t, "nginx")
	write(t, dir+"/config", fmt.Sprintf(`daemon off; pid %s/pid; error_log stderr; worker_processes 1;
events { worker_connections 256; }
http { access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
server { listen %s; location / { return 200 "$pid\n"; } } }
`, dir, addr), 0o644)
	return exec.Command(path, "-p", dir, "-c", dir+"/config")
}

func haproxy(t *testing.T, dir, addr string) *exec.Cmd {
	t.Helper()
	path := find(t, "haproxy")
	write(t, dir+"/config", fmt.Sprintf(`global
	stats socket %s/stats mode 600 expose-fd listeners level user
defaults
	mode http
	timeout client 30s
	timeout server 30s
	timeout connect 1s
frontend f
	bind %s
	http-request return status 200 content-type text/plain lf-string %%pid
`, dir, addr), 0o644)
	return exec.Command(path, "-W", "-f", dir+"/config")
}

func find(t *testing.T, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	t.Skip(name, " is not installed")
	return ""
}

func spoilConfig(t *testing.T, dir string) {
	b, err := os.ReadFile(dir + "/config")
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/config.good", string(b), 0o644)
	write(t, dir+"/config", "this is wrong\n", 0o644)
}

func repairConfig(t *testing.T, dir string) {
	if err := os.Rename(dir+"/config.good", dir+"/config"); err != nil {
		t.Fatal(err)
	}
}

func spoilProgram(t *testing.T, dir string) {
	if err := os.Link(dir+"/program", dir+"/program.good"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/program", "#!/bin/sh\nexit 1\n", 0o755)
}

func repairProgram(t *testing.T, dir string) {
	if err := os.Rename(dir+"/program.good", dir+"/program"); err != nil {
		t.Fatal(err)
	}
}

// run is a server under test.
type run struct {
	server
	t    *testing.T
	dir  string
	addr string
	cmd  *exec.Cmd
	pids map[int]bool  // that have answered
	last int           // the newest of them
	both time.Duration // the longest time in which an old process answered after a new one
}

func (s server) start(t *testing.T) *run {
	t.Helper()
	dir, err := os.MkdirTemp("", "compare")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("tcp", "127.0.0.1:0") // for a port that is free
	if err != nil {
		t.Fatal(err)
	}
	r := &run{server: s, t: t, dir: dir, addr: ln.Addr().String(), pids: map[int]bool{}}
	ln.Close()
	if s.program != "" {
		build := exec.Command("go", "build", "-o", dir+"/program", "./programs/"+s.program)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		r.cmd = exec.Command(dir+"/program", r.addr)
		r.spoil, r.repair = spoilProgram, repairProgram
	} else {
		r.cmd = s.command(t, dir, r.addr)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	r.cmd.Stderr, r.cmd.Stdout = log, log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		_ = r.cmd.Wait()
		if b, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("its log:\n%s", b)
		}
	})
	if !r.answers(20*time.Second, func(pid int) bool { return true }) {
		t.Fatal("it does not start")
	}
	return r
}

// post sends one request and returns who has answered.
func post(c *http.Client, addr string) (pid int, err error) {
	resp, err := c.Post("http://"+addr+"/", "text/plain", strings.NewReader("hello"))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("status %s", resp.Status)
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func client(keep bool) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: !keep, MaxIdleConnsPerHost: 1}}
}

// answers waits until ten requests in a row, each on a connection of its own, are
// answered by processes that want accepts.
func (r *run) answers(patience time.Duration, want func(pid int) bool) bool {
	c := client(false)
	end := time.Now().Add(patience)
	var first time.Time
	for row := 0; row < 10; {
		pid, err := post(c, r.addr)
		if err == nil && want(pid) {
			if first.IsZero() {
				first = time.Now()
			}
			row++
			r.pids[pid], r.last = true, pid
			continue
		}
		if err == nil && !first.IsZero() {
			r.both = max(r.both, time.Since(first))
		}
		row = 0
		if time.Now().After(end) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

// upgrade returns how long it took until new processes alone answered.
func (r *run) upgrade(patience time.Duration) (time.Duration, bool) {
	old := make(map[int]bool)
	for pid := range r.pids {
		old[pid] = true
	}
	time.Sleep(r.settle)
	start := time.Now()
	r.send()
	ok := r.answers(patience, func(pid int) bool { return !old[pid] })
	return time.Since(start), ok
}

func (r *run) send() {
	pid := r.last
	if r.fixed {
		pid = r.cmd.Process.Pid
	}
	_ = syscall.Kill(pid, r.signal)
}

// A count is what some clients saw.
type count struct {
	answered, failed atomic.Int64
	first            atomic.Value // error
}

func (c *count) String() string {
	s := fmt.Sprintf("%d of %d requests failed", c.failed.Load(), c.answered.Load()+c.failed.Load())
	if text := c.first.Load(); text != nil {
		s += fmt.Sprintf(" (%v)", text)
	}
	return s
}

// load has clients make requests until it is ended: half of them on a new
// connection each, the others on connections that are kept.
func load(t *testing.T, addr string) (fresh, kept *count, end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	fresh, kept = new(count), new(count)
	var all sync.WaitGroup
	for i := range 8 {
		c, n := client(false), fresh
		if i%2 == 0 {
			c, n = client(true), kept
		}
		all.Go(func() {
			for ctx.Err() == nil {
				if _, err := post(c, addr); err != nil {
					n.failed.Add(1)
					n.first.CompareAndSwap(nil, err.Error())
				} else {
					n.answered.Add(1)
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	return fresh, kept, func() {
		cancel()
		all.Wait()
	}
}

// TestCompare says what clients saw. What it requires, it requires of this
// package alone.
func TestCompare(t *testing.T) {
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			r := s.start(t)
			patience := 5 * time.Second
			if s.name == "ecdysis" { // which is required
				patience = 20 * time.Second
			}
			fresh, kept, end := load(t, r.addr)
			done, longest := 0, time.Duration(0)
			for range *upgrades {
				d, ok := r.upgrade(patience)
				if !ok {
					break
				}
				done++
				longest = max(longest, d)
				time.Sleep(300 * time.Millisecond) // what comes late is seen, too
			}
			end()
			t.Logf("%d of %d upgrades, the longest %v; an old process answered for %v after a new one", done, *upgrades, longest.Round(time.Millisecond), r.both.Round(time.Millisecond))
			t.Log("on new connections: ", fresh)
			t.Log("on kept connections: ", kept)
			lost := fresh.failed.Load() + kept.failed.Load()

			r.spoil(t, r.dir)
			fresh, kept, end = load(t, r.addr)
			r.send()
			time.Sleep(2 * time.Second) // for any damage to show
			end()
			r.repair(t, r.dir)
			_, again := r.upgrade(patience)
			t.Log("a version that cannot start, on new connections: ", fresh)
			t.Log("a version that cannot start, on kept connections: ", kept)
			t.Log("the next upgrade works: ", again)
			lost += fresh.failed.Load() + kept.failed.Load()

			if s.name == "ecdysis" && (done < *upgrades || lost > 0 || r.both > 0 || !again) {
				t.Error("want that none fails, that no old process answers after a new one, and that every upgrade works")
			}
		})
	}
}
