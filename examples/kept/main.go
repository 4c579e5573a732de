// Kept is the smallest daemon under a keeper: for containers, terminals and
// supervisors that know one process. It sends back what its clients send, is
// replaced on SIGHUP and stopped by SIGTERM or Ctrl-C.
package main

import (
	"flag"
	"io"
	"log"
	"os"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/keeper"
)

func main() {
	address := flag.String("tcp", ":7000", "TCP `address` to listen on")
	pidFile := flag.String("pidfile", "/kept.pid", "`path` of the PID file")
	flag.Parse()
	if err := keeper.Stay(*pidFile); err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        *pidFile,
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
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go func() { u.Wait(); ln.Close() }()
	var clients sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		clients.Go(func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		})
	}
	clients.Wait()
}
