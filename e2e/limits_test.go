package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Many generations, many descriptors of every kind, and too many of them.

func TestManyGenerations(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	c, first := p.Chain, p
	var early []string
	for n := 1; n <= 100; n++ {
		s := p.Upgrade()
		p.Kill()
		p = s
		if n%20 == 10 { // not those whose descriptors are compared
			p.Serves()
		}
		switch n {
		case 3:
			early = kindsOf(p.FDs())
		case 100:
			if late := kindsOf(p.FDs()); !slices.Equal(early, late) {
				t.Errorf("descriptors of generation 3: %q, of generation 100: %q", early, late)
			}
			if g := p.Generation(); g != 100 {
				t.Errorf("generation %d; want 100", g)
			}
		}
	}
	p.Inherits(first)
	p.Serves()
	p.HasPIDFile()
	c.HasFiles("pid", "sock")
}

// kindsOf makes descriptors of different processes comparable.
func kindsOf(fds []string) (list []string) {
	for _, fd := range fds {
		_, target, _ := strings.Cut(fd, " ")
		list = append(list, digits.ReplaceAllString(target, "N"))
	}
	slices.Sort(list)
	return list
}

var digits = regexp.MustCompile("[0-9]+")

func TestManyListeners(t *testing.T) {
	t.Parallel()
	var spec proctest.Spec
	for i := range 250 {
		spec = spec.And("tcp", "127.0.0.1:0").And("unix", fmt.Sprint("$DIR/", i))
	}
	p := proctest.Start(t, spec)
	p.Serves()
	fds := len(p.FDs())
	if fds > 500+20 {
		t.Errorf("500 listeners take %d descriptors", fds)
	}
	s := p.Upgrade()
	s.Inherits(p)
	p.Kill()
	last := s.Upgrade()
	last.Inherits(p)
	s.Kill()
	last.Serves()
	// The last of the clients' descriptors are about to be closed.
	n := len(last.FDs())
	for end := time.Now().Add(proctest.Patience / 2); n > fds+2 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		n = len(last.FDs())
	}
	if n > fds+2 {
		t.Errorf("%d descriptors, and %d two generations before", n, fds)
	}
	last.Stop()
	p.Chain.HasFiles()
}

// huge has more listeners than the system takes before the successor reads, even
// where a socket's buffer has two megabytes. The addresses that they were asked
// for by, which travel with them, are long.
func huge() (s proctest.Spec) {
	port := strings.Repeat("0", 500)
	for i := range 5000 {
		s.Listen = append(s.Listen, proctest.Listen{Network: "tcp", Address: fmt.Sprintf("127.1.%d.%d:%s", i/100, 1+i%100, port)})
	}
	return s
}

// servesSome fails the test unless p answers at some of its addresses, the first
// and the last among them.
func servesSome(p *proctest.Proc) {
	p.T.Helper()
	list := p.Addrs()
	for i := 0; i < len(list); i += 100 {
		p.ServesAt(list[i])
	}
	p.ServesAt(list[len(list)-1])
}

// needDescriptors skips the test unless a process may have so many open files.
func needDescriptors(t *testing.T, n uint64) {
	t.Helper()
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	if max := uint64(l.Max); max < n {
		t.Skipf("the limit of open files is %d; want %d", max, n)
	}
}

// Listeners that the program closes before they were sent are not handed on.
func TestClosedBeforeSent(t *testing.T) {
	t.Parallel()
	const n = 160
	var spec proctest.Spec
	for range n { // more than the system takes before the successor reads
		spec = spec.And("tcp", "127.0.0.1:"+strings.Repeat("0", 15_000))
	}
	p := proctest.Start(t, spec.UpgradeTimeout(2*proctest.Patience), proctest.TCP.Hold(proctest.AtStart))
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtStart)
	for i := range n {
		if err := p.Close(i); err != nil {
			t.Fatal(err)
		}
	}
	s.Resume()
	a.OK()
	s.Serves()
	if got := len(s.Event(ecdysis.EventReady, 0).Unclaimed); got == 0 || got == n {
		t.Errorf("%d of the %d listeners were sent; want those that the system has taken at once", got, n)
	}
}

// A listener whose record is too long fails the upgrade before the successor
// starts, until it is closed.
func TestTooLongToSend(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP.And("tcp", "127.0.0.1:"+strings.Repeat("0", 70_000)), proctest.TCP)
	f := p.FailUpgrade(ecdysis.StepStart, nil)
	proctest.Want(t, f, nil, "there can be")
	p.Serves()
	if err := p.Close(1); err != nil {
		t.Fatal(err)
	}
	p.Upgrade().Serves()
	p.Chain.None()
}

