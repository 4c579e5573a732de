package main

import (
	"context"
	"fmt"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/redis/go-redis/v9"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 1)
	dial := func() *redis.Client {
		return redis.NewClient(&redis.Options{Addr: s.Addrs[0], MaxRetries: -1, PoolSize: 1,
			ReadTimeout: proctest.Patience, DisableIdentity: true, Protocol: 2})
	}
	echo := func(c *servertest.Client, r *redis.Client) error {
		token := c.Token()
		got, err := r.Echo(context.Background(), token).Result()
		if err != nil || got != token {
			return fmt.Errorf("%q, %v; want %q", got, err, token)
		}
		c.Answered()
		return nil
	}
	s.Clients("short", 4, func(c *servertest.Client) error {
		r := dial()
		defer r.Close()
		return echo(c, r)
	})
	s.Clients("long", 4, func(c *servertest.Client) error {
		r := dial()
		defer r.Close()
		for !c.Over() {
			if err := echo(c, r); err != nil {
				return err
			}
		}
		return nil
	})
	s.Upgrades()
}
