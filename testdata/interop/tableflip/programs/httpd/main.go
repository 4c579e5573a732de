// Command httpd is a web server in the shape of the other library's example.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

func main() {
	address := flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	pidFile := flag.String("pid-file", "", "`path` of the PID file")
	drain := flag.Bool("drain", false, "end by package httpdrain, which loses no request")
	flag.Parse()

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile})
	if err != nil {
		panic(err)
	}
	defer upg.Stop()

	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGHUP)
	go func() {
		for range sig {
			if err := upg.Upgrade(); err != nil {
				line.Say("upgrade failed: %v", err)
			}
		}
	}()

	// Listen must be called before Ready.
	ln, err := upg.Listen("tcp", *address)
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, line.Answer())
	})}
	serve, shutdown := ln, server.Shutdown
	if *drain {
		d := httpdrain.New(&server)
		serve, shutdown = d.Listener(ln), d.Shutdown
	}
	go func() {
		if err := server.Serve(serve); !errors.Is(err, http.ErrServerClosed) {
			log.Fatalln("HTTP server:", err)
		}
	}()

	if err := upg.Ready(); err != nil {
		panic(err)
	}
	line.Say("ready tcp %s", ln.Addr())
	<-upg.Exit()

	// No upgrade can begin while the parent is there.
	time.AfterFunc(30*time.Second, func() {
		log.Println("graceful shutdown timed out")
		os.Exit(1)
	})
	if err := shutdown(context.Background()); err != nil {
		log.Fatalln("shutdown:", err)
	}
}