// Not parallel, because two of these processes have 10,000 descriptors in
// flight, and the system counts those of all processes of a user.
func TestHugeInheritance(t *testing.T) {
	proctest.OnlyOn(t, "all of 127.0.0.0/8 is needed", "linux")
	needDescriptors(t, 6000)
	t.Run("upgrade", func(t *testing.T) {
		p := proctest.Start(t, huge())
		s := p.Upgrade()
		s.Inherits(p)
		servesSome(s)
	})
	t.Run("predecessor killed at the start", func(t *testing.T) {
		p := proctest.Start(t, huge(), huge().Hold(proctest.AtStart), huge())
		s := p.BeginUpgrade().Successor()
		s.At(proctest.AtStart)
		p.Kill()
		s.Resume()
		s.At(proctest.AtServing) // every Listen has succeeded
		old, now := p.Addrs(), s.Addrs()
		n := 0
		for n < len(old) && old[n] == now[n] {
			n++
		}
		t.Log(n, "sockets had been handed on")
		if n < 100 || n == len(old) {
			t.Errorf("%d of %d sockets had been handed on; want many, and not all", n, len(old))
		}
		same := 0
		for i := n; i < len(old); i++ {
			if old[i] == now[i] { // the system may choose a port again
				same++
			}
		}
		if same > 5 {
			t.Fatalf("socket %d was not handed on, %d after it were", n, same)
		}
		servesSome(s)
		next := s.Upgrade()
		next.Inherits(s)
		servesSome(next)
	})
	t.Run("successor killed at the start", func(t *testing.T) {
		p := proctest.Start(t, huge(), huge().At(proctest.AtStart, proctest.Kill), huge())
		begun := time.Now()
		f := p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
		// Far less than UpgradeTimeout, a minute.
		if d := time.Since(begun); d > proctest.Patience {
			t.Errorf("Upgrade returned after %v", d)
		}
		f.Successor.Reaped()
		servesSome(p)
		s := p.Upgrade()
		s.Inherits(p)
		servesSome(s)
	})
}

// withLimit is a successor that may have so many open files.
func withLimit(t *testing.T, n int) proctest.Successor {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return proctest.Successor{
		Path: "/bin/sh",
		Args: []string{"-c", fmt.Sprint("ulimit -n ", n, `; exec "$0" "-test.run=^$"`), program},
	}
}

// failsByLimit fails the test unless this successor fails, and the errors
// of both processes name the limit.
func failsByLimit(p *proctest.Proc, s proctest.Successor) {
	p.T.Helper()
	f := p.FailUpgrade(ecdysis.StepInit, nil, s)
	proctest.Want(p.T, f, nil, "RLIMIT_NOFILE")
	proctest.Want(p.T, f.Successor.ErrAt(proctest.AtNewFailed), nil, "RLIMIT_NOFILE")
	f.Successor.Reaped()
}

// A successor that may not have so many descriptors says so, and nothing is
// lost.
func TestDescriptorLimit(t *testing.T) {
	t.Parallel()
	t.Run("listeners", func(t *testing.T) {
		t.Parallel()
		var spec proctest.Spec
		for range 60 {
			spec = spec.And("tcp", "127.0.0.1:0")
		}
		p := proctest.Start(t, spec)
		for range 2 {
			failsByLimit(p, withLimit(t, 20))
			p.Serves()
		}
		p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
		s := p.Upgrade()
		s.Inherits(p)
		s.Serves()
	})
	t.Run("all kinds", func(t *testing.T) {
		t.Parallel()
		proctest.SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
		p := proctest.Start(t, proctest.TCP, proctest.Holding)
		const n = 300
		want := makeMany.On(p, n)
		keeps := p.KeepsWithClients()
		for range 2 {
			failsByLimit(p, withLimit(t, 100))
			p.Serves()
			keeps()
		}
		p.UpgradeHolding(func(s *proctest.Proc) { hasMany(s, n, want) }).HasUnclaimed("tcp 127.0.0.1:0")
	})
}

// manyKinds is how many kinds makeMany makes, in turn.
const manyKinds = 8

