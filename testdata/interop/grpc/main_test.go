package main

import (
	"context"
	"fmt"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 1)
	dial := func() *grpc.ClientConn {
		conn, err := grpc.NewClient(s.Addrs[0], grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
			grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
		if err != nil {
			t.Error(err)
		}
		return conn
	}
	once := func(c *servertest.Client, conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
		defer cancel()
		token, got := c.Token(), new(wrapperspb.StringValue)
		if err := conn.Invoke(ctx, "/test.Echo/Once", wrapperspb.String(token), got); err != nil || got.Value != token {
			return fmt.Errorf("%q, %v; want %q", got.Value, err, token)
		}
		c.Answered()
		return nil
	}
	often := func(c *servertest.Client, conn *grpc.ClientConn, messages int) error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		stream, err := conn.NewStream(ctx, &service.Streams[0], "/test.Echo/Often")
		if err != nil {
			return err
		}
		for i := 0; i < messages || messages == 0 && !c.Over(); i++ {
			token, got := c.Token(), new(wrapperspb.StringValue)
			if err := stream.SendMsg(wrapperspb.String(token)); err != nil {
				return err
			}
			if err := stream.RecvMsg(got); err != nil || got.Value != token {
				return fmt.Errorf("%q, %v; want %q", got.Value, err, token)
			}
			c.Answered()
		}
		return stream.CloseSend()
	}
	shared := dial()
	defer shared.Close()
	s.Clients("unary", 4, func(c *servertest.Client) error { return once(c, shared) })
	s.Clients("stream", 4, func(c *servertest.Client) error { return often(c, shared, 3) })
	s.Clients("long-stream", 2, func(c *servertest.Client) error { return often(c, shared, 0) })
	s.Clients("short", 2, func(c *servertest.Client) error {
		conn := dial()
		defer conn.Close()
		return once(c, conn)
	})
	s.Upgrades()
}
