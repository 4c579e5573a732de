package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The files of Unix sockets: their mode, and what is there already.

// A modesArg says how sockets are made: n times with each mode.
type modesArg struct {
	Network, Path string
	Umask         int
	N             int
	Modes         []os.FileMode
}

// socketModes makes sockets, and returns the modes of their files.
var socketModes = proctest.Define("modes of sockets", func(d *proctest.Daemon, a modesArg) (list []os.FileMode, err error) {
	defer syscall.Umask(syscall.Umask(a.Umask))
	for _, mode := range a.Modes {
		for range a.N {
			s, err := listenAs(d.U, isPackets(a.Network), ecdysis.ListenConfig{Mode: mode}, a.Network, a.Path)
			if err != nil {
				return list, err
			}
			fi, err := os.Lstat(a.Path)
			if err := errors.Join(err, s.Close()); err != nil {
				return list, err
			}
			if got := fi.Mode().Perm(); len(list) == 0 || list[len(list)-1] != got {
				list = append(list, got)
			}
		}
	}
	return list, nil
})

// A socket's file has its mode whatever the umask. That of a socket for
// packets, which can be sent to at once, never has more on Linux.
func TestSocketMode(t *testing.T) {
	t.Parallel()
	for _, network := range unixNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{})
			path := p.Chain.Path("s")
			modes := []os.FileMode{0o600, 0o666, 0o660, 0o622, 0o222}
			for _, mask := range []int{0, 0o22, 0o77, 0o777} {
				if got := socketModes.On(p, modesArg{network, path, mask, 1, modes}); !slices.Equal(got, modes) {
					t.Errorf("umask %o: modes %o; want %o", mask, got, modes)
				}
			}
			if got := socketModes.On(p, modesArg{network, path, 0o27, 1, []os.FileMode{0}}); got[0] != 0o750 {
				t.Errorf("Mode 0 under a umask of 027: mode %o; want 750", got[0])
			}
			if network != "unixgram" || runtime.GOOS != "linux" {
				return
			}
			made := socketModes.Begin(p, modesArg{network, path, 0, 500, []os.FileMode{0o600}})
			stop, seen := make(chan struct{}), make(chan map[os.FileMode]int)
			go func() {
				modes := make(map[os.FileMode]int)
				for {
					select {
					case <-stop:
						seen <- modes
						return
					default:
					}
					if fi, err := os.Lstat(path); err == nil {
						modes[fi.Mode().Perm()]++
					}
				}
			}()
			got, err := made.Wait()
			close(stop)
			before := <-seen
			if err != nil || !slices.Equal(got, []os.FileMode{0o600}) {
				t.Errorf("modes %o, %v", got, err)
			}
			delete(before, 0o600)
			if len(before) > 0 {
				t.Errorf("the file of a socket that is made with mode 0600 was seen with %v", before)
			}
		})
	}
}

// abandoned returns when no process has a copy of the socket whose file this
// is: one that another test starts has a copy until it runs its program.
func abandoned(t *testing.T, network, path string) {
	t.Helper()
	for end := time.Now().Add(proctest.Patience); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial(network, path)
		if err == nil {
			c.Close()
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the socket of %s is still there: %v", path, err)
		}
	}
}

