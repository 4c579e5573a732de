//go:build linux

package systemd_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// patience is how long a test waits for what must happen.
var patience = proctest.Patience

// A service is a unit of one part of TestInside, made from one of the units in
// testdata/units.
type service struct {
	name   string
	base   string // in testdata/units
	dropIn string // for the service's section
	socket string // drop-in of its socket unit, or "" for no such unit
	test   func(d *daemon)
}

// services are the parts of TestInside. Each has addresses of its own.
var services = []*service{
	{name: "reload", base: "mydaemon", dropIn: "User=nobody\n", test: testReload},
	{name: "failures", base: "mydaemon", dropIn: "User=nobody\n", test: testFailures},
	{name: "notify", base: "mydaemon-notify", dropIn: "User=nobody\n", test: testNotify},
	{name: "slow", base: "mydaemon", dropIn: "TimeoutStartSec=1\n", test: testSlow},
	{name: "stop", base: "mydaemon", dropIn: "User=nobody\n", test: testStop},
	{name: "death", base: "mydaemon", test: testDeath},
	{name: "killed", base: "mydaemon", dropIn: "RestartSec=0\n", test: testKilled},
	{name: "watchdog", base: "mydaemon", dropIn: "WatchdogSec=1\nRestart=no\n", test: testWatchdog},
	{name: "forking", base: "mydaemon-forking", test: testForking},
	{name: "takeover", base: "mydaemon", test: testTakeover},
	{name: "takeover-next", base: "mydaemon"}, // takes over
	{name: "socket", base: "mydaemon", dropIn: "User=nobody\n", socket: "[Socket]\nListenStream=\nListenStream=127.0.0.1:7010\nListenStream=/run/socket.sock\n", test: testSocket},
	{name: "store", base: "mydaemon-stored", dropIn: "User=nobody\n", test: testStore},
}

// flagRun is the pattern that go test was given.
func flagRun() string { return flag.Lookup("test.run").Value.String() }

// TestInside runs under the systemd that TestRealSystemd boots.
func TestInside(t *testing.T) {
	if os.Getenv(insideVar) == "" {
		t.Skip("TestRealSystemd runs this under a systemd of its own")
	}
	for _, s := range services {
		if s.test == nil {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			d := &daemon{t: t, service: s}
			t.Cleanup(func() {
				if t.Failed() {
					t.Log(d.status())
				}
			})
			s.test(d)
		})
	}
}

// A daemon is a service under test.
type daemon struct {
	t *testing.T
	*service
	network, address string // of the test's clients
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemctl %s: %v, %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (d *daemon) status() string {
	out, _ := exec.Command("systemctl", "status", "--no-pager", "-n", "100", d.name).CombinedOutput()
	return string(out)
}

// configure writes what the daemon reads when it starts.
func (d *daemon) configure(lines ...string) {
	d.t.Helper()
	path := "/run/" + d.name + ".conf"
	if err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		d.t.Fatal(err)
	}
	for _, l := range lines {
		if w, ok := strings.CutPrefix(l, "listen="); ok && d.address == "" {
			d.network, d.address = strings.Fields(w)[1], strings.Fields(w)[2]
		}
	}
}

func (d *daemon) show(property string) string {
	d.t.Helper()
	return systemctl(d.t, "show", "--value", "-p", property, d.name)
}

// await returns when a property has one of these values.
func (d *daemon) await(property string, want ...string) {
	d.t.Helper()
	end := time.Now().Add(patience)
	got := d.show(property)
	for ; !slices.Contains(want, got); got = d.show(property) {
		if time.Now().After(end) {
			d.t.Fatalf("%s is %q; want %q", property, got, want)
		}
		time.Sleep(10 * time.Millisecond) // without D-Bus there is no event to wait for
	}
}

