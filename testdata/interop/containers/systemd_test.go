package containers

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/systemd"
)

// TestSystemd boots a systemd in namespaces of its own, where driver tries what
// docs/supervisors.md says.
func TestSystemd(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		missing(t, "no systemd can be booted without root")
	}
	if _, err := exec.LookPath("debootstrap"); err != nil && !exists("/tmp/sdroot/.realsd-ok") {
		missing(t, err)
	}
	doc, err := os.ReadFile("../../../docs/supervisors.md")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../../docs/systemd.md")
	if err != nil {
		t.Fatal(err)
	}
	bin, units := t.TempDir(), t.TempDir()
	install(t, program(t, ""), filepath.Join(bin, "mydaemon"))
	install(t, program(t, "echod"), filepath.Join(bin, "echod"))
	unit := func(name, text string) {
		t.Helper()
		if text == "" {
			t.Fatal("the documentation has no unit for ", name)
		}
		text = strings.ReplaceAll(text, "/usr/local/bin/", "/opt/test/")
		text = strings.Replace(text, "[Service]\n", "[Service]\nEnvironment="+mydaemon.Env()+"\n", 1)
		if err := os.WriteFile(filepath.Join(units, name+".service"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	base := string(regexp.MustCompile("(?ms)^# mydaemon.service\n(.*?)^```$").FindSubmatch(page)[1])
	base = strings.Replace(base, "[Service]\n", "[Service]\nRuntimeDirectory=mydaemon\n", 1)
	for _, s := range stops {
		if s.line != "" && !strings.Contains(string(doc), "\n| `"+s.line+"` |") {
			t.Fatalf("the documentation does not know %s", s.line)
		}
		unit(s.name, strings.Replace(base, "[Service]\n", "[Service]\n"+s.line+"\n", 1))
	}
	const both = "ExecReload=/usr/local/bin/mydaemon -upgrade"
	if !strings.Contains(string(doc), "`"+both+"`") {
		t.Fatalf("the documentation does not know %s", both)
	}
	unit("both", strings.Replace(base, "[Service]\n", "[Service]\n"+both+"\n", 1))
	for _, m := range docFile.FindAllStringSubmatch(string(doc), -1) {
		if m[1] == "/etc/systemd/system/echod.service" {
			unit("echod", m[2])
			unit("echod-mixed", strings.Replace(m[2], "KillMode=process", "KillMode=mixed", 1))
		}
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("exec env "+driver.Env()+" ./mydaemon -test.run=^$"), 0o644); err != nil {
		t.Fatal(err)
	}
	journal := filepath.Join(t.TempDir(), "journal")
	out, err := exec.Command("../../../systemd/testdata/real-systemd.sh", "-j", journal, bin, units, script).CombinedOutput()
	t.Logf("inside: %v\n%s", err, out)
	if err != nil || !strings.Contains(string(out), "\nall is as documented\n") {
		j, _ := os.ReadFile(journal)
		t.Fatalf("the journal:\n%s", j)
	}
}

// stops are lines of a unit, and what happens to clients of an older generation
// on a stop.
var stops = []struct {
	name, line  string
	stop, ended bool // served while the main process stops, and after it has ended
}{
	{"default", "", false, false},
	{"mixed", "KillMode=mixed", true, false},
	{"execstop", "ExecStop=/usr/local/bin/mydaemon -stop", true, false},
	{"process", "KillMode=process", true, true},
}

// mydaemon is the daemon of the unit in docs/systemd.md: it tells each client its
// generation, and sends back what it sends.
var mydaemon = proctest.DefineRole("mydaemon", func() {
	if len(os.Args) > 1 { // as the unit has it
		if _, err := ecdysis.Request(context.Background(), "/run/mydaemon/"+strings.TrimPrefix(os.Args[1], "-")); err != nil {
			log.Fatal(err)
		}
		return
	}
	opts := ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		UpgradeSocket:  "/run/mydaemon/upgrade",
		StopSocket:     "/run/mydaemon/stop",
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	if _, err := systemd.Setup(&opts); err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", "127.0.0.1:7001")
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	srv := &drain.Server{Handler: func(c net.Conn) {
		fmt.Fprintln(c, u.Generation())
		_, _ = io.Copy(c, c)
	}}
	go srv.Serve(ln)
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
	log.Print("drains")
	_ = srv.Shutdown(context.Background())
})

// A client is one of mydaemon's.
type client struct {
	net.Conn
	r          *bufio.Reader
	generation int
}

func dialClient() (*client, error) {
	conn, err := net.Dial("tcp", "127.0.0.1:7001")
	if err != nil {
		return nil, err
	}
	c := &client{Conn: conn, r: bufio.NewReader(conn)}
	_ = c.SetDeadline(time.Now().Add(proctest.Patience))
	_, err = fmt.Fscanln(c.r, &c.generation)
	return c, err
}

// served fails if the client is cut off.
func (c *client) served() error {
	_, _ = io.WriteString(c, "again\n")
	_, err := c.r.ReadString('\n')
	return err
}

// driver runs under the systemd.
var driver = proctest.DefineRole("driver", func() {
	log.SetFlags(0)
	for _, s := range stops {
		if err := tryStop(s.name, s.stop, s.ended); err != nil {
			log.Fatalf("%s: %v", s.name, err)
		}
	}
	if err := tryBoth(); err != nil {
		log.Fatalf("both: %v", err)
	}
	failed, err := tryEchod("echod")
	if err == nil && failed != 0 {
		err = errors.New("clients have failed")
	}
	if err != nil {
		log.Fatalf("echod: %v", err)
	}
	failed, err = tryEchod("echod-mixed")
	if err == nil && failed == 0 {
		err = errors.New("no client has failed")
	}
	if err != nil {
		log.Fatalf("echod-mixed: %v", err)
	}
	log.Print("\nall is as documented")
})

func systemctl(args ...string) error {
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// property returns one of a unit's properties.
func property(unit, name string) string {
	out, _ := exec.Command("systemctl", "show", "--value", "-p", name, unit).Output()
	return strings.TrimSpace(string(out))
}

// until waits for what nothing tells of.
func until(what string, f func() bool) error {
	for end := time.Now().Add(proctest.Patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("not within %v: %s", proctest.Patience, what)
		}
	}
	return nil
}

func tryStop(unit string, stop, ended bool) error {
	if err := systemctl("start", unit); err != nil {
		return err
	}
	old, err := dialClient()
	if err != nil {
		return err
	}
	defer old.Close()
	if err := systemctl("reload", unit); err != nil {
		return err
	}
	last, err := dialClient()
	if err != nil {
		return err
	}
	defer last.Close()
	if err := old.served(); err != nil || old.generation != 0 || last.generation != 1 {
		return fmt.Errorf("generations %d and %d, %w", old.generation, last.generation, err)
	}
	// Before its Wait has returned the old process catches SIGTERM.
	if err := until("the old process drains", func() bool {
		out, _ := exec.Command("journalctl", "-u", unit).Output()
		return bytes.Contains(out, []byte("drains"))
	}); err != nil {
		return err
	}
	stopped := make(chan error, 1)
	go func() { stopped <- systemctl("stop", unit) }()
	if err := until("new clients are refused", func() bool {
		c, err := dialClient()
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}); err != nil {
		return err
	}
	if !stop {
		if _, err := old.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("a client of the older generation: %v; want that it is cut off", err)
		}
	} else if err := old.served(); err != nil {
		return fmt.Errorf("a client of the older generation, while the main process stops: %w", err)
	}
	if err := last.served(); err != nil {
		return fmt.Errorf("a client of the main process, while that stops: %w", err)
	}
	last.Close()
	if err := <-stopped; err != nil {
		return err
	}
	if r := property(unit, "Result"); r != "success" {
		return fmt.Errorf("its result is %s", r)
	}
	switch err := old.served(); {
	case ended && err != nil:
		return fmt.Errorf("a client of the older generation, after the stop: %w", err)
	case !ended && err == nil:
		return errors.New("a client of the older generation is served after the stop")
	}
	return nil
}

// tryBoth finds that a reload is two upgrades, or fails because the second one
// comes during the first.
func tryBoth() error {
	if err := systemctl("start", "both"); err != nil {
		return err
	}
	reload := systemctl("reload", "both")
	c, err := dialClient()
	if err != nil {
		return err
	}
	defer c.Close()
	if reload == nil && c.generation != 2 {
		return fmt.Errorf("generation %d serves after a reload; want 2", c.generation)
	}
	c.Close()
	return systemctl("stop", "both")
}

// tryEchod returns how many clients have failed during three reloads.
func tryEchod(unit string) (failed int64, err error) {
	if err := systemctl("start", unit); err != nil {
		return 0, err
	}
	dial := func() (net.Conn, error) { return net.Dial("tcp", "127.0.0.1:7000") }
	if err := until("a client is served", func() bool { return echo(dial) == nil }); err != nil {
		return 0, err
	}
	var served, bad atomic.Int64
	end := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			default:
			}
			if err := echo(dial); err != nil {
				bad.Add(1)
			} else {
				served.Add(1)
			}
		}
	}()
	for range 3 {
		n := served.Load()
		main := property(unit, "MainPID")
		if err := systemctl("reload", unit); err != nil {
			return 0, err
		}
		if err := until("the next main process serves", func() bool {
			now := property(unit, "MainPID")
			return now != main && now != "0" && served.Load() > n+10 && property(unit, "ActiveState") == "active"
		}); err != nil {
			return 0, err
		}
	}
	close(end)
	<-done
	if n := property(unit, "NRestarts"); n != "3" {
		return 0, fmt.Errorf("%s restarts; want 3", n)
	}
	log.Printf("%s: %d of %d clients have failed", unit, bad.Load(), bad.Load()+served.Load())
	return bad.Load(), systemctl("stop", unit)
}
