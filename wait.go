package ecdysis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A trigger is what causes an upgrade or a stop. The zero value is a call.
type trigger struct {
	signal os.Signal
	socket string        // the path of a control socket
	conn   *net.UnixConn // its client, who waits for a line; nil: none, or it is among Upgrader.asked
	taker  *stream       // its client, who takes over; nil: a successor is to be started
}

// event returns an event that t has caused.
func (t trigger) event(kind EventKind) Event {
	return Event{Kind: kind, Signal: t.signal, Socket: t.socket}
}

// refuse tells who is at the other end of a control socket that the upgrade
// has failed.
func (t trigger) refuse(err error) {
	answer(t.conn, "error: "+err.Error())
	if t.taker != nil {
		t.taker.sendFail(err)
		t.taker.close()
	}
}

// Wait acts on signals and on control sockets until this process is to end:
// it upgrades on one of Options.UpgradeSignals or a client of UpgradeSocket,
// stops on one of StopSignals or a client of StopSocket, ends accepting on one
// of PartialStopSignals or a client of PartialStopSocket, and is taken over by
// a client of TakeoverSocket. It returns the event that ended it, with its
// cause: EventUpgraded, EventStopping or EventPartialStop, also if another
// goroutine's call of Upgrade or Stop was that. The caller then finishes what
// is in flight and exits; after EventPartialStop it calls Stop first.
//
// A failed upgrade goes to Options.Notify, and Wait goes on. So does a trigger
// that comes during an upgrade, with ErrInProgress. One that comes before Ready
// waits for it. Without any in Options, Wait waits for a call of Upgrade or
// Stop. Of several calls of Wait each gets the signals to stop, and one of
// them each other trigger.
func (u *Upgrader) Wait() Event {
	stops := make(chan os.Signal, 1)
	partials := make(chan os.Signal, 1)
	if len(u.opts.StopSignals) > 0 {
		signal.Notify(stops, u.opts.StopSignals...)
		defer signal.Stop(stops)
	}
	if len(u.opts.PartialStopSignals) > 0 {
		signal.Notify(partials, u.opts.PartialStopSignals...)
		defer signal.Stop(partials)
	}
	var running sync.WaitGroup // what was started here and has not ended
	for _, c := range u.controls {
		if c.serving.TryLock() {
			running.Go(func() {
				defer c.serving.Unlock()
				c.serve(&running)
			})
		}
	}
	var upgrades chan os.Signal // nil until there is something to upgrade
	ready := u.ready
	for {
		select {
		case <-ready:
			ready, upgrades = nil, u.signals
		case s := <-upgrades:
			running.Go(func() {
				t := trigger{signal: s}
				if err := u.beginUpgrade(t); err != nil {
					u.notifyRefused(t, err)
					return
				}
				_ = u.attempt(t) // its events tell
			})
		case s := <-stops:
			u.stop(trigger{signal: s})
		case s := <-partials:
			u.partialStop(trigger{signal: s})
		case <-u.over:
			running.Wait()
			u.mu.Lock()
			defer u.mu.Unlock()
			return u.last
		}
	}
}

// notifyRefused tells of a trigger that came at the wrong time. That this
// process has ended is told by other events.
func (u *Upgrader) notifyRefused(t trigger, err error) {
	if err == ErrUpgraded || err == ErrStopped {
		return
	}
	e := t.event(EventUpgradeFailed)
	e.Err = err
	u.notify(e)
}

// A control is a control socket. serving is held while its clients are served:
// by one call of Wait.
type control struct {
	*listener
	u       *Upgrader
	path    string
	option  socketOption
	serving sync.Mutex

	mu     sync.Mutex
	silent []*net.UnixConn // of the takeover socket: have not said what they want, in their order
}

// maxSilent is how many clients of the takeover socket may be silent; a
// further one takes the place of the first.
const maxSilent = 32

// silence is how long one may be.
const silence = 10 * time.Second

// A socketOption is one of the paths in Options.
type socketOption struct {
	name string
	path *string
	act  func(*control, trigger, *sync.WaitGroup)
	// late: in a handover it accepts until the successor serves, so that
	// who comes during an upgrade is told so, and does not begin the next.
	late     bool
	takeover bool // its clients speak the protocol, the others' wait for a line
}

func (o *Options) sockets() []socketOption {
	return []socketOption{
		{"UpgradeSocket", &o.UpgradeSocket, (*control).upgrade, true, false},
		{"StopSocket", &o.StopSocket, (*control).stop, false, false},
		{"PartialStopSocket", &o.PartialStopSocket, (*control).partialStop, false, false},
		{"TakeoverSocket", &o.TakeoverSocket, (*control).handOver, true, true},
	}
}

// controlPath returns the path of a control socket, made absolute.
func controlPath(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	if strings.HasSuffix(path, "/") {
		return "", fmt.Errorf("%q is a directory; want the path of a socket", path)
	}
	if !isAbstract(path) {
		var err error
		if path, err = absolute(path); err != nil {
			return "", err
		}
	}
	return path, ListenConfig{}.check(kindListener, "unix", path)
}

