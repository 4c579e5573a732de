package e2e

import (
	"cmp"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Sockets that were made elsewhere are adopted by AddFile.

// An adoptee is a socket that a daemon has made behind the package's back.
type adoptee struct {
	words []proctest.Addr // by which it is found, its own address first
	bound string          // what the system has its address as, if that is another
}

// byName is the way to find an adoptee that is none of its words.
const byName = -1

// ways are the indexes of a.words, and byName.
func (a adoptee) ways() []int {
	list := []int{byName}
	for i := range a.words {
		list = append(list, i)
	}
	return list
}

func (a adoptee) network() string { return a.words[0].Network }
func (a adoptee) address() string { return a.words[0].Address }
func (a adoptee) packets() bool   { return a.network() == "udp" || a.network() == "unixgram" }

// byItsName is the package's method that finds a by its name.
func (a adoptee) byItsName() claim {
	if a.packets() {
		return claimPacketConn
	}
	return claimListener
}

// byAddress is the package's method that finds a by an address.
func (a adoptee) byAddress() proctest.Call[socketAt, string] {
	if a.packets() {
		return ownPacketConn
	}
	return ownListener
}

// forClients is where clients reach it.
func (a adoptee) forClients() proctest.Addr {
	_, port, _ := net.SplitHostPort(a.address())
	switch {
	case a.network() == "tcp6":
		return proctest.Addr{Network: "tcp6", Address: "[::1]:" + port}
	case strings.HasPrefix(a.address(), "[::]"), strings.HasPrefix(a.address(), "0.0.0.0"):
		return proctest.Addr{Network: a.network(), Address: "127.0.0.1:" + port}
	}
	return a.words[0]
}

// isClosed fails the test if anybody answers.
func (a adoptee) isClosed(t *testing.T) {
	t.Helper()
	if pid, _, err := a.forClients().Ask(); err == nil {
		t.Errorf("%v is open still: process %d answers", a.words[0], pid)
	}
}

// hasFile fails the test unless the file of a Unix socket is there.
func (a adoptee) hasFile(t *testing.T) {
	t.Helper()
	if filepath.IsAbs(a.address()) {
		if _, err := os.Lstat(a.address()); err != nil {
			t.Errorf("the file: %v", err)
		}
	}
}

// adoptees are the kinds of sockets, each with a function that lets a daemon
// make one with the key "made".
func adoptees() map[string]func(p *proctest.Proc) adoptee {
	m := make(map[string]func(p *proctest.Proc) adoptee)
	for _, network := range []string{"tcp", "udp"} {
		m[network] = func(p *proctest.Proc) adoptee {
			at := listenElsewhere.On(p, socketAt{"made", network, "127.0.0.1:0"})
			_, port, _ := net.SplitHostPort(at)
			return adoptee{words: []proctest.Addr{{Network: network, Address: at}, {Network: network + "4", Address: at}, {Network: network, Address: "localhost:" + port}}}
		}
		m[network+" everywhere"] = func(p *proctest.Proc) adoptee {
			at := listenElsewhere.On(p, socketAt{"made", network, ":0"}) // [::], where that means both versions of IP
			_, port, _ := net.SplitHostPort(at)
			return adoptee{words: []proctest.Addr{{Network: network, Address: at}, {Network: network, Address: ":" + port}, {Network: network, Address: "0.0.0.0:" + port}}}
		}
	}
	if ln, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		ln.Close()
		m["tcp6"] = func(p *proctest.Proc) adoptee {
			_, port, _ := net.SplitHostPort(listenElsewhere.On(p, socketAt{"made", "tcp6", "[::]:0"}))
			return adoptee{words: []proctest.Addr{{Network: "tcp6", Address: "[::]:" + port}, {Network: "tcp6", Address: ":" + port}}}
		}
	}
	for _, network := range []string{"unix", "unixpacket", "unixgram"} {
		if network == "unixpacket" && runtime.GOOS == "darwin" {
			continue
		}
		m[network] = func(p *proctest.Proc) adoptee {
			path := p.Chain.Path("s")
			listenElsewhere.On(p, socketAt{"made", network, path})
			roundabout := p.Chain.Dir + "/../" + filepath.Base(p.Chain.Dir) + "/./s"
			return adoptee{words: []proctest.Addr{{Network: network, Address: path}, {Network: network, Address: roundabout}}}
		}
		if runtime.GOOS == "linux" && network != "unixpacket" {
			m[network+" abstract"] = func(p *proctest.Proc) adoptee {
				name := "@ecdysis-adopt-" + filepath.Base(p.Chain.Dir)
				listenElsewhere.On(p, socketAt{"made", network, name})
				return adoptee{words: []proctest.Addr{{Network: network, Address: name}, {Network: network, Address: "\x00" + name[1:]}}}
			}
		}
	}
	m["unix relative"] = func(p *proctest.Proc) adoptee {
		inDir(p, p.Chain.Dir, func() { listenElsewhere.On(p, socketAt{"made", "unix", "s"}) })
		return adoptee{words: []proctest.Addr{{Network: "unix", Address: p.Chain.Path("s")}}, bound: "s"}
	}
	return m
}

