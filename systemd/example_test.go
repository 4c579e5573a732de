package systemd_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/systemd"
)

// address is where the examples listen.
var address = "127.0.0.1:7000"

// A whole daemon of Type=notify-reload or Type=notify, with a socket unit or
// without one. It runs without systemd, too.
func Example() {
	opts := ecdysis.Options{
		UpgradeSignals: []os.Signal{syscall.SIGHUP}, // systemctl reload sends it
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	if _, err := systemd.Setup(&opts); err != nil && !errors.Is(err, systemd.ErrNoSocket) {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	if err := systemd.Adopt(u); err != nil {
		log.Fatal(u.Fail(err))
	}
	ln, err := u.Listen("tcp", address) // the socket unit's socket, if it has this address
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil { // systemctl start or reload returns
		log.Fatal(err)
	}
	go func() { u.Wait(); ln.Close() }() // until replaced or stopped
	var clients sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		clients.Go(func() { serve(c) })
	}
	clients.Wait()
}

// serve is the service.
func serve(c net.Conn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

// A socket unit has FileDescriptorName=web and several ListenStream=. The program
// serves all of them, whatever their addresses are.
func ExampleAdopt() {
	u, err := ecdysis.New(ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}})
	if err != nil {
		log.Fatal(err)
	}
	if err := systemd.Adopt(u); err != nil {
		log.Fatal(u.Fail(err))
	}
	var listeners []net.Listener
	for {
		ln, err := u.Listener("web") // each call returns the next socket
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		listeners = append(listeners, ln)
	}
	if len(listeners) == 0 {
		log.Fatal(u.Fail(errors.New("no sockets: is the socket unit enabled?")))
	}
	log.Print("serving on ", len(listeners), " sockets")
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}

// systemd keeps the sockets of this daemon. They survive systemctl restart and a
// crash.
func ExampleNotifier_Store() {
	opts := ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}}
	n, err := systemd.Setup(&opts)
	if err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	if err := n.Restore(u); err != nil { // in the place of Adopt
		log.Fatal(u.Fail(err))
	}
	ln, err := u.Listen("tcp", address) // the socket that was kept, if there is one
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := n.Store(map[string]any{"web": ln}); err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}

// systemd restarts a unit with WatchdogSec= unless its program sends a sign of
// life in time.
func ExampleNotifier_Watchdog() {
	var opts ecdysis.Options
	n, err := systemd.Setup(&opts)
	if err != nil && !errors.Is(err, systemd.ErrNoSocket) {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	if interval, ping := n.Watchdog(); interval > 0 {
		go func() {
			for range time.Tick(interval / 2) {
				if !well() {
					continue
				}
				if err := ping(); err != nil && err != ecdysis.ErrUpgraded {
					log.Print(err)
				}
			}
		}()
	}
	u.Wait()
}

// well reports whether the program works, as far as it can tell.
func well() bool { return true }

// A start that takes long reports its progress, and asks for more time.
func ExampleNotifier_Status() {
	var opts ecdysis.Options
	n, err := systemd.Setup(&opts)
	if err != nil && !errors.Is(err, systemd.ErrNoSocket) {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	for i := range 3 {
		// Without systemd these do nothing but return ErrNoSocket.
		_ = n.Status(fmt.Sprintf("reading part %d of 3", i+1))
		_ = n.ExtendTimeout(time.Minute)
		read(i)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	_ = n.Status("") // the reading is over
	u.Wait()
}

// read is the part of the start that takes long.
func read(int) {}
