package e2e

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What makes Accept return, and what does not. Reads of packets are in
// packet_test.go.

// acceptWithin sets a deadline and accepts a connection of the first socket.
var acceptWithin = proctest.Define("accept within", func(d *proctest.Daemon, limit time.Duration) (proctest.None, error) {
	err := d.Socket(0).(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(limit))
	if err == nil {
		_, err = d.Listener(0).Accept()
	}
	return proctest.None{}, err
})

// The deadline is the caller's, before Ready, while serving, and over an
// upgrade that fails. Nothing else ends Accept.
func TestAcceptDeadline(t *testing.T) {
	t.Parallel()
	listen := map[string]string{"tcp": "127.0.0.1:0", "unix": "$DIR/sock", "unixpacket": "$DIR/sock"}
	if runtime.GOOS == "darwin" {
		delete(listen, "unixpacket")
	}
	for network, address := range listen {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			spec := proctest.Spec{NoAccept: true}.And(network, address)
			p := proctest.New(t, spec.Hold(proctest.AtListened), spec.At(proctest.On(ecdysis.EventReady), proctest.Exit(1))).Launch()
			p.At(proctest.AtListened)
			a := socketAddr.On(p, 0)
			dial := func() {
				t.Helper()
				c, err := a.Dial()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
			}
			late := func(when string) {
				t.Helper()
				if err := acceptWithin.Err(p, time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("Accept %s: %v; want that the deadline has passed", when, err)
				}
			}
			late("before Ready")
			dial() // and waits in the backlog
			late("before Ready, with a client there")
			p.Resume()
			p.At(proctest.AtServing)
			acceptWithin.On(p, time.Minute) // the client that waited
			late("while serving")
			// The call that waits over a failed handover sees its own deadline and
			// nothing of the upgrade.
			call := acceptWithin.Begin(p, time.Minute)
			p.FailUpgrade(ecdysis.StepHandover, io.ErrUnexpectedEOF)
			dial()
			if err := call.Err(); err != nil {
				t.Errorf("over a failed upgrade: %v", err)
			}
		})
	}
}

// A process that is out of descriptors waits, and serves when it has some.
func TestAcceptWaitsOutEMFILE(t *testing.T) {
	t.Parallel()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	p := proctest.New(t, proctest.TCP).Start(func(cmd *exec.Cmd) { // a limit of its own
		cmd.Args = append([]string{"sh", "-c", `ulimit -n 40; exec "$0" "$@"`}, cmd.Args...)
		cmd.Path = sh
	})
	var clients []net.Conn
	for range 60 { // more than it can have; the rest waits in the backlog
		c, err := p.Addr(0).Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	p.Answers(clients[0])
	last := clients[len(clients)-1]
	for _, c := range clients[:len(clients)-1] {
		c.Close()
	}
	p.Answers(last) // when descriptors are free again
}
