package main

import (
	"fmt"
	"net"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/miekg/dns"
)

func TestMain(m *testing.M) { servertest.Main(m, main) }

func Test(t *testing.T) {
	s := servertest.Start(t, 2)
	client := func(network, host string, queries int) func(c *servertest.Client) error {
		return func(c *servertest.Client) error {
			listening := s.Addrs[0]
			if network == "tcp" {
				listening = s.Addrs[1]
			}
			_, port, err := net.SplitHostPort(listening)
			if err != nil {
				return err
			}
			d := &dns.Client{Net: network, Timeout: proctest.Patience}
			// Connected: an answer from another address than the one that was
			// asked does not arrive.
			conn, err := d.Dial(net.JoinHostPort(host, port))
			if err != nil {
				return err
			}
			defer conn.Close()
			for i := 0; i < queries || queries == 0 && !c.Over(); i++ {
				token := c.Token()
				a, _, err := d.ExchangeWithConn(new(dns.Msg).SetQuestion(token+".test.", dns.TypeTXT), conn)
				if err != nil {
					return err
				}
				if txt, ok := a.Answer[0].(*dns.TXT); !ok || txt.Txt[0] != token {
					return fmt.Errorf("%v; want %q", a, token)
				}
				c.Answered()
			}
			return nil
		}
	}
	s.Clients("udp", 2, client("udp", "127.0.0.1", 5))
	s.Clients("second-address", 2, client("udp", "127.0.0.2", 5))
	s.Clients("tcp", 2, client("tcp", "127.0.0.1", 1))
	s.Clients("tcp-long", 2, client("tcp", "127.0.0.2", 0))
	s.Upgrades()
}
