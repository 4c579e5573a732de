package e2e

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Sockets that are not handed on are in a successor's way.

var unregistered = proctest.Define("Unregistered", func(d *proctest.Daemon, _ proctest.None) ([]string, error) { return d.U.Unregistered() })

// registersAll fails the test if p has a socket that it does not hand on.
func registersAll(p *proctest.Proc) {
	p.T.Helper()
	if list := unregistered.On(p); len(list) > 0 {
		p.T.Errorf("process %d has the unregistered sockets %q", p.PID, list)
	}
}

var descriptor = proctest.Define("descriptor", func(d *proctest.Daemon, key string) (n int, err error) {
	err = onFD(d, key, func(fd uintptr) { n = int(fd) })
	return n, err
})

// stray lets p make a socket, and returns what Unregistered is to say of it.
func stray(p *proctest.Proc, s socketAt) string {
	p.T.Helper()
	at := listenElsewhere.On(p, s)
	return fmt.Sprintf("%s %s (descriptor %d)", s.Network, at, descriptor.On(p, s.Key))
}

// What is bound and not handed on is listed, with its descriptor.
func TestUnregistered(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "the others do not tell of every socket what it is", "linux")
	first := proctest.TCP.And("tcp", ":0")
	first.NoAccept = true
	p := proctest.Start(t, first, proctest.Holding)
	registersAll(p)
	// None of these is in a successor's way.
	c, err := p.Addr(0).Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	acceptClient.On(p, "client")
	for network := range connNetworks() {
		dialled(p, network, network)
	}
	streamPair.On(p, "stream")
	datagramPair.On(p, "dgram")
	openPipe.On(p, "pipe")
	bindTCP.On(p, "bound")
	pair.On(p, named{"pair", "pair"})
	ownListener.On(p, socketAt{"u", "unix", p.Chain.Path("u")})
	ownListener.On(p, socketAt{"q", "unixpacket", p.Chain.Path("q")})
	ownPacketConn.On(p, socketAt{"d", "udp", "127.0.0.1:0"})
	ownPacketConn.On(p, socketAt{"g", "unixgram", p.Chain.Path("g")})
	adopts(p, adoptees()["tcp"])
	registersAll(p)
	finds(p, claimListener, "socket", "adopted", "*ecdysis.listener")
	fileOf.On(p, copyOf{"copy", "d"}) // copies of ours
	registersAll(p)
	// And all of these are.
	var want []string
	for _, s := range []socketAt{
		{"made", "tcp", "127.0.0.1:0"}, {"made 1", "tcp", ":0"}, {"made 2", "udp", "127.0.0.1:0"}, {"made 3", "udp", ":0"},
		{"made 4", "unix", p.Chain.Path("U")}, {"made 5", "unixpacket", p.Chain.Path("Q")}, {"made 6", "unixgram", p.Chain.Path("G")},
		{"made 7", "unix", "@unregistered-" + filepath.Base(p.Chain.Dir)},
	} {
		want = append(want, stray(p, s))
	}
	got := unregistered.On(p)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("unregistered: %q\nwant %q", got, want)
	}
	// One that is brought in is no more.
	fileOf.On(p, copyOf{"f", "made"})
	addFile.On(p, named{"now", "f"})
	if n := len(unregistered.On(p)); n != len(want)-1 {
		t.Errorf("%d are unregistered; want %d", n, len(want)-1)
	}
	// One that was taken out is again.
	claimFile.On(p, named{"now", "f2"})
	if n := len(unregistered.On(p)); n != len(want)+2 { // three descriptors of one socket
		t.Errorf("%d are unregistered; want %d", n, len(want)+2)
	}
	// What a successor has inherited and not asked for yet is not.
	closes(p, "f", "f2", "made")
	s := p.UpgradeHolding(registersAll)
	registersAll(s)
}

// An attempt is a call that binds an address, of the package or of net.
type attempt struct {
	Network, Address string
	Ours             bool
}

