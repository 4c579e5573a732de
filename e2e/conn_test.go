package e2e

import (
	"crypto/tls"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Connections are handed on with what is unread, and rules that hold for all that
// is added.

// A connection moves with what is unread, whenever the caller closes it, and
// no copy stays behind.
func TestConnMoves(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		for _, when := range []string{"closed at once", "closed after the upgrade"} {
			t.Run(network+" "+when, func(t *testing.T) {
				t.Parallel()
				p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
				peer := dialled(p, "c", network)
				talk(p, "c", peer)
				old := []*proctest.Proc{p}
				for range 2 {
					addConn.On(p, named{"the name", "c"})
					if when == "closed at once" {
						closes(p, "c")
					}
					say(t, peer, "unread")
					s := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimConn, "the name", "c", typ) })
					s.HasUnclaimed()
					if when != "closed at once" {
						closes(p, "c")
					}
					reads(s, "c", "unread")
					talk(s, "c", peer)
					p, old = s, append(old, s)
				}
				closes(p, "c")
				ends(t, peer)
				for _, q := range old { // and all of them live
					q.Generation()
				}
			})
		}
	}
}

// acceptClient accepts at the first listener.
var acceptClient = proctest.Define("accept client", func(d *proctest.Daemon, key string) (proctest.None, error) {
	c, err := d.Listener(0).Accept()
	d.Set(key, c)
	return proctest.None{}, err
})

// A client that was accepted moves, and one that waits in the backlog is
// accepted by the successor.
func TestConnMovesAccepted(t *testing.T) {
	t.Parallel()
	listens := proctest.TCP
	listens.NoAccept = true
	p := proctest.Start(t, listens, listens.Hold(proctest.AtNew))
	c, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	acceptClient.On(p, "c")
	addConn.On(p, named{"client", "c"})
	say(t, c, "half a re")
	waits, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	g := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimConn, "client", "c", "*net.TCPConn") })
	closes(p, "c")
	say(t, c, "quest")
	reads(g, "c", "half a request")
	acceptClient.On(g, "c2")
	talk(g, "c2", waits)
	closes(g, "c", "c2")
	ends(t, c)
	ends(t, waits)
}

// A socket for packets of this package moves as a connection.
func TestConnMovesPackets(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	ownPacketConn.On(p, socketAt{"u", "udp", "127.0.0.1:0"})
	c, err := net.Dial("udp", localAddr.On(p, "u"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	addConn.On(p, named{"u", "u"})
	say(t, c, "unread")
	s := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimConn, "u", "u", "*net.UDPConn") })
	s.HasUnclaimed("udp 127.0.0.1:0") // which is the same socket
	closes(p, "u")
	reads(s, "u", "unread")
	serveKey.On(s, "u")
	s.Answers(c)
	closes(s, "u")
	ends(t, c)
}

// After an upgrade that has failed the old process goes on with its
// connection, and the next successor gets it.
func TestConnFailedUpgrade(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			peer := dialled(p, "c", network)
			addConn.On(p, named{"c", "c"})
			p.KillHolding(func(s *proctest.Proc) { finds(s, claimConn, "c", "c", typ) })
			talk(p, "c", peer)
			p.KillHolding(func(s *proctest.Proc) {}) // which does not ask for it
			talk(p, "c", peer)
			closes(p, "c")
			say(t, peer, "unread")
			s := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimConn, "c", "c", typ) })
			reads(s, "c", "unread")
			talk(s, "c", peer)
			closes(s, "c")
			ends(t, peer)
			p.Generation()
		})
	}
}

