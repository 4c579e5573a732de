package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	echodPackage = "github.com/ecdysis-go/ecdysis/examples/echod"

	// standInVar names the socket of the demo. echod does not know it; the
	// demo's own program, started in the place of echod, does.
	standInVar = "ECDYSIS_DEMO_SOCKET"

	// patience is how long anything may take that must happen.
	patience = 15 * time.Second
)

// standIn is this program in the place of a successor: it does what the demo
// tells it, and never returns. It must not import package ecdysis, which would
// take at once what the program that it becomes is to inherit.
func standIn(socket string) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "stand-in:", err)
		os.Exit(1)
	}
	r := bufio.NewReader(c)
	order, _ := r.ReadString('\n')
	switch order = strings.TrimSuffix(order, "\n"); order {
	case crash:
		os.Exit(3)
	case hang:
		_, _ = r.ReadString('\n') // until the demo is over
	default: // a path: become that program, with all that this one inherits
		fmt.Fprintln(os.Stderr, "stand-in:", syscall.Exec(order, os.Args, os.Environ()))
	}
	os.Exit(1)
}

// A generation is one process that has served.
type generation struct {
	Number   int     `json:"generation"`
	PID      int     `json:"pid"`
	ReadyMS  float64 `json:"ready_ms"` // from the signal; the first one's from its start
	Answered int     `json:"answered"` // requests
	Failed   int     `json:"failed"`
	Killed   bool    `json:"killed"`
	InHands  int     `json:"in_its_hands"` // ended with it, because it was killed

	process *os.Process
	began   time.Time // its start was asked for: it accepts some time after that
	served  time.Time // it was found to serve
	died    time.Time // if it was killed
}

// A daemon is echod in all its generations.
type daemon struct {
	ctx         context.Context
	dir         string
	echod       string // the real program
	program     string // a link to what is started next
	pidFile     string
	control     string       // the directory of the control sockets
	unix, tcp   string       // addresses
	standIns    net.Listener // where they ask
	cmd         *exec.Cmd    // the first process
	taker       *exec.Cmd    // the one that takes over; nil: not started yet
	stderr      *os.File     // of all generations, until the last that is not another's child is started
	log         chan string  // of all generations; closed when all have ended
	generations []*generation
	serving     atomic.Pointer[generation]
}

func newDaemon(ctx context.Context) (*daemon, error) {
	dir, err := os.MkdirTemp("", "ecdysis-demo")
	if err != nil {
		return nil, err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	d := &daemon{ctx: ctx, dir: dir, log: make(chan string, 1000), echod: path("echod.real"), program: path("echod"),
		pidFile: path("echod.pid"), unix: path("echod.sock"), control: path("control")}
	if err := os.Mkdir(d.control, 0o700); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	if d.standIns, err = net.Listen("unix", path("demo.sock")); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return d, nil
}

func build(ctx context.Context, program, pkg string) error {
	out, err := exec.CommandContext(ctx, "go", "build", "-o", program, pkg).CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build %s, in the module's directory: %w\n%s", pkg, err, out)
	}
	return nil
}

// install puts a program in the place of the one that runs, as a deployment
// would: by the rename of a link.
func (d *daemon) install(program string) error {
	link := d.program + ".new"
	if err := os.Symlink(program, link); err != nil {
		return err
	}
	return os.Rename(link, d.program)
}

// start runs the first generation.
func (d *daemon) start() error {
	if err := d.install(d.echod); err != nil {
		return err
	}
	// The time-out is for the successor that hangs.
	cmd := exec.Command(d.program, "-tcp", "127.0.0.1:0", "-unix", d.unix, "-greet", "-pidfile", d.pidFile, "-control", d.control, "-timeout", "3s")
	cmd.Env = append(os.Environ(), standInVar+"="+d.standIns.Addr().String())
	began := time.Now()
	if err := d.launch(cmd); err != nil {
		return err
	}
	var err error
	if d.tcp, err = d.await(`listening on tcp (\S+)$`); err != nil {
		return err
	}
	return d.ready(began)
}

