package e2e

import (
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Sockets of net's own, and settings of inherited sockets.

// rawServer is what a library that insists on a *net.UDPConn does: it serves
// from Ready until its socket is closed.
var rawServer struct {
	c    *net.UDPConn
	once sync.Once
}

var listenRaw = proctest.Define("listen raw", func(d *proctest.Daemon, _ proctest.None) (string, error) {
	c, err := d.U.ListenPacketWith(ecdysis.ListenConfig{Raw: true}, "udp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		return "", fmt.Errorf("it is a %T; want a *net.UDPConn", c)
	}
	rawServer.c = u
	return u.LocalAddr().String(), nil
})

var serveRaw = proctest.Define("serve raw", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	rawServer.once.Do(func() {
		go func() {
			b := make([]byte, 512)
			for {
				_, from, err := rawServer.c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				answer := fmt.Appendf(nil, "%d %d\n", os.Getpid(), d.U.Generation())
				if _, err := rawServer.c.WriteToUDPAddrPort(answer, from); err != nil {
					return
				}
			}
		}()
	})
	return proctest.None{}, nil
})

var closeRaw = proctest.Define("close raw", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	return proctest.None{}, rawServer.c.Close()
})

// A raw socket is handed on, is read by both generations for a moment, and is
// the program's to close.
func TestRawUDP(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP.At(proctest.AtNew, listenRaw.Do()).At(proctest.AtServing, serveRaw.Do())
	p := proctest.Start(t, spec)
	address, err := listenRaw.At(p, proctest.AtNew)
	if err != nil {
		t.Fatal(err)
	}
	addr := proctest.Addr{Network: "udp", Address: address}
	p.ServesAt(addr)
	for range 3 {
		s := p.Upgrade()
		if got, err := listenRaw.At(s, proctest.AtNew); got != address || err != nil {
			t.Fatalf("the successor's socket is %s, %v; want %s", got, err, address)
		}
		for range 20 { // each datagram is answered, by one of the two
			pid, _, err := addr.Ask()
			if err != nil || pid != p.PID && pid != s.PID {
				t.Fatalf("process %d answers, %v; want %d or %d", pid, err, p.PID, s.PID)
			}
		}
		closeRaw.On(p) // a second call would be an error: the package has not closed it
		s.ServesAt(addr)
		p = s
	}
	// An upgrade that fails leaves it as it was.
	p.Chain.Specs(spec.At(proctest.AtListened, proctest.Exit(3)))
	p.FailUpgrade(ecdysis.StepInit, nil)
	p.ServesAt(addr)
	// A stop does not end it, either.
	p.Stop()
	p.ServesAt(addr)
	closeRaw.On(p)
}

// Raw is for UDP.
func TestRawIsForUDP(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	for _, l := range [][2]string{{"tcp", "127.0.0.1:0"}, {"unixgram", p.Chain.Path("gram")}} {
		if _, err := p.ListenWith(ecdysis.ListenConfig{Raw: true}, l[0], l[1]); err == nil {
			t.Errorf("Raw was taken for %s", l[0])
		} else {
			proctest.Want(t, err, nil, "ListenConfig.Raw is for UDP", l[0])
		}
	}
	p.Chain.HasFiles("pid", "sock")
}

// Whether an inherited socket is kept on a stop is what this process says.
func TestKeepOnStopOfAnInheritedSocket(t *testing.T) {
	t.Parallel()
	with := func(keep bool) proctest.Spec {
		return proctest.Spec{Listen: []proctest.Listen{{Network: "tcp", Address: "127.0.0.1:0", Config: ecdysis.ListenConfig{KeepOnStop: keep}}}}
	}
	for _, keep := range []bool{true, false} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, with(!keep), with(keep))
			s := p.Upgrade()
			s.Stop()
			if keep {
				s.Serves()
			} else if _, err := s.Addr(0).Dial(); err == nil {
				t.Error("a socket that this process does not keep is open after a stop")
			}
		})
	}
}

// addKept brings in a listener by AddFile, and asks for it by its address to be
// kept on a stop.
var addKept = proctest.Define("add a kept listener", func(d *proctest.Daemon, name string) (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := d.U.AddFile(name, f); err != nil {
		return "", err
	}
	_, err = d.U.ListenWith(ecdysis.ListenConfig{KeepOnStop: true}, "tcp", ln.Addr().String())
	return ln.Addr().String(), err
})

// takeByName looks a listener up, and serves it.
var takeByName = proctest.Define("take by name", func(d *proctest.Daemon, name string) (proctest.None, error) {
	ln, err := d.U.Listener(name)
	if err == nil {
		d.Keep(ln)
		d.Accept(ln)
	}
	return proctest.None{}, err
})

// A socket that is looked up by name keeps the setting that came with it.
func TestKeepOnStopByName(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP.At(proctest.AtNew, addKept.Do("web")), proctest.TCP.At(proctest.AtNew, takeByName.Do("web")))
	address, err := addKept.At(p, proctest.AtNew)
	if err != nil {
		t.Fatal(err)
	}
	s := p.Upgrade()
	if err := takeByName.ErrAt(s, proctest.AtNew); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	s.ServesAt(proctest.Addr{Network: "tcp", Address: address})
}
