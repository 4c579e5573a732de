// Command keeper is the echo daemon under a keeper.
package main

import (
	"io"
	"log"
	"os"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/keeper"
)

func main() {
	if err := keeper.Stay("/run/keeper.pid"); err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(u.Fail(err))
	}
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
		clients.Go(func() { io.Copy(c, c); c.Close() })
	}
	clients.Wait()
}
