package e2e

import (
	"errors"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Sockets that end: a new configuration drops them, the program closes them, or
// the service is stopped.

// What a new configuration drops is closed and named, and its file removed. The
// process that was replaced has its sockets for packets until it closes them,
// and nobody else has them.
func TestDropped(t *testing.T) {
	t.Parallel()
	var spec, keep proctest.Spec
	files := map[string]bool{} // and whether they stay
	spec = spec.And("tcp", "127.0.0.1:0").And("udp", "127.0.0.1:0")
	unclaimed := []string{"tcp 127.0.0.1:0", "udp 127.0.0.1:0"}
	c := proctest.New(t, spec)
	for _, n := range unixNetworks() {
		spec = spec.And(n, "$DIR/drop-"+n).And(n, "$DIR/keep-"+n)
		keep = keep.And(n, "$DIR/keep-"+n)
		unclaimed = append(unclaimed, n+" "+c.Path("drop-"+n))
		files["drop-"+n], files["keep-"+n] = false, true
	}
	c.Specs(spec, keep.Hold(proctest.AtListened))
	p := c.Start()
	addrs := p.Addrs()
	var clients []net.Conn
	for i := range addrs {
		clients = append(clients, p.Dial(i))
	}
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtListened)
	p.Serves() // all of it, as long as the successor is not ready
	s.Resume()
	a.OK()
	s.HasUnclaimed(unclaimed...)
	s.At(proctest.AtServing)
	s.Serves()
	for name, stays := range files {
		if _, err := os.Lstat(c.Path(name)); (err == nil) != stays {
			t.Errorf("the file %s: %v", name, err)
		}
	}
	if conn, err := addrs[0].Dial(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the dropped port of TCP: %v, %v", conn, err)
	}
	for i, a := range addrs {
		if isPackets(a.Network) {
			if err := p.Close(i); err != nil {
				t.Fatal(err)
			}
		}
	}
	if conn, err := net.ListenPacket("udp", addrs[1].Address); err != nil {
		t.Errorf("the dropped port of UDP: %v", err)
	} else {
		conn.Close()
	}
	for i, l := range spec.Listen {
		switch l.Address {
		case "$DIR/drop-unixgram":
			if _, err := clients[i].Write([]byte("x")); !errors.Is(err, proctest.ClosedPeer()) {
				t.Errorf("to the dropped socket: %v", err)
			}
		case "$DIR/keep-unixgram":
			s.Answers(clients[i])
		}
	}
}

// A socket that is closed is not handed on, and its file is removed if it is
// this process's own.
func TestCloseWithdraws(t *testing.T) {
	t.Parallel()
	for _, network := range unixNetworks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			last := proctest.Spec{}.And(network, "$DIR/c").Hold(proctest.AtNew)
			p := proctest.Start(t, proctest.Spec{}.And(network, "$DIR/a").And(network, "$DIR/b").And(network, "$DIR/c"), last)
			c := p.Chain
			if err := p.Close(0); err != nil {
				t.Fatal(err)
			}
			proctest.Want(t, p.Close(0), net.ErrClosed)
			c.HasFiles("b", "c")
			// Another process's file at the path stays.
			if err := os.Remove(c.Path("b")); err != nil {
				t.Fatal(err)
			}
			if network == "unixgram" {
				if err := os.WriteFile(c.Path("b"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			} else {
				other, err := net.Listen(network, c.Path("b"))
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
			}
			if err := p.Close(1); err != nil {
				t.Fatal(err)
			}
			c.HasFiles("b", "c")
			// The file of one that is closed while the successor has its copy stays
			// with that, and is removed if the upgrade fails.
			p.KillHolding(func(*proctest.Proc) {})
			p.ServesAt(p.Addr(2))
			p.KillHolding(func(*proctest.Proc) {
				if err := p.Close(2); err != nil {
					t.Fatal(err)
				}
				c.HasFiles("b", "c")
			})
			c.HasFiles("b")
			// None is left to be handed on.
			c.Specs(proctest.Spec{})
			p.Upgrade().HasUnclaimed()
		})
	}
}

// Nothing refers to a socket that was closed.
func TestClosedIsForgotten(t *testing.T) {
	t.Parallel()
	c, err := proctest.Ours(t).ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forgotten := make(chan struct{})
	runtime.AddCleanup(c.(*ecdysis.UDPConn).UDPConn, func(done chan struct{}) { close(done) }, forgotten)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for limit := time.After(proctest.Patience); ; {
		runtime.GC()
		select {
		case <-forgotten:
			return
		case <-limit:
			t.Fatal("the socket is not collected")
		case <-time.After(time.Millisecond):
		}
	}
}

// takeOne accepts a connection of the i-th socket, or reads a packet.
var takeOne = proctest.Define("take one", func(d *proctest.Daemon, i int) (proctest.None, error) {
	if c, ok := d.Socket(i).(net.PacketConn); ok {
		_, _, err := c.ReadFrom(make([]byte, 10))
		return proctest.None{}, err
	}
	c, err := d.Listener(i).Accept()
	if err == nil {
		c.Close()
	}
	return proctest.None{}, err
})

// Close ends a call that waits for a client, before Ready and after it.
func TestCloseEndsCalls(t *testing.T) {
	t.Parallel()
	spec := proctest.Spec{NoAccept: true}.And("tcp", "127.0.0.1:0").And("udp", "127.0.0.1:0")
	for _, n := range unixNetworks() {
		spec = spec.And(n, "$DIR/"+n)
	}
	for _, point := range []proctest.Point{proctest.AtListened, proctest.AtServing} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			p := proctest.New(t, spec.Hold(point)).Launch()
			p.At(point)
			for i, l := range spec.Listen {
				call := takeOne.Begin(p, i)
				if err := p.Close(i); err != nil {
					t.Fatal(err)
				}
				proctest.Want(t, call.Err(), net.ErrClosed)
				proctest.Want(t, takeOne.Err(p, i), net.ErrClosed)
				if err := p.Close(i); !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s: a second Close: %v", l.Network, err)
				}
			}
			p.Chain.HasFiles()
		})
	}
}

// Stop closes listeners and removes their files, but not what is to be kept,
// which is handed on with the socket. TestPacketStop is about packets.
func TestStopCloses(t *testing.T) {
	t.Parallel()
	networks := []string{"tcp", "unix"}
	if runtime.GOOS != "darwin" {
		networks = append(networks, "unixpacket")
	}
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			address := func(name string) string {
				if network == "tcp" {
					return "127.0.0.1:0"
				}
				return "$DIR/" + name
			}
			spec := proctest.Spec{}.And(network, address("closed")).And(network, address("kept"))
			spec.Listen[1].Config.KeepOnStop = true
			p := proctest.Start(t, spec).Upgrade()
			closed, kept := p.Addr(0), p.Addr(1)
			p.Stop()
			p.AwaitExit()
			gone := func(a proctest.Addr) {
				t.Helper()
				if c, err := a.Dial(); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v: %v, %v", a, c, err)
				}
			}
			gone(closed)
			if network != "tcp" {
				p.Chain.HasFiles("kept")
			}
			p.ServesAt(kept)
			for i := range 2 {
				if err := p.Close(i); err != nil {
					t.Errorf("Close of %d after Stop: %v", i, err)
				}
			}
			gone(kept)
			p.Chain.HasFiles()
		})
	}
}