// A successor that ends within its probation leaves the connection to the old
// process, which has kept it, and to the next.
func TestConnProbation(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}.Probation(time.Minute), proctest.Holding)
	peer := dialled(p, "c", "tcp")
	addConn.On(p, named{"c", "c"})
	openPipe.On(p, "p")
	addFile.On(p, named{"p", "p.r"})
	pair.On(p, named{"d", "d"})
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	finds(s, claimConn, "c", "c", "*net.TCPConn")
	finds(s, pair, "d", "d", "*net.UnixConn")
	s.Resume()
	s.At(proctest.AtServing) // which closes what it has not asked for
	s.HasUnclaimed("file p")
	talk(s, "c", peer)
	s.Kill()
	a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
	talk(p, "c", peer)
	writes(p, "d.down", "to the next")
	writes(p, "p.w", "unread")
	a = p.BeginUpgrade()
	s = a.Successor()
	s.At(proctest.AtNew)
	finds(s, claimConn, "c", "c", "*net.TCPConn")
	finds(s, claimFile, "p", "p", "*os.File")
	finds(s, pair, "d", "d", "*net.UnixConn")
	s.Resume()
	s.At(proctest.AtServing)
	s.Stop() // ends the probation
	a.OK()
	closes(p, "c")
	talk(s, "c", peer)
	reads(s, "p", "unread")
	reads(s, "d.up", "to the next")
}

// Conn takes the copy back in the process that has made it.
func TestConnTakenBack(t *testing.T) {
	t.Parallel()
	for network, typ := range connNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
			peer := dialled(p, "c", network)
			addConn.On(p, named{"c", "c"})
			finds(p, claimConn, "c", "copy", typ)
			findsNothing(p, claimConn, "c")
			talk(p, "c", peer)
			closes(p, "c")
			talk(p, "copy", peer)
			s := p.UpgradeHolding(func(s *proctest.Proc) { findsNothing(s, claimConn, "c") })
			s.HasUnclaimed()
			talk(p, "copy", peer)
			closes(p, "copy")
			ends(t, peer)
		})
	}
}

// One name stands for many, in their order, and every kind has names of its
// own.
func TestConnNames(t *testing.T) {
	t.Parallel()
	odd := "a=b kind=file \x00\n\t" + strings.Repeat("ü", 500)
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	add := func(name, text string) {
		t.Helper()
		streamPair.On(p, "s")
		writes(p, "s.b", text)
		if strings.HasPrefix(text, "file") {
			addFile.On(p, named{name, "s.a"})
		} else {
			connOf.On(p, copyOf{"c", "s.a"})
			addConn.On(p, named{name, "c"})
			closes(p, "c")
		}
		closes(p, "s.a", "s.b")
	}
	add("x", "conn x 0")
	add("x", "file x 0")
	add(odd, "conn o 0")
	add("x", "conn x 1")
	add("x ", "conn _ 0")
	add("x", "file x 1")
	add("x", "conn x 2")
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		take := func(c claim, name, want string) {
			t.Helper()
			if got := c.On(s, named{name, "c"}); got == nothing {
				t.Fatalf("%v of %q has found nothing; want %q", c, name, want)
			}
			reads(s, "c", want)
			closes(s, "c")
		}
		findsNothing(s, claimConn, "X")
		findsNothing(s, claimConn, "")
		findsNothing(s, claimListener, "x")
		findsNothing(s, claimPacketConn, "x")
		take(claimConn, odd, "conn o 0")
		findsNothing(s, claimConn, odd)
		take(claimConn, "x", "conn x 0")
		take(claimConn, "x", "conn x 1")
		take(claimFile, "x", "file x 0")
		take(claimFile, "x", "file x 1")
		take(claimFile, "x", "conn x 2") // a connection can be had as a file
		findsNothing(s, claimFile, "x")
		findsNothing(s, claimConn, "x")
		take(claimConn, "x ", "conn _ 0")
	})
	s.HasUnclaimed()
}

// A notSocket is a net.Conn of a file that is no socket.
type notSocket struct {
	net.Conn
	f *os.File
}

func (c notSocket) SyscallConn() (syscall.RawConn, error) { return c.f.SyscallConn() }
func (c notSocket) Close() error                          { return c.f.Close() }

// makeUnfit makes what cannot be handed on, and a TLS client of the connection
// "tcp".
var makeUnfit = proctest.Define("make unfit things", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	d.Set("tls", net.Conn(tls.Client(proctest.Get[net.Conn](d, "tcp"), &tls.Config{ServerName: "localhost"})))
	p, _ := net.Pipe()
	d.Set("net.Pipe", p)
	f, err := os.Open(os.DevNull)
	d.Set("no socket", notSocket{nil, f})
	d.Set("nil file", (*os.File)(nil))
	return proctest.None{}, err
})