// launch starts the first process and follows its log.
func (d *daemon) launch(cmd *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	d.stderr = w
	cmd.Stderr = w // every generation inherits it
	// A process group of its own: Ctrl-C is for the demo, which ends them all.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		r.Close()
		return err
	}
	d.cmd = cmd
	go func() {
		defer close(d.log)
		defer r.Close()
		for s := bufio.NewScanner(r); s.Scan(); {
			d.log <- s.Text()
		}
	}()
	return nil
}

// await returns what the next line of the log that matches has in the
// pattern's parentheses. An empty pattern is the end of all generations.
func (d *daemon) await(pattern string) (string, error) {
	re := regexp.MustCompile(pattern)
	limit := time.After(patience)
	seen := ""
	for {
		select {
		case line, ok := <-d.log:
			if pattern == "" && !ok {
				return "", nil
			}
			if m := re.FindStringSubmatch(line); m != nil && pattern != "" {
				return m[1], nil
			}
			if seen += "\n" + line; !ok {
				return "", fmt.Errorf("the daemon has ended; its log:%s", seen)
			}
		case <-limit:
			return "", fmt.Errorf("no %q in the daemon's log:%s", pattern, seen)
		case <-d.ctx.Done():
			return "", d.ctx.Err()
		}
	}
}

// ready returns when the next generation serves.
func (d *daemon) ready(began time.Time) error {
	n := len(d.generations)
	pid, err := d.await(fmt.Sprintf(`ready: pid=(\d+) generation=%d$`, n))
	if err != nil {
		return err
	}
	g := &generation{Number: n, ReadyMS: ms(time.Since(began)), began: began, served: time.Now()}
	if g.PID, err = strconv.Atoi(pid); err != nil {
		return err
	}
	if g.process, err = os.FindProcess(g.PID); err != nil {
		return err
	}
	d.generations = append(d.generations, g)
	d.serving.Store(g)
	return nil
}

// trigger makes the process that serves start this program as its successor.
func (d *daemon) trigger(program string) (began time.Time, err error) {
	if err := d.install(program); err != nil {
		return began, err
	}
	return time.Now(), d.serving.Load().process.Signal(syscall.SIGHUP)
}

// upgrade replaces the process that serves.
func (d *daemon) upgrade() error {
	began, err := d.trigger(d.echod)
	if err != nil {
		return err
	}
	if err := d.ready(began); err != nil {
		return err
	}
	_, err = d.await(`(upgraded) by signal hangup`) // from here on the next one is allowed
	return err
}

// triggerStandIn makes this program the successor and returns the connection
// by which it takes its order.
func (d *daemon) triggerStandIn() (c net.Conn, began time.Time, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, began, err
	}
	if began, err = d.trigger(self); err != nil {
		return nil, began, err
	}
	if err := d.standIns.(*net.UnixListener).SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, began, err
	}
	c, err = d.standIns.Accept()
	return c, began, err
}

// fail makes an upgrade fail in this way. It returns the reason in echod's log
// when the process that served is found to serve on.
func (d *daemon) fail(how string) (reason string, err error) {
	if how == missing {
		if _, err := d.trigger(filepath.Join(d.dir, "nothing")); err != nil {
			return "", err
		}
	} else {
		c, _, err := d.triggerStandIn()
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := fmt.Fprintln(c, how); err != nil {
			return "", err
		}
	}
	if reason, err = d.await(`(upgrade failed at .*)$`); err != nil {
		return "", err
	}
	return reason, d.servesOn()
}

// servesOn finds the process that served before an upgrade to serve after it.
func (d *daemon) servesOn() error {
	if b, err := os.ReadFile(d.pidFile); err != nil || string(b) != fmt.Sprintln(d.serving.Load().PID) {
		return fmt.Errorf("the PID file says %q (%v); want %d", b, err, d.serving.Load().PID)
	}
	c, err := dial("tcp", d.tcp)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.ask("still there?"); err != nil || c.by != d.serving.Load().Number {
		return fmt.Errorf("generation %d answers (%v); want %d", c.by, err, d.serving.Load().Number)
	}
	return nil
}

