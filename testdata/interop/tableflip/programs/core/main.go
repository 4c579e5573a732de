// Command core is the daemon as one that calls package ecdysis writes it.
package main

import (
	"errors"
	"flag"
	"io"
	"io/fs"
	"log"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/tableflip"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// kept is the name under which a tableflip process hands on a connection.
const kept = "conn tcp kept"

func main() {
	unix := flag.String("unix", "", "`path` of the Unix socket")
	lock := flag.String("lock", "", "`path` of the lock file")
	pidFile := flag.String("pid-file", "", "`path` of the PID file")
	timeout := flag.Duration("timeout", 0, "`time` for an upgrade")
	flag.Parse()
	line.Point("begun")

	u, err := tableflip.Inherit(ecdysis.Options{
		PIDFile:        *pidFile,
		UpgradeTimeout: *timeout,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify: func(e ecdysis.Event) {
			if e.Kind == ecdysis.EventReady {
				line.Point("told") // is next
			}
			if e.Err != nil {
				line.Say("%s", e)
			}
		},
	})
	if err != nil {
		log.Fatalln("can't begin:", err)
	}
	line.Point("inherited")
	var clients sync.WaitGroup
	serve := func(c net.Conn) {
		if line.Serve(c) {
			if err := u.AddConn(kept, c); err != nil {
				log.Fatalln("can't keep:", err)
			}
			io.WriteString(c, line.Answer())
			c.Close()
		}
	}

	tcp, err := u.Listener("listener tcp 127.0.0.1:0")
	if errors.Is(err, fs.ErrNotExist) {
		tcp, err = u.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	local, err := u.Listen("unix", *unix)
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	udp, err := u.PacketConn("packet udp 127.0.0.1:0")
	if errors.Is(err, fs.ErrNotExist) {
		udp, err = u.ListenPacket("udp", "127.0.0.1:0")
	}
	if err != nil {
		log.Fatalln("can't listen:", err)
	}

	how := "inherited"
	file, err := u.File("lock")
	if errors.Is(err, fs.ErrNotExist) {
		how = "new"
		file, err = os.OpenFile(*lock, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err == nil {
		err = u.AddFile("lock", file)
	}
	if err == nil {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		log.Fatalln("no lock:", err)
	}
	line.Say("lock %s", how)
	client, err := u.Conn(kept)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Fatalln("no connection:", err)
	}

	var accepting sync.WaitGroup
	for _, ln := range []net.Listener{tcp, local} {
		accepting.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				clients.Go(func() { serve(c) })
			}
		})
	}
	accepting.Go(func() {
		for b := make([]byte, 100); ; {
			_, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			if _, err := udp.WriteTo([]byte(line.Answer()), from); err != nil {
				log.Fatalln("write:", err)
			}
		}
	})

	line.Point("listened")
	if err := u.Ready(); err != nil {
		log.Fatalln("not ready:", err)
	}
	if client != nil {
		clients.Go(func() { serve(client) })
	}
	line.Say("ready tcp %s unix %s udp %s", tcp.Addr(), *unix, udp.LocalAddr())
	u.Wait()
	tcp.Close()
	local.Close()
	udp.SetReadDeadline(past)
	accepting.Wait()
	clients.Wait()
	line.Say("done")
}
