// Command daemon hands on one of everything: a socket of TCP, of Unix and of
// UDP, a lock file, and a client's connection.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

// past is a deadline that has passed.
var past = time.Unix(1, 0)

func main() {
	unix := flag.String("unix", "", "`path` of the Unix socket")
	lock := flag.String("lock", "", "`path` of the lock file")
	pidFile := flag.String("pid-file", "", "`path` of the PID file")
	timeout := flag.Duration("timeout", 0, "`time` for an upgrade")
	flag.Parse()
	line.Point("begun")

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, UpgradeTimeout: *timeout})
	if err != nil {
		log.Fatalln("can't begin:", err)
	}
	defer upg.Stop()

	line.Point("inherited")
	var clients sync.WaitGroup
	serve := func(c net.Conn) {
		if line.Serve(c) {
			if err := upg.AddConn("tcp", "kept", c.(*net.TCPConn)); err != nil {
				log.Fatalln("can't keep:", err)
			}
			io.WriteString(c, line.Answer())
			c.Close()
		}
	}

	tcp, err := upg.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	local, err := upg.Listen("unix", *unix)
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	udp, err := upg.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatalln("can't listen:", err)
	}

	if line.Ordered("more") {
		for _, address := range []string{*unix + "-more", *unix + "-others"} {
			if _, err := upg.Listen("unix", address); err != nil {
				log.Fatalln("can't listen:", err)
			}
		}
		if err := upg.AddFile("more", os.Stdin); err != nil {
			log.Fatalln("can't add:", err)
		}
	}

	file, err := upg.File("lock")
	if err != nil {
		log.Fatalln("no lock:", err)
	}
	how := "inherited"
	if file == nil {
		if file, err = os.OpenFile(*lock, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			log.Fatalln("no lock:", err)
		}
		if err := upg.AddFile("lock", file); err != nil {
			log.Fatalln("can't hand the lock on:", err)
		}
		how = "new"
	}
	// The lock is the open file's, so that a process which has inherited it has
	// the lock, and any other is refused.
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		log.Fatalln("no lock:", err)
	}
	line.Say("lock %s", how)
	kept, err := upg.Conn("tcp", "kept")
	if err != nil {
		log.Fatalln("no connection:", err)
	}

	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGHUP, syscall.SIGTERM)
	go func() {
		for s := range sig {
			if s == syscall.SIGTERM {
				upg.Stop()
				return
			}
			if err := upg.Upgrade(); err != nil {
				line.Say("upgrade failed: %v", err)
			}
		}
	}()

	var accepting sync.WaitGroup
	for _, ln := range []net.Listener{tcp, local} {
		accepting.Go(func() {
			for {
				c, err := ln.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					log.Fatalln("accept:", err)
				}
				clients.Go(func() { serve(c) })
			}
		})
	}
	accepting.Go(func() {
		for b := make([]byte, 100); ; {
			_, from, err := udp.ReadFrom(b)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				log.Fatalln("read:", err)
			}
			if _, err := udp.WriteTo([]byte(line.Answer()), from); err != nil {
				log.Fatalln("write:", err)
			}
		}
	})

	line.Point("listened")
	if err := upg.Ready(); err != nil {
		log.Fatalln("not ready:", err)
	}
	if kept != nil {
		clients.Go(func() { serve(kept) })
	}
	line.Say("ready tcp %s unix %s udp %s", tcp.Addr(), *unix, udp.LocalAddr())
	if upg.HasParent() {
		go func() {
			if err := upg.WaitForParent(context.Background()); err != nil {
				log.Fatalln("wait for the parent:", err)
			}
			line.Say("alone")
		}()
	}
	<-upg.Exit()
	tcp.Close()
	local.Close()
	udp.SetReadDeadline(past)
	accepting.Wait()
	clients.Wait()
	line.Say("done")
}