func (d *daemon) main() int {
	d.t.Helper()
	pid, err := strconv.Atoi(d.show("MainPID"))
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

func (d *daemon) start() int {
	d.t.Helper()
	systemctl(d.t, "start", d.name)
	return d.serves(0)
}

func (d *daemon) reload() {
	d.t.Helper()
	systemctl(d.t, "reload", d.name)
}

// serves asserts that the unit is active, and that its main process answers as
// this generation.
func (d *daemon) serves(generation int) int {
	d.t.Helper()
	if s := d.show("ActiveState") + " " + d.show("SubState"); s != "active running" {
		d.t.Fatalf("the unit is %s; want active running", s)
	}
	c := d.dial()
	defer c.Close()
	if main := d.main(); c.pid != main || c.generation != generation {
		d.t.Fatalf("process %d of generation %d answers; want the main process %d of generation %d", c.pid, c.generation, main, generation)
	}
	return c.pid
}

// alone returns when the older generations have served their last clients and
// exited. A stop or restart would end them before.
func (d *daemon) alone() {
	d.t.Helper()
	path := "/sys/fs/cgroup" + d.show("ControlGroup") + "/cgroup.procs"
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(path)
		if err != nil {
			d.t.Fatal(err)
		}
		if len(bytes.Fields(b)) == 1 {
			return
		}
		if time.Now().After(end) {
			d.t.Fatalf("the unit has the processes %q; want one", b)
		}
	}
}

// logs asserts that the journal of the unit has a line with a text, or has none.
func (d *daemon) logs(text string, want bool) {
	d.t.Helper()
	_ = exec.Command("journalctl", "--sync").Run()
	out, err := exec.Command("journalctl", "-o", "cat", "--no-pager", "-u", d.name).Output()
	if err != nil {
		d.t.Fatal(err)
	}
	if bytes.Contains(bytes.ToLower(out), []byte(strings.ToLower(text))) != want {
		d.t.Errorf("%q in the journal of %s: want %v", text, d.name, want)
	}
}

// A client is a connection that the daemon has greeted.
type client struct {
	net.Conn
	t               *testing.T
	r               *bufio.Reader
	pid, generation int
}

func (d *daemon) dial() *client {
	d.t.Helper()
	c, err := d.connect()
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	c.t = d.t
	return c
}

func (d *daemon) connect() (*client, error) {
	conn, err := net.DialTimeout(d.network, d.address, patience)
	if err != nil {
		return nil, err
	}
	c := &client{Conn: conn, r: bufio.NewReader(conn)}
	_ = conn.SetDeadline(time.Now().Add(patience))
	line, err := c.r.ReadString('\n')
	if err == nil {
		_, err = fmt.Sscan(line, &c.pid, &c.generation)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("no greeting: %w", err)
	}
	return c, nil
}

// ask sends a line, and returns an error unless the daemon sends it back.
func (c *client) ask(text string) error {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, text+"\n"); err != nil {
		return err
	}
	back, err := c.r.ReadString('\n')
	if err == nil && back != text+"\n" {
		err = fmt.Errorf("sent %q, got %q back", text, back)
	}
	return err
}

func (c *client) asks(text string) {
	c.t.Helper()
	if err := c.ask(text); err != nil {
		c.t.Fatal(err)
	}
}

// load keeps two clients at the service until the returned function is called,
// which asserts that there were many and that none of them failed.
func (d *daemon) load() (check func()) { return d.loadUntil(new(atomic.Bool)) }

// loadUntil is load for a service that is stopped after ended is set. From then
// on a client may come too late, but every client that was greeted is served.
func (d *daemon) loadUntil(ended *atomic.Bool) (check func()) {
	d.t.Helper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var answered atomic.Int64
	var mu sync.Mutex
	var failures []error
	var once sync.Once
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := d.connect()
				if err != nil && ended.Load() {
					return
				}
				if err == nil {
					err = c.ask("load")
					c.Close()
				}
				if err != nil {
					mu.Lock()
					failures = append(failures, err)
					mu.Unlock()
				} else {
					answered.Add(1)
				}
				time.Sleep(200 * time.Microsecond) // leaves processor time for the other parts
			}
		})
	}
	end := func() { once.Do(func() { close(stop); wg.Wait() }) }
	d.t.Cleanup(end)
	return func() {
		d.t.Helper()
		end()
		if n := len(failures); n > 0 || answered.Load() == 0 {
			d.t.Fatalf("%d clients answered, %d failed; the first: %v", answered.Load(), n, cmp.Or(append(failures, nil)[0], errors.New("none")))
		}
		d.t.Logf("%d clients answered, 0 failed", answered.Load())
	}
}

