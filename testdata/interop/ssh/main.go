// Ssh is an SSH server, by github.com/gliderlabs/ssh. A command is answered with
// itself, and without one a session is answered line by line.
package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"fmt"
	"log"
	"strings"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	key, err := hostKey()
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(ln.Addr())

	var conns drain.Server
	srv := &ssh.Server{Handler: session}
	srv.AddHostKey(key) // the same one in each generation
	go func() { log.Print(srv.Serve(conns.Listener(ln))) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return conns.Shutdown(ctx)
}

// hostKey returns the key of the test. A real server reads its own from a file.
func hostKey() (gossh.Signer, error) {
	return gossh.NewSignerFromKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
}

func session(s ssh.Session) {
	if c := s.Command(); len(c) > 0 {
		token := strings.Join(c, " ")
		servertest.Processed(token)
		fmt.Fprint(s, token)
		return
	}
	for lines := bufio.NewScanner(s); lines.Scan(); {
		servertest.Processed(lines.Text())
		fmt.Fprintln(s, lines.Text())
	}
}
