//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"golang.org/x/sys/unix"
)

// What a daemon of these tests holds has a key there, by which the test's
// commands name it.
var things = struct {
	sync.Mutex
	m map[string]any
}{m: make(map[string]any)}

func thing[T any](key string) T {
	things.Lock()
	defer things.Unlock()
	x, ok := things.m[key].(T)
	if !ok {
		panic(fmt.Sprintf("%q is a %T", key, things.m[key]))
	}
	return x
}

func setThing(key string, x any) {
	things.Lock()
	defer things.Unlock()
	things.m[key] = x
}

// onThing calls f with a thing's descriptor.
func onThing(key string, f func(fd int)) error {
	raw, err := thing[syscall.Conn](key).SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// keep stores what a call has returned, and says of what type it is; "nil":
// the interface or pointer that it returned is nil.
func keep[T comparable](key string, x T, err error) ([]string, error) {
	var none T
	if err != nil || x == none {
		return []string{"nil"}, err
	}
	setThing(key, x)
	return []string{fmt.Sprintf("%T", x)}, nil
}

// thing gives p a command that must succeed, and returns its answer.
func (p *proc) thing(verb string, args ...string) []string {
	p.t.Helper()
	m := p.call("thing "+verb, args...)
	if m.Err != nil {
		p.t.Fatalf("process %d: %s %q: %+v", p.pid, verb, args, m.Err)
	}
	return m.Text
}

// noThing gives p a command that must fail with an error that is this one, and
// says all of that.
func (p *proc) noThing(is string, says []string, verb string, args ...string) {
	p.t.Helper()
	m := p.call("thing "+verb, args...)
	if m.Err == nil || is != "" && !slices.Contains(m.Err.Is, is) {
		p.t.Errorf("%s %.100q: %+v; want an error that is %q", verb, args, m.Err, is)
		return
	}
	for _, s := range says {
		if !strings.Contains(m.Err.Text, s) {
			p.t.Errorf("%s %.100q: %v; want that it says %q", verb, args, m.Err.Text, s)
		}
	}
}

// gives asserts what a command answers.
func (p *proc) gives(want, verb string, args ...string) {
	p.t.Helper()
	if got := strings.Join(p.thing(verb, args...), "|"); got != want {
		p.t.Fatalf("process %d: %s %q: %q; want %q", p.pid, verb, args, got, want)
	}
}

// holding is a daemon that waits after New for what the test wants of it.
func holding() spec {
	return spec{NoAccept: true, Do: map[string]string{"new": "hold"}}
}

// succeed upgrades p to a process that does f between New and Ready.
func (p *proc) succeed(f func(s *proc)) *proc {
	p.t.Helper()
	answer := p.begin(command{Verb: "upgrade"})
	s := p.h.proc()
	s.at("new")
	f(s)
	s.resume()
	if m := answer(); m.Err != nil {
		p.t.Fatalf("upgrade: %+v", m.Err)
	}
	s.at("serving")
	return s
}

// perish upgrades p to a process that does f after New and is killed then.
func (p *proc) perish(f func(s *proc)) {
	p.t.Helper()
	answer := p.begin(command{Verb: "upgrade"})
	s := p.h.proc()
	s.at("new")
	f(s)
	s.kill()
	checkErr(p.t, answer().Err, "init", "unexpected EOF")
}

// unclaimed asserts what p has named so.
func (p *proc) unclaimed(want ...string) {
	p.t.Helper()
	if got := p.event(ecdysis.EventReady, 0).Unclaimed; !slices.Equal(got, want) {
		p.t.Errorf("unclaimed: %q; want %q", got, want)
	}
}

func init() {
	knownErrors["os.ErrClosed"] = os.ErrClosed
	knownErrors["EOF"] = io.EOF
	knownErrors["closed peer"] = proctest.ClosedPeer()
	knownErrors["EFBIG"] = syscall.EFBIG
	for name, f := range thingVerbs {
		verbs["thing "+name] = func(d *daemon, c command) message {
			text, err := f(d, c.Args)
			return message{Text: text, Err: toErrMsg(err)}
		}
	}
}

var thingVerbs = map[string]func(d *daemon, a []string) ([]string, error){
	// How things come about, behind the package's back: the key comes first.
	"dial": func(d *daemon, a []string) ([]string, error) {
		c, err := net.Dial(a[1], a[2])
		if err != nil {
			return nil, err
		}
		setThing(a[0], c)
		return []string{c.LocalAddr().String()}, nil
	},
	"listen": func(d *daemon, a []string) ([]string, error) {
		if a[1] == "udp" || a[1] == "unixgram" {
			c, err := net.ListenPacket(a[1], a[2])
			if err != nil {
				return nil, err
			}
			setThing(a[0], c)
			return []string{c.LocalAddr().String()}, nil
		}
		ln, err := net.Listen(a[1], a[2])
		if err != nil {
			return nil, err
		}
		if ul, ok := ln.(*net.UnixListener); ok {
			ul.SetUnlinkOnClose(false)
		}
		setThing(a[0], ln)
		return []string{ln.Addr().String()}, nil
	},
	"file of": func(d *daemon, a []string) ([]string, error) {
		if c, ok := thing[any](a[1]).(interface{ File() (*os.File, error) }); ok {
			f, err := c.File()
			return keep(a[0], f, err)
		}
		var f *os.File
		var err error
		cerr := onThing(a[1], func(fd int) {
			if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				f = os.NewFile(uintptr(fd), "")
			}
		})
		return keep(a[0], f, errors.Join(cerr, err))
	},
	"open": func(d *daemon, a []string) ([]string, error) {
		flags := os.O_RDWR | os.O_CREATE
		if fi, err := os.Stat(a[1]); err == nil && fi.IsDir() {
			flags = os.O_RDONLY
		}
		f, err := os.OpenFile(a[1], flags, 0o600)
		return keep(a[0], f, err)
	},
	"pipe": func(d *daemon, a []string) ([]string, error) { // "blocking" or "non-blocking"
		var fds [2]int
		if err := syscall.Pipe(fds[:]); err != nil {
			return nil, err
		}
		for i, end := range []string{".r", ".w"} {
			syscall.CloseOnExec(fds[i])
			if err := syscall.SetNonblock(fds[i], a[1] == "non-blocking"); err != nil {
				return nil, err
			}
			setThing(a[0]+end, os.NewFile(uintptr(fds[i]), end))
		}
		return nil, nil
	},
	"socketpair": func(d *daemon, a []string) ([]string, error) {
		typ := syscall.SOCK_STREAM
		if a[1] == "dgram" {
			typ = syscall.SOCK_DGRAM
		}
		fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
		if err != nil {
			return nil, err
		}
		for i, end := range []string{".a", ".b"} {
			syscall.CloseOnExec(fds[i])
			setThing(a[0]+end, os.NewFile(uintptr(fds[i]), end))
		}
		return nil, nil
	},
	"bound": func(d *daemon, a []string) ([]string, error) { // a TCP socket that does not listen
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			return nil, err
		}
		syscall.CloseOnExec(fd)
		setThing(a[0], os.NewFile(uintptr(fd), ""))
		return nil, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	},

	// The package's calls.
	"AddConn": func(d *daemon, a []string) ([]string, error) {
		return nil, d.u.AddConn(a[0], thing[net.Conn](a[1]))
	},
	"AddFile": func(d *daemon, a []string) ([]string, error) {
		return nil, d.u.AddFile(a[0], thing[*os.File](a[1]))
	},
	"Conn": func(d *daemon, a []string) ([]string, error) {
		c, err := d.u.Conn(a[0])
		if notThere(err) {
			return keep(a[1], (net.Conn)(nil), nil)
		}
		return keep(a[1], c, err)
	},
	"File": func(d *daemon, a []string) ([]string, error) {
		f, err := d.u.File(a[0])
		if notThere(err) {
			err = nil
		}
		return keep(a[1], f, err)
	},
	"Listener": func(d *daemon, a []string) ([]string, error) {
		ln, err := d.u.Listener(a[0])
		if notThere(err) {
			err = nil
		}
		return keep(a[1], ln, err)
	},
	"PacketConn": func(d *daemon, a []string) ([]string, error) {
		c, err := d.u.PacketConn(a[0])
		if notThere(err) {
			err = nil
		}
		return keep(a[1], c, err)
	},
	"Listen": func(d *daemon, a []string) ([]string, error) {
		ln, err := d.u.Listen(a[1], a[2])
		return keep(a[0], ln, err)
	},
	"ListenPacket": func(d *daemon, a []string) ([]string, error) {
		c, err := d.u.ListenPacket(a[1], a[2])
		return keep(a[0], c, err)
	},
	"DatagramPair": func(d *daemon, a []string) ([]string, error) {
		up, down, err := d.u.DatagramPair(a[0])
		if err != nil && !notThere(err) {
			return nil, err
		}
		setThing(a[1]+".down", down)
		return keep(a[1]+".up", up, nil)
	},
	"Unregistered": func(d *daemon, a []string) ([]string, error) { return d.u.Unregistered() },

	// What is done with things.
	"close": func(d *daemon, a []string) ([]string, error) {
		for _, key := range a {
			if err := thing[io.Closer](key).Close(); err != nil {
				return nil, err
			}
		}
		return nil, nil
	},
	"write": func(d *daemon, a []string) ([]string, error) {
		_, err := io.WriteString(thing[io.Writer](a[0]), a[1])
		return nil, err
	},
	"read": func(d *daemon, a []string) ([]string, error) { // so many bytes
		n, err := strconv.Atoi(a[1])
		if err != nil {
			return nil, err
		}
		r := thing[io.Reader](a[0])
		if c, ok := r.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = c.SetReadDeadline(time.Now().Add(patience))
		}
		b := make([]byte, n)
		n, err = io.ReadFull(r, b)
		return []string{string(b[:n])}, err
	},
	"addr": func(d *daemon, a []string) ([]string, error) {
		return []string{thing[interface{ LocalAddr() net.Addr }](a[0]).LocalAddr().String()}, nil
	},
	"conn of": func(d *daemon, a []string) ([]string, error) {
		c, err := net.FileConn(thing[*os.File](a[1]))
		return keep(a[0], c, err)
	},
	"seek": func(d *daemon, a []string) ([]string, error) {
		n, err := strconv.Atoi(a[1])
		if err == nil {
			_, err = thing[io.Seeker](a[0]).Seek(int64(n), io.SeekStart)
		}
		return nil, err
	},
	"readdir": func(d *daemon, a []string) ([]string, error) { return thing[*os.File](a[0]).Readdirnames(-1) },
	"flock": func(d *daemon, a []string) (_ []string, err error) {
		cerr := onThing(a[0], func(fd int) { err = syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB) })
		return nil, errors.Join(cerr, err)
	},
	"descriptor": func(d *daemon, a []string) (list []string, err error) {
		err = onThing(a[0], func(fd int) { list = []string{strconv.Itoa(fd)} })
		return list, err
	},
	"flags": func(d *daemon, a []string) (list []string, err error) { // O_NONBLOCK, FD_CLOEXEC
		cerr := onThing(a[0], func(fd int) {
			fl, err1 := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			fd, err2 := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			list, err = []string{strconv.FormatBool(fl&unix.O_NONBLOCK != 0), strconv.FormatBool(fd&unix.FD_CLOEXEC != 0)}, errors.Join(err1, err2)
		})
		return list, errors.Join(cerr, err)
	},
	// Before Ready: a listener of this daemon, which it accepts on.
	"keep": func(d *daemon, a []string) ([]string, error) {
		d.lns = append(d.lns, thing[net.Listener](a[0]))
		return nil, nil
	},
	"serve": func(d *daemon, a []string) ([]string, error) {
		if ln, ok := thing[any](a[0]).(net.Listener); ok {
			d.acceptOn(ln)
			return nil, nil
		}
		d.answerPackets(thing[net.PacketConn](a[0]))
		return nil, nil
	},
}