// identity is equal for two descriptors of one thing, in any process.
func identity(kind int, c syscall.Conn) string {
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

// makeMany makes and adds so many things, all by one name as far as they may
// have it, and returns which they are. The next process reads from connections,
// files and pairs which number each had.
var makeMany = proctest.Define("make many", func(d *proctest.Daemon, n int) (list []string, err error) {
	for i := range n {
		var c io.Closer
		kind := i % manyKinds
		path := filepath.Join(proctest.Dir(), strconv.Itoa(i))
		switch kind {
		case 0, 1, 2:
			na := [][2]string{{"tcp", "127.0.0.1:0"}, {"unix", path}, {"unixpacket", path}}[kind]
			ln, err := net.Listen(na[0], na[1])
			if err != nil {
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
		case 5, 6:
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
			_, down, err := d.U.DatagramPair(fmt.Sprint("pair ", i))
			if down == nil {
				return nil, err
			}
			if _, err := fmt.Fprintln(down, i); err != nil {
				return nil, err
			}
			list = append(list, fmt.Sprint("content ", i))
			down.Close()
			continue
		}
		list = append(list, identity(kind, c.(syscall.Conn)))
		switch kind {
		case 5:
			err = d.U.AddConn("one name", c.(net.Conn))
		case 6:
			err = d.U.AddFile("one name", c.(*os.File))
		default:
			var f *os.File
			if f, err = c.(interface{ File() (*os.File, error) }).File(); err == nil {
				err = d.U.AddFile(fmt.Sprint("kind ", kind), f)
				f.Close()
			}
		}
		if err = errors.Join(err, c.Close()); err != nil {
			return nil, err
		}
	}
	return list, nil
})

// takeMany takes so many, in their order, and returns which they are.
var takeMany = proctest.Define("take many", func(d *proctest.Daemon, n int) (list []string, err error) {
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
			x, err = d.U.Listener(name)
		case 3, 4:
			x, err = d.U.PacketConn(name)
		case 5:
			var c net.Conn
			if c, err = d.U.Conn("one name"); c != nil {
				content(c)
				x = c
			}
		case 6:
			var f *os.File
			if f, err = d.U.File("one name"); f != nil {
				content(f)
				x = f
			}
		case 7:
			var up *net.UnixConn
			if up, _, err = d.U.DatagramPair(fmt.Sprint("pair ", i)); up != nil {
				content(up)
				continue
			}
		}
		if err != nil || x == nil {
			return list, fmt.Errorf("number %d: %v, %w", i, x, err)
		}
		list = append(list, identity(kind, x.(syscall.Conn)))
		d.Set(fmt.Sprint("many ", i), x) // it stays open
	}
	return list, nil
})

// hasMany lets s take n things, and fails the test unless they are those that
// makeMany has returned.
func hasMany(s *proctest.Proc, n int, want []string) {
	s.T.Helper()
	got := takeMany.On(s, n)
	if len(got) != len(want) {
		s.T.Fatalf("%d things; want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			s.T.Fatalf("number %d is %s; want %s", i, got[i], want[i])
		}
	}
}

// Everything arrives, in its order.
func TestManyThings(t *testing.T) {
	proctest.SkipOn(t, "it has no SOCK_SEQPACKET", "darwin")
	for _, n := range []int{300, 5000} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			needDescriptors(t, uint64(n)*3/2)
			if n < 1000 { // more would be too many in flight with others
				t.Parallel()
			}
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			before := len(p.FDs())
			want := makeMany.On(p, n)
			if runtime.GOOS == "linux" {
				if now := len(p.FDs()); now != before+n {
					t.Errorf("%d things take %d descriptors", n, now-before)
				}
			}
			p.KillHolding(func(*proctest.Proc) {}) // as if it had not been
			begun := time.Now()
			s := p.UpgradeHolding(func(s *proctest.Proc) {
				t.Log(n, "things arrived after", time.Since(begun))
				hasMany(s, n, want)
			})
			s.HasUnclaimed()
			if runtime.GOOS == "linux" {
				if now := len(p.FDs()); now != before+1 {
					t.Errorf("the predecessor has %d descriptors; want %d and the stream", now, before)
				}
			}
		})
	}
}

