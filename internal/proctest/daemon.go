package proctest

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// A Daemon is the process itself, for functions that tests define.
type Daemon struct {
	Spec    Spec
	Options *ecdysis.Options  // what New gets; a call planned AtStart may change it
	U       *ecdysis.Upgrader // nil before AtNew
	Command *ecdysis.Command  // in a call planned AtPrepare: Prepare's

	// Stream is the connection of a Raw process.
	Stream net.Conn

	conn    *conn
	once    sync.Map // keys of actions that are done
	resumed chan struct{}

	accepts sync.WaitGroup // accept loops and answers that must end before the process does
	clients sync.WaitGroup

	things sync.Map // see Set

	mu      sync.Mutex
	open    sync.Cond // holds > 0 or serves
	holds   int
	serves  bool
	next    *Successor // what Prepare does in the next upgrade
	sockets []socket
}

// A socket is a net.Listener or a net.PacketConn.
type socket interface{ Close() error }

var daemonRole = DefineRole("daemon", func() { join().run() })

// Raw is a process that does not use ecdysis. Its Daemon has a Stream to the
// predecessor, if there is one. It does what is planned AtStart, and takes calls
// after that.
var Raw = DefineRole("raw", func() {
	d := join()
	d.Stream = inheritedStream()
	d.Point(AtStart)
	d.takeCalls()
	select {}
})

// join connects to the test. No child inherits that connection.
func join() *Daemon {
	d := &Daemon{resumed: make(chan struct{}, 1000)}
	d.open.L = &d.mu
	c, err := net.Dial("unix", os.Getenv(hubVar))
	if err != nil {
		exit(err)
	}
	d.conn = newConn(c)
	d.conn.greet(hello{PID: os.Getpid()})
	if err := d.conn.dec.Decode(&d.Spec); err != nil {
		exit(err)
	}
	d.Spec = d.Spec.expanded()
	go func() {
		for {
			var c command
			if err := d.conn.dec.Decode(&c); err != nil {
				os.Exit(3) // the test is over
			}
			if c.Resume {
				d.resumed <- struct{}{}
				continue
			}
			go d.answer(c)
		}
	}()
	return d
}

func exit(err error) {
	fmt.Fprintln(os.Stderr, "daemon:", err)
	os.Exit(1)
}

// Fatal ends the process with status 1. A nil error is one, too, so that
// Fatal(d.U.Fail(err)) is right.
func (d *Daemon) Fatal(err error) { exit(err) }

func (d *Daemon) send(m message) { _ = d.conn.send(m) }

// fatal comes to a point of failure and ends the process.
func (d *Daemon) fatal(p Point, err error) {
	d.point(message{At: p, Err: toWire(err)})
	exit(err)
}

func (d *Daemon) run() {
	var err error
	opts := d.Spec.Options
	opts.Notify = func(e ecdysis.Event) {
		m := message{At: On(e.Kind), Event: &e, Err: toWire(e.Err)}
		e.Err = nil
		d.point(m)
	}
	opts.Prepare = d.prepare
	d.Options = &opts
	d.Point(AtStart)
	if d.U, err = ecdysis.New(opts); err != nil {
		d.fatal(AtNewFailed, err)
	}
	d.Point(AtNew)
	for _, l := range d.Spec.Listen {
		if _, err := d.Listen(l); err != nil {
			d.U.Fail(err)
			d.fatal(AtListenFailed, err)
		}
	}
	d.Point(AtListened)
	d.addrs()
	if !d.Spec.NoAccept && !d.Spec.LateAccept {
		d.AcceptAll()
	}
	waited := make(chan struct{})
	if d.Spec.Wait {
		d.accepts.Go(func() {
			defer close(waited)
			d.wait()
		})
	}
	if err := d.U.Ready(); err != nil {
		d.point(message{At: AtReadyFailed, Err: toWire(err)})
		if d.Spec.Wait && errors.Is(err, ecdysis.ErrStopped) {
			<-waited // Wait returns as well, and a Stop that is planned for it must not be cut short
		}
		exit(err)
	}
	d.Point(AtServing)
	if d.Spec.LateAccept {
		d.AcceptAll()
	}
	d.takeCalls()
	if !d.Spec.Wait {
		select {} // until it is killed or told to exit
	}
	d.accepts.Wait()
	d.clients.Wait()
}

// takeCalls lets calls be made whenever they come.
func (d *Daemon) takeCalls() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.serves = true
	d.open.Broadcast()
}

func (d *Daemon) wait() {
	e := d.U.Wait()
	m := message{At: AtWaitReturned, Event: &e, Err: toWire(e.Err)}
	e.Err = nil
	d.point(m)
	d.mu.Lock()
	sockets := d.sockets
	d.mu.Unlock()
	for _, s := range sockets {
		s.Close()
	}
}

