//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Control sockets: opening and serving them, and answering their clients.

// A control is a control socket.
//
// A client that was accepted gets an answer even if the process is about to
// exit, because finish waits until nobody is between accept and answer. So the
// loop calls no hook, which may call Stop and wait for the loop.
type control struct {
	// These do not change.
	ln     *listener
	u      *Upgrader
	path   string
	option string // the field of Options

	serving sync.Mutex // held by the call of Wait that serves the clients, until finish

	mu     sync.Mutex
	takers []streamConn // clients of the takeover socket that have sent nothing yet, in the order of their coming
}

// controlPath returns the path of a control socket, made absolute.
func controlPath(path string) (string, error) {
	if strings.HasSuffix(path, "/") {
		return "", errorf("%q is a directory; want the path of a socket", path)
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
	for _, p := range u.opts.socketPaths() {
		if *p.path == "" {
			continue
		}
		c, err := u.openControl(p.option, *p.path)
		if err != nil {
			for _, c := range u.controls {
				_ = c.ln.Close()
			}
			u.controls = nil
			return errorf("%s: %w", p.option, errors.Unwrap(err))
		}
		u.controls = append(u.controls, c)
	}
	return nil
}

func (u *Upgrader) openControl(option, path string) (*control, error) {
	lc := ListenConfig{Mode: 0o600}
	if isAbstract(path) {
		lc.Mode = 0 // a name has no mode; the client's credentials are checked
	}
	s, err := u.listenOrInherit(lc, kindListener, newListener, "unix", path)
	if err != nil {
		return nil, err
	}
	ln := s.(*listener)
	ln.silent = true
	// In a handover the sockets for upgrades accept until the successor
	// serves. So a trigger that comes during an upgrade is refused, and does
	// not begin the next one.
	ln.e.acceptsUntilDone = option == "UpgradeSocket" || option == "TakeoverSocket"
	return &control{ln: ln, u: u, path: path, option: option}, nil
}

// serve handles each client until the socket is closed. When it returns, each
// client that was accepted has got its answer, waits for one in
// lifecycle.stopClients, or belongs to an upgrade that runs.
func (c *control) serve(running *sync.WaitGroup) {
	for {
		conn, err := c.ln.Accept()
		if err != nil {
			c.mu.Lock()
			for _, t := range c.takers {
				t.Close()
			}
			c.mu.Unlock()
			return
		}
		c.handle(conn.(*net.UnixConn), running)
	}
}

func (c *control) handle(client *net.UnixConn, running *sync.WaitGroup) {
	t := trigger{socket: c.path, conn: client}
	if c.option == "TakeoverSocket" {
		s, err := streamOn(client)
		if err != nil { // closed by now
			return
		}
		t.conn, t.taker = nil, s
	}
	if err := trusted(client, isAbstract(c.path)); err != nil {
		t.refuse(err)
		return
	}
	switch c.option {
	case "UpgradeSocket":
		c.upgrade(t, running)
	case "StopSocket":
		c.stop(EventStopping, t, running)
	case "PartialStopSocket":
		c.stop(EventPartialStop, t, running)
	case "TakeoverSocket":
		c.serveTakeover(t, running)
	}
}

// finish closes the socket. It returns when each client that was accepted has
// got its answer or is among those that wait for one.
func (c *control) finish() {
	c.ln.end()
	c.serving.Lock()
	defer c.serving.Unlock()
}

// trusted returns an error unless the peer runs as root or as this process's
// user. Where only the peer's user ID protects this process, and no file's mode,
// it must not be one that stands for every unknown user.
func trusted(c syscall.Conn, byIDAlone bool) error {
	cred, err := PeerCred(c)
	if err != nil {
		return err
	}
	if byIDAlone && cred.UID == os.Geteuid() && standsForOthers(cred.UID) {
		return errorf("%w: this process and the peer run as user %d, which stands for every user that this user namespace does not map", os.ErrPermission, cred.UID)
	}
	if uid := os.Geteuid(); cred.UID != 0 && cred.UID != uid {
		return errorf("%w: the peer is a process of user %d, and this one runs as user %d; want the same user, or root", os.ErrPermission, cred.UID, uid)
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

func (c *control) stop(kind EventKind, t trigger, running *sync.WaitGroup) {
	c.u.keepStopClient(t.conn)
	running.Go(func() { c.u.stop(kind, t) })
}

// keepStopClient keeps the client that requests the end of this process until
// that has come. If it has come already, the client is answered.
func (u *Upgrader) keepStopClient(c *net.UnixConn) {
	u.mu.Lock()
	e := u.life.last
	if e == nil {
		u.life.stopClients = append(u.life.stopClients, c)
	}
	u.mu.Unlock()
	if e != nil {
		u.answerStop(c, e)
	}
}

// answerStop answers a client that has requested the end of this process, now
// that it accepts no more. The connection stays open until this process exits,
// so that the client can wait for that. If this process was replaced before, and
// could not pass the stop on, the answer is an error.
func (u *Upgrader) answerStop(c *net.UnixConn, e *Event) {
	u.mu.Lock()
	failed := e.Kind == EventUpgraded && !u.life.passedOn
	if !failed {
		u.life.answered = append(u.life.answered, c)
	}
	u.mu.Unlock()
	if failed {
		answer(c, "error: "+ErrUpgraded.Error()+": pid="+strconv.Itoa(e.PID)+" generation="+strconv.Itoa(e.Generation)+" serves")
		return
	}
	writeLine(c, okLine(e))
}

func okLine(e *Event) string {
	return "ok pid=" + strconv.Itoa(e.PID) + " generation=" + strconv.Itoa(e.Generation)
}

// answer writes a line to the client of a control socket and closes the
// connection.
func answer(c *net.UnixConn, line string) {
	writeLine(c, line)
	c.Close()
}

func writeLine(c *net.UnixConn, line string) {
	b := []byte(line)
	for i, c := range b {
		if c < ' ' {
			b[i] = ' '
		}
	}
	b = append(b, '\n')
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = c.Write(b) // fails only if the client is gone
	// What the client has sent is taken, or it would see a reset in the place
	// of the end.
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			var b [4 << 10]byte
			for range 16 {
				if n, err := syscall.Read(int(fd), b[:]); n <= 0 || err != nil {
					return
				}
			}
		})
	}
}