// answerPackets answers each packet with this process's ID and generation.
func (d *daemon) answerPackets(c net.PacketConn) {
	d.loops.Go(func() {
		b := make([]byte, 1024)
		for {
			_, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo(fmt.Appendf(nil, "%d %d\n", os.Getpid(), d.u.Generation()), from)
			}
		}
	})
}

// notThere reports whether a call has found nothing under a name.
func notThere(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// The test's side of a connection.

// dialled lets p dial the test, and returns the test's end.
func dialled(p *proc, key, network string) net.Conn {
	p.t.Helper()
	address := "127.0.0.1:0"
	if strings.HasPrefix(network, "unix") {
		address = filepath.Join(shortDir(p.t), "peer")
	}
	if network == "udp" {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { c.Close() })
		local := p.thing("dial", key, network, c.LocalAddr().String())[0]
		to, err := net.ResolveUDPAddr("udp", local)
		if err != nil {
			p.t.Fatal(err)
		}
		// Connected, so that it hears when the other end has gone.
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) {
				err = syscall.Connect(int(fd), &syscall.SockaddrInet4{Addr: [4]byte(to.IP.To4()), Port: to.Port})
			})
			err = errors.Join(cerr, err)
		}
		if err != nil {
			p.t.Fatal(err)
		}
		return c.(*net.UDPConn)
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		p.t.Fatal(err)
	}
	defer ln.Close()
	p.thing("dial", key, network, ln.Addr().String())
	c, err := ln.Accept()
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

func say(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("got %q, %v; want %q", b[:n], err, text)
	}
}

// converse lets p, and the test at the other end, each say something.
func converse(p *proc, key string, c net.Conn) {
	p.t.Helper()
	p.thing("write", key, "question")
	hear(p.t, c, "question")
	say(p.t, c, "answer")
	p.gives("answer", "read", key, "6")
}

// connNetworks are the networks whose connections move, and what they are then.
func connNetworks() map[string]string {
	m := map[string]string{"tcp": "*net.TCPConn", "unix": "*net.UnixConn", "udp": "*net.UDPConn"}
	if runtime.GOOS != "darwin" {
		m["unixpacket"] = "*ecdysis.SeqpacketConn"
	}
	return m
}
