// Kept is a small daemon under a keeper, for containers, terminals and
// supervisors that know one process. It sends back what its clients send. SIGHUP
// upgrades it, and SIGTERM or Ctrl-C stops it. A generation that was replaced or
// stopped serves its clients for -drain at most, because the keeper and its
// container live as long as any generation.
//
// With -takeover a new container takes over from the generation that still
// serves. So does the keeper that a supervisor starts after it has killed an
// earlier one.
package main

import (
	"context"
	"flag"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/keeper"
)

func main() {
	address := flag.String("tcp", ":7000", "TCP `address` to listen on")
	pidFile := flag.String("pidfile", "/kept.pid", "`path` of the PID file")
	takeover := flag.String("takeover", "", "`path` of the socket by which another process takes over; empty for none")
	limit := flag.Duration("drain", 30*time.Second, "longest `time` to serve connected clients after the end of accepting")
	flag.Parse()
	// A supervisor stops reading the log when the keeper has ended. Without this
	// call SIGPIPE would then end the service at its next log line.
	signal.Ignore(syscall.SIGPIPE)
	if err := keeper.Stay(*pidFile); err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        *pidFile,
		TakeoverSocket: *takeover,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Prepare: func(c *ecdysis.Command) error {
			c.Sibling = true // a child of the keeper
			return nil
		},
		Notify: func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", *address)
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
	ctx, cancel := context.WithTimeout(context.Background(), *limit)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		log.Print(err)
	}
}
