// Redis is a server of the Redis protocol, by github.com/tidwall/redcon. It
// knows the command ECHO.
package main

import (
	"context"
	"log"
	"strings"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/tidwall/redcon"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	var conns drain.Server
	srv := redcon.NewServer("", handle, nil, nil)
	go func() { log.Print(srv.Serve(conns.Listener(ln))) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return conns.Shutdown(ctx)
}

func handle(c redcon.Conn, cmd redcon.Command) {
	if name := string(cmd.Args[0]); len(cmd.Args) != 2 || !strings.EqualFold(name, "echo") {
		c.WriteError("ERR unknown command '" + name + "'")
		return
	}
	servertest.Processed(string(cmd.Args[1]))
	c.WriteBulk(cmd.Args[1])
}