// A reloading is a running systemctl reload.
type reloading struct {
	t    *testing.T
	done chan error
}

func (d *daemon) startReload() reloading {
	r := reloading{d.t, make(chan error, 1)}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, "systemctl", "reload", d.name).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("systemctl reload: %w, %s", err, out)
		}
		r.done <- err
	}()
	return r
}

func (r reloading) wait() {
	r.t.Helper()
	if err := <-r.done; err != nil {
		r.t.Fatal(err)
	}
}

func (r reloading) runs(d time.Duration) {
	r.t.Helper()
	select {
	case err := <-r.done:
		r.t.Fatalf("the reload has returned: %v", err)
	case <-time.After(d):
	}
}

// fifo makes the FIFO at which a successor with do=hold waits. held returns when a
// successor waits there. Its result lets the successor go on.
func (d *daemon) fifo() (path string, held func() (release func())) {
	d.t.Helper()
	path = "/run/" + d.name + ".fifo"
	if err := syscall.Mkfifo(path, 0); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		d.t.Fatal(err)
	}
	return path, func() func() {
		d.t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // waits for the reader
		if err != nil {
			d.t.Fatal(err)
		}
		return func() { f.Close() }
	}
}

func testReload(d *daemon) {
	fifo, held := d.fifo()
	normal := []string{"listen=web tcp 127.0.0.1:7001", "status=serving as"}
	d.configure(normal...)
	first := d.start()
	check := d.load()
	old := d.dial()

	// The reload returns when the successor serves, and not before.
	d.configure(append(normal, "do=hold", "fifo="+fifo)...)
	r := d.startReload()
	release := held()
	d.await("ActiveState", "reloading")
	if main := d.main(); main != first {
		d.t.Fatalf("the main process is %d before the successor is ready; want %d", main, first)
	}
	r.runs(0)
	release()
	r.wait()
	d.serves(1)

	// Ten reloads follow each other while the first process drains.
	d.configure(normal...)
	old.asks("still served")
	for i := range 10 {
		d.reload()
		d.serves(2 + i)
	}
	old.asks("still served")
	old.Close()

	// Two reloads run at once.
	before := d.main()
	a, b := d.startReload(), d.startReload()
	a.wait()
	b.wait()
	c := d.dial()
	if c.pid != d.main() || c.pid == before || c.generation < 12 || c.generation > 13 {
		d.t.Fatalf("after two reloads at once process %d of generation %d serves; the main process is %d, and was %d", c.pid, c.generation, d.main(), before)
	}
	c.Close()

	// A signal that systemd has not sent reloads the unit, too. A signal during a
	// reload does not delay anything.
	for range 10 {
		before := d.main()
		r := d.startReload()
		if err := syscall.Kill(before, syscall.SIGHUP); err != nil && err != syscall.ESRCH {
			d.t.Fatal(err)
		}
		r.wait()
		d.await("ActiveState", "active") // one of the two reloads may still run
		if now := d.main(); now == before {
			d.t.Fatalf("the main process is still %d", now)
		}
	}
	check()
	c = d.dial()
	d.await("StatusText", "serving as "+strconv.Itoa(c.generation))
	d.clean()
}

// clean asserts that systemd has logged no complaint.
func (d *daemon) clean() {
	d.t.Helper()
	for _, text := range []string{"not our child", "SIGKILL", "permitted", "Killing", "timed out", "ignoring", "Left behind"} {
		d.logs(text, false)
	}
}

