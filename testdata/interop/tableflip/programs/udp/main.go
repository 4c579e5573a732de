// Command udp answers packets.
package main

import (
	"errors"
	"flag"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

// past is a deadline that has passed.
var past = time.Unix(1, 0)

func main() {
	network := flag.String("network", "udp", "`network` to listen on")
	address := flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	flag.Parse()

	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		panic(err)
	}
	defer upg.Stop()

	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGHUP)
	go func() {
		for range sig {
			if err := upg.Upgrade(); err != nil {
				line.Say("upgrade failed: %v", err)
			}
		}
	}()

	conn, err := upg.ListenPacket(*network, *address)
	if err != nil {
		log.Fatalln("can't listen:", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 100); ; {
			_, from, err := conn.ReadFrom(b)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				log.Fatalln("read:", err)
			}
			if _, err := conn.WriteTo([]byte(line.Answer()), from); err != nil {
				log.Fatalln("write:", err)
			}
		}
	}()

	if err := upg.Ready(); err != nil {
		panic(err)
	}
	line.Say("ready %s %s", *network, conn.LocalAddr())
	<-upg.Exit()
	// A packet that was read is answered first.
	conn.SetReadDeadline(past)
	<-done
}