// killParent kills the process that serves after it has started its successor
// and before that one is ready. Until it is, clients wait in the queue.
func (d *daemon) killParent(l *load) error {
	victim := d.serving.Load()
	witness, err := dial("unix", d.unix)
	if err != nil {
		return err
	}
	defer witness.Close()
	if err := witness.ask("accepted?"); err != nil {
		return err
	}
	successor, began, err := d.triggerStandIn()
	if err != nil {
		return err
	}
	defer successor.Close()
	if err := victim.process.Kill(); err != nil {
		return err
	}
	if _, err := witness.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("process %d does not die", victim.PID)
	}
	victim.Killed, victim.died = true, time.Now() // its connections have ended: it accepts no more

	answeredBy := l.queue(20) // clients that surely come while nobody accepts
	if _, err := fmt.Fprintln(successor, d.echod); err != nil {
		return err
	}
	if err := d.ready(began); err != nil {
		return err
	}
	answeredBy(d.serving.Load())
	return nil
}

// takeOver starts an echod with other flags, as a new unit or container would,
// which takes the place of the process that serves.
func (d *daemon) takeOver() error {
	if err := d.install(d.echod); err != nil {
		return err
	}
	d.taker = exec.Command(d.program, "-tcp", d.tcp, "-unix", d.unix, "-greet", "-pidfile", d.pidFile, "-control", d.control, "-probation", "1m")
	d.taker.Env = d.cmd.Env
	d.taker.Stderr = d.stderr
	d.taker.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: d.cmd.Process.Pid} // in which the others are
	began := time.Now()
	if err := d.taker.Start(); err != nil {
		d.taker = nil
		return err
	}
	d.stderr.Close()
	if err := d.ready(began); err != nil {
		return err
	}
	_, err := d.await(`(upgraded) by socket`)
	return err
}

// failProbation upgrades, and kills the successor when it has served for a
// moment. The old process, which stands by, takes its place again.
func (d *daemon) failProbation(l *load) (reason string, err error) {
	old := d.serving.Load()
	began, err := d.trigger(d.echod)
	if err != nil {
		return "", err
	}
	if err := d.ready(began); err != nil {
		return "", err
	}
	victim := d.serving.Load()
	witness, err := dial("tcp", d.tcp)
	if err != nil {
		return "", err
	}
	defer witness.Close()
	if err := errors.Join(witness.ask("accepted?"), l.more(d.ctx, 200)); err != nil {
		return "", err
	}
	if err := victim.process.Kill(); err != nil {
		return "", err
	}
	if _, err := witness.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return "", fmt.Errorf("process %d does not die", victim.PID)
	}
	victim.Killed, victim.died = true, time.Now()
	if reason, err = d.await(`(upgrade failed at .*)$`); err != nil {
		return "", err
	}
	d.serving.Store(old)
	return reason, d.servesOn()
}

// stop ends the last generation, and returns when all have ended.
func (d *daemon) stop() error {
	if out, err := exec.Command(d.echod, "-control", d.control, "-stop").CombinedOutput(); err != nil {
		return fmt.Errorf("echod -stop: %w: %s", err, out)
	}
	if _, err := d.await(`(stopping) by socket`); err != nil {
		return err
	}
	if _, err := d.await(""); err != nil {
		return err
	}
	for _, path := range []string{d.pidFile, d.unix} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s was left: %v", path, err)
		}
	}
	return errors.Join(d.cmd.Wait(), d.taker.Wait()) // each exits with status 0
}

// cleanUp ends what is left.
func (d *daemon) cleanUp() {
	if d.standIns != nil {
		d.standIns.Close()
	}
	if d.stderr != nil {
		d.stderr.Close()
	}
	for open := d.cmd != nil; open; {
		select {
		case _, open = <-d.log:
		default:
			// A process lives, so the group that the first one was made the
			// leader of is still ours.
			_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
			_, open = <-d.log
		}
	}
	for _, cmd := range []*exec.Cmd{d.cmd, d.taker} {
		if cmd != nil && cmd.ProcessState == nil {
			_ = cmd.Wait()
		}
	}
	os.RemoveAll(d.dir)
}
