// Echod sends back what its clients send, over TCP and over a Unix socket. It can
// be replaced by a new version of itself, and clients do not notice.
//
// It is meant to be copied. Put your own protocol in the place of echo.
//
//	echod -tcp :7000 -unix /run/echod.sock -pidfile /run/echod.pid -control /run/echod
//
// SIGHUP starts the program again, from the file that is at its path by then. The
// running process hands over its listening sockets, serves its last clients for
// -drain at most, and exits. SIGTERM and SIGINT stop it in the same way, without a
// successor. A second signal ends it at once. SIGUSR1 ends accepting, and the
// process exits when its clients have gone.
//
// With -control other programs can request this, too. Echod itself can:
//
//	echod -control /run/echod -upgrade
//	echod -control /run/echod -stop
//
// Each command prints the result when it is known, and exits with status 0 or 1.
//
// An echod that is started with the -control directory of a running one takes
// everything over from it. The new one may have other flags, and run in another
// unit or container. The flag -unit names that unit. With it, a process that was
// taken over stays until it is told to stop, and takes nothing back when its
// supervisor restarts it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
)

var (
	tcpAddr  = flag.String("tcp", "127.0.0.1:7000", "TCP `address` to listen on; empty for none")
	unixPath = flag.String("unix", "", "`path` of a Unix socket to listen on; empty for none")
	pidFile  = flag.String("pidfile", "", "`path` of the PID file; empty for none")
	control  = flag.String("control", "", "existing `directory` for the control sockets; empty for none")
	limit    = flag.Duration("drain", 30*time.Second, "longest `time` to serve connected clients after the end of accepting")
	timeout  = flag.Duration("timeout", ecdysis.DefaultUpgradeTimeout, "longest `time` that a new process may take to become ready")
	standBy  = flag.Duration("probation", 0, "`time` in which the old process serves again if the new one ends")

	greet = flag.Bool("greet", false, "tell each client first which process serves it")
	unit  = flag.String("unit", "", "`name` of the container, pod or unit that this process belongs to; empty for none")

	askUpgrade = flag.Bool("upgrade", false, "make the process that runs with this -control upgrade itself, and exit")
	askStop    = flag.Bool("stop", false, "make the process that runs with this -control stop, and exit")
)

func main() {
	flag.Parse()
	log.SetPrefix(fmt.Sprintf("echod[%d] ", os.Getpid()))
	log.SetFlags(log.Ltime | log.Lmicroseconds | log.Lmsgprefix)
	// The reader of the log may go while clients are served, as a supervisor's pipe
	// does with the process that it has started. Without this call SIGPIPE would
	// then end the service at its next log line.
	signal.Ignore(syscall.SIGPIPE)
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
	reply, err := ecdysis.Request(context.Background(), socket(name))
	if err == nil {
		fmt.Println("ok", reply)
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
		Unit:               *unit,
		Notify:             func(e ecdysis.Event) { log.Print(e) },
	})
	if errors.Is(err, ecdysis.ErrRetired) {
		log.Print(err)
		log.Print("stopping by signal ", ecdysis.WaitRetired(syscall.SIGTERM, os.Interrupt))
		return nil
	}
	if err != nil {
		return err
	}

	// All steps that can fail come before Ready. Until then the predecessor, if
	// there is one, goes on serving. Fail makes it report the reason.
	if flag.NArg() > 0 || *limit < 0 {
		return u.Fail(errors.New("want no arguments but flags, and a -drain that is not negative; see echod -h"))
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

	srv := &drain.Server{Handler: echo}
	if *greet {
		srv.Handler = func(c net.Conn) {
			fmt.Fprintf(c, "pid=%d generation=%d\n", os.Getpid(), u.Generation())
			echo(c)
		}
	}
	for _, ln := range listeners {
		go srv.Serve(ln) // until Shutdown, because nothing else ends Accept
	}
	e := u.Wait() // until replaced or stopped
	ctx, cancel := context.WithTimeout(context.Background(), *limit)
	defer cancel()
	err = srv.Shutdown(ctx)
	if err != nil {
		log.Print(err) // says how many clients did not end in time
	} else {
		log.Print("all clients are served")
	}
	switch {
	case e.Kind == ecdysis.EventPartialStop:
		u.Stop()
	case e.Takeover && *unit != "":
		u.Wait() // until the supervisor stops this unit
	}
	return nil
}

// echo sends back what it reads until the client closes, the connection
// breaks, or Shutdown ends reading.
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
