// Package xnet shows that what reads packets its own way does so through a
// *ecdysis.UDPConn: golang.org/x/net, batch by batch, and quic-go.
package xnet

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/quic-go/quic-go"
	"golang.org/x/net/ipv4"
)

const (
	// addressVar tells a successor what to listen to: a socket for batches,
	// one for QUIC.
	addressVar = "ECDYSIS_TEST_ADDRESSES"
	ownVar     = "ECDYSIS_TEST_OWN"
	patience   = 20 * time.Second
)

func TestMain(m *testing.M) {
	if addresses, ok := os.LookupEnv(addressVar); ok {
		if err := successor(strings.Fields(addresses)); err != nil {
			fmt.Fprintln(os.Stderr, "successor:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// listen returns u's sockets.
func listen(u *ecdysis.Upgrader, addresses []string) (list []*ecdysis.UDPConn, err error) {
	for _, a := range addresses {
		c, err := u.ListenPacket("udp", a)
		if err != nil {
			return nil, err
		}
		list = append(list, c.(*ecdysis.UDPConn))
	}
	return list, nil
}

// batches is a socket as golang.org/x/net reads it.
type batches struct {
	*ipv4.PacketConn
	in []ipv4.Message
}

func newBatches(c net.PacketConn) (*batches, error) {
	b := &batches{PacketConn: ipv4.NewPacketConn(c), in: make([]ipv4.Message, 8)}
	return b, b.SetControlMessage(ipv4.FlagDst|ipv4.FlagInterface, true)
}

// read returns the next batch.
func (b *batches) read() ([]ipv4.Message, error) {
	for i := range b.in {
		b.in[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 100)}, OOB: ipv4.NewControlMessage(ipv4.FlagDst | ipv4.FlagInterface)}
	}
	n, err := b.ReadBatch(b.in, 0)
	return b.in[:max(n, 0)], err
}

// answer answers each of a batch, and says who does.
func (b *batches) answer(who string, in []ipv4.Message) error {
	var out []ipv4.Message
	for _, m := range in {
		var cm ipv4.ControlMessage
		if err := cm.Parse(m.OOB[:m.NN]); err != nil {
			return err
		}
		text := fmt.Sprintf("%s: %s to %v on an interface: %v", who, m.Buffers[0][:m.N], cm.Dst, cm.IfIndex > 0)
		out = append(out, ipv4.Message{Buffers: [][]byte{[]byte(text)}, Addr: m.Addr})
	}
	for len(out) > 0 {
		n, err := b.WriteBatch(out, 0)
		if err != nil {
			return err
		}
		out = out[n:]
	}
	return nil
}

// waits returns when a goroutine that has called what waits for the package.
// done, if not nil, is closed when the call returns.
func waits(what string, done <-chan struct{}) error {
	limit := time.After(patience)
	for stacks := make([]byte, 1<<20); ; time.Sleep(time.Millisecond) {
		for _, g := range bytes.Split(stacks[:runtime.Stack(stacks, true)], []byte("\n\n")) {
			if bytes.Contains(g, []byte(what+"(")) && bytes.Contains(g, []byte("ecdysis.(*gate).sleep(")) {
				return nil
			}
		}
		select {
		case <-done:
			return errors.New(what + " has not waited")
		case <-limit:
			return errors.New(what + " does not wait")
		default:
		}
	}
}

func tlsConfig() (*tls.Config, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(nil, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:         []string{"echo"},
		InsecureSkipVerify: true,
	}, nil
}

// serveQUIC answers what comes on each stream, and says who does. It returns
// the error by which accepting ends.
func serveQUIC(who string, ln *quic.Listener) error {
	for {
		c, err := ln.Accept(context.Background())
		if err != nil {
			return err
		}
		go func() {
			for {
				s, err := c.AcceptStream(context.Background())
				if err != nil {
					return
				}
				text, err := io.ReadAll(s)
				if err == nil {
					_, _ = fmt.Fprintf(s, "%s: %s", who, text)
				}
				s.Close()
			}
		}()
	}
}

// askQUIC returns what a server says to a new client.
func askQUIC(address, text string) (string, error) {
	conf, err := tlsConfig()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := quic.DialAddr(ctx, address, conf, nil)
	if err != nil {
		return "", err
	}
	defer c.CloseWithError(0, "")
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return "", err
	}
	if _, err := io.WriteString(s, text); err != nil {
		return "", err
	}
	if err := s.Close(); err != nil {
		return "", err
	}
	if err := s.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	b, err := io.ReadAll(s)
	return string(b), err
}

// successor serves until the test is over. It fails the upgrade if reading does
// not wait.
func successor(addresses []string) error {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		return err
	}
	list, err := listen(u, addresses)
	if err != nil {
		return u.Fail(err)
	}
	conf, err := tlsConfig()
	if err != nil {
		return u.Fail(err)
	}
	b, err := newBatches(list[0])
	if err != nil {
		return u.Fail(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			in, err := b.read()
			if err == nil {
				err = b.answer("new", in)
			}
			if err != nil {
				return
			}
		}
	}()
	if err := waits("ipv4.(*payloadHandler).ReadBatch", ended); err != nil {
		return u.Fail(err)
	}
	ln, err := (&quic.Transport{Conn: list[1]}).Listen(conf, nil)
	if err != nil {
		return u.Fail(err)
	}
	go serveQUIC("new", ln)
	if err := waits("quic-go.(*Transport).listen", nil); err != nil {
		return u.Fail(err)
	}
	if err := u.Ready(); err != nil {
		return err
	}
	return u.WaitForParent(context.Background())
}