// inDir calls f while dir is p's working directory, which is / from then on.
func inDir(p *proctest.Proc, dir string, f func()) {
	p.T.Helper()
	if err := p.Chdir(dir); err != nil {
		p.T.Fatal(err)
	}
	f()
	if err := p.Chdir("/"); err != nil {
		p.T.Fatal(err)
	}
}

// adopts lets p make a socket and add it, with the name "socket".
func adopts(p *proctest.Proc, create func(p *proctest.Proc) adoptee) adoptee {
	p.T.Helper()
	a := create(p)
	fileOf.On(p, copyOf{"file", "made"})
	closes(p, "made")
	a.addedBy(p, "file")
	return a
}

// addedBy lets p add the socket's file, which it closes.
func (a adoptee) addedBy(p *proctest.Proc, key string) {
	p.T.Helper()
	add := func() { addFile.On(p, named{"socket", key}) }
	if a.bound != "" {
		inDir(p, filepath.Dir(a.address()), add) // where it was made
	} else {
		add()
	}
	closes(p, key)
}

// foundBy lets p find the socket, which it serves as "sock" from then on.
func (a adoptee) foundBy(p *proctest.Proc, way int) {
	p.T.Helper()
	want := map[string]string{"udp": "*ecdysis.UDPConn", "unixgram": "*ecdysis.UnixgramConn", "unixpacket": "*ecdysis.SeqpacketListener"}[a.network()]
	want = cmp.Or(want, "*ecdysis.listener")
	if way == byName {
		finds(p, a.byItsName(), "socket", "sock", want)
	} else if w := a.words[way]; a.byAddress().On(p, socketAt{"sock", w.Network, w.Address}) != want {
		p.T.Fatalf("process %d has not found a %s at %v", p.PID, want, w)
	}
	findsNothing(p, a.byItsName(), "socket")
	serveKey.On(p, "sock")
}

// A socket that was made elsewhere is found by its name and by every word for
// its address, where it was brought in and in each generation, is served
// without a gap, and its file belongs to somebody else.
func TestAdopted(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			a := adopts(p, add)
			a.foundBy(p, byName)
			for _, way := range a.ways() {
				fileOf.On(p, copyOf{"file", "sock"})
				closes(p, "sock")
				a.hasFile(t)
				a.addedBy(p, "file")
				a.foundBy(p, way)
				p.ServesAt(a.forClients())
			}
			l := proctest.StartLoad(t, proctest.Clients{}, a.forClients())
			first := p
			for _, way := range append(a.ways(), byName) {
				l.More(20)
				s := p.UpgradeHolding(func(s *proctest.Proc) { a.foundBy(s, way) })
				s.HasUnclaimed()
				s.ServesAt(a.forClients())
				p = s
			}
			l.More(20)
			l.Check()
			closes(p, "sock")
			a.hasFile(t)
			if !a.packets() { // those stay open where they were read
				a.isClosed(t)
			}
			first.Generation()
		})
	}
}

// A socket need not be claimed where it was added. Its file stays, whichever
// process ends it, because somebody else has made it.
func TestAdoptedUnasked(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		for _, end := range []string{"dropped", "stopped", "stopped where it was made"} {
			t.Run(name+" "+end, func(t *testing.T) {
				t.Parallel()
				p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
				a := adopts(p, add)
				if end == "stopped where it was made" {
					p.Stop()
					a.isClosed(t)
					a.hasFile(t)
					return
				}
				way := byName
				if end == "stopped" {
					way, a.bound = 0, ""
				}
				p.KillHolding(func(s *proctest.Proc) { a.foundBy(s, way) })
				s := p.UpgradeHolding(func(s *proctest.Proc) { a.foundBy(s, way) })
				s.HasUnclaimed()
				s.ServesAt(a.forClients())
				if end == "dropped" {
					s.UpgradeHolding(func(*proctest.Proc) {}).HasUnclaimed(a.network() + " " + cmp.Or(a.bound, a.address()))
				} else {
					s.Stop()
				}
				if a.packets() {
					closes(s, "sock") // where it is read no more, and kept for answers
				}
				a.isClosed(t)
				a.hasFile(t)
			})
		}
	}
}

