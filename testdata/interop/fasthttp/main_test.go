package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/valyala/fasthttp"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 1)
	client := func(think time.Duration, requests int) func(c *servertest.Client) error {
		return func(c *servertest.Client) error {
			// Of a connection each, and without a second attempt.
			client := &fasthttp.HostClient{Addr: s.Addrs[0], MaxIdemponentCallAttempts: 1, MaxConns: 1}
			defer client.CloseIdleConnections()
			for i := 0; i < requests || requests == 0 && !c.Over(); i++ {
				token := c.Token()
				req, resp := fasthttp.AcquireRequest(), fasthttp.AcquireResponse()
				req.SetRequestURI("http://test/")
				req.Header.SetMethod(fasthttp.MethodPost)
				req.SetBodyString(token)
				err := client.DoTimeout(req, resp, proctest.Patience)
				if got := string(resp.Body()); err != nil || got != token {
					return fmt.Errorf("%q, %v; want %q", got, err, token)
				}
				c.Answered()
				time.Sleep(think)
			}
			return nil
		}
	}
	s.Clients("short", 2, client(0, 1))
	s.Clients("keep-alive", 4, client(0, 0))
	s.Clients("thinking", 4, client(10*time.Millisecond, 0))
	s.Upgrades()
}
