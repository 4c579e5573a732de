package udpflow

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

// testUpgrader returns the one Upgrader of this process. It is ready.
var testUpgrader = sync.OnceValues(func() (*ecdysis.Upgrader, error) {
	var opts ecdysis.Options
	Setup(&opts)
	u, err := ecdysis.New(opts)
	if err != nil {
		return nil, err
	}
	return u, u.Ready()
})

func listen(t testing.TB, network, address string, config Config) *Conn {
	t.Helper()
	u, err := testUpgrader()
	if err != nil {
		t.Fatal(err)
	}
	c, err := ListenPacket(u, network, address, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// addOlder returns a Conn that c's group takes for the socket of an older process.
// Each call adds one that is a generation older. The Conn reads from its inbox.
func addOlder(t testing.TB, c *Conn, back int) *Conn {
	t.Helper()
	owner, err := c.g.table.newOwner()
	if err != nil {
		t.Fatal(err)
	}
	fds, err := inboxPair(c.config.Buffer)
	if err != nil {
		t.Fatal(err)
	}
	r, w := os.NewFile(uintptr(fds[0]), "inbox"), os.NewFile(uintptr(fds[1]), "inbox")
	p := &peer{owner: owner, generation: c.self.generation - back, member: c.self.member, inbox: w}
	if p.raw, err = w.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	older := &Conn{UDPConn: c.UDPConn, config: c.config, g: c.g, self: p, raw: c.raw, inbox: r, idle: c.idle, byAddress: c.byAddress, done: make(chan struct{})}
	if older.inboxRaw, err = r.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	older.source.Store(fromInbox)
	c.g.peers.Store(newPeers(append(slices.Clone(c.g.peers.Load().list), p)))
	t.Cleanup(func() { r.Close(); w.Close() })
	return older
}

func dial(t testing.TB, c *Conn) *net.UDPConn {
	t.Helper()
	client, err := net.DialUDP("udp", nil, c.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func addrOf(c net.Conn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func keyOf(c net.Conn) []byte {
	b, _ := addrOf(c).MarshalBinary()
	return b
}

// recordBytes returns the record of a message.
func recordBytes(m *message) []byte {
	var h record
	h.encode(m)
	return bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&h)), recordSize))
}
