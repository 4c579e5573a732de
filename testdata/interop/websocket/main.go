// Websocket is a WebSocket server, by github.com/coder/websocket on net/http.
// Each message is answered with itself.
package main

import (
	"context"
	"log"
	"net/http"
	"time"

	"github.com/coder/websocket"
	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/httpdrain"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
)

func main() { servertest.Run(serve) }

// reconnect is the message that asks a client to connect again. A client that
// does not know it stays as long as the server lets it.
const reconnect = "reconnect"

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	mux := http.NewServeMux()
	srv := &http.Server{Handler: mux}
	conns := httpdrain.New(srv)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			log.Print(err)
			return
		}
		defer c.CloseNow()
		handle(c, conns.Draining())
	})
	go func() { log.Print(srv.Serve(conns.Listener(ln))) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return conns.Shutdown(ctx) // waits for handle
}

// handle returns when the client has closed. A client whose server drains is
// asked to do so, and not sent a close frame, because what it has sent meanwhile
// would get no answer.
func handle(c *websocket.Conn, draining <-chan struct{}) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-draining:
			_ = c.Write(ctx, websocket.MessageText, []byte(reconnect))
		case <-ctx.Done():
		}
	}()
	for {
		kind, b, err := c.Read(ctx)
		if err != nil {
			return // the client has closed
		}
		servertest.Processed(string(b))
		if err := c.Write(ctx, kind, b); err != nil {
			return
		}
	}
}