// openControls makes the control sockets, or finds the inherited ones.
func (u *Upgrader) openControls() error {
	for _, o := range u.opts.sockets() {
		if *o.path == "" {
			continue
		}
		lc := ListenConfig{Mode: 0o600}
		if isAbstract(*o.path) {
			lc.Mode = 0 // who may ask is told from the client's credentials
		}
		s, err := u.obtain(lc, kindListener, "unix", *o.path)
		if err != nil {
			for _, c := range u.controls {
				_ = c.Close()
			}
			u.controls = nil
			return fmt.Errorf("%s: %w", o.name, errors.Unwrap(err))
		}
		l := s.(*listener)
		l.e.late = o.late
		u.controls = append(u.controls, &control{listener: l, u: u, path: *o.path, option: o})
	}
	return nil
}

// serve lets each client in until the socket is closed. Whoever was accepted
// when it returns has got a line, waits for one in Upgrader.asked, or belongs
// to an upgrade that runs. No hook is called here: it could wait, as Stop
// does, for this to end.
func (c *control) serve(running *sync.WaitGroup) {
	for {
		conn, err := c.Accept()
		if err != nil {
			c.mu.Lock()
			for _, s := range c.silent {
				s.Close()
			}
			c.mu.Unlock()
			return
		}
		client := conn.(*net.UnixConn)
		t := trigger{socket: c.path, conn: client}
		if c.option.takeover {
			t.conn = nil
			if t.taker, err = streamOn(client); err != nil { // closed by now
				continue
			}
		}
		if err := trusted(client); err != nil {
			t.refuse(err)
			continue
		}
		c.option.act(c, t, running)
	}
}

// finish closes the socket, and returns when whoever was accepted has got a
// line or is among those who wait for one.
func (c *control) finish() {
	c.shut()
	c.serving.Lock()
	defer c.serving.Unlock()
}

// trusted reports, as an error, that the other end is a user's with whom this
// process has nothing to do.
func trusted(c *net.UnixConn) error {
	cred, err := PeerCred(c)
	if err != nil {
		return err
	}
	if uid := os.Geteuid(); cred.UID != 0 && cred.UID != uid {
		return fmt.Errorf("%w: at the other end is a process of user %d; want one of user %d or 0", os.ErrPermission, cred.UID, uid)
	}
	return nil
}

func (c *control) upgrade(t trigger, running *sync.WaitGroup) {
	if err := c.u.beginUpgrade(t); err != nil {
		t.refuse(err)
		running.Go(func() { c.u.notifyRefused(t, err) })
		return
	}
	running.Go(func() { _ = c.u.attempt(t) })
}

func (c *control) stop(t trigger, running *sync.WaitGroup) {
	c.u.ask(&t)
	running.Go(func() { c.u.stop(t) })
}

func (c *control) partialStop(t trigger, running *sync.WaitGroup) {
	c.u.ask(&t)
	running.Go(func() { c.u.partialStop(t) })
}

// ask keeps the client that asks for the end of this process until that has
// come, or answers if it has.
func (u *Upgrader) ask(t *trigger) {
	u.mu.Lock()
	e := u.last
	if e.Kind == "" {
		u.asked = append(u.asked, t.conn)
	}
	u.mu.Unlock()
	if e.Kind != "" {
		answer(t.conn, outcome(e))
	}
	t.conn = nil
}

// outcome is what one is told who has asked for the end of this process.
func outcome(e Event) string {
	if e.Kind == EventUpgraded {
		return fmt.Sprintf("error: %v: pid=%d generation=%d serves", ErrUpgraded, e.PID, e.Generation)
	}
	return okLine(e)
}

func okLine(e Event) string {
	return "ok pid=" + strconv.Itoa(e.PID) + " generation=" + strconv.Itoa(e.Generation)
}

// answer writes a line to the client of a control socket, and hangs up.
func answer(c *net.UnixConn, line string) {
	if c == nil {
		return
	}
	defer c.Close()
	line = strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, line)
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = io.WriteString(c, line+"\n") // fails only if nobody waits for it
	// What it has sent unasked is taken, or it would see a reset for the end.
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			var b [4 << 10]byte
			for range 16 {
				if n, err := unix.Read(int(fd), b[:]); n <= 0 || err != nil {
					return
				}
			}
		})
	}
}

// handOver lets a client of the takeover socket say what it wants, and then
// lets it take over.
func (c *control) handOver(t trigger, running *sync.WaitGroup) {
	conn := t.taker.conn
	c.mu.Lock()
	if len(c.silent) == maxSilent {
		c.silent[0].Close()
		c.silent = c.silent[1:]
	}
	c.silent = append(c.silent, conn)
	c.mu.Unlock()
	running.Go(func() {
		err := t.taker.hearTake()
		c.mu.Lock()
		c.silent = slices.DeleteFunc(c.silent, func(s *net.UnixConn) bool { return s == conn })
		c.mu.Unlock()
		if err == nil && t.taker.atEnd() {
			err = io.EOF // it has come while this process did not look, and has gone
		}
		if err == nil {
			if err = c.u.beginUpgrade(t); err == nil {
				_ = c.u.attempt(t)
				return
			}
			c.u.notifyRefused(t, err)
		}
		t.refuse(err)
	})
}

