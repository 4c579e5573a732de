// Package udp shows that sessions over UDP live through upgrades: those of a
// protocol with a cookie, under load, and those of others' libraries for QUIC,
// DTLS and CoAP, on a *udpflow.Conn.
package udp

import (
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
)

func TestMain(m *testing.M) { proctest.Main(m) }

// setup is planned for AtStart.
var setup = proctest.Define("Setup", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	udpflow.Setup(d.Options)
	return proctest.None{}, nil
})

// listen makes d's socket, or ends d.
func listen(d *proctest.Daemon, config udpflow.Config) *udpflow.Conn {
	c, err := udpflow.ListenPacket(d.U, "udp4", "127.0.0.1:0", config)
	if err != nil {
		d.Fatal(d.U.Fail(err))
	}
	// The system's buffer is not what is tested here.
	if err := c.SetReadBuffer(1 << 20); err != nil {
		d.Fatal(d.U.Fail(err))
	}
	d.Keep(c)
	return c
}

var stats = proctest.Define("Stats", func(d *proctest.Daemon, _ proctest.None) (udpflow.Stats, error) {
	return d.PacketConn(0).(*udpflow.Conn).Stats(), nil
})
