// Command rollout is a daemon whose upgrades are counted, for Prometheus to
// collect.
package main

import (
	"context"
	"errors"
	"flag"
	"log"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

var (
	events = promauto.NewCounterVec(prometheus.CounterOpts{
		Name: "ecdysis_events_total",
		Help: "What has happened in upgrades and stops of this process.",
	}, []string{"event"})
	generation = promauto.NewGauge(prometheus.GaugeOpts{
		Name: "ecdysis_generation",
		Help: "How many upgrades have led to this process.",
	})
)

func count(e ecdysis.Event) {
	events.WithLabelValues(string(e.Kind)).Inc()
	if e.Kind == ecdysis.EventReady {
		generation.Set(float64(e.Generation))
	}
	log.Print(e)
}

func run(address string) error {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify:         count,
	})
	if err != nil {
		return err
	}
	ln, err := u.Listen("tcp", address)
	if err != nil {
		return u.Fail(err)
	}
	log.Print("listening on ", ln.Addr())
	srv := &http.Server{Handler: promhttp.Handler()}
	drainer := httpdrain.New(srv)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = drainer.Shutdown(ctx)
	if serr := <-served; serr != http.ErrServerClosed {
		err = errors.Join(err, serr)
	}
	return err
}

func main() {
	address := flag.String("addr", "127.0.0.1:0", "`address` of the metrics")
	flag.Parse()
	if err := run(*address); err != nil {
		log.Fatal(err)
	}
}
