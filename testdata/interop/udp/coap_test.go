package udp

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/udpflow"
	coapdtls "github.com/plgd-dev/go-coap/v3/dtls"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/options"
	coapudp "github.com/plgd-dev/go-coap/v3/udp"
)

// serveCoAP is planned for AtNew. /pid is the process ID. An observer of /ticks
// gets it again and again; the observations are what a process keeps.
var serveCoAP = proctest.Define("serve CoAP", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	router := mux.NewRouter()
	pid := func() io.ReadSeeker { return bytes.NewReader(fmt.Append(nil, os.Getpid())) }
	_ = router.Handle("/pid", mux.HandlerFunc(func(w mux.ResponseWriter, _ *mux.Message) {
		_ = w.SetResponse(codes.Content, message.TextPlain, pid())
	}))
	_ = router.Handle("/ticks", mux.HandlerFunc(func(w mux.ResponseWriter, m *mux.Message) {
		token, conn := m.Token(), w.Conn()
		if observe, err := m.Options().Observe(); err == nil && observe == 0 {
			go func() {
				for n := uint32(2); ; n++ {
					r := conn.AcquireMessage(conn.Context())
					r.SetCode(codes.Content)
					r.SetContentFormat(message.TextPlain)
					r.SetToken(token)
					r.SetObserve(n)
					r.SetBody(pid())
					err := conn.WriteMessage(r)
					conn.ReleaseMessage(r)
					if err != nil {
						return
					}
					time.Sleep(5 * time.Millisecond)
				}
			}()
			return // the first tick is the response
		}
		_ = w.SetResponse(codes.Content, message.TextPlain, pid())
	}))
	// The library's server for DTLS takes any listener, and its server for UDP a
	// *net.UDPConn alone. Both speak the same protocol.
	s := coapdtls.NewServer(options.WithMux(router))
	l := listenRemotes(listen(d, udpflow.Config{}))
	go func() { d.Fatal(s.Serve(l)) }()
	return proctest.None{}, nil
})

// Observations of CoAP go on through upgrades, and so do requests.
func TestCoAP(t *testing.T) {
	spec := proctest.Spec{NoAccept: true}.At(proctest.AtStart, setup.Do()).At(proctest.AtNew, serveCoAP.Do())
	p := proctest.Start(t, spec)
	ctx, cancel := context.WithTimeout(context.Background(), 2*proctest.Patience)
	defer cancel()
	type client struct {
		pid   int
		get   func() (int, error)
		ticks atomic.Int64
		wrong atomic.Int64
	}
	var clients []*client
	number := func(m *pool.Message) (n int, err error) {
		b, err := m.ReadBody()
		if err == nil {
			_, err = fmt.Sscan(string(b), &n)
		}
		return n, err
	}
	dial := func() {
		t.Helper()
		c, err := coapudp.Dial(p.Addr(0).Address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		k := &client{pid: p.PID}
		k.get = func() (int, error) {
			m, err := c.Get(ctx, "/pid")
			if err != nil {
				return 0, err
			}
			return number(m)
		}
		if _, err := c.Observe(ctx, "/ticks", func(m *pool.Message) {
			if n, err := number(m); err != nil || n != k.pid {
				k.wrong.Add(1)
			}
			k.ticks.Add(1)
		}); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, k)
	}
	// Each client gets more ticks, and its process's answer to requests.
	all := func() {
		t.Helper()
		want := make([]int64, len(clients))
		for i, k := range clients {
			want[i] = k.ticks.Load() + 3
		}
		for i, k := range clients {
			if n, err := k.get(); err != nil || n != k.pid {
				t.Fatalf("client %d: process %d answers, %v; want %d", i, n, err, k.pid)
			}
			for limit := time.Now().Add(proctest.Patience); k.ticks.Load() < want[i]; time.Sleep(time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatalf("client %d of process %d gets no more ticks", i, k.pid)
				}
			}
		}
	}
	for range 10 {
		dial()
	}
	for range 5 {
		all()
		p = p.Upgrade()
		dial()
		dial()
	}
	all()
	var ticks int64
	for i, k := range clients {
		ticks += k.ticks.Load()
		if n := k.wrong.Load(); n > 0 {
			t.Errorf("client %d has got %d ticks of another process", i, n)
		}
	}
	t.Logf("%d clients are alive, after %d ticks", len(clients), ticks)
	if s := stats.On(p); s.Forwarded == 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}
