// Fasthttp is a web server, by github.com/valyala/fasthttp. It answers with the
// body of the request.
package main

import (
	"context"
	"log"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/valyala/fasthttp"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	var conns drain.Server
	srv := &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) {
		select {
		case <-conns.Draining():
			ctx.SetConnectionClose() // the client's next request goes to the next process
		default:
		}
		handle(ctx)
	}}
	go func() { log.Print(srv.Serve(conns.Listener(ln))) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := conns.Shutdown(ctx); err != nil { // connections without a request have been closed
		log.Print(err)
	}
	return nil
}

func handle(ctx *fasthttp.RequestCtx) {
	servertest.Processed(string(ctx.PostBody()))
	ctx.SetBody(ctx.PostBody())
}