// Request asks the process that serves a control socket, one of
// Options.UpgradeSocket, StopSocket and PartialStopSocket, for what that
// socket is for, and waits until it is done. It returns a line such as
// "pid=1234 generation=2": the successor that serves, or the process that has
// stopped. To connect is the request: what is done is not undone when ctx
// ends. It works in any program of the same user or root, with or without an
// Upgrader.
//
// The error is what the process says, as text; or it wraps ctx's error,
// io.ErrUnexpectedEOF if the process ended without a word, or a *net.OpError if
// nobody listens there (syscall.ENOENT, syscall.ECONNREFUSED) or this user may
// not connect (os.ErrPermission).
func Request(ctx context.Context, path string) (string, error) {
	line, err := request(ctx, path)
	if err != nil {
		return "", fmt.Errorf("ecdysis: request at %q: %w", path, err)
	}
	return line, nil
}

func request(ctx context.Context, path string) (string, error) {
	c, err := dialControl(ctx, path)
	if err != nil {
		return "", err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(past) })
	defer stop()
	b, err := io.ReadAll(io.LimitReader(c, maxFrame))
	line, _, whole := strings.Cut(string(b), "\n")
	switch {
	case whole:
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil || errors.Is(err, unix.ECONNRESET):
		return "", fmt.Errorf("the process there has ended, or does not serve it, without a word: %w", io.ErrUnexpectedEOF)
	default:
		return "", err
	}
	if text, ok := strings.CutPrefix(line, "ok "); ok {
		return text, nil
	}
	text, ok := strings.CutPrefix(line, "error: ")
	if !ok {
		return "", fmt.Errorf("it answers %q, which no control socket does", line)
	}
	return "", errors.New(text)
}

// dialControl connects to a Unix socket. The error from the system is a
// *net.OpError.
func dialControl(ctx context.Context, path string) (*net.UnixConn, error) {
	if err := (ListenConfig{}).check(kindListener, "unix", path); err != nil {
		return nil, err
	}
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Net: "unix", Name: path}, Err: err}
	}
	fd, err := newSocket(unix.AF_UNIX, unix.SOCK_STREAM)
	if err != nil {
		return nil, fail(err)
	}
	for {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err == nil || err == unix.EISCONN {
			break
		}
		if err == unix.EAGAIN { // the queue is full, and room in it is no event
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		if err != unix.EAGAIN && err != unix.EINTR {
			unix.Close(fd)
			return nil, fail(os.NewSyscallError("connect", err))
		}
		if err := ctx.Err(); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	return unixConn(fd)
}

// errLate: in a takeover, nothing came from the older process for too long.
var errLate = fmt.Errorf("the process that listens there has not answered in time (Options.UpgradeTimeout): %w", os.ErrDeadlineExceeded)

// takeOverAt asks the process that serves at path for all that it has, and
// returns the stream to it and its first frame; nil: there is nobody.
func takeOverAt(path string, deadline time.Time) (*stream, frame, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	for tries := 1; ; tries++ {
		c, err := dialControl(ctx, path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
			return nil, frame{}, nil
		}
		if err == context.DeadlineExceeded { // so many wait there already
			return nil, frame{}, errLate
		}
		if err != nil {
			return nil, frame{}, err
		}
		s, f, err := askFor(c, deadline)
		if err == nil {
			return s, f, nil
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, frame{}, errLate
		case err != io.EOF:
			return nil, frame{}, err
		case tries == 100:
			return nil, frame{}, fmt.Errorf("a process listens there and hangs up: %w", io.ErrUnexpectedEOF)
		}
		// It has ended, or was just being replaced.
		time.Sleep(10 * time.Millisecond)
	}
}

// askFor says TAKE and returns what is said in return, if that is HELLO. It
// takes c over, or closes it.
func askFor(c *net.UnixConn, deadline time.Time) (*stream, frame, error) {
	s, err := streamOn(c)
	if err != nil {
		return nil, frame{}, err
	}
	if err := trusted(c); err != nil {
		s.close()
		return nil, frame{}, err
	}
	s.inherits = true
	// Who hangs up at once may have said why.
	err = s.send(frameTake, []record{{"version=" + protocolVersion}}, nil)
	var f frame
	if err == nil || err == io.EOF {
		f, err = s.read(deadline)
	}
	if err == nil && f.kind == frameFail {
		err = fmt.Errorf("the process that serves there refuses: %s", f.first("reason"))
	} else if err == nil {
		if err = checkHello(f); err != nil {
			s.sendFail(err)
		}
	}
	if err != nil {
		s.close()
		return nil, f, err
	}
	return s, f, nil
}
