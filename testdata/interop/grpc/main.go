// Grpc is a gRPC server, by google.golang.org/grpc. It answers with what it is
// sent: once, or as often as the client wants.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	srv := grpc.NewServer()
	srv.RegisterService(&service, nil)
	go func() { log.Print(srv.Serve(ln)) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	limit := time.AfterFunc(30*time.Second, srv.Stop)
	defer limit.Stop()
	srv.GracefulStop() // asks each client to make its next calls to the next process
	return nil
}

var service = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Once", Handler: once}},
	Streams:     []grpc.StreamDesc{{StreamName: "Often", Handler: often, ServerStreams: true, ClientStreams: true}},
}

func once(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	m := new(wrapperspb.StringValue)
	if err := decode(m); err != nil {
		return nil, err
	}
	servertest.Processed(m.Value)
	return m, nil
}

func often(_ any, s grpc.ServerStream) error {
	for {
		m := new(wrapperspb.StringValue)
		if err := s.RecvMsg(m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		servertest.Processed(m.Value)
		if err := s.SendMsg(m); err != nil {
			return err
		}
	}
}