// hogRole is a process that keeps descriptors in flight, as many as its argument
// says. Each byte of its input makes it take back what it has, or send as many
// again.
var hogRole = proctest.DefineRole("hog", func() {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "hog:", err)
			os.Exit(1)
		}
	}
	n, err := strconv.Atoi(proctest.Args()[0])
	must(err)
	in := bufio.NewReader(os.Stdin)
	for {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		must(err)
		for left := n; left > 0; left -= 100 {
			must(syscall.Sendmsg(fds[0], []byte("x"), syscall.UnixRights(make([]int, min(left, 100))...), nil, 0))
		}
		fmt.Println("in flight")
		if _, err := in.ReadByte(); err != nil {
			return
		}
		b, oob := make([]byte, 1), make([]byte, syscall.CmsgSpace(4*100))
		for left := n; left > 0; left -= 100 {
			_, oobn, _, _, err := syscall.Recvmsg(fds[1], b, oob, 0)
			must(err)
			msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
			if err != nil || len(msgs) == 0 {
				must(fmt.Errorf("control messages %v: %w", msgs, err))
			}
			list, err := syscall.ParseUnixRights(&msgs[0])
			must(err)
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
})

// A hog is a process of hogRole.
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

// inFlightLimit is how many open files the daemons of TestInFlight may have.
const inFlightLimit = 200

// besideHog starts a process as a user that no other process has, but a hog.
func besideHog(t *testing.T, uid int, specs ...proctest.Spec) (*proctest.Proc, *hog) {
	t.Helper()
	c := proctest.New(t, specs...)
	as := c.Users()(uid)
	cmd := hogRole.Command(strconv.Itoa(inFlightLimit + 100))
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
	return c.Start(as, func(cmd *exec.Cmd) {
		script := fmt.Sprint("ulimit -n ", inFlightLimit, `; exec "$0" "$@"`)
		cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", script}, cmd.Args...)
	}), g
}

// A user may not have more descriptors in flight than a process may have open.
// What other processes of that user do can delay an upgrade, or let it fail, but
// loses nothing.
func TestInFlight(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "the limit is one of Linux: unix(7), ETOOMANYREFS", "linux")
	// Users that no other test has, nor another run of this one.
	uid := 20000 + 3*(os.Getpid()%13000)
	const n = 120 // more than a message
	t.Run("stays full", func(t *testing.T) {
		t.Parallel()
		p, g := besideHog(t, uid, proctest.TCP.UpgradeTimeout(lateTimeout), proctest.Spec{NoAccept: true}, proctest.Holding)
		want := makeMany.On(p, n)
		keeps := p.KeepsWithClients()
		begun := time.Now()
		f := p.FailUpgrade(ecdysis.StepInit, os.ErrDeadlineExceeded)
		if d := time.Since(begun); d < lateTimeout || d > proctest.Patience {
			t.Errorf("it failed after %v; want %v", d, lateTimeout)
		}
		proctest.Want(t, f, nil, "descriptors are in flight", "RLIMIT_NOFILE")
		f.Successor.Ended()
		p.Serves()
		keeps()
		g.turn("free")
		p.UpgradeHolding(func(s *proctest.Proc) { hasMany(s, n, want) }).HasUnclaimed("tcp 127.0.0.1:0")
	})
	t.Run("is freed", func(t *testing.T) {
		t.Parallel()
		p, g := besideHog(t, uid+1, proctest.TCP, proctest.Holding.Hold(proctest.AtStart), proctest.Holding)
		want := makeMany.On(p, n)
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtStart) // nothing could be sent before that
		p.Serves()
		g.turn("free")
		s.Resume()
		s.At(proctest.AtNew)
		hasMany(s, n, want)
		s.Resume()
		a.OK()
		s.At(proctest.AtServing)
		s.HasUnclaimed("tcp 127.0.0.1:0")
		// And the next, from the new one, though it is full at first.
		g.turn("in flight")
		addFile.On(s, named{"f", "many 6"})
		a = s.BeginUpgrade()
		next := a.Successor()
		g.turn("free")
		next.At(proctest.AtNew)
		finds(next, claimFile, "f", "f", "*os.File")
		next.Resume()
		a.OK()
		// Sockets and pairs are handed on again, and now nobody asks for them.
		if list := next.Event(ecdysis.EventReady, 0).Unclaimed; len(list) != 6*n/manyKinds {
			t.Errorf("%d unclaimed: %q; want %d", len(list), list, 6*n/manyKinds)
		}
	})
	t.Run("stopped meanwhile", func(t *testing.T) {
		t.Parallel()
		p, _ := besideHog(t, uid+2, proctest.TCP, proctest.Holding.Hold(proctest.AtStart))
		makeMany.On(p, n)
		a := p.BeginUpgrade()
		a.Successor().At(proctest.AtStart)
		p.Stop()
		a.Fails(ecdysis.StepInit, ecdysis.ErrStopped)
		p.AwaitExit()
		p.Refuses()
	})
}
