// Package servertest takes a server through upgrades while its clients use it,
// and notices each request that is lost or processed twice. It is for the
// servers of others' libraries, each in a program and a module of its own.
//
// The server is a function that Run calls. Main makes the test binary run it, when a
// test has started the binary as a server:
//
//	func main() { servertest.Run(serve) }
//
//	func TestMain(m *testing.M) { servertest.Main(m, main) }
//
//	func Test(t *testing.T) {
//		s := servertest.Start(t, 1) // it listens at one address
//		s.Clients("short", 2, func(c *servertest.Client) error { … })
//		s.Upgrades()
//	}
package servertest

import (
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// dirVar names a directory that a test shares with the processes of its server.
const dirVar = "ECDYSIS_SERVERTEST_DIR"

// Files in that directory.
const (
	processed = "processed" // a line for each request
	fault     = "fault"     // what the next process does
)

// What a process does if it finds the word in the file fault.
const (
	exits    = "exit"      // exit before it is ready
	standsBy = "probation" // stand by after its own upgrade, until the successor ends
)

var (
	program func()
	role    = proctest.DefineRole("server", func() { program() })
)

// Main is what TestMain calls. The test binary is the server when the test
// starts it as such.
func Main(m *testing.M, main func()) {
	program = main
	proctest.Main(m)
}

// Run runs a server. It calls serve with an Upgrader that upgrades on SIGHUP,
// stops on SIGTERM, and ends accepting on SIGUSR1. It exits with status 1 if
// serve returns an error.
//
// When a successor on probation gets SIGUSR1, serve ends its clients well. The
// process exits without a message to its predecessor, which takes the service back.
func Run(serve func(u *ecdysis.Upgrader) error) {
	log.SetPrefix(fmt.Sprintf("[%d] ", os.Getpid()))
	log.SetFlags(log.Lmicroseconds | log.Lmsgprefix)
	opts := ecdysis.Options{
		UpgradeSignals:     []os.Signal{syscall.SIGHUP},
		StopSignals:        []os.Signal{syscall.SIGTERM},
		PartialStopSignals: []os.Signal{syscall.SIGUSR1},
		Notify:             func(e ecdysis.Event) { log.Print(e) },
	}
	switch nextFault() {
	case exits:
		os.Exit(3)
	case standsBy:
		opts.Probation = time.Hour
	}
	u, err := ecdysis.New(opts)
	if err == nil {
		err = serve(u)
	}
	if err != nil {
		log.Fatal("failed: ", err)
	}
	log.Print("ended")
}

func path(name string) string { return filepath.Join(os.Getenv(dirVar), name) }

// nextFault returns the fault for this process, and removes it from the directory.
func nextFault() string {
	b, err := os.ReadFile(path(fault))
	if err != nil {
		return ""
	}
	_ = os.Remove(path(fault))
	return string(b)
}

// Listening tells the test an address. A server calls it for each of its
// addresses, in the order in which the test has them.
func Listening(a net.Addr) { log.Print("listening at ", a) }

// Processed records that this process has processed a client's request. A server
// calls it once for each request.
func Processed(token string) {
	f, err := os.OpenFile(path(processed), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		log.Fatal("failed: ", err)
	}
	_, err = f.WriteString(token + "\n") // one call, so that lines stay whole
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		log.Fatal("failed: ", err)
	}
}
