package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

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
