package httpdrain_test

import (
	"context"
	"io"
	"log"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
)

// address is where the example listens.
var address = ":8080"

// A web server that is replaced on SIGHUP and stopped by SIGTERM. As a program
// of its own, Example is main.
func Example() {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", address)
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", ln.Addr())

	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "hello\n") })

	srv := &http.Server{Handler: mux}
	d := httpdrain.New(srv)                              // when srv is configured
	go func() { log.Print(srv.Serve(d.Listener(ln))) }() // waits for Ready

	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := d.Shutdown(ctx); err != nil {
		log.Print(err)
	}
}

// A stream of events has no end of its own. This one ends when the server
// drains. Its client then connects again, to the next process.
func ExampleDrainer_Draining() {
	mux := http.NewServeMux()
	d := httpdrain.New(&http.Server{Handler: mux})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			_, _ = io.WriteString(w, "data: the time is "+time.Now().Format(time.TimeOnly)+"\n\n")
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
			select {
			case <-time.After(time.Second):
			case <-d.Draining():
				return
			}
		}
	})
}

// A program can log what a server waits for while it drains.
func ExampleDrainer_Counts() {
	d := httpdrain.New(&http.Server{})
	done := make(chan error)
	go func() { done <- d.Shutdown(context.Background()) }()
	for tick := time.Tick(10 * time.Second); ; {
		select {
		case err := <-done:
			log.Print("drained: ", err)
			return
		case <-tick:
			log.Print("waiting for ", d.Counts()) // 0 new, 1 active and 3 idle connections, 1 handlers
		}
	}
}