func testFailures(d *daemon) {
	listen := "listen=web tcp 127.0.0.1:7002"
	d.configure(listen, "timeout=2s", "probation=10s")
	first := d.start()
	check := d.load()
	for _, c := range []struct{ do, reason string }{
		{"crash", "exit status 3"}, // no more is known, because the successor is systemd's child
		{"hang", "not ready within 2s"},
		{"fail", "it says: bad MAINPID=1 configuration"},
		{"die", "failed at probation"},
		{"crash", "failed at init"},
	} {
		d.configure(listen, "do="+c.do)
		d.reload()
		if pid := d.serves(0); pid != first {
			d.t.Fatalf("after %s the main process is %d; want %d", c.do, pid, first)
		}
		if c.reason == "exit status 3" {
			c.reason = "ended without a call of Ready or Fail"
		}
		if text := d.show("StatusText"); !strings.HasPrefix(text, "upgrade failed by signal hangup: ") || !strings.Contains(text, c.reason) {
			d.t.Fatalf("after %s the status is %q; want the reason, %q", c.do, text, c.reason)
		}
	}
	check()
	d.clean()
}

// With ExecReload= as a client of the control socket the reload has the outcome
// of the upgrade.
func testNotify(d *daemon) {
	normal := []string{"listen=web tcp 127.0.0.1:7009", "control=/run/mydaemon/upgrade", "timeout=2s"}
	d.configure(normal...)
	d.start()
	check := d.load()
	old := d.dial()
	for i := range 5 {
		d.reload()
		d.serves(1 + i)
	}
	old.asks("still served")
	old.Close()
	pid := d.main()
	for do, reason := range map[string]string{"crash": "without a call of Ready or Fail", "hang": "not ready within 2s", "fail": "it says: bad"} {
		d.configure(append(normal, "do="+do)...)
		out, err := exec.Command("systemctl", "reload", d.name).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 {
			d.t.Fatalf("a reload in which the successor does %s: %v, %s; want status 1", do, err, out)
		}
		if now := d.serves(5); now != pid {
			d.t.Fatalf("after %s the main process is %d; want %d", do, now, pid)
		}
		if text := d.show("StatusText"); !strings.HasPrefix(text, "upgrade failed by socket /run/mydaemon/upgrade: ") || !strings.Contains(text, reason) {
			d.t.Fatalf("after %s the status is %q; want the reason, %q", do, text, reason)
		}
	}
	// Of two reloads at once, one upgrade is done. systemd merges the reloads, or the
	// second one fails.
	d.configure(normal...)
	a, b := d.startReload(), d.startReload()
	if err := errors.Join(<-a.done, <-b.done); err != nil && !strings.Contains(err.Error(), "failed") {
		d.t.Fatal(err)
	}
	d.await("ActiveState", "active")
	if d.main() == pid {
		d.t.Fatal("two reloads at once have replaced nothing")
	}
	check()
	d.clean()
}

// TimeoutStartSec= of the unit does not limit an upgrade.
func testSlow(d *daemon) {
	fifo, held := d.fifo()
	listen := "listen=web tcp 127.0.0.1:7003"
	d.configure(listen)
	first := d.start()
	d.configure(listen, "do=crash")
	d.reload()
	d.configure(listen, "do=hold", "fifo="+fifo)
	r := d.startReload()
	release := held()
	r.runs(1500 * time.Millisecond) // TimeoutStartSec=1
	if main := d.main(); main != first {
		d.t.Fatalf("the main process is %d before the successor is ready; want %d", main, first)
	}
	release()
	r.wait()
	d.serves(1)
	// The status of the failed upgrade is gone, and the status that the successor
	// set before it was the main process is there.
	if text := d.show("StatusText"); text != "starting as 1" {
		d.t.Fatalf("the status is %q; want the successor's", text)
	}
	d.clean()
}

func testStop(d *daemon) {
	d.configure("listen=web tcp 127.0.0.1:7004")
	d.start()
	var ended atomic.Bool
	check := d.loadUntil(&ended)
	old := d.dial()
	d.reload()
	d.serves(1)
	c := d.dial()
	old.asks("still served")
	ended.Store(true)
	systemctl(d.t, "stop", "--no-block", d.name)
	d.await("ActiveState", "deactivating")
	d.await("SubState", "stop-sigterm")
	if other, err := d.connect(); err == nil {
		other.Close()
		d.t.Fatal("a client is served after the stop")
	}
	check()
	if err := old.ask("hello"); err == nil { // as docs/systemd.md says
		d.t.Fatal("the signal that stops the unit has not ended the older generation")
	}
	c.asks("still served")
	c.Close()
	d.await("ActiveState", "inactive")
	if r := d.show("Result") + " " + d.show("ExecMainStatus"); r != "success 0" {
		d.t.Fatalf("the unit has ended with %s; want success 0", r)
	}
	d.clean()
}