// failToListen lets a successor find an address in use, and fail for that
// reason.
var failToListen = proctest.Define("fail to listen", func(d *proctest.Daemon, a attempt) (_ proctest.None, err error) {
	switch {
	case a.Ours && a.Network == "udp":
		_, err = d.U.ListenPacket(a.Network, a.Address)
	case a.Ours:
		_, err = d.U.Listen(a.Network, a.Address)
	case a.Network == "udp":
		_, err = net.ListenPacket(a.Network, a.Address)
	default:
		_, err = net.Listen(a.Network, a.Address)
	}
	if !errors.Is(err, syscall.EADDRINUSE) {
		err = fmt.Errorf("not what was planned: %w", err)
	}
	d.Fatal(d.U.Fail(err))
	return proctest.None{}, nil
})

// A successor that finds an address in use learns why through the old one.
func TestUnregisteredIsBlamed(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "the others do not tell of every socket what it is", "linux")
	p := proctest.Start(t, proctest.TCP, proctest.Holding)
	// fails makes an attempt whose successor does f, and returns the error.
	fails := func(f func(s *proctest.Proc)) string {
		t.Helper()
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtNew)
		f(s)
		return a.Fails(ecdysis.StepInit, nil).Error()
	}
	says := func(text string, want ...string) {
		t.Helper()
		proctest.Want(t, errors.New(text), nil, want...)
	}
	saysNothingOf := func(text string, unwanted ...string) {
		t.Helper()
		for _, w := range unwanted {
			if strings.Contains(text, w) {
				t.Errorf("%q says %q", text, w)
			}
		}
	}
	listenFails := func(network, address string, ours bool) func(s *proctest.Proc) {
		return func(s *proctest.Proc) { _ = failToListen.Begin(s, attempt{network, address, ours}) }
	}
	// With nothing unregistered nothing is blamed, whatever the reason.
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	text := fails(listenFails("tcp", p.Addr(0).Address, false))
	says(text, "it says: ", "address already in use")
	saysNothingOf(text, "descriptor")
	listenElsewhere.On(p, socketAt{"autobound", "unix", ""}) // such a name is in nobody's way
	text = fails((*proctest.Proc).Kill)
	says(text, "without a call of Ready or Fail")
	saysNothingOf(text, "descriptor")

	strays := map[string]string{
		"tcp":  stray(p, socketAt{"tcp", "tcp", "127.0.0.1:0"}),
		"udp":  stray(p, socketAt{"udp", "udp", "127.0.0.1:0"}),
		"unix": stray(p, socketAt{"unix", "unix", p.Chain.Path("U")}),
	}
	address := func(network string) string { return strings.Fields(strays[network])[1] }
	for network, named := range strays {
		for _, ours := range []bool{false, true} {
			text := fails(listenFails(network, address(network), ours))
			says(text, "it says: ", "address already in use", "; the cause is what this process has bound and does not hand on: "+named)
			for another, name := range strays {
				if another != network {
					saysNothingOf(text, name)
				}
			}
		}
	}
	says(fails((*proctest.Proc).Kill), "without a call of Ready or Fail", "perhaps because of what this process has bound",
		strays["tcp"], strays["udp"], strays["unix"])
	text = fails(func(s *proctest.Proc) { _ = proctest.CallFail.Begin(s, "told to fail") })
	says(text, "told to fail")
	saysNothingOf(text, "descriptor", "perhaps")
	// An address that somebody else has is no fault of this process.
	text = fails(listenFails("tcp", other.Addr().String(), false))
	says(text, "address already in use")
	saysNothingOf(text, "the cause is", strays["unix"])
	// And a port of one protocol is not that of another.
	if c, err := net.ListenPacket("udp", address("tcp")); err == nil { // it is free
		text := fails(listenFails("udp", address("tcp"), false))
		says(text, "address already in use")
		saysNothingOf(text, "the cause is", strays["tcp"])
		c.Close()
	}
	p.Serves()
	closes(p, "tcp", "udp", "unix")
	p.Chain.Specs(proctest.TCP)
	p.Upgrade().Serves()
}
