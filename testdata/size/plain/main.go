// Command plain is an echo daemon that cannot be upgraded: what
// BenchmarkSize compares its sibling to.
package main

import (
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	ln, err := net.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(err)
	}
	go func() { log.Print(<-stop); ln.Close() }()
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
