package tableflip_test

import (
	"log"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/tableflip"
)

// This program calls package ecdysis itself. It takes over from a running process
// that uses github.com/cloudflare/tableflip, or this package.
func ExampleInherit() {
	u, err := tableflip.Inherit(ecdysis.Options{PIDFile: "/run/mydaemon.pid"})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listen("tcp", "localhost:8080")
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait() // until replaced or stopped
	ln.Close()
}
