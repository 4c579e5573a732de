package main

import (
	"context"
	"fmt"
	"testing"

	"github.com/coder/websocket"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 1)
	// A client makes so many requests on a connection, or any number if that is
	// 0, and closes it when it is asked to, unless it stays.
	client := func(requests int, stays bool) func(c *servertest.Client) error {
		return func(c *servertest.Client) error {
			ctx, cancel := context.WithTimeout(context.Background(), 2*proctest.Patience)
			defer cancel()
			conn, _, err := websocket.Dial(ctx, "ws://"+s.Addrs[0]+"/", nil)
			if err != nil {
				return err
			}
			defer conn.CloseNow()
			asked := false
			for i := 0; i < requests || requests == 0 && !c.Over() && !(asked && !stays); i++ {
				token := c.Token()
				if err := conn.Write(ctx, websocket.MessageText, []byte(token)); err != nil {
					return err
				}
				_, b, err := conn.Read(ctx)
				if err == nil && string(b) == reconnect {
					asked = true
					_, b, err = conn.Read(ctx)
				}
				if err != nil || string(b) != token {
					return fmt.Errorf("%q, %v; want %q", b, err, token)
				}
				c.Answered()
			}
			return conn.Close(websocket.StatusNormalClosure, "")
		}
	}
	s.Clients("short", 2, client(1, true))
	s.Clients("obliging", 4, client(0, false))
	s.Clients("long", 2, client(0, true))
	s.Upgrades()
}
