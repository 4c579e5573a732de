// Command overseer is the server as the users of github.com/jpillora/overseer
// write it.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/jpillora/overseer"
)

func main() {
	overseer.Run(overseer.Config{Address: os.Args[1], Program: func(state overseer.State) {
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			fmt.Fprintln(w, os.Getpid())
		})}
		go func() { log.Print(srv.Serve(state.Listener)) }()
		<-state.GracefulShutdown
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			log.Print(err)
		}
	}})
}