// packetEnd dials a Unix datagram socket from a path of its own.
func packetEnd(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := proctest.Addr{Network: "unixgram", Address: path}.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A stale file is replaced, a live one is not, and the process that listens
// there is not disturbed.
func TestStaleFile(t *testing.T) {
	t.Parallel()
	for _, network := range unixNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			u := proctest.Ours(t)
			dir := proctest.ShortDir(t)
			path := filepath.Join(dir, "s")
			inUse := func(what string) {
				t.Helper()
				before, err := os.Lstat(path)
				if err != nil {
					t.Fatal(err)
				}
				s, err := listenAs(u, isPackets(network), ecdysis.ListenConfig{}, network, path)
				if s != nil {
					s.Close()
				}
				proctest.Want(t, err, syscall.EADDRINUSE, path)
				if strings.HasPrefix(what, "a listener") && !strings.Contains(err.Error(), "another process listens there") {
					t.Errorf("at the path of %s: %v", what, err)
				}
				if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
					t.Errorf("the file of %s after that: %v", what, err)
				}
			}
			stale := func(what, of string) {
				t.Helper()
				abandoned(t, of, path)
				s, err := listenAs(u, isPackets(network), ecdysis.ListenConfig{}, network, path)
				if err != nil {
					t.Fatalf("at the path that %s has left: %v", what, err)
				}
				var c net.Conn
				var got func([]byte) (int, error)
				if ln, ok := s.(net.Listener); ok {
					if c, err = net.Dial(network, path); err != nil {
						t.Fatal(err)
					}
					a, err := ln.Accept()
					if err != nil {
						t.Fatal(err)
					}
					defer a.Close()
					got = a.Read
				} else {
					c = packetEnd(t, path)
					got = func(b []byte) (int, error) { n, _, err := s.(net.PacketConn).ReadFrom(b); return n, err }
				}
				defer c.Close()
				if _, err := io.WriteString(c, "hello"); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 10)
				if n, err := got(b); err != nil || string(b[:n]) != "hello" {
					t.Errorf("after %s: %q, %v", what, b[:n], err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("after Close: %v", err)
				}
			}

			// Datagrams: net leaves their files behind.
			g, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			inUse("a socket for datagrams")
			c := packetEnd(t, path)
			if _, err := io.WriteString(c, "the first"); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 20)
			if n, _, err := g.ReadFrom(b); err != nil || string(b[:n]) != "the first" {
				t.Errorf("a live socket got %q, %v", b[:n], err)
			}
			for full := 0; full < 1000; full++ { // however long its queue is
				if err := c.SetWriteDeadline(time.Now().Add(time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write([]byte("x")); err != nil {
					break
				}
			}
			inUse("a socket for datagrams whose queue is full")
			g.Close()
			stale("a socket for datagrams", "unixgram")

			// One that has a peer refuses all others, and lives.
			peer, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "peer"), Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			g, err = net.DialUnix("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}, peer.LocalAddr().(*net.UnixAddr))
			if err != nil {
				t.Fatal(err)
			}
			inUse("a connected socket")
			g.Close()
			stale("a connected socket", "unixgram")

			for _, of := range unixNetworks() {
				if of == "unixgram" {
					continue
				}
				what := "a listener of " + of
				ln, err := net.ListenUnix(of, &net.UnixAddr{Name: path, Net: of})
				if err != nil {
					t.Fatal(err)
				}
				ln.SetUnlinkOnClose(false)
				inUse(what)
				c, err := net.Dial(of, path)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(c, "the first"); err != nil {
					t.Fatal(err)
				}
				a, err := ln.Accept() // nobody came before
				if err != nil {
					t.Fatal(err)
				}
				if n, err := a.Read(b); err != nil || string(b[:n]) != "the first" {
					t.Errorf("%s got %q, %v", what, b[:n], err)
				}
				a.Close()
				c.Close()
				ln.Close()
				stale(what, of)
			}

			// The package's own.
			for _, of := range unixNetworks() {
				s, err := listenAs(u, isPackets(of), ecdysis.ListenConfig{}, of, path)
				if err != nil {
					t.Fatal(err)
				}
				inUse("the package's own socket of " + of)
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Of several processes that find one stale file, one gets it and the others
// are told.
func TestStaleFileRace(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Holding)
	var procs []*proctest.Proc
	for range 4 {
		procs = append(procs, c.Launch())
	}
	for _, p := range procs {
		p.At(proctest.AtNew)
	}
	for round := range 20 {
		network := unixNetworks()[round%len(unixNetworks())]
		path := c.Path(fmt.Sprint("s", round))
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		abandoned(t, "unix", path)
		var calls []*proctest.Pending[string]
		for _, p := range procs {
			calls = append(calls, proctest.CallListen.Begin(p, proctest.Listen{Network: network, Address: path}))
		}
		won := 0
		for _, call := range calls {
			if err := call.Err(); err == nil {
				won++
			} else {
				proctest.Want(t, err, syscall.EADDRINUSE)
			}
		}
		if won != 1 {
			t.Errorf("round %d, %s: %d processes got the path", round, network, won)
		}
		if c, err := net.Dial(network, path); err != nil {
			t.Errorf("round %d: %v", round, err)
		} else {
			c.Close()
		}
	}
}

// A socket file that a process may not connect to is not said to be another
// process's, and stays.
func TestStaleFileOfAnotherUser(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Both)
	as := c.Users()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: c.Path("sock")})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if err := os.Chmod(c.Path("sock"), 0o600); err != nil {
		t.Fatal(err)
	}
	err = c.Launch(as(65534)).ErrAt(proctest.AtListenFailed)
	proctest.Want(t, err, syscall.EADDRINUSE, "cannot be told")
	proctest.Want(t, err, syscall.EACCES)
	c.HasFiles("sock")
}