// A process has one Upgrader: this is one test, in a process of its own.
func TestInterop(t *testing.T) {
	if os.Getenv(ownVar) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestInterop$", "-test.v")
		cmd.Env = append(os.Environ(), ownVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	var addresses []string
	u, err := ecdysis.New(ecdysis.Options{Prepare: func(c *ecdysis.Command) error {
		c.Env = append(c.Env, addressVar+"="+strings.Join(addresses, " "))
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	list, err := listen(u, []string{"127.0.0.1:0", "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		addresses = append(addresses, c.LocalAddr().String())
	}

	// Batches wait for Ready.
	b, err := newBatches(list[0])
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("udp", addresses[0])
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	say := func(text string) {
		t.Helper()
		if _, err := io.WriteString(client, text); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(want string) {
		t.Helper()
		got := make([]byte, 200)
		n, err := client.Read(got)
		if err != nil || string(got[:n]) != want {
			t.Fatalf("the client got %q, %v; want %q", got[:n], err, want)
		}
	}
	words := []string{"one", "two", "three"}
	for _, text := range words {
		say(text)
	}
	var in []ipv4.Message
	var rerr error
	begin := func() (done chan struct{}) {
		done = make(chan struct{})
		go func() {
			defer close(done)
			in, rerr = b.read()
		}()
		return done
	}
	done := begin()
	if err := waits("ipv4.(*payloadHandler).ReadBatch", done); err != nil {
		t.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		t.Fatal(err)
	}
	for got := 0; got < len(words); {
		<-done
		if rerr != nil {
			t.Fatal(rerr)
		}
		if runtime.GOOS == "linux" && len(in) != len(words) {
			t.Errorf("a batch of %d; want %d", len(in), len(words))
		}
		got += len(in)
		if err := b.answer("old", in); err != nil {
			t.Fatal(err)
		}
		if got < len(words) {
			done = begin()
		}
	}
	for _, text := range words {
		hear("old: " + text + " to 127.0.0.1 on an interface: true")
	}

	// QUIC, by messages with control data.
	if _, ok := net.PacketConn(list[1]).(quic.OOBCapablePacketConn); !ok {
		t.Errorf("%T is not what quic-go takes for a socket with control messages", list[1])
	}
	conf, err := tlsConfig()
	if err != nil {
		t.Fatal(err)
	}
	transport := &quic.Transport{Conn: list[1]}
	ln, err := transport.Listen(conf, nil)
	if err != nil {
		t.Fatal(err)
	}
	var accepting sync.WaitGroup
	var aerr error
	accepting.Go(func() { aerr = serveQUIC("old", ln) })
	if got, err := askQUIC(addresses[1], "hello"); err != nil || got != "old: hello" {
		t.Fatalf("over QUIC: %q, %v", got, err)
	}

	// The successor takes over. This process may still answer.
	say("held")
	if in, rerr = b.read(); rerr != nil {
		t.Fatal(rerr)
	}
	held := []ipv4.Message{in[0]}
	done = begin()
	if err := u.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if err := b.answer("old", held); err != nil {
		t.Fatal(err)
	}
	hear("old: held to 127.0.0.1 on an interface: true")
	say("four")
	hear("new: four to 127.0.0.1 on an interface: true")

	if got, err := askQUIC(addresses[1], "hello"); err != nil || got != "new: hello" {
		t.Errorf("over QUIC, from the successor: %q, %v", got, err)
	}

	// Reading ends when this process closes the sockets.
	select {
	case <-done:
		t.Errorf("ReadBatch of a process that was replaced: %v; want that it waits", rerr)
	default:
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	for _, c := range list {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	<-done
	if !errors.Is(rerr, net.ErrClosed) {
		t.Errorf("ReadBatch of a closed socket: %v; want net.ErrClosed", rerr)
	}
	accepting.Wait()
	if !errors.Is(aerr, quic.ErrTransportClosed) {
		t.Errorf("quic-go's Accept after Transport.Close: %v; want ErrTransportClosed", aerr)
	}
	if got, err := askQUIC(addresses[1], "again"); err != nil || got != "new: again" {
		t.Errorf("over QUIC, when the old process has closed: %q, %v", got, err)
	}
}