// keepListener makes a listener one of the daemon's sockets.
var keepListener = proctest.Define("keep listener", func(d *proctest.Daemon, key string) (proctest.None, error) {
	d.Keep(proctest.Get[net.Listener](d, key))
	return proctest.None{}, nil
})

// The order among sockets of one name, and of one address.
func TestAdoptedOrder(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	var at []string
	for i := range 4 {
		at = append(at, listenElsewhere.On(p, socketAt{"made", "tcp", "127.0.0.1:0"}))
		fileOf.On(p, copyOf{"f", "made"})
		addFile.On(p, named{"socket", "f"})
		closes(p, "made", "f")
		if i == 0 { // one is asked for here, and goes on being the first
			finds(p, claimListener, "socket", "ln", "*ecdysis.listener")
		}
	}
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		ownListener.On(s, socketAt{"ln", "tcp", at[2]})
		keepListener.On(s, "ln")
		for range 3 {
			finds(s, claimListener, "socket", "ln", "*ecdysis.listener")
			keepListener.On(s, "ln")
		}
		findsNothing(s, claimListener, "socket")
		ownListener.On(s, socketAt{"new", "tcp", "127.0.0.1:0"})
	})
	s.HasUnclaimed()
	for i, n := range []int{2, 0, 1, 3} {
		if a := s.Addr(i); a.Address != at[n] {
			t.Errorf("socket %d: %v; want %s", i, a, at[n])
		}
	}
}

// A file is found by a path with a symbolic link in it, as one of this
// package's own is.
func TestAdoptedByLink(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"here", "in the successor"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			if err := os.Symlink(p.Chain.Dir, p.Chain.Path("link")); err != nil {
				t.Fatal(err)
			}
			a := adopts(p, adoptees()["unix"])
			b := adoptee{words: []proctest.Addr{{Network: "unix", Address: p.Chain.Path("link/s")}}}
			if where == "here" {
				b.foundBy(p, 0)
				p.ServesAt(b.forClients())
				return
			}
			s := p.UpgradeHolding(func(s *proctest.Proc) { b.foundBy(s, 0) })
			s.HasUnclaimed()
			s.ServesAt(a.forClients())
			closes(s, "sock")
			a.hasFile(t)
		})
	}
}

// What is no socket for clients is a file.
func TestNotAdopted(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	tcp, udp := dialled(p, "tcp", "tcp"), dialled(p, "udp", "udp")
	opens(p, "null", os.DevNull)
	fileOf.On(p, copyOf{"tcp file", "tcp"})
	fileOf.On(p, copyOf{"udp file", "udp"})
	streamPair.On(p, "stream")
	datagramPair.On(p, "dgram")
	bindTCP.On(p, "bound")
	keys := []string{"null", "tcp file", "udp file", "stream.a", "dgram.a"}
	if runtime.GOOS == "linux" || runtime.GOOS == "freebsd" {
		keys = append(keys, "bound") // where the system tells
	}
	check := func(p *proctest.Proc) {
		t.Helper()
		for _, key := range keys {
			findsNothing(p, claimListener, key)
			findsNothing(p, claimPacketConn, key)
			findsNothing(p, claimConn, key)
		}
	}
	for _, key := range keys {
		addFile.On(p, named{key, key})
	}
	check(p)
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		check(s)
		for _, key := range keys {
			finds(s, claimFile, key, key, "*os.File")
		}
	})
	s.HasUnclaimed()
	connOf.On(s, copyOf{"c", "tcp file"})
	talk(s, "c", tcp)
	connOf.On(s, copyOf{"c", "udp file"})
	talk(s, "c", udp)
}

// File takes a socket out, here and in the successor: it is nobody's listener
// then, and not handed on.
func TestAdoptedTakenOut(t *testing.T) {
	t.Parallel()
	for name, add := range adoptees() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			a := adopts(p, add)
			s := p.UpgradeHolding(func(s *proctest.Proc) {
				finds(s, claimFile, "socket", "f", "*os.File")
				findsNothing(s, a.byItsName(), "socket")
				findsNothing(s, claimFile, "socket")
			})
			s.HasUnclaimed()
			proctest.Want(t, a.byAddress().Err(s, socketAt{"none", a.network(), a.address()}), syscall.EADDRINUSE)
			addFile.On(s, named{"again", "f"})
			finds(s, claimFile, "again", "f2", "*os.File")
			g := s.UpgradeHolding(func(g *proctest.Proc) {
				findsNothing(g, claimFile, "again")
				findsNothing(g, a.byItsName(), "again")
			})
			g.HasUnclaimed()
			proctest.Want(t, a.byAddress().Err(g, socketAt{"none", a.network(), a.address()}), syscall.EADDRINUSE)
			closes(s, "f", "f2")
			a.isClosed(t)
		})
	}
}