var addNilConn = proctest.Define("AddConn of nil", func(d *proctest.Daemon, name string) (proctest.None, error) {
	return proctest.None{}, d.U.AddConn(name, nil)
})

// What cannot move is refused, and the error says why.
func TestAddRefuses(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	before := p.FDs()
	peer := dialled(p, "tcp", "tcp")
	makeUnfit.On(p)
	refuses := func(c proctest.Call[named, proctest.None], name, key string, target error, says ...string) {
		t.Helper()
		proctest.Want(t, c.Err(p, named{name, key}), target, says...)
	}
	refuses(addConn, "name", "tls", nil, `"name"`, "*tls.Conn", "has no descriptor", "want a connection of TCP, UDP or Unix")
	refuses(addConn, "name", "net.Pipe", nil, `"name"`, "*net.pipe", "has no descriptor")
	proctest.Want(t, addNilConn.Err(p, "name"), nil, `"name"`, "<nil>", "has no descriptor")
	refuses(addConn, "name", "no socket", syscall.ENOTSOCK, `"name"`, "getsockopt")
	refuses(addFile, "name", "nil file", nil, "invalid argument")
	opens(p, "null", os.DevNull)
	long := strings.Repeat("x", 1025)
	refuses(addConn, "", "tcp", nil, "add connection", "name is empty")
	refuses(addConn, long, "tcp", nil, "add connection", "1025 bytes", "1024")
	refuses(addFile, "", "null", nil, "add file", "name is empty")
	refuses(addFile, long, "null", nil, "add file", "1025 bytes", "1024")
	proctest.Want(t, pair.Err(p, named{"", "none"}), nil, "name is empty")
	proctest.Want(t, pair.Err(p, named{long, "none"}), nil, "1025 bytes", "1024")
	talk(p, "tcp", peer)
	closes(p, "tcp", "null")
	ends(t, peer)
	refuses(addConn, "name", "tcp", net.ErrClosed, `"name"`)
	refuses(addFile, "name", "null", os.ErrClosed, `"name"`)
	if os.Getuid() == 0 && runtime.GOOS == "linux" {
		dial.On(p, socketAt{"ip", "ip4:icmp", "127.0.0.1"})
		refuses(addConn, "name", "ip", nil, "*net.IPConn", "a kind that net has no connections for", "AddFile")
		closes(p, "ip")
	}
	if runtime.GOOS == "linux" { // none of these has left a descriptor
		closes(p, "no socket")
		if now := p.FDs(); !slices.Equal(now, before) {
			t.Errorf("descriptors: %q; before: %q", now, before)
		}
	}
	p.UpgradeHolding(func(s *proctest.Proc) {}).HasUnclaimed()
}

// tryAll makes every call that adds or claims, and returns the text of each
// error, which is "" if there is none or if nothing was found.
func tryAll(d *proctest.Daemon) (map[string]string, error) {
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	f, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := make(map[string]string)
	has := func(call string, err error) {
		if m[call] = ""; err != nil && !errors.Is(err, fs.ErrNotExist) {
			m[call] = err.Error()
		}
	}
	has("AddConn", d.U.AddConn("x", c))
	has("AddFile", d.U.AddFile("x", f))
	_, err = d.U.Conn("nothing")
	has("Conn", err)
	_, err = d.U.File("nothing")
	has("File", err)
	_, err = d.U.Listener("nothing")
	has("Listener", err)
	_, err = d.U.PacketConn("nothing")
	has("PacketConn", err)
	_, down, err := d.U.DatagramPair("x")
	has("DatagramPair", err)
	if down != nil {
		down.Close()
	}
	return m, nil
}

var (
	allCalls = proctest.Define("all calls", func(d *proctest.Daemon, _ proctest.None) (map[string]string, error) { return tryAll(d) })
	// failThenAll calls Fail first. The predecessor ends this process soon
	// after.
	failThenAll = proctest.Define("all calls after Fail", func(d *proctest.Daemon, _ proctest.None) (map[string]string, error) {
		_ = d.U.Fail(errors.New("planned"))
		return tryAll(d)
	})
)

