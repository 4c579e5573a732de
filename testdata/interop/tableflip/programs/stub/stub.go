// Package stub is a part of a program that takes either an Upgrader or its
// stand-in, and is tested with the stand-in.
package stub

import (
	"errors"
	"net"

	"github.com/cloudflare/tableflip"
	"github.com/cloudflare/tableflip/testing"
)

// An Upgrader is what the program needs of one.
type Upgrader interface {
	Listen(network, addr string) (net.Listener, error)
	Stop()
	Upgrade() error
	Ready() error
	Exit() <-chan struct{}
}

var (
	_ Upgrader = (*tableflip.Upgrader)(nil)
	_ Upgrader = (*testing.Upgrader)(nil)
)

// New returns an Upgrader, or its stand-in where there are none.
func New(opts tableflip.Options) (Upgrader, error) {
	upg, err := tableflip.New(opts)
	if errors.Is(err, tableflip.ErrNotSupported) {
		return testing.New()
	}
	return upg, err
}

// Serve answers each connection with its own bytes until the upgrader ends.
func Serve(upg Upgrader, network, address string, listening func(net.Addr)) error {
	ln, err := upg.Listen(network, address)
	if err != nil {
		return err
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 100)
				n, _ := c.Read(b)
				c.Write(b[:n])
			}()
		}
	}()
	listening(ln.Addr())
	if err := upg.Ready(); err != nil {
		return err
	}
	<-upg.Exit()
	return nil
}
