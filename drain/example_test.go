package drain_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/rpc"
	"os"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
)

// address is where the example listens.
var address = ":7000"

// A plain server that is replaced on SIGHUP and stopped by SIGTERM. Its clients
// have 30 seconds to finish. As a program of its own, Example is main.
func Example() {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", address)
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", ln.Addr())

	srv := &drain.Server{Handler: func(c net.Conn) { _, _ = io.Copy(c, c) }}
	go srv.Serve(ln) // waits for Ready

	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		log.Print(err)
	}
}

// mustListen and mustDial keep the examples short.
func mustListen() net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return ln
}

func mustDial(ln net.Listener) net.Conn {
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	return c
}

// A client that is connected when Shutdown begins is served until it ends.
// Half-closing works, because the handler has a *net.TCPConn.
func ExampleServer_Shutdown() {
	srv := &drain.Server{Handler: func(c net.Conn) {
		all, _ := io.ReadAll(c) // until the client has ended its side
		fmt.Fprintf(c, "%d bytes", len(all))
	}}
	ln := mustListen()
	serving := make(chan error)
	go func() { serving <- srv.Serve(ln) }()

	client := mustDial(ln).(*net.TCPConn)
	defer client.Close()
	for srv.Connections() == 0 { // until it is accepted
		time.Sleep(time.Millisecond)
	}
	down := make(chan error)
	go func() { down <- srv.Shutdown(context.Background()) }()
	fmt.Println("serve:", <-serving)

	_, _ = io.WriteString(client, "all of this")
	_ = client.CloseWrite()
	answer, err := io.ReadAll(client)
	fmt.Printf("client: %s, %v\n", answer, err)
	fmt.Println("shutdown:", <-down)
	// Output:
	// serve: drain: server closed
	// client: 11 bytes, <nil>
	// shutdown: <nil>
}

// The error of Shutdown tells how many clients did not end in time.
func ExampleShutdownError() {
	srv := &drain.Server{Handler: func(c net.Conn) { _, _ = io.Copy(c, c) }}
	ln := mustListen()
	go srv.Serve(ln)
	client := mustDial(ln) // stays connected
	defer client.Close()
	for srv.Connections() == 0 {
		time.Sleep(time.Millisecond)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	err := srv.Shutdown(ctx)
	var e *drain.ShutdownError
	if errors.As(err, &e) {
		fmt.Println("clients that were cut off:", e.Open)
	}
	// Output:
	// clients that were cut off: 1
}

// A stream has no end of its own. This one ends when the server drains, and its
// client connects again, to the next process.
func ExampleServer_Draining() {
	srv := &drain.Server{}
	srv.Handler = func(c net.Conn) {
		for {
			if _, err := io.WriteString(c, "news\n"); err != nil {
				return
			}
			select {
			case <-time.After(time.Hour):
			case <-srv.Draining():
				_, _ = io.WriteString(c, "connect again\n")
				return
			}
		}
	}
	ln := mustListen()
	go srv.Serve(ln)
	client := bufio.NewScanner(mustDial(ln))
	client.Scan()
	fmt.Println(client.Text())

	fmt.Println("shutdown:", srv.Shutdown(context.Background()))
	for client.Scan() {
		fmt.Println(client.Text())
	}
	// Output:
	// news
	// shutdown: <nil>
	// connect again
}

// Adder is a service for net/rpc.
type Adder struct{}

// Add is called by clients.
func (Adder) Add(args [2]int, sum *int) error {
	*sum = args[0] + args[1]
	return nil
}

// A library that accepts by itself, here net/rpc, gets its listener from the
// server.
func ExampleServer_Listener() {
	lib := rpc.NewServer()
	if err := lib.Register(Adder{}); err != nil {
		log.Fatal(err)
	}
	var srv drain.Server
	ln := mustListen()
	go lib.Accept(srv.Listener(ln))

	client := rpc.NewClient(mustDial(ln))
	add := func(a, b int) {
		var sum int
		err := client.Call("Adder.Add", [2]int{a, b}, &sum)
		fmt.Println("sum:", sum, err)
	}
	add(1, 2)
	down := make(chan error)
	go func() { down <- srv.Shutdown(context.Background()) }()
	<-srv.Draining()
	add(3, 4)
	fmt.Println("connections:", srv.Connections())
	client.Close()
	fmt.Println("shutdown:", <-down)
	// Output:
	// sum: 3 <nil>
	// sum: 7 <nil>
	// connections: 1
	// shutdown: <nil>
}
