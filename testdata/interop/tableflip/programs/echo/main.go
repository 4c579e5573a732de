// Command echo answers lines over TCP or a Unix socket. It has the shape of the
// other library's example of a TCP server, and ends its clients properly.
package main

import (
	"flag"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/cloudflare/tableflip"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

func main() {
	network := flag.String("network", "tcp", "`network` to listen on")
	address := flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	pidFile := flag.String("pid-file", "", "`path` of the PID file")
	flag.Parse()

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile})
	if err != nil {
		panic(err)
	}
	defer upg.Stop()

	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGHUP, syscall.SIGTERM)
	go func() {
		for s := range sig {
			if s == syscall.SIGTERM {
				upg.Stop()
				return
			}
			if err := upg.Upgrade(); err != nil {
				line.Say("upgrade failed: %v", err)
			}
		}
	}()

	// Listen must be called before Ready.
	ln, err := upg.Fds.Listen(*network, *address)
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	var clients sync.WaitGroup
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			clients.Go(func() { line.Serve(c) })
		}
	}()

	if err := upg.Ready(); err != nil {
		panic(err)
	}
	line.Say("ready %s %s", *network, ln.Addr())
	<-upg.Exit()
	ln.Close()
	<-accepting
	clients.Wait()
}