// haveFailed fails the test unless each call has returned this error itself.
func haveFailed(t *testing.T, calls map[string]string, want error) {
	t.Helper()
	text := ""
	if want != nil {
		text = want.Error()
	}
	if len(calls) != 7 {
		t.Errorf("%d calls; want 7", len(calls))
	}
	for call, got := range calls {
		if got != text {
			t.Errorf("%s: %q; want %q", call, got, text)
		}
	}
}

// Adding and claiming have the errors of Listen.
func TestAddPhases(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Holding, proctest.Holding.Hold(proctest.AtListened), proctest.Holding)
	check := func(p *proctest.Proc, want error) {
		t.Helper()
		before := p.FDs()
		haveFailed(t, allCalls.On(p), want)
		if want == nil || runtime.GOOS != "linux" {
			return
		}
		if now := p.FDs(); !slices.Equal(now, before) {
			t.Errorf("%v left descriptors behind: %q; before: %q", want, now, before)
		}
	}
	p := c.Launch()
	p.At(proctest.AtNew)
	check(p, nil)
	p.Resume()
	p.At(proctest.AtServing)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	check(p, ecdysis.ErrInProgress)
	finds(s, claimConn, "x", "x", "*net.UDPConn")
	finds(s, claimFile, "x", "x", "*os.File")
	finds(s, pair, "x", "x", "*net.UnixConn")
	s.Resume()
	s.At(proctest.AtListened)
	check(p, ecdysis.ErrInProgress)
	s.Kill()
	a.Fails(ecdysis.StepInit, io.ErrUnexpectedEOF)
	s = p.UpgradeHolding(func(s *proctest.Proc) {})
	s.HasUnclaimed("conn x", "file x", "pair x")
	check(p, ecdysis.ErrUpgraded)
	check(s, nil)
	s.Stop()
	check(s, ecdysis.ErrStopped)
}

// A successor that was given up has the errors of Listen, too.
func TestAddAfterFail(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtNew)
	haveFailed(t, failThenAll.On(s), ecdysis.ErrAborted)
	a.Fails(ecdysis.StepInit, nil)
}

// Prepare may still add.
func TestAddInPrepare(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}.At(proctest.AtPrepare, allCalls.Do()), proctest.Holding)
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		finds(s, claimConn, "x", "c", "*net.UDPConn")
		finds(s, claimFile, "x", "f", "*os.File")
		finds(s, pair, "x", "p", "*net.UnixConn")
	})
	s.HasUnclaimed()
	calls, err := allCalls.At(p, proctest.AtPrepare)
	if err != nil {
		t.Fatal(err)
	}
	haveFailed(t, calls, nil)
}

