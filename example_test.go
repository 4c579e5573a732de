//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"io"
	"log"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
)

// address is where the example listens.
var address = ":7000"

// A plain blocking server that is replaced on SIGHUP and stopped by SIGTERM.
// As a program of its own, Example is main.
func Example() {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", address)
	if err != nil {
		log.Fatal(u.Fail(err)) // the old process, if there is one, reports why and serves on
	}
	log.Print("listening on ", ln.Addr())
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go func() { u.Wait(); ln.Close() }() // until replaced or stopped
	var clients sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		clients.Go(func() { echo(c) })
	}
	clients.Wait() // whom this process accepted, it answers
}

// echo is the service: it takes all the time that the client takes.
func echo(c net.Conn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}