// The successor's death is noticed at once, although its predecessor still
// drains.
func testDeath(d *daemon) {
	d.configure("listen=web tcp 127.0.0.1:7005")
	d.start()
	check := d.load()
	old := d.dial()
	d.reload()
	second := d.serves(1)
	old.asks("still served")
	check() // before the kill, because accepted clients are lost with their process
	if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
	d.await("NRestarts", "1")
	d.await("ActiveState", "active")
	d.serves(0)
	d.logs("not our child", false)
	d.logs("Main process exited, code=killed", true)
}

// The predecessor's death during an upgrade ends the unit, which Restart= starts
// again.
func testKilled(d *daemon) {
	fifo, held := d.fifo()
	listen := "listen=web tcp 127.0.0.1:7006"
	d.configure(listen)
	first := d.start()
	d.configure(listen, "do=hold", "fifo="+fifo)
	r := d.startReload()
	release := held()
	d.configure(listen)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
	<-r.done // its result does not matter
	d.await("NRestarts", "1")
	d.await("ActiveState", "active")
	d.serves(0)
	release()
}

func testWatchdog(d *daemon) {
	listen := "listen=web tcp 127.0.0.1:7008"
	d.configure(listen, "probation=1300ms") // longer than WatchdogSec=1
	d.start()
	d.reload()
	second := d.serves(1)
	time.Sleep(1300 * time.Millisecond) // longer than the watchdog's interval, in which nothing must happen
	d.configure(listen, "do=sleep")
	if now := d.serves(1); now != second {
		d.t.Fatalf("the main process is %d; want %d", now, second)
	}
	d.clean()
	d.reload() // this successor sends no sign of life
	d.await("Result", "watchdog")
}

// systemd follows the PID file of a daemon that sends no messages.
func testForking(d *daemon) {
	d.configure("listen=web tcp 127.0.0.1:7007", "pidfile=/run/mydaemon.pid")
	d.start()
	check := d.load()
	for i := range 5 {
		old := d.dial()
		d.reload() // returns at once
		now := d.dial()
		for end := time.Now().Add(patience); now.generation == i; now = d.dial() {
			now.Close()
			if time.Now().After(end) {
				d.t.Fatalf("generation %d still serves", i)
			}
		}
		old.asks("still served")
		old.Close()
		// systemd reads the PID file when the old process has ended.
		d.await("MainPID", strconv.Itoa(now.pid))
		now.Close()
		d.serves(1 + i)
	}
	check()
	c := d.dial()
	systemctl(d.t, "stop", "--no-block", d.name)
	d.await("SubState", "stop-sigterm")
	c.asks("still served")
	c.Close()
	d.await("ActiveState", "inactive")
	if r := d.show("Result"); r != "success" {
		d.t.Fatalf("the unit has ended with %s; want success", r)
	}
	d.clean()
}

// A process of another unit takes everything over, and back again.
func testTakeover(d *daemon) {
	next := &daemon{t: d.t, service: &service{name: d.name + "-next"}}
	conf := []string{"listen=web tcp 127.0.0.1:7011", "takeover=/run/" + d.name + ".sock"}
	d.configure(conf...)
	next.configure(conf...)
	d.start()
	check := d.load()
	old := d.dial()
	systemctl(d.t, "start", next.name) // returns when it serves
	next.serves(1)
	if s := d.show("ActiveState") + " " + d.show("StatusText"); !strings.HasPrefix(s, "active upgraded") {
		d.t.Fatalf("the unit that was taken over is %s; want active, with a status that tells of it", s)
	}
	old.asks("still served")
	old.Close()
	d.await("ActiveState", "inactive")
	if r := d.show("Result"); r != "success" {
		d.t.Fatalf("the unit that was taken over has ended with %s; want success", r)
	}
	next.reload()
	next.serves(2)
	systemctl(d.t, "start", d.name)
	d.serves(3)
	next.await("ActiveState", "inactive")
	check()
	d.clean()
	next.clean()
}

