// Dns is a name server, by github.com/miekg/dns. Each name has one TXT record,
// which holds the name.
package main

import (
	"context"
	"errors"
	"log"
	"net"
	"strings"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/servertest"
	"github.com/miekg/dns"
)

func main() { servertest.Run(serve) }

func serve(u *ecdysis.Upgrader) error {
	pc, err := u.ListenPacketWith(ecdysis.ListenConfig{Raw: true}, "udp", ":0") // net's own *net.UDPConn
	if err != nil {
		return u.Fail(err)
	}
	ln, err := u.Listen("tcp", ":0")
	if err != nil {
		return u.Fail(err)
	}
	servertest.Listening(pc.LocalAddr())
	servertest.Listening(ln.Addr())

	var conns drain.Server
	started := make(chan struct{})
	udp := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(answer), NotifyStartedFunc: func() { close(started) }}
	tcp := &dns.Server{Listener: conns.Listener(ln), Handler: dns.HandlerFunc(answer), MaxTCPQueries: -1} // for one client of the test
	go func() { log.Print(tcp.ActivateAndServe()) }()
	if err := u.Ready(); err != nil {
		return err
	}
	go func() { log.Print(udp.ActivateAndServe()) }() // after Ready, because the socket is never paused
	<-started
	u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return errors.Join(udp.ShutdownContext(ctx), conns.Shutdown(ctx))
}

func answer(w dns.ResponseWriter, q *dns.Msg) {
	a := new(dns.Msg).SetReply(q)
	for _, question := range q.Question {
		token, _, _ := strings.Cut(question.Name, ".")
		servertest.Processed(token)
		a.Answer = append(a.Answer, &dns.TXT{
			Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
			Txt: []string{token},
		})
	}
	if err := w.WriteMsg(a); err != nil && !errors.Is(err, net.ErrClosed) {
		log.Print("failed: ", err)
	}
}
