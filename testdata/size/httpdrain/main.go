// Command httpdrain is a web server that can be upgraded.
package main

import (
	"context"
	"log"
	"net/http"
	"os"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
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
	srv := &http.Server{Handler: http.NotFoundHandler()}
	d := httpdrain.New(srv)
	go srv.Serve(d.Listener(ln))
	u.Wait()
	d.Shutdown(context.Background())
}