// prepare changes the command as the test has asked for.
func (d *Daemon) prepare(c *ecdysis.Command) error {
	d.Command = c
	d.Point(AtPrepare)
	d.Command = nil
	d.mu.Lock()
	s := d.next
	d.next = nil
	d.mu.Unlock()
	if s == nil {
		return nil
	}
	if s.Veto != "" {
		return errors.New(s.Veto)
	}
	c.Path = cmp.Or(s.Path, c.Path)
	c.Dir = cmp.Or(s.Dir, c.Dir)
	c.Sibling = s.Sibling
	if len(s.Args) > 0 {
		c.Args = s.Args
	}
	if len(s.Env) > 0 {
		c.Env = s.Env
	}
	set := s.SetEnv
	if s.Role.name != "" {
		set = append(slices.Clone(set), s.Role.Env())
	}
	c.Env = append(slices.DeleteFunc(c.Env, func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.ContainsFunc(set, func(n string) bool { return strings.HasPrefix(n, name+"=") })
	}), set...)
	return nil
}

// hold waits for the test, and takes its calls meanwhile.
func (d *Daemon) hold() {
	d.mu.Lock()
	d.holds++
	d.mu.Unlock()
	d.open.Broadcast()
	<-d.resumed
	d.mu.Lock()
	d.holds--
	d.mu.Unlock()
}

// answer makes a call as soon as this process takes calls.
func (d *Daemon) answer(c command) {
	d.mu.Lock()
	for d.holds == 0 && !d.serves {
		d.open.Wait()
	}
	d.mu.Unlock()
	if d.Spec.Wait && (c.Call == CallUpgrade.name || c.Call == CallStop.name) {
		d.accepts.Add(1) // a call that ends this process is answered before
		defer d.accepts.Done()
	}
	m := d.call(c.Call, c.Arg)
	m.ID = c.ID
	d.send(m)
}

func (d *Daemon) call(name string, arg []byte) message {
	f, ok := calls[name]
	if !ok {
		panic("proctest: no such call: " + name)
	}
	b, err := f(d, arg)
	return message{Result: b, Err: toWire(err)}
}

// Listen makes a socket, which d closes. Accept serves it.
func (d *Daemon) Listen(l Listen) (s socket, err error) {
	l.Address = expand(l.Address)
	if strings.HasPrefix(l.Network, "udp") || l.Network == "unixgram" {
		s, err = d.U.ListenPacketWith(l.Config, l.Network, l.Address)
	} else {
		s, err = d.U.ListenWith(l.Config, l.Network, l.Address)
	}
	if err != nil {
		return nil, err
	}
	d.Keep(s)
	return s, nil
}

// Keep makes s, a net.Listener or a net.PacketConn, one of d's sockets.
func (d *Daemon) Keep(s socket) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sockets = append(d.sockets, s)
}

// Socket is the i-th socket.
func (d *Daemon) Socket(i int) socket {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sockets[i]
}

// Listener is the i-th socket, if it is a listener.
func (d *Daemon) Listener(i int) net.Listener { return d.Socket(i).(net.Listener) }

// PacketConn is the i-th socket, if it is one for packets.
func (d *Daemon) PacketConn(i int) net.PacketConn { return d.Socket(i).(net.PacketConn) }

// Set keeps x for Get.
func (d *Daemon) Set(key string, x any) { d.things.Store(key, x) }

// Get returns what Set has kept by this name, which must be a T.
func Get[T any](d *Daemon, key string) T {
	x, _ := d.things.Load(key)
	v, ok := x.(T)
	if !ok {
		panic(fmt.Sprintf("proctest: %q is a %T", key, x))
	}
	return v
}

// addrs sends the addresses to the test.
func (d *Daemon) addrs() {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := []Addr{}
	for _, s := range d.sockets {
		list = append(list, addrOf(s))
	}
	d.send(message{Addrs: list})
}

func addrOf(s socket) Addr {
	var a net.Addr
	switch s := s.(type) {
	case net.Listener:
		a = s.Addr()
	case net.PacketConn:
		a = s.LocalAddr()
	}
	return Addr{a.Network(), a.String()}
}

// AcceptAll serves all sockets.
func (d *Daemon) AcceptAll() {
	d.mu.Lock()
	sockets := d.sockets
	d.mu.Unlock()
	for _, s := range sockets {
		d.Accept(s)
	}
}

