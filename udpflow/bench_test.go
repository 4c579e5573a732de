package udpflow

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// BenchmarkRead measures what a packet of one's own costs, and one that is
// forwarded and read in the older process, against net's own read. The three
// take turns, with packets that are in the socket before the clock runs, and
// the medians of all turns are compared, because other programs disturb some.
func BenchmarkRead(b *testing.B) {
	const burst = 256
	packet := make([]byte, 200)
	buf := make([]byte, 1500)
	plain, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer plain.Close()
	alone, c := listen(b, "udp", "127.0.0.1:0", Config{}), listen(b, "udp", "127.0.0.1:0", Config{})
	older := addOlder(b, c, 1)
	for _, x := range []interface{ SetReadBuffer(int) error }{plain, alone, c} {
		if err := x.SetReadBuffer(1 << 20); err != nil {
			b.Fatal(err)
		}
	}
	send := func(client *net.UDPConn, n int) {
		for range n {
			if _, err := client.Write(packet); err != nil {
				b.Fatal(err)
			}
		}
	}
	read := func(r interface {
		ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error)
	}, n int) {
		for range n {
			if _, _, err := r.ReadFromUDPAddrPort(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	toPlain, err := net.DialUDP("udp", nil, plain.LocalAddr().(*net.UDPAddr))
	if err != nil {
		b.Fatal(err)
	}
	defer toPlain.Close()
	toAlone, own, others := dial(b, alone), dial(b, c), dial(b, c)
	older.Claim(keyOf(others))
	turns := []struct {
		name       string
		send, read func()
		took       []time.Duration
	}{
		{"net", func() { send(toPlain, burst) }, func() { read(plain, burst) }, nil},
		{"alone", func() { send(toAlone, burst) }, func() { read(alone, burst) }, nil},
		{"own", func() { send(own, burst) }, func() { read(c, burst) }, nil},
		// One of its own ends the read that forwards the others.
		{"forwarded", func() { send(others, burst); send(own, 1) }, func() { read(c, 1); read(older, burst) }, nil},
	}
	for b.Loop() {
		for i := range turns {
			t := &turns[i]
			t.send()
			start := time.Now()
			t.read()
			t.took = append(t.took, time.Since(start))
		}
	}
	b.ReportMetric(0, "ns/op")
	var floor float64
	for _, t := range turns {
		slices.Sort(t.took)
		ns := float64(t.took[len(t.took)/2].Nanoseconds()) / burst
		b.ReportMetric(ns, t.name+"-ns/packet")
		if floor == 0 {
			floor = ns
		} else {
			b.ReportMetric(ns/floor, t.name+"/net")
		}
	}
}
