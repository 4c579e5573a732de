package e2e

import (
	"slices"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Several sockets on one address, with ListenConfig.ReusePort.

// listenOften makes four sockets of this network on one port, which is asked
// for by number from the second on.
var listenOften = proctest.Define("listen often", func(d *proctest.Daemon, network string) (proctest.None, error) {
	address := "127.0.0.1:0"
	for range 4 {
		if _, err := d.Listen(proctest.Listen{Network: network, Address: address, Config: ecdysis.ListenConfig{ReusePort: true}}); err != nil {
			return proctest.None{}, err
		}
		if isPackets(network) {
			address = d.PacketConn(0).LocalAddr().String()
		} else {
			address = d.Listener(0).Addr().String()
		}
	}
	return proctest.None{}, nil
})

// They are handed on, in order, and no client of any of them sees it.
func TestReusePort(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Spec{}.At(proctest.AtListened, listenOften.Do(network)))
			if err := listenOften.ErrAt(p, proctest.AtListened); err != nil {
				t.Fatal(err)
			}
			a := p.Addr(0)
			var spec proctest.Spec
			for range 4 {
				spec.Listen = append(spec.Listen, proctest.Listen{Network: network, Address: a.Address, Config: ecdysis.ListenConfig{ReusePort: true}})
			}
			p.Chain.Specs(spec)
			inodes := slices.Sorted(slices.Values(p.Inodes()))
			p = p.Upgrade() // those that were asked for by this address are the first
			p.HasUnclaimed()
			ordered := p.Inodes()
			if got := slices.Sorted(slices.Values(ordered)); !slices.Equal(got, inodes) {
				t.Errorf("sockets %v, handed on as %v", inodes, got)
			}
			l := proctest.StartLoad(t, proctest.Clients{N: 2}, a)
			for range 3 {
				l.More(50) // each goes to the socket that its address decides
				s := p.Upgrade()
				s.HasUnclaimed()
				s.Inherits(p)
				if got := s.Inodes(); !slices.Equal(got, ordered) {
					t.Errorf("sockets %v, handed on as %v", ordered, got)
				}
				p = s
			}
			l.More(50)
			l.Check()
			p.Serves()
		})
	}
}
