// Httpd is a web server. It can be replaced by a new version of itself, and no
// request is lost.
//
// It is meant to be copied. Put your own handlers in the place of routes.
//
//	httpd -addr :8080 -pidfile /run/httpd.pid -control /run/httpd
//	httpd -addr :8443 -cert cert.pem -key key.pem
//
// SIGHUP starts the program again, from the file that is at its path by then. The
// running process hands over its listening socket. With the answer to its next
// request each client is told to connect again, and reaches the new process. The
// old process exits after -grace if its clients are quiet, and within -drain in
// any case. SIGTERM and SIGINT stop it in the same way, without a successor. A
// second signal ends it at once.
//
// With -control other programs can request both, for example:
//
//	httpd -request /run/httpd/upgrade
//	httpd -request /run/httpd/stop
//
// Each command prints the result when it is known, and exits with status 0 or 1.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
)

var (
	addr    = flag.String("addr", "127.0.0.1:8080", "TCP `address` to listen on")
	cert    = flag.String("cert", "", "`file` with the certificate; empty for no TLS")
	key     = flag.String("key", "", "`file` with the certificate's key")
	pidFile = flag.String("pidfile", "", "`path` of the PID file; empty for none")
	control = flag.String("control", "", "existing `directory` for the control sockets upgrade and stop; empty for none")
	request = flag.String("request", "", "`path` of a control socket; request what it is for from the running process, and exit")
	grace   = flag.Duration("grace", httpdrain.DefaultGrace, "`time` that a quiet connection stays open after the end of accepting")
	drain   = flag.Duration("drain", 30*time.Second, "longest `time` to serve connected clients after the end of accepting")
)

func main() {
	flag.Parse()
	log.SetPrefix(fmt.Sprintf("httpd[%d] ", os.Getpid()))
	log.SetFlags(log.Ltime | log.Lmicroseconds | log.Lmsgprefix)
	// The reader of the log may go while clients are served, as a supervisor's pipe
	// does with the process that it has started. Without this call SIGPIPE would
	// then end the service at its next log line.
	signal.Ignore(syscall.SIGPIPE)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	if *request != "" {
		reply, err := ecdysis.Request(context.Background(), *request)
		if err == nil {
			fmt.Println("ok", reply)
		}
		return err
	}
	opts := ecdysis.Options{
		PIDFile:        *pidFile,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	if *control != "" {
		opts.UpgradeSocket, opts.StopSocket = *control+"/upgrade", *control+"/stop"
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		return err
	}

	// All steps that can fail come before Ready. Until then the predecessor, if
	// there is one, goes on serving. Fail makes it report the reason.
	if flag.NArg() > 0 || *grace <= 0 || *drain <= 0 {
		return u.Fail(errors.New("want no arguments but flags, and -grace and -drain above 0; see httpd -h"))
	}
	ln, err := u.Listen("tcp", *addr)
	if err != nil {
		return u.Fail(err)
	}
	log.Printf("listening on %s", ln.Addr())

	mux := http.NewServeMux()
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	serve := srv.Serve
	if *cert != "" || *key != "" {
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			return u.Fail(err)
		}
		srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
		serve = func(ln net.Listener) error { return srv.ServeTLS(ln, "", "") }
	}
	d := httpdrain.New(srv) // when srv is complete
	d.Grace = *grace
	routes(mux, u.Generation(), d.Draining())

	go func() {
		if err := serve(d.Listener(ln)); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	if err := u.Ready(); err != nil {
		return err
	}

	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), *drain)
	defer cancel()
	if err := d.Shutdown(ctx); err != nil {
		return err
	}
	log.Print("all clients are served")
	return nil
}

// routes is the service.
func routes(mux *http.ServeMux, generation int, draining <-chan struct{}) {
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "pid=%d generation=%d\n", os.Getpid(), generation)
	})

	// A stream ends when the server drains. Its client then connects again.
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			fmt.Fprintf(w, "data: pid=%d generation=%d\n\n", os.Getpid(), generation)
			_ = http.NewResponseController(w).Flush() // fails when the context has ended
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			case <-draining:
				return
			}
		}
	})
}
