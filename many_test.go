//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// Many descriptors of every kind, and too many.

// manyKinds is how many kinds "thing many" makes, in turn.
const manyKinds = 8

func init() {
	// N DIR: makes and adds so many things, all by one name as far as they
	// may have it, and says which they are.
	verbs["thing many"] = func(d *daemon, c command) message {
		n, _ := strconv.Atoi(c.Args[0])
		text, err := makeMany(d, n, c.Args[1])
		return message{Text: text, Err: toErrMsg(err)}
	}
	// N: takes so many, in their order, and says which they are.
	verbs["thing take many"] = func(d *daemon, c command) message {
		n, _ := strconv.Atoi(c.Args[0])
		text, err := takeMany(d, n)
		return message{Text: text, Err: toErrMsg(err)}
	}
}

// identity is equal for two descriptors of one thing, in any process.
func identity(kind string, c syscall.Conn) string {
	var st syscall.Stat_t
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { err = syscall.Fstat(int(fd), &st) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(kind, " ", st.Dev, ":", st.Ino)
}

func makeMany(d *daemon, n int, dir string) (list []string, err error) {
	for i := range n {
		var c io.Closer
		kind := i % manyKinds
		path := filepath.Join(dir, strconv.Itoa(i))
		switch kind {
		case 0, 1, 2:
			na := [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", path}, {"unixpacket", path}}[kind]
			var ln net.Listener
			if ln, err = net.Listen(na[0], na[1]); err != nil {
				return nil, err
			}
			if ul, ok := ln.(*net.UnixListener); ok {
				ul.SetUnlinkOnClose(false)
			}
			c = ln
		case 3, 4:
			na := [][2]string{{"udp", "127.0.0.1:0"}, {"unixgram", path}}[kind-3]
			if c, err = net.ListenPacket(na[0], na[1]); err != nil {
				return nil, err
			}
		case 5, 6: // a connection, and a file, with this number to be read
			var fds [2]int
			if kind == 5 {
				fds, err = syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			} else {
				err = syscall.Pipe(fds[:])
			}
			if err != nil {
				return nil, err
			}
			f, w := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
			syscall.CloseOnExec(fds[0])
			syscall.CloseOnExec(fds[1])
			fmt.Fprintln(w, i)
			w.Close()
			if c = f; kind == 5 {
				if c, err = net.FileConn(f); err != nil {
					return nil, err
				}
				f.Close()
			}
			list = append(list, fmt.Sprint("content ", i))
		case 7:
			_, down, err := d.u.DatagramPair(fmt.Sprint("pair ", i))
			if err != nil && !notThere(err) {
				return nil, err
			}
			if _, err := fmt.Fprintln(down, i); err != nil {
				return nil, err
			}
			list = append(list, fmt.Sprint("content ", i))
			down.Close()
			continue
		}
		list = append(list, identity(strconv.Itoa(kind), c.(syscall.Conn)))
		switch kind {
		case 5:
			err = d.u.AddConn("one name", c.(net.Conn))
		case 6:
			err = d.u.AddFile("one name", c.(*os.File))
		default:
			var f *os.File
			if f, err = c.(interface{ File() (*os.File, error) }).File(); err == nil {
				err = d.u.AddFile(fmt.Sprint("kind ", kind), f)
				f.Close()
			}
		}
		if err = errors.Join(err, c.Close()); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func takeMany(d *daemon, n int) (list []string, err error) {
	content := func(r io.Reader) {
		line, err := bufio.NewReader(r).ReadString('\n')
		if err != nil {
			line = err.Error()
		}
		list = append(list, "content "+strings.TrimSpace(line))
	}
	for i := range n {
		var x any
		kind := i % manyKinds
		name := fmt.Sprint("kind ", kind)
		switch kind {
		case 0, 1, 2:
			x, err = d.u.Listener(name)
		case 3, 4:
			x, err = d.u.PacketConn(name)
		case 5:
			var c net.Conn
			if c, err = d.u.Conn("one name"); c != nil {
				content(c)
				x = c
			}
		case 6:
			var f *os.File
			if f, err = d.u.File("one name"); f != nil {
				content(f)
				x = f
			}
		case 7:
			var up *net.UnixConn
			if up, _, err = d.u.DatagramPair(fmt.Sprint("pair ", i)); up != nil {
				content(up)
				continue
			}
		}
		if err != nil || x == nil {
			return list, fmt.Errorf("number %d: %v, %w", i, x, err)
		}
		list = append(list, identity(strconv.Itoa(kind), x.(syscall.Conn)))
		setThing(fmt.Sprint("many ", i), x) // it stays open
	}
	return list, nil
}

// sameMany asserts that two lists are equal.
func sameMany(t *testing.T, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d things; want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("number %d is %s; want %s", i, got[i], want[i])
		}
	}
}

// Everything arrives, in its order.
func TestManyThings(t *testing.T) {
	if runtime.GOOS == "darwin" {
		t.Skip("there are no sequenced packets")
	}
	for _, n := range []int{300, 5000} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			if limit := openFileLimit(t); limit < uint64(n)*3/2 {
				t.Skip("the limit of open files is ", limit)
			}
			if n < 1000 { // more would be too many in flight with others
				t.Parallel()
			}
			h := newHub(t, spec{}, holding())
			p := h.serving()
			before := len(p.call("fds").Text)
			want := p.thing("many", strconv.Itoa(n), h.dir)
			if runtime.GOOS == "linux" {
				if now := len(p.call("fds").Text); now != before+n {
					t.Errorf("%d things take %d descriptors", n, now-before)
				}
			}
			p.perish(func(s *proc) {}) // as if it had not been
			begun := time.Now()
			s := p.succeed(func(s *proc) {
				t.Log(n, "things arrived after", time.Since(begun))
				sameMany(t, s.thing("take many", strconv.Itoa(n)), want)
			})
			s.unclaimed()
			if runtime.GOOS == "linux" {
				if now := len(p.call("fds").Text); now != before+1 {
					t.Errorf("the old process has %d descriptors; want %d and the stream", now, before)
				}
			}
		})
	}
}