// Stop closes the copies, and so does what follows a successful upgrade, which
// leaves the old process with the stream to its successor alone.
func TestCopiesAreClosed(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no /proc that tells what a descriptor is", "linux")
	for _, how := range []string{"stop", "partial stop", "upgrade", "unclaimed", "stop before Ready", "stop of a successor"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			first := proctest.Spec{Options: ecdysis.Options{PartialStopSignals: []os.Signal{syscall.SIGUSR2}}}
			at := proctest.AtServing
			if how == "stop before Ready" {
				first, at = proctest.Holding, proctest.AtNew
			}
			p := proctest.New(t, first, proctest.Holding).Launch()
			p.At(at)
			after := fdKinds(p)
			var peers []net.Conn
			for network := range connNetworks() {
				peers = append(peers, dialled(p, "c", network))
				addConn.On(p, named{network, "c"})
				closes(p, "c")
			}
			openPipe.On(p, "pipe")
			addFile.On(p, named{"pipe", "pipe.r"})
			closes(p, "pipe.r")
			pair.On(p, named{"pair", "pair"})
			closes(p, "pair.down")
			listenElsewhere.On(p, socketAt{"ln", "tcp", "127.0.0.1:0"})
			fileOf.On(p, copyOf{"f", "ln"})
			addFile.On(p, named{"socket", "f"})
			closes(p, "ln", "f")
			switch how {
			case "stop", "stop before Ready":
				p.Stop()
			case "partial stop":
				returns := wait.Begin(p)
				p.InWait()
				p.Signal(syscall.SIGUSR2)
				if e, err := returns.Wait(); err != nil || e.Kind != ecdysis.EventPartialStop {
					t.Fatalf("Wait returned %v, %v", e, err)
				}
			case "upgrade":
				s := p.UpgradeHolding(func(s *proctest.Proc) {
					for network := range connNetworks() {
						claimConn.On(s, named{network, network})
					}
					finds(s, claimFile, "pipe", "pipe", "*os.File")
					finds(s, pair, "pair", "pair", "*net.UnixConn")
					finds(s, claimFile, "socket", "socket", "*os.File")
				})
				s.HasUnclaimed()
				for network := range connNetworks() {
					closes(s, network)
				}
				closes(s, "pipe")
				after = append(after, "socket:[N]") // the stream
			case "unclaimed":
				s := p.UpgradeHolding(func(s *proctest.Proc) {})
				if got := len(s.Event(ecdysis.EventReady, 0).Unclaimed); got != len(peers)+3 {
					t.Errorf("%d unclaimed; want %d", got, len(peers)+3)
				}
				after = append(after, "socket:[N]")
			case "stop of a successor": // of what it has and of what it has not asked for
				s := p.UpgradeHolding(func(s *proctest.Proc) {
					for network := range connNetworks() {
						claimConn.On(s, named{network, "c"})
						addConn.On(s, named{network, "c"})
						closes(s, "c")
					}
				})
				s.Stop()
				after = append(after, "socket:[N]")
			}
			for _, peer := range peers {
				ends(t, peer)
			}
			cannotWrite(p, "pipe.w", syscall.EPIPE)
			closes(p, "pipe.w")
			slices.Sort(after)
			if now := fdKinds(p); !slices.Equal(now, after) {
				t.Errorf("descriptors: %q; want %q", now, after)
			}
		})
	}
}

// What nobody has asked for is named and closed.
func TestUnclaimedIsNamed(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, sendingState(proctest.Spec{}, sending{Size: 10}), proctest.Holding)
	peer := dialled(p, "c", "tcp")
	addConn.On(p, named{"x", "c"})
	other := dialled(p, "c2", "tcp")
	addConn.On(p, named{"x", "c2"})
	closes(p, "c", "c2")
	openPipe.On(p, "p")
	addFile.On(p, named{"y", "p.r"})
	closes(p, "p.r")
	pair.On(p, named{"z", "z"})
	at := listenElsewhere.On(p, socketAt{"ln", "tcp", "127.0.0.1:0"})
	fileOf.On(p, copyOf{"f", "ln"})
	addFile.On(p, named{"socket", "f"})
	closes(p, "f", "ln")
	s := p.UpgradeHolding(func(s *proctest.Proc) { finds(s, claimConn, "x", "c", "*net.TCPConn") })
	s.HasUnclaimed("conn x", "file y", "pair z", "tcp "+at, "state")
	if line := s.Event(ecdysis.EventReady, 0).String(); !strings.HasSuffix(line, " unclaimed=conn x,file y,pair z,tcp "+at+",state") {
		t.Errorf("the event's line: %s", line)
	}
	talk(s, "c", peer)
	ends(t, other)
	cannotWrite(p, "p.w", syscall.EPIPE)
	cannotWrite(p, "z.down", nil)
	if _, err := net.Dial("tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the unclaimed listener: %v", err)
	}
	// And nothing of it comes back.
	g := s.UpgradeHolding(func(g *proctest.Proc) {
		for _, name := range []string{"x", "y", "z", "socket"} {
			findsNothing(g, claimConn, name)
			findsNothing(g, claimFile, name)
			findsNothing(g, claimListener, name)
		}
		findsNothing(g, pair, "z")
	})
	g.HasUnclaimed()
}
