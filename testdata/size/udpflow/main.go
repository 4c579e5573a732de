// Command udpflow is the echo daemon with sessions over UDP.
package main

import (
	"io"
	"log"
	"os"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/udpflow"
)

func main() {
	opts := ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	udpflow.Setup(&opts)
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	c, err := udpflow.ListenPacket(u, "udp", ":7000", udpflow.Config{})
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, a, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], a)
		}
	}()
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