// Accept answers each line or packet that comes over s with this process's ID
// and generation.
func (d *Daemon) Accept(s socket) {
	if c, ok := s.(net.PacketConn); ok {
		d.accepts.Go(func() { d.answerPackets(c) })
		return
	}
	ln := s.(net.Listener)
	d.accepts.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			d.clients.Go(func() { d.Serve(c) })
		}
	})
}

// Serve answers each line of c, and closes it at the end.
func (d *Daemon) Serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	for {
		if _, err := r.ReadString('\n'); err != nil {
			return
		}
		fmt.Fprintf(c, "%d %d\n", os.Getpid(), d.U.Generation())
	}
}

func (d *Daemon) answerPackets(c net.PacketConn) {
	b := make([]byte, 1024)
	for {
		_, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && from != nil {
			_, _ = c.WriteTo(fmt.Appendf(nil, "%d %d\n", os.Getpid(), d.U.Generation()), from)
		}
	}
}

// The calls that methods of Proc make, for plans.
var (
	CallUpgrade = Define("Upgrade", func(d *Daemon, s Successor) (None, error) {
		if !s.zero() {
			d.mu.Lock()
			d.next = &s
			d.mu.Unlock()
		}
		return None{}, d.U.Upgrade()
	})
	CallReady = Define("Ready", func(d *Daemon, _ None) (None, error) { return None{}, d.U.Ready() })
	CallStop  = Define("Stop", func(d *Daemon, _ None) (None, error) { d.U.Stop(); return None{}, nil })
	CallFail  = Define("Fail", func(d *Daemon, text string) (None, error) { return None{}, d.U.Fail(errors.New(text)) })
	// CallListen makes a socket, serves it and returns its address.
	CallListen = Define("Listen", func(d *Daemon, l Listen) (string, error) {
		s, err := d.Listen(l)
		if err != nil {
			return "", err
		}
		d.addrs()
		d.Accept(s)
		return addrOf(s).Address, nil
	})
	CallClose = Define("Close", func(d *Daemon, i int) (None, error) { return None{}, d.Socket(i).Close() })
	// CallWaitForPredecessor returns context.DeadlineExceeded after this time.
	CallWaitForPredecessor = Define("WaitForParent", func(d *Daemon, limit time.Duration) (None, error) {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		return None{}, d.U.WaitForParent(ctx)
	})
	// CallAccept serves all sockets.
	CallAccept = Define("Accept", func(d *Daemon, _ None) (None, error) { d.AcceptAll(); return None{}, nil })
)

var (
	callPrepare = Define("prepare", func(d *Daemon, s Successor) (None, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.next = &s
		return None{}, nil
	})
	callExited = Define("exited", func(d *Daemon, _ None) (bool, error) {
		select {
		case <-d.U.Exit():
			return true, nil
		default:
			return false, nil
		}
	})
	callAwaitExit = Define("await exit", func(d *Daemon, _ None) (None, error) { <-d.U.Exit(); return None{}, nil })
	callFDs       = Define("descriptors", func(*Daemon, None) ([]string, error) { return openFDs(), nil })
	callEnviron   = Define("environment", func(*Daemon, None) ([]string, error) { return os.Environ(), nil })
	callArgs      = Define("arguments", func(*Daemon, None) ([]string, error) { return os.Args, nil })
	callGetwd     = Define("working directory", func(*Daemon, None) (string, error) { return os.Getwd() })
	callChdir     = Define("chdir", func(_ *Daemon, dir string) (None, error) { return None{}, os.Chdir(dir) })
	callRun       = Define("run", func(_ *Daemon, words []string) (string, error) {
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		return string(out), err
	})
	callInodes = Define("inodes", func(d *Daemon, _ None) (list []uint64, err error) {
		d.mu.Lock()
		sockets := d.sockets
		d.mu.Unlock()
		for _, s := range sockets {
			raw, err := s.(syscall.Conn).SyscallConn()
			if err != nil {
				return nil, err
			}
			var st syscall.Stat_t
			cerr := raw.Control(func(fd uintptr) { err = syscall.Fstat(int(fd), &st) })
			if err := cmp.Or(cerr, err); err != nil {
				return nil, err
			}
			list = append(list, uint64(st.Ino))
		}
		return list, nil
	})
	callGoroutines = Define("goroutines", func(*Daemon, None) (int, error) { return runtime.NumGoroutine(), nil })
	callGeneration = Define("generation", func(d *Daemon, _ None) (generation, error) {
		return generation{d.U.Generation(), d.U.HasParent()}, nil
	})
	callExit = Define("exit", func(d *Daemon, status int) (None, error) {
		d.clients.Wait()
		os.Exit(status)
		return None{}, nil
	})
)

type generation struct {
	Number         int
	HasPredecessor bool
}
