// Command drain is the echo daemon with a drain.Server.
package main

import (
	"context"
	"io"
	"log"
	"net"
	"os"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
)

func main() {
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
	srv := &drain.Server{Handler: func(c net.Conn) { io.Copy(c, c) }}
	go srv.Serve(ln)
	u.Wait()
	srv.Shutdown(context.Background())
}