func testSocket(d *daemon) {
	const path = "/run/socket.sock"
	// One socket is found by its address, and the other by the name of both.
	d.configure("listen=a tcp 127.0.0.1:7010", "name=web")
	systemctl(d.t, "start", d.name+".socket")
	if s := systemctl(d.t, "show", "--value", "-p", "ActiveState", d.name+".service"); s != "inactive" {
		d.t.Fatalf("the service is %s before there is a client", s)
	}
	check := d.load()
	other := *d
	other.network, other.address = "unix", path
	checkOther := other.load()
	d.dial().Close()
	d.await("ActiveState", "active")
	d.serves(0)
	for i := range 3 {
		d.reload()
		d.serves(1 + i)
		other.serves(1 + i)
	}
	d.alone()
	systemctl(d.t, "restart", d.name+".service")
	d.serves(0)
	other.serves(0)
	d.reload()
	d.serves(1)
	check()
	checkOther()
	d.alone()
	systemctl(d.t, "stop", d.name+".service")
	if _, err := os.Stat(path); err != nil {
		d.t.Fatalf("the socket of the socket unit after the service: %v", err)
	}
	d.clean()
}

func testStore(d *daemon) {
	const web, extra = "listen=web tcp 127.0.0.1:7020", "listen=extra tcp 127.0.0.1:7021"
	kept := func(n int) {
		d.t.Helper()
		d.await("NFileDescriptorStore", strconv.Itoa(n))
	}
	d.configure("store=yes", web)
	d.start()
	kept(1)
	check := d.load()
	for range 3 {
		before := d.main()
		d.alone()
		systemctl(d.t, "restart", d.name)
		if now := d.serves(0); now == before {
			d.t.Fatal("it was not restarted")
		}
	}
	d.reload()
	d.serves(1)
	// A successor that fails leaves nothing in the store.
	d.configure("store=yes", web, extra, "do=crash")
	d.reload()
	d.serves(1)
	kept(1)
	// A successor that takes over has its sockets in the store.
	d.configure("store=yes", web, extra)
	d.reload()
	d.serves(2)
	kept(2)
	check()

	// Clients that connect while a process is killed are served by the next one.
	pid := d.main()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		d.t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) { // until it accepts no more
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if _, rest, _ := strings.Cut(string(stat), ") "); strings.HasPrefix(rest, "T") {
			break
		}
		if err != nil || time.Now().After(end) {
			d.t.Fatalf("process %d has not stopped: %q, %v", pid, stat, err)
		}
	}
	var waiting []net.Conn
	for _, port := range []string{"7020", "7021"} {
		for range 20 {
			c, err := net.DialTimeout("tcp", "127.0.0.1:"+port, patience)
			if err != nil {
				d.t.Fatal(err)
			}
			d.t.Cleanup(func() { c.Close() })
			waiting = append(waiting, c)
		}
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
	for i, c := range waiting {
		_ = c.SetDeadline(time.Now().Add(patience))
		var by, generation int
		if _, err := fmt.Fscan(c, &by, &generation); err != nil || by == pid || generation != 0 {
			d.t.Fatalf("waiting client %d: process %d of generation %d, %v", i, by, generation, err)
		}
	}
	d.await("ActiveState", "active")
	d.serves(0)
	kept(2)

	// A socket that is not wanted any more is closed, after an upgrade and after a
	// restart.
	refused := func(port string) {
		d.t.Helper()
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); !errors.Is(err, syscall.ECONNREFUSED) {
			if err == nil {
				c.Close()
			}
			d.t.Fatalf("port %s, which nobody listens on: %v", port, err)
		}
	}
	d.configure("store=yes", web)
	d.reload()
	d.serves(1)
	kept(1)
	refused("7021")
	d.configure("store=yes", web, extra)
	d.reload()
	kept(2)
	d.configure("store=yes", extra)
	systemctl(d.t, "restart", d.name)
	kept(1)
	refused("7020")
	d.address = "127.0.0.1:7021"
	d.serves(0)
	d.logs("permitted", false)
	d.logs("not our child", false)
}
