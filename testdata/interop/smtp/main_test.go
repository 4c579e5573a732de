package main

import (
	"strings"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/emersion/go-smtp"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 1)
	send := func(c *servertest.Client, client *smtp.Client) error {
		token := c.Token()
		err := client.SendMail("from@test", []string{"to@test"}, strings.NewReader(token+"\r\n"))
		if err == nil {
			c.Answered()
		}
		return err
	}
	s.Clients("short", 3, func(c *servertest.Client) error {
		client, err := smtp.Dial(s.Addrs[0])
		if err != nil {
			return err
		}
		defer client.Close()
		if err := send(c, client); err != nil {
			return err
		}
		return client.Quit()
	})
	s.Clients("long", 2, func(c *servertest.Client) error {
		client, err := smtp.Dial(s.Addrs[0])
		if err != nil {
			return err
		}
		defer client.Close()
		for !c.Over() {
			if err := send(c, client); err != nil {
				return err
			}
		}
		return client.Quit()
	})
	s.Upgrades()
}
