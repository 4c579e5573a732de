package udpflow_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
)

// address is where the example listens.
var address = ":5684"

// A server whose sessions stay with the process in which they began. As a program
// of its own, Example is main.
func Example() {
	opts := ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	udpflow.Setup(&opts) // before New
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := udpflow.ListenPacket(u, "udp", address, udpflow.Config{})
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", conn.LocalAddr())
	go serve(conn, u.Generation()) // ReadFromUDPAddrPort, WriteToUDPAddrPort, as with net
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	if e := u.Wait(); e.Kind == ecdysis.EventUpgraded {
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		_ = conn.Drained(ctx) // this process goes on with the sessions that it has
		cancel()
	}
	conn.Close()
}

// serve answers each client with the generation that the client belongs to.
func serve(conn *udpflow.Conn, generation int) {
	buf := make([]byte, 64<<10)
	for {
		n, client, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		_, _ = conn.WriteToUDPAddrPort(fmt.Appendf(nil, "generation %d: %s", generation, buf[:n]), client)
	}
}

var exampleRole = proctest.DefineRole("example", func() {
	address = "127.0.0.1:0"
	Example()
})

// A client keeps its process over two upgrades. A new client gets the newest
// process.
func TestExample(t *testing.T) {
	t.Parallel()
	p := proctest.Run(t, exampleRole.Command())
	addr := p.Await(`listening on (\S+)`)[1]
	serves := p.Ready(0)
	var clients []net.Conn
	for g := range 3 {
		if g > 0 {
			if err := serves.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			serves = p.Ready(g)
			p.Await(`(upgraded) by signal`)
		}
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
		for of, c := range clients {
			if err := c.SetDeadline(time.Now().Add(proctest.Patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 100)
			n, err := c.Read(buf)
			if want := fmt.Sprintf("generation %d: hello", of); err != nil || string(buf[:n]) != want {
				t.Fatalf("at generation %d: %q, %v; want %q", g, buf[:n], err, want)
			}
		}
	}
}
