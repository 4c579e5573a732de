package udpflow

import (
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// BenchmarkRead measures a packet of the process's own flow, and a packet that is
// forwarded and read in the older process, against net's own read. In batches of
// 32 it measures them against what golang.org/x/net does, which is one recvmmsg(2)
// and an address for each packet. All take turns, with packets that are in the
// socket before the clock runs. The medians of all turns are compared, because
// other programs disturb some turns.
func BenchmarkRead(b *testing.B) {
	const burst = 256
	packet, buf := make([]byte, 200), make([]byte, 1500)
	plain, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer plain.Close()
	c := listen(b, "udp", "127.0.0.1:0", Config{})
	older := addOlder(b, c, 1)
	for _, x := range []interface{ SetReadBuffer(int) error }{plain, c} {
		if err := x.SetReadBuffer(1 << 20); err != nil {
			b.Fatal(err)
		}
	}
	dialTo := func(a net.Addr) net.Conn {
		client, err := net.Dial("udp", a.String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { client.Close() })
		return client
	}
	toPlain, own, others := dialTo(plain.LocalAddr()), dialTo(c.LocalAddr()), dialTo(c.LocalAddr())
	older.Claim(keyOf(others))
	send := func(client net.Conn, n int) {
		for range n {
			if _, err := client.Write(packet); err != nil {
				b.Fatal(err)
			}
		}
	}
	single := func(r udpConn, n int) {
		for range n {
			if _, _, err := r.ReadFromUDPAddrPort(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	ms := make([]xnetMessage, 32)
	for i := range ms {
		ms[i].Buffers = [][]byte{make([]byte, 1500)}
	}
	batches := func(c *Conn, n int) {
		for n > 0 {
			k, err := BatchConn[xnetMessage]{c}.ReadBatch(ms, 0)
			if err != nil {
				b.Fatal(err)
			}
			n -= k
		}
	}
	plainRaw, err := plain.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	plainBatches := func(n int) {
		r := newReader(len(ms))
		defer r.free()
		for i := range ms {
			r.msgs[i].bufs = ms[i].Buffers
		}
		var k int
		var rerr error
		f := func(fd uintptr) bool { k, rerr = r.recv(int(fd)); return rerr != unix.EAGAIN }
		for n > 0 {
			if err := plainRaw.Read(f); err != nil || rerr != nil {
				b.Fatal(err, rerr)
			}
			for i := range k {
				ms[i].Addr = net.UDPAddrFromAddrPort(r.msgs[i].from)
			}
			n -= k
		}
	}

	type turn struct {
		name       string
		send, read func()
		took       []time.Duration
	}
	// A packet of c's own ends the read that forwards the others.
	toPlainAll, toOwn, toOthers := func() { send(toPlain, burst) }, func() { send(own, burst) }, func() { send(others, burst); send(own, 1) }
	turns := []*turn{
		{name: "net", send: toPlainAll, read: func() { single(plain, burst) }},
		{name: "own", send: toOwn, read: func() { single(c, burst) }},
		{name: "forwarded", send: toOthers, read: func() { single(c, 1); single(older, burst) }},
		{name: "batch", send: toPlainAll, read: func() { plainBatches(burst) }},
		{name: "own-batch", send: toOwn, read: func() { batches(c, burst) }},
		{name: "forwarded-batch", send: toOthers, read: func() { batches(c, 1); batches(older, burst) }},
	}
	for b.Loop() {
		for range 20 {
			for _, t := range turns {
				t.send()
				start := time.Now()
				t.read()
				t.took = append(t.took, time.Since(start))
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	bounds := map[string]float64{"own": 1.06, "own-batch": 1.03, "forwarded": 4, "forwarded-batch": 2.5}
	ns := make([]float64, len(turns))
	for i, t := range turns {
		slices.Sort(t.took)
		ns[i] = float64(t.took[len(t.took)/2].Nanoseconds()) / burst
		if floor := i - i%3; i != floor {
			proctest.Ratio(b, ns[i]/ns[floor], bounds[t.name], t.name+"/"+turns[floor].name)
		} else {
			b.ReportMetric(ns[i], t.name+"-ns/packet")
		}
	}
}
