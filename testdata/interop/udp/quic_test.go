package udp

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
	"github.com/quic-go/quic-go"
	"golang.org/x/net/ipv4"
)

// idLen is the length of the connection IDs that a server chooses. Its first
// byte is the generation. A client's own, by which it finds a server at first,
// have at least eight bytes (RFC 9000, section 7.2).
const idLen = 7

// quicFlows tells the packets of QUIC apart (RFC 8999).
var quicFlows = udpflow.Config{
	Generation: func(b []byte) (g byte, ok bool) {
		if len(b) > idLen && b[0]&0x80 == 0 { // a short header
			return b[1], true
		}
		if id := longID(b); len(id) == idLen {
			return id[0], true
		}
		return 0, false
	},
	Key: func(b []byte, _ netip.AddrPort) []byte { return longID(b) },
}

// longID returns the destination's connection ID of a long header; nil if there
// is none.
func longID(b []byte) []byte {
	if len(b) < 6 || b[0]&0x80 == 0 || len(b) < 6+int(b[5]) {
		return nil
	}
	return b[6 : 6+int(b[5])]
}

// An idGenerator makes connection IDs that name the generation.
type idGenerator byte

func (g idGenerator) GenerateConnectionID() (quic.ConnectionID, error) {
	b := make([]byte, idLen)
	_, err := rand.Read(b)
	b[0] = byte(g)
	return quic.ConnectionIDFromBytes(b), err
}

func (idGenerator) ConnectionIDLen() int { return idLen }

func tlsConfig() *tls.Config {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(nil, cert, cert, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return &tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:         []string{"echo"},
		InsecureSkipVerify: true,
	}
}

// serveQUIC is planned for AtNew. Each line of a stream is answered by the
// process ID and the line.
var serveQUIC = proctest.Define("serve QUIC", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	c := listen(d, quicFlows)
	tr := &quic.Transport{Conn: udpflow.BatchConn[ipv4.Message]{Conn: c}, ConnectionIDGenerator: idGenerator(d.U.Generation())}
	ln, err := tr.Listen(tlsConfig(), nil)
	if err != nil {
		d.Fatal(d.U.Fail(err))
	}
	go func() {
		for {
			conn, err := ln.Accept(context.Background())
			if err != nil {
				d.Fatal(err)
			}
			go func() {
				for {
					s, err := conn.AcceptStream(context.Background())
					if err != nil {
						return
					}
					go echo(s)
				}
			}()
		}
	}()
	return proctest.None{}, nil
})

// echo answers each line by the process ID and the line.
func echo(s io.ReadWriter) {
	for r := bufio.NewReader(s); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(s, "%d %s", os.Getpid(), line); err != nil {
			return
		}
	}
}

// A talk is a connection on which a client says a line after the other.
type talk struct {
	pid  int // who has answered the first line
	said atomic.Int64
	err  error // by which it has ended
}

// next says a line, and fails unless it is answered by the process that
// answered the first.
func (k *talk) next(w io.Writer, r *bufio.Reader) error {
	n := k.said.Load()
	if _, err := fmt.Fprintf(w, "line %d\n", n); err != nil {
		return err
	}
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	var pid int
	var got int64
	if _, err := fmt.Sscanf(line, "%d line %d\n", &pid, &got); err != nil || got != n {
		return fmt.Errorf("the answer to line %d is %q, %v", n, line, err)
	}
	if k.pid == 0 {
		k.pid = pid
	}
	if pid != k.pid {
		return fmt.Errorf("process %d answers line %d; process %d answered the first", pid, n, k.pid)
	}
	k.said.Add(1)
	return nil
}

// A chatter keeps talks going until it ends.
type chatter struct {
	t     testing.TB
	stop  atomic.Bool
	wg    sync.WaitGroup
	talks []*talk
}

// begin begins a talk by a connection that is there.
func (ch *chatter) begin(c io.ReadWriter) *talk {
	ch.t.Helper()
	k := &talk{}
	r := bufio.NewReader(c)
	if err := k.next(c, r); err != nil {
		ch.t.Fatal(err)
	}
	ch.talks = append(ch.talks, k)
	ch.wg.Go(func() {
		for k.err == nil && !ch.stop.Load() {
			k.err = k.next(c, r)
			time.Sleep(5 * time.Millisecond) // the processor is not what is tested
		}
	})
	return k
}

// more returns when n more lines of each talk were answered.
func (ch *chatter) more(n int64) {
	ch.t.Helper()
	want := make([]int64, len(ch.talks))
	for i, k := range ch.talks {
		want[i] = k.said.Load() + n
	}
	limit := time.Now().Add(proctest.Patience)
	for i, k := range ch.talks {
		for ; k.said.Load() < want[i]; time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				ch.end()
				ch.t.Fatalf("connection %d, to process %d: %d lines were answered and no more: %v", i, k.pid, k.said.Load(), k.err)
			}
		}
	}
}

func (ch *chatter) end() {
	ch.stop.Store(true)
	ch.wg.Wait()
}

// check ends the talks, which must all be alive.
func (ch *chatter) check() {
	ch.t.Helper()
	ch.end()
	lines, alive := int64(0), 0
	for i, k := range ch.talks {
		lines += k.said.Load()
		if k.err != nil {
			ch.t.Errorf("connection %d, to process %d, has ended after %d lines: %v", i, k.pid, k.said.Load(), k.err)
			continue
		}
		alive++
	}
	ch.t.Logf("%d of %d connections are alive, after %d lines", alive, len(ch.talks), lines)
}

// Connections of QUIC live through upgrades and migrate, and new ones go to the
// new process, also from a port that has older ones.
func TestQUIC(t *testing.T) {
	spec := proctest.Spec{NoAccept: true}.At(proctest.AtStart, setup.Do()).At(proctest.AtNew, serveQUIC.Do())
	p := proctest.Start(t, spec)
	to, err := net.ResolveUDPAddr("udp", p.Addr(0).Address)
	if err != nil {
		t.Fatal(err)
	}
	transport := func() *quic.Transport {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		tr := &quic.Transport{Conn: c}
		t.Cleanup(func() { tr.Close(); c.Close() })
		return tr
	}
	ch := &chatter{t: t}
	defer ch.end()
	var conns []*quic.Conn
	ctx, cancel := context.WithTimeout(context.Background(), 2*proctest.Patience)
	defer cancel()
	dial := func(tr *quic.Transport) *talk {
		t.Helper()
		c, err := tr.Dial(ctx, to, tlsConfig(), &quic.Config{MaxIdleTimeout: proctest.Patience})
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.OpenStreamSync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		return ch.begin(s)
	}
	shared := transport()
	for i := range 40 {
		tr := shared
		if i%2 == 0 {
			tr = transport()
		}
		dial(tr)
	}
	migrated := 0
	for range 5 {
		ch.more(5)
		p = p.Upgrade()
		for range 5 {
			for _, tr := range []*quic.Transport{shared, transport()} {
				if k := dial(tr); k.pid != p.PID {
					t.Errorf("process %d answers a new connection; want %d", k.pid, p.PID)
				}
			}
		}
		// One of each age goes on from another address.
		for i := migrated; i < len(conns); i += 20 {
			path, err := conns[i].AddPath(transport())
			if err == nil {
				err = path.Probe(ctx)
			}
			if err == nil {
				err = path.Switch()
			}
			if err != nil {
				t.Errorf("connection %d, to process %d, does not migrate: %v", i, ch.talks[i].pid, err)
			}
		}
		migrated++
	}
	ch.more(20)
	ch.check()
	s := stats.On(p)
	if s.Forwarded == 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}
