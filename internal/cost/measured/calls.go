//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

const (
	accepts = 200 // connections in a batch: they wait in the listener's queue
	reads   = 64  // packets in a batch: they wait in the socket's buffer
)

// A packetReader is what is compared of a socket for packets.
type packetReader interface {
	net.PacketConn
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
}

// calls prints a line for each pair of batches: what is compared, and the time
// of one call here and of one of package net, in nanoseconds. Reading takes less
// time and varies more, so it has more pairs.
func calls(pairs int) error {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		return err
	}
	if err := u.Ready(); err != nil {
		return err
	}
	var listeners [2]net.Listener
	var conns [2]packetReader
	if listeners[0], err = u.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	if listeners[1], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	for i, listen := range []func(network, address string) (net.PacketConn, error){u.ListenPacket, net.ListenPacket} {
		c, err := listen("udp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		conns[i] = c.(packetReader)
	}
	if err := compare("accept", pairs, func(i int) (time.Duration, error) { return acceptBatch(listeners[i]) }); err != nil {
		return err
	}
	return compare("read", 10*pairs, func(i int) (time.Duration, error) { return readBatch(conns[i]) })
}

// compare measures the two in pairs, and each one first in every other pair.
func compare(what string, pairs int, batch func(i int) (time.Duration, error)) error {
	for k := range pairs {
		var took [2]time.Duration
		for j := range 2 {
			i := (j + k) % 2
			var err error
			if took[i], err = batch(i); err != nil {
				return err
			}
		}
		if _, err := os.Stdout.WriteString(what + " " + line(int64(took[0]), int64(took[1])) + "\n"); err != nil {
			return err
		}
	}
	return nil
}

func acceptBatch(ln net.Listener) (time.Duration, error) {
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.(*net.TCPConn).SetLinger(0) // or the ports of many batches would wait
			c.Close()
		}
	}()
	for range accepts {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return 0, err
		}
		open = append(open, c)
	}
	began := time.Now()
	for range accepts {
		c, err := ln.Accept()
		if err != nil {
			return 0, err
		}
		open = append(open, c)
	}
	return time.Since(began) / accepts, nil
}

func readBatch(c packetReader) (time.Duration, error) {
	to, err := net.Dial("udp", c.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	defer to.Close()
	b := make([]byte, 64)
	for range reads {
		if _, err := to.Write(b); err != nil {
			return 0, err
		}
	}
	// A packet that the system has dropped must not make this wait for ever.
	if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		return 0, err
	}
	began := time.Now()
	n := time.Duration(0)
	for ; n < reads; n++ {
		_, _, err := c.ReadFromUDPAddrPort(b)
		if errors.Is(err, os.ErrDeadlineExceeded) && n > 0 {
			return 0, errors.New("the system has dropped packets to the loopback interface")
		}
		if err != nil {
			return 0, err
		}
	}
	return time.Since(began) / n, nil
}
