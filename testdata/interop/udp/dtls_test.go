package udp

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
	"github.com/pion/dtls/v3"
	dtlsnet "github.com/pion/dtls/v3/pkg/net"
)

func dtlsConfig() *dtls.Config {
	c := tlsConfig()
	return &dtls.Config{Certificates: []tls.Certificate(c.Certificates), InsecureSkipVerify: true}
}

// serveDTLS is planned for AtNew. It answers as serveQUIC does.
var serveDTLS = proctest.Define("serve DTLS", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	ln, err := dtls.NewListener(dtlsnet.PacketListenerFromListener(listenRemotes(listen(d, udpflow.Config{}))), dtlsConfig())
	if err != nil {
		d.Fatal(d.U.Fail(err))
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				d.Fatal(err)
			}
			go echo(c)
		}
	}()
	return proctest.None{}, nil
})

// Sessions of DTLS live through upgrades, and new ones are the new process's.
func TestDTLS(t *testing.T) {
	spec := proctest.Spec{NoAccept: true}.At(proctest.AtStart, setup.Do()).At(proctest.AtNew, serveDTLS.Do())
	p := proctest.Start(t, spec)
	to, err := net.ResolveUDPAddr("udp", p.Addr(0).Address)
	if err != nil {
		t.Fatal(err)
	}
	ch := &chatter{t: t}
	defer ch.end()
	dial := func() {
		t.Helper()
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		s, err := dtls.Client(c, to, dtlsConfig())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close(); c.Close() })
		if k := ch.begin(s); k.pid != p.PID {
			t.Errorf("process %d answers a new session; want %d", k.pid, p.PID)
		}
	}
	for range 10 {
		dial()
	}
	for range 5 {
		ch.more(5)
		p = p.Upgrade()
		dial()
		dial()
	}
	ch.more(20)
	ch.check()
	if s := stats.On(p); s.Forwarded == 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}
