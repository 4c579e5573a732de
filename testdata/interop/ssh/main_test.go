package main

import (
	"bufio"
	"fmt"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	gossh "golang.org/x/crypto/ssh"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	key, err := hostKey()
	if err != nil {
		t.Fatal(err)
	}
	s := servertest.Start(t, 1)
	dial := func() (*gossh.Client, *gossh.Session, error) {
		client, err := gossh.Dial("tcp", s.Addrs[0], &gossh.ClientConfig{User: "test",
			HostKeyCallback: gossh.FixedHostKey(key.PublicKey()), Timeout: proctest.Patience})
		if err != nil {
			return nil, nil, err
		}
		session, err := client.NewSession()
		if err != nil {
			client.Close()
		}
		return client, session, err
	}
	s.Clients("short", 3, func(c *servertest.Client) error {
		client, session, err := dial()
		if err != nil {
			return err
		}
		defer client.Close()
		token := c.Token()
		got, err := session.Output(token)
		if err != nil || string(got) != token {
			return fmt.Errorf("%q, %v; want %q", got, err, token)
		}
		c.Answered()
		return nil
	})
	s.Clients("long", 1, func(c *servertest.Client) error {
		client, session, err := dial()
		if err != nil {
			return err
		}
		defer client.Close()
		in, err := session.StdinPipe()
		if err != nil {
			return err
		}
		out, err := session.StdoutPipe()
		if err != nil {
			return err
		}
		if err := session.Shell(); err != nil {
			return err
		}
		for answers := bufio.NewReader(out); !c.Over(); {
			token := c.Token()
			if _, err := fmt.Fprintln(in, token); err != nil {
				return err
			}
			got, err := answers.ReadString('\n')
			if err != nil || got != token+"\n" {
				return fmt.Errorf("%q, %v; want %q", got, err, token)
			}
			c.Answered()
		}
		return nil
	})
	s.Upgrades()
}
