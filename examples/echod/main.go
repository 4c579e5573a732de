// Echod sends back what its clients send, over TCP and over a Unix socket, and
// can be replaced by a new version of itself without a client noticing.
//
// It is meant to be copied: put your own protocol in the place of echo.
//
//	echod -tcp :7000 -unix /run/echod.sock -pidfile /run/echod.pid -control /run/echod
//
// SIGHUP starts the program anew, whatever file is in its place by then. The
// running process hands over its listening sockets, serves the clients that
// it has, for -drain at most, and exits. SIGTERM and SIGINT stop it the same
// way, without a successor; a second one ends it at once. SIGUSR1 ends
// accepting alone: the process exits when its clients have gone.
//
// With -control it can be told so by other programs, too, this one among them:
//
//	echod -control /run/echod -upgrade
//	echod -control /run/echod -stop
//
// print how it went when it is done, and exit with status 0 or 1. An echod that
// is started with the directory of one that runs takes everything over from
// it: with other flags, from another unit or container.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

var (
	tcpAddr  = flag.String("tcp", "127.0.0.1:7000", "TCP `address` to listen on; empty: none")
	unixPath = flag.String("unix", "", "`path` of a Unix socket to listen on; empty: none")
	pidFile  = flag.String("pidfile", "", "`path` of the PID file; empty: none")
	control  = flag.String("control", "", "existing `directory` for the control sockets; empty: none")
	drain    = flag.Duration("drain", 30*time.Second, "longest `time` to serve connected clients after the end of accepting")
	timeout  = flag.Duration("timeout", ecdysis.DefaultUpgradeTimeout, "longest `time` that a new process may take to become ready")
	standBy  = flag.Duration("probation", 0, "`time` for which the old process comes back if the new one ends")

	askUpgrade = flag.Bool("upgrade", false, "make the process that runs with this -control upgrade itself, and exit")
	askStop    = flag.Bool("stop", false, "make it stop, and exit")
)

func main() {
	flag.Parse()
	log.SetPrefix(fmt.Sprintf("echod[%d] ", os.Getpid()))
	log.SetFlags(log.Ltime | log.Lmicroseconds | log.Lmsgprefix)
	act := run
	if *askUpgrade || *askStop {
		act = ask
	}
	if err := act(); err != nil {
		log.Fatal(err)
	}
}

// socket returns the path of a control socket.
func socket(name string) string {
	if *control == "" {
		return ""
	}
	return filepath.Join(*control, name)
}

// ask is the client of a control socket.
func ask() error {
	name := "upgrade"
	if *askStop {
		name = "stop"
	}
	if *askUpgrade && *askStop || *control == "" || flag.NArg() > 0 {
		return errors.New("want -control with a directory, one of -upgrade and -stop, and no arguments; see echod -h")
	}
	line, err := ecdysis.Request(context.Background(), socket(name))
	if err == nil {
		fmt.Println("ok", line)
	}
	return err
}

func run() error {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeTimeout:     *timeout,
		Probation:          *standBy,
		PIDFile:            *pidFile,
		UpgradeSignals:     []os.Signal{syscall.SIGHUP},
		StopSignals:        []os.Signal{syscall.SIGTERM, os.Interrupt},
		PartialStopSignals: []os.Signal{syscall.SIGUSR1},
		UpgradeSocket:      socket("upgrade"),
		StopSocket:         socket("stop"),
		PartialStopSocket:  socket("partial-stop"),
		TakeoverSocket:     socket("takeover"),
		Notify:             func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		return err
	}

	// Whatever can fail comes before Ready. Until then an older process, if
	// there is one, goes on serving; Fail makes it report the reason.
	if flag.NArg() > 0 || *drain < 0 {
		return u.Fail(errors.New("there are no arguments beside the flags, and -drain is not negative; see echod -h"))
	}
	var listeners []net.Listener
	for _, a := range [][2]string{{"tcp", *tcpAddr}, {"unix", *unixPath}} {
		if a[1] == "" {
			continue
		}
		ln, err := u.Listen(a[0], a[1])
		if err != nil {
			return u.Fail(err)
		}
		log.Printf("listening on %s %s", a[0], ln.Addr())
		listeners = append(listeners, ln)
	}
	if len(listeners) == 0 {
		return u.Fail(errors.New("neither -tcp nor -unix names an address"))
	}
	if err := u.Ready(); err != nil {
		return err
	}

	s := server{clients: make(map[net.Conn]bool)}
	for _, ln := range listeners {
		s.accepting.Go(func() { s.accept(ln) })
	}
	u.Wait() // until replaced or stopped: from here on Accept fails
	s.finish(*drain)
	u.Stop() // says goodbye after a partial stop; nothing after the others
	log.Print("all clients are served")
	return nil
}

// A server knows its clients, so that it can end.
type server struct {
	accepting sync.WaitGroup // accept loops
	serving   sync.WaitGroup // one for each client

	mu      sync.Mutex
	clients map[net.Conn]bool
}

// accept serves every client of ln until ln is closed.
func (s *server) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return // nothing but the end of accepting
		}
		s.mu.Lock()
		s.clients[c] = true
		s.mu.Unlock()
		s.serving.Go(func() {
			echo(c)
			s.mu.Lock()
			delete(s.clients, c)
			s.mu.Unlock()
			c.Close()
		})
	}
}

// finish returns when the clients have gone, or when their time is over: then
// no more is read from them, and what was read is answered within a second.
func (s *server) finish(limit time.Duration) {
	s.accepting.Wait() // first, so that no client is missed
	end := time.Now().Add(limit)
	s.mu.Lock()
	for c := range s.clients {
		_ = c.SetReadDeadline(end)
		_ = c.SetWriteDeadline(end.Add(time.Second))
	}
	s.mu.Unlock()
	s.serving.Wait()
}

// echo sends back what it reads until the client closes, the connection
// breaks, or finish has set an end.
func echo(c net.Conn) {
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}
