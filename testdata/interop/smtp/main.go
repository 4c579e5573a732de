// Smtp is a mail server, by github.com/emersion/go-smtp. It takes every mail and
// looks at its text alone.
package main

import (
	"context"
	"io"
	"log"
	"strings"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/emersion/go-smtp"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	srv := smtp.NewServer(smtp.BackendFunc(newSession))
	go func() { log.Print(srv.Serve(ln)) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return srv.Shutdown(ctx) // waits for the sessions
}

type session struct{}

func newSession(*smtp.Conn) (smtp.Session, error)    { return session{}, nil }
func (session) Mail(string, *smtp.MailOptions) error { return nil }
func (session) Rcpt(string, *smtp.RcptOptions) error { return nil }
func (session) Reset()                               {}
func (session) Logout() error                        { return nil }

func (session) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	servertest.Processed(strings.TrimSpace(string(b)))
	return nil
}
