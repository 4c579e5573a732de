package stub

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"

	"github.com/cloudflare/tableflip"
	stub "github.com/cloudflare/tableflip/testing"
)

func TestServe(t *testing.T) {
	for range 2 { // New may be called again
		upg, err := stub.New()
		if err != nil {
			t.Fatal(err)
		}
		addr := make(chan net.Addr, 1)
		go Serve(upg, "tcp", "127.0.0.1:0", func(a net.Addr) { addr <- a })
		a := <-addr
		c, err := net.Dial(a.Network(), a.String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err != nil || string(b[:n]) != "hello" {
			t.Errorf("the answer is %q, %v", b[:n], err)
		}
		c.Close()
	}
}

func TestStub(t *testing.T) {
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	if upg.HasParent() || upg.Exit() != nil || upg.Ready() != nil || upg.WaitForParent(context.Background()) != nil {
		t.Error("the stand-in has a parent, an end, or an error")
	}
	if err := upg.Upgrade(); !errors.Is(err, tableflip.ErrNotSupported) {
		t.Errorf("Upgrade returned %v; want tableflip.ErrNotSupported", err)
	}
	upg.Stop()
	if ln, err := upg.Listener("tcp", ":0"); ln != nil || err != nil {
		t.Errorf("Listener returned %v, %v", ln, err)
	}
	if c, err := upg.Conn("tcp", ":0"); c != nil || err != nil {
		t.Errorf("Conn returned %v, %v", c, err)
	}
	if f, err := upg.File("a"); f != nil || err != nil {
		t.Errorf("File returned %v, %v", f, err)
	}
	if err := errors.Join(upg.AddListener("tcp", ":0", nil), upg.AddConn("tcp", ":0", nil), upg.AddFile("a", os.Stdin)); err != nil {
		t.Error(err)
	}
}
