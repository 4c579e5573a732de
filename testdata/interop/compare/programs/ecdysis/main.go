// Command ecdysis is the server as this package's users write it.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
)

func main() {
	u, err := ecdysis.New(ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}, StopSignals: []os.Signal{syscall.SIGTERM}})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, os.Getpid())
	})}
	d := httpdrain.New(srv)
	go func() { log.Print(srv.Serve(d.Listener(ln))) }()
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := d.Shutdown(ctx); err != nil {
		log.Print(err)
	}
}