// A successor that may not have so many descriptors says so, and nothing is
// lost.
func TestManyThingsLimit(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "darwin" {
		t.Skip("there are no sequenced packets")
	}
	h := newHub(t, tcp(), holding())
	p := h.serving()
	want := p.thing("many", "300", h.dir)
	before := p.call("fds").Text
	low := command{Command: &ecdysis.Command{
		Path: "/bin/sh",
		Args: []string{"-c", `ulimit -n 100; exec "$0" "-test.run=^$"`, os.Args[0]},
	}}
	for range 2 {
		e := p.failUpgrade(low, "init", "")
		if !strings.Contains(e.Text, "RLIMIT_NOFILE") {
			t.Errorf("error %+v; want that it names RLIMIT_NOFILE", e)
		}
		s := h.proc()
		if m := s.at("new failed"); !strings.Contains(m.Err.Text, "RLIMIT_NOFILE") {
			t.Errorf("New's error %+v; want that it names RLIMIT_NOFILE", m.Err)
		}
		p.serves()
		sameFiles(p, before)
	}
	s := p.succeed(func(s *proc) { sameMany(t, s.thing("take many", "300"), want) })
	s.unclaimed("tcp 127.0.0.1:0")
}

func init() {
	// A process that keeps descriptors in flight. Each byte of its input makes
	// it take back what it has, or send so many again.
	roles["hog"] = func() {
		n, _ := strconv.Atoi(os.Getenv("ECDYSIS_TEST_HOG"))
		in := bufio.NewReader(os.Stdin)
		for {
			fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				fatal(err)
			}
			for left := n; left > 0; left -= 100 {
				if err := syscall.Sendmsg(fds[0], []byte("x"), syscall.UnixRights(make([]int, min(left, 100))...), nil, 0); err != nil {
					fatal(err)
				}
			}
			fmt.Println("in flight")
			if _, err := in.ReadByte(); err != nil {
				return
			}
			b, oob := make([]byte, 1), make([]byte, syscall.CmsgSpace(4*100))
			for left := n; left > 0; left -= 100 {
				_, oobn, _, _, err := syscall.Recvmsg(fds[1], b, oob, 0)
				if err != nil {
					fatal(err)
				}
				msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
				if err != nil || len(msgs) == 0 {
					fatal(fmt.Errorf("control messages %v: %w", msgs, err))
				}
				list, _ := syscall.ParseUnixRights(&msgs[0])
				for _, fd := range list {
					syscall.Close(fd)
				}
			}
			syscall.Close(fds[0])
			syscall.Close(fds[1])
			fmt.Println("free")
			if _, err := in.ReadByte(); err != nil {
				return
			}
		}
	}
}

// A hog is a process that keeps descriptors in flight.
type hog struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func (g *hog) expect(want string) {
	g.t.Helper()
	if line, err := g.out.ReadString('\n'); err != nil || line != want+"\n" {
		g.t.Fatalf("the hog says %q, %v; want %q", line, err, want)
	}
}

// turn makes it free what it has, or take it again.
func (g *hog) turn(want string) {
	g.t.Helper()
	if _, err := g.in.Write([]byte{'\n'}); err != nil {
		g.t.Fatal(err)
	}
	g.expect(want)
}

// inFlightLimit is that of the daemons of TestInFlight.
const inFlightLimit = 200

