// Quicd sends back what its clients send over QUIC. It can be replaced by a new
// version of itself, and no connection is ended.
//
//	quicd -listen 127.0.0.1:4433
//
// SIGHUP starts the program again, from the file that is at its path by then.
// Connections stay with their process, which exits when they have ended. New
// connections go to the new process. SIGTERM and SIGINT stop it.
package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/udpflow"
	"github.com/quic-go/quic-go"
	"golang.org/x/net/ipv4"
)

var address = flag.String("listen", "127.0.0.1:4433", "UDP `address` to listen on")

func main() {
	flag.Parse()
	log.SetPrefix(fmt.Sprintf("quicd[%d] ", os.Getpid()))
	if err := serve(); err != nil {
		log.Fatal(err)
	}
}

// idLen is the length of this server's connection IDs. Their first byte is the
// generation. The ID with which a client first finds a server is the client's own,
// and has eight bytes or more.
const idLen = 7

// flows says which process a packet is for (RFC 8999).
var flows = udpflow.Config{
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

// longID returns the destination's connection ID in a long header, or nil if there
// is none.
func longID(b []byte) []byte {
	if len(b) < 6 || b[0]&0x80 == 0 || len(b) < 6+int(b[5]) {
		return nil
	}
	return b[6 : 6+int(b[5])]
}

// ids makes connection IDs that name the generation.
type ids byte

func (g ids) ConnectionIDLen() int { return idLen }

func (g ids) GenerateConnectionID() (quic.ConnectionID, error) {
	b := make([]byte, idLen)
	_, err := rand.Read(b)
	b[0] = byte(g)
	return quic.ConnectionIDFromBytes(b), err
}

// secrets are what all generations must share: the keys of stateless resets,
// tokens and session tickets, and the server's identity.
type secrets struct{ reset, token, ticket, identity [32]byte }

func (s *secrets) parts() [][]byte {
	return [][]byte{s.reset[:], s.token[:], s.ticket[:], s.identity[:]}
}

func (s *secrets) send(w io.Writer) (err error) {
	for _, p := range s.parts() {
		if _, werr := w.Write(p); werr != nil {
			err = werr
		}
	}
	return err
}

// inherit reads the secrets that the predecessor has sent. The first process makes
// them.
func (s *secrets) inherit(u *ecdysis.Upgrader) error {
	from := u.State()
	if !u.HasParent() {
		from = rand.Reader
	}
	for _, p := range s.parts() {
		if _, err := io.ReadFull(from, p); err != nil {
			return fmt.Errorf("secrets: %w", err)
		}
	}
	return nil
}

func (s *secrets) tls() (*tls.Config, error) {
	key := ed25519.NewKeyFromSeed(s.identity[:])
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(nil, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"echo"}}
	c.SetSessionTicketKeys([][32]byte{s.ticket})
	return c, nil
}

func serve() error {
	var s secrets
	opts := ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		SendState:      s.send,
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	udpflow.Setup(&opts)
	u, err := ecdysis.New(opts)
	if err != nil {
		return err
	}
	if err := s.inherit(u); err != nil {
		return u.Fail(err)
	}
	conf, err := s.tls()
	if err != nil {
		return u.Fail(err)
	}
	conn, err := udpflow.ListenPacket(u, "udp", *address, flows)
	if err != nil {
		return u.Fail(err)
	}
	tr := &quic.Transport{
		Conn:                  udpflow.BatchConn[ipv4.Message]{Conn: conn},
		ConnectionIDGenerator: ids(u.Generation()),
		StatelessResetKey:     (*quic.StatelessResetKey)(&s.reset),
		TokenGeneratorKey:     (*quic.TokenGeneratorKey)(&s.token),
	}
	ln, err := tr.Listen(conf, nil)
	if err != nil {
		return u.Fail(err)
	}
	var conns sync.WaitGroup
	go func() {
		for {
			c, err := ln.Accept(context.Background())
			if err != nil {
				return
			}
			conns.Go(func() { echo(c) })
		}
	}()
	if err := u.Ready(); err != nil {
		return err
	}
	if e := u.Wait(); e.Kind == ecdysis.EventUpgraded {
		conns.Wait() // new connections are the successor's
	}
	return errors.Join(ln.Close(), tr.Close(), conn.Close())
}

// echo serves a connection until it ends.
func echo(c *quic.Conn) {
	for {
		s, err := c.AcceptStream(context.Background())
		if err != nil {
			return
		}
		go func() {
			defer s.Close()
			for lines := bufio.NewScanner(s); lines.Scan(); {
				if _, err := fmt.Fprintf(s, "%d: %s\n", os.Getpid(), lines.Text()); err != nil {
					return
				}
			}
		}()
	}
}
