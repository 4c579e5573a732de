package drain_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Tests that change or end a process start processes of their own.

func TestMain(m *testing.M) { proctest.Main(m) }

var (
	fewDescriptorsRole = proctest.DefineRole("few descriptors", func() { must(fewDescriptors()) })
	panicRole          = proctest.DefineRole("drain panic", func() { must(panics()) })
	exampleRole        = proctest.DefineRole("drain example", func() {
		address = "127.0.0.1:0"
		Example()
	})
	daemonRole = proctest.DefineRole("drained daemon", func() { must(daemon()) })
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// fewDescriptors serves clients, and has descriptors for only a few. It prints its
// address, prints when no descriptor is left, and at the end of its standard input
// prints how many clients it has served.
func fewDescriptors() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served, full := 0, sync.OnceFunc(func() { fmt.Println("full") })
	var mu sync.Mutex
	srv := drain.Server{
		Handler: func(c net.Conn) {
			if _, err := io.Copy(c, c); err == nil {
				mu.Lock()
				defer mu.Unlock()
				served++
			}
		},
		AcceptError: func(err error) {
			if !errors.Is(err, syscall.EMFILE) {
				panic(err)
			}
			full()
		},
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = 32
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	serving := make(chan error, 1)
	go func() { serving <- srv.Serve(ln) }()
	fmt.Println(ln.Addr())
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if err := srv.Close(); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	fmt.Println(served, <-serving)
	return nil
}

// A server that runs out of descriptors serves as many clients as it can, and the
// others when these have gone.
func TestNoDescriptorLeft(t *testing.T) {
	t.Parallel()
	const clients = 64
	cmd := fewDescriptorsRole.Command()
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var addr, full string
	if _, err := fmt.Fscanln(out, &addr); err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	results := make(chan error, clients)
	for i := range clients {
		c, err := net.DialTimeout("tcp", addr, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		go func() {
			err := say(c, fmt.Sprint("client ", i))
			<-release
			if err == nil {
				err = c.(halfCloser).CloseWrite()
			}
			if rest, rerr := io.ReadAll(c); err == nil && (rerr != nil || len(rest) > 0) {
				err = fmt.Errorf("at the end: %q, %w", rest, rerr)
			}
			results <- err
		}()
	}
	if _, err := fmt.Fscanln(out, &full); err != nil || full != "full" {
		t.Fatalf("%q, %v; want full", full, err)
	}
	close(release)
	for range clients {
		if err := receive(t, results); err != nil {
			t.Error(err)
		}
	}
	in.Close()
	rest, err := io.ReadAll(out)
	if want := fmt.Sprintln(clients, drain.ErrServerClosed); err != nil || string(rest) != want {
		t.Errorf("it says %q, %v; want %q", rest, err, want)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// panics has a client and a handler that panics.
func panics() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := drain.Server{Handler: func(net.Conn) { panic("on purpose") }}
	go srv.Serve(ln)
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	time.Sleep(patience) // the program ends before
	return nil
}

// A handler's panic ends the program, with its trace.
func TestPanic(t *testing.T) {
	t.Parallel()
	out, err := panicRole.Command().CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 ||
		!strings.HasPrefix(string(out), "panic: on purpose") || !strings.Contains(string(out), "drain_test.panics") {
		t.Errorf("%v; it says\n%s", err, out)
	}
}

// runs starts a role by a path that the test can remove.
func runs(t *testing.T, cmd *exec.Cmd) *proctest.Program {
	t.Helper()
	path := filepath.Join(t.TempDir(), "daemon")
	if err := os.Symlink(cmd.Path, path); err != nil {
		t.Fatal(err)
	}
	cmd.Path, cmd.Args[0] = path, path
	return proctest.Run(t, cmd)
}

// stop tells a process to stop, once it catches the signal. It acts on signals when
// it reports that it cannot be upgraded.
func stop(t *testing.T, p *proctest.Program, process *os.Process) {
	t.Helper()
	if err := os.Remove(p.Cmd.Path); err != nil {
		t.Fatal(err)
	}
	signal(t, process, syscall.SIGHUP)
	p.Await(`upgrade failed by signal hangup: .* failed at start`)
	signal(t, process, syscall.SIGTERM)
	p.Await(`stopping by signal terminated`)
}

func signal(t *testing.T, p *os.Process, s os.Signal) {
	t.Helper()
	if err := p.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// upgrade replaces a process by its successor, which has this generation, and
// returns the successor.
func upgrade(t *testing.T, p *proctest.Program, process *os.Process, generation int) *os.Process {
	t.Helper()
	signal(t, process, syscall.SIGHUP)
	next := p.Ready(generation)
	p.Await(`upgraded by signal hangup: pid=` + strconv.Itoa(next.Pid))
	return next
}

// The package example runs unchanged. SIGHUP replaces it, SIGTERM stops it, and
// clients are served to their end by the process that has them.
func TestExample(t *testing.T) {
	t.Parallel()
	p := runs(t, exampleRole.Command())
	addr, err := net.ResolveTCPAddr("tcp", p.Await(`listening on (\S+)`)[1])
	if err != nil {
		t.Fatal(err)
	}
	first := p.Ready(0)
	held := dial(t, addr)
	if err := say(held, "before"); err != nil {
		t.Fatal(err)
	}
	second := upgrade(t, p, first, 1)
	late := dial(t, addr)
	for _, c := range []net.Conn{held, late} {
		if err := say(c, "after"); err != nil {
			t.Fatal(err)
		}
	}
	held.Close()
	stop(t, p, second)
	if err := say(late, "after the stop"); err != nil {
		t.Fatal(err)
	}
	late.Close()
	if state := p.End(); !state.Success() {
		t.Errorf("the first process: %v", state)
	}
}

// daemon serves in all ways by one Server. SIGHUP replaces it and SIGTERM stops it.
// Its accept loops must not end by themselves.
func daemon() error {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		return err
	}
	var srv drain.Server
	results := make([]<-chan error, len(ways))
	for i, w := range ways {
		addr := "127.0.0.1:0"
		if w.network == "unix" {
			addr = filepath.Join(proctest.Args()[0], strconv.Itoa(i))
		}
		ln, err := u.Listen(w.network, addr)
		if err != nil {
			return u.Fail(err)
		}
		log.Printf("way %d listens on %s", i, ln.Addr())
		results[i] = w.start(&srv, ln, answer)
	}
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait()
	time.Sleep(10 * time.Millisecond) // as if the program had other work to end first
	for i, result := range results {
		if len(result) > 0 {
			log.Fatalf("%s: accepting has ended by itself: %v", ways[i].name, <-result)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = srv.Shutdown(ctx)
	for i, result := range results {
		if w := ways[i]; !w.library {
			if err := <-result; err != drain.ErrServerClosed {
				log.Fatalf("%s: Serve: %v", w.name, err)
			}
		} else if len(result) > 0 {
			log.Fatalf("%s: Shutdown has made Accept fail: %v", w.name, <-result)
		}
	}
	log.Printf("drained: %v", err)
	return nil
}

// No client notices ten upgrades, also if it half-closes its connection. Each
// process ends when it has served its clients.
func TestUpgradesLoseNothing(t *testing.T) {
	t.Parallel()
	const upgrades = 10
	p := runs(t, daemonRole.Command(proctest.ShortDir(t)))
	var l load
	for i, w := range ways {
		addr := p.Await(fmt.Sprintf(`way %d listens on (\S+)`, i))[1]
		l.start(func() (net.Conn, error) {
			c, err := net.DialTimeout(w.network, addr, patience)
			if err == nil && w.secure {
				c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // each process has its own certificate
			}
			return c, err
		})
	}
	process := p.Ready(0)
	for generation := range upgrades {
		l.more(t, 20)
		process = upgrade(t, p, process, generation+1)
	}
	l.more(t, 20)
	l.stop.Store(true)
	l.clients.Wait()
	stop(t, p, process)
	if state := p.End(); !state.Success() {
		t.Errorf("the first process: %v", state)
	}
	t.Logf("%d sessions, %d failed", l.served.Load(), len(l.failed))
	for _, err := range l.failed {
		t.Error(err)
	}
	drained := 0
	for _, line := range p.Said() {
		if strings.HasSuffix(line, "drained: <nil>") {
			drained++
		}
	}
	if want := upgrades + 1; drained != want {
		t.Errorf("%d processes have drained without an error; want %d", drained, want)
	}
}