// unprivileged returns a hub for a user that nobody else is, how to start a
// process as that one, and a hog of that user.
func unprivileged(t *testing.T, uid int, specs ...spec) (*hub, func(*exec.Cmd), *hog) {
	t.Helper()
	h := newHub(t, specs...)
	binary := filepath.Join(h.dir, "binary")
	// As unkillable does.
	if out, err := exec.Command("cp", os.Args[0], binary).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, err := range []error{os.Chmod(h.dir, 0o777), os.Chmod(h.path, 0o777), os.Chmod(binary, 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	as := func(cmd *exec.Cmd) {
		cmd.Dir = h.dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), roleVar+"=hog", fmt.Sprint("ECDYSIS_TEST_HOG=", inFlightLimit+100))
	as(cmd)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Skip("a process of another user: ", err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	g := &hog{t, in, bufio.NewReader(out)}
	g.expect("in flight")
	return h, func(cmd *exec.Cmd) {
		as(cmd)
		cmd.Args = []string{"sh", "-c", fmt.Sprint("ulimit -n ", inFlightLimit, `; exec "$0" "-test.run=^$"`), binary}
		cmd.Path = "/bin/sh"
	}, g
}

// A user may not have more descriptors in flight than a process may have open.
// What others of that user do can delay an upgrade, or let it fail, but loses
// nothing.
func TestInFlight(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("it is a limit of Linux: unix(7), ETOOMANYREFS")
	}
	if os.Getuid() != 0 {
		t.Skip("processes of a user of their own take root to start")
	}
	// Users whom no other test counts with, nor another run of this one.
	uid := 20000 + 3*(os.Getpid()%13000)
	const n = 120 // more than a message
	t.Run("stays full", func(t *testing.T) {
		t.Parallel()
		sp := tcp()
		sp.Options.UpgradeTimeout = lateTimeout
		h, as, g := unprivileged(t, uid, sp, spec{NoAccept: true}, holding())
		p := h.serving(as)
		want := p.thing("many", strconv.Itoa(n), h.dir)
		before := p.call("fds").Text
		begun := time.Now()
		e := p.failUpgrade(command{}, "init", "deadline")
		if d := time.Since(begun); d < lateTimeout || d > 2*lateTimeout {
			t.Errorf("it failed after %v; want %v", d, lateTimeout)
		}
		if !strings.Contains(e.Text, "descriptors are in flight") || !strings.Contains(e.Text, "RLIMIT_NOFILE") {
			t.Errorf("error %+v; want that it tells of descriptors in flight and RLIMIT_NOFILE", e)
		}
		h.proc().ended()
		p.serves()
		sameFiles(p, before)
		g.turn("free")
		s := p.succeed(func(s *proc) { sameMany(t, s.thing("take many", strconv.Itoa(n)), want) })
		s.unclaimed("tcp 127.0.0.1:0")
	})
	t.Run("is freed", func(t *testing.T) {
		t.Parallel()
		next := holding()
		next.Do["start"] = "hold"
		h, as, g := unprivileged(t, uid+1, tcp(), next)
		p := h.serving(as)
		want := p.thing("many", strconv.Itoa(n), h.dir)
		answer := p.begin(command{Verb: "upgrade"})
		s := h.proc()
		s.at("start") // nothing could be sent before that
		p.serves()
		g.turn("free")
		s.resume()
		s.at("new")
		sameMany(t, s.thing("take many", strconv.Itoa(n)), want)
		s.resume()
		if m := answer(); m.Err != nil {
			t.Fatalf("%+v", m.Err)
		}
		s.at("serving")
		s.unclaimed("tcp 127.0.0.1:0")
		// And the next, from the new one, though it is full at first.
		g.turn("in flight")
		s.thing("AddFile", "f", "many 6")
		h.next(holding())
		answer = s.begin(command{Verb: "upgrade"})
		c := h.proc()
		g.turn("free")
		c.at("new")
		c.gives("*os.File", "File", "f", "f")
		c.resume()
		if m := answer(); m.Err != nil {
			t.Fatalf("%+v", m.Err)
		}
		if e := c.event(ecdysis.EventReady, 0); len(e.Unclaimed) != 5*n/manyKinds+n/manyKinds {
			t.Errorf("%d unclaimed: %q", len(e.Unclaimed), e.Unclaimed)
		}
	})
	t.Run("stopped meanwhile", func(t *testing.T) {
		t.Parallel()
		next := holding()
		next.Do["start"] = "hold"
		h, as, _ := unprivileged(t, uid+2, tcp(), next)
		p := h.serving(as)
		p.thing("many", strconv.Itoa(n), h.dir)
		answer := p.begin(command{Verb: "upgrade"})
		h.proc().at("start")
		p.call("stop")
		checkErr(t, answer().Err, "init", "ErrStopped")
		p.call("awaitexit")
		p.refuses()
	})
}
