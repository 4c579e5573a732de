package udp

import (
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/udpflow"
	"golang.org/x/net/ipv4"
)

// BenchmarkReadBatch measures what a packet costs that is read in batches of
// 32, by golang.org/x/net and by a BatchConn. The two take turns, with packets
// that are in the socket before the clock runs, and the medians are compared.
func BenchmarkReadBatch(b *testing.B) {
	for _, clients := range []int{1, 64} {
		b.Run(fmt.Sprint("clients=", clients), func(b *testing.B) { benchmarkReadBatch(b, clients) })
	}
}

func benchmarkReadBatch(b *testing.B, clients int) {
	const burst = 256
	var opts ecdysis.Options
	udpflow.Setup(&opts)
	u, err := newUpgrader(opts)
	if err != nil {
		b.Fatal(err)
	}
	plain, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer plain.Close()
	own, err := udpflow.ListenPacket(u, "udp4", "127.0.0.1:0", udpflow.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer own.Close()
	turns := []*turn{{name: "x/net", r: ipv4.NewPacketConn(plain), c: plain}, {name: "own", r: udpflow.BatchConn[ipv4.Message]{Conn: own}, c: own}}
	packet := make([]byte, 200)
	for _, t := range turns {
		if err := t.c.SetReadBuffer(1 << 20); err != nil {
			b.Fatal(err)
		}
		for range clients {
			c, err := net.Dial("udp4", t.c.LocalAddr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			t.clients = append(t.clients, c)
		}
		t.ms = make([]ipv4.Message, 32)
		for i := range t.ms {
			t.ms[i].Buffers = [][]byte{make([]byte, 1500)}
		}
	}
	for b.Loop() {
		for _, t := range turns {
			for i := range burst {
				if _, err := t.clients[i%clients].Write(packet); err != nil {
					b.Fatal(err)
				}
			}
			start := time.Now()
			for n := 0; n < burst; {
				k, err := t.r.ReadBatch(t.ms, 0)
				if err != nil {
					b.Fatal(err)
				}
				n += k
			}
			t.took = append(t.took, time.Since(start))
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, t := range turns {
		slices.Sort(t.took)
		b.ReportMetric(t.median()/burst, t.name+"-ns/packet")
	}
	b.ReportMetric(turns[1].median()/turns[0].median(), "own/x/net")
}

type turn struct {
	name string
	r    interface {
		ReadBatch([]ipv4.Message, int) (int, error)
	}
	c interface {
		net.PacketConn
		SetReadBuffer(int) error
	}
	clients []net.Conn
	ms      []ipv4.Message
	took    []time.Duration
}

func (t *turn) median() float64 { return float64(t.took[len(t.took)/2]) }

// newUpgrader returns the one Upgrader of this process.
func newUpgrader(opts ecdysis.Options) (*ecdysis.Upgrader, error) {
	if upgrader != nil {
		return upgrader, nil
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		return nil, err
	}
	upgrader = u
	return u, u.Ready()
}

var upgrader *ecdysis.Upgrader
