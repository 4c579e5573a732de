package keeper_test

import (
	"flag"
	"log"
	"os"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/keeper"
)

// The program's first process stays while its generations change.
func ExampleStay() {
	pidFile := flag.String("pidfile", "/run/daemon.pid", "`path` of the PID file")
	flag.Parse()
	if err := keeper.Stay(*pidFile); err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        *pidFile,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
		Prepare: func(c *ecdysis.Command) error {
			c.Sibling = true // a child of the keeper
			return nil
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	// Listen and Serve as always.
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}
