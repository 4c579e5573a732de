package systemd_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

func init() {
	// A process of another user that fills the relay's queue and sends.
	mains["flood"] = func() {
		if err := syscall.Setuid(65534); err != nil {
			fmt.Println("flooded", err)
			return
		}
		flood := func(n int) error {
			var held []net.Conn
			for range n {
				c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: os.Args[1]})
				if err != nil {
					return err
				}
				if len(held) > 0 { // an error means that it was let go already
					_, _ = c.Write([]byte("STATUS=I am another\nMAINPID=1\nREADY=1"))
				}
				held = append(held, c)
			}
			_, err := held[0].Read(make([]byte, 1)) // returns when the connection is closed
			return err
		}
		fmt.Println("flooded", flood(5000)) // more than any queue holds
		_, _ = os.Stdin.Read(make([]byte, 1))
		fmt.Println("flooded again", flood(100))
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
}

// A process of another user cannot keep the successor from the relay, and systemd
// gets nothing of what it sends.
func TestRelayFlood(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	m := newManager(t, socketPath(t))
	_, opts, _ := hooked(t, m)
	c := prepare(t, m, opts)
	p := program(t, "flood", nil, relayAddress(c))
	defer func() { p.in.Close(); p.wait() }()
	p.expect("flooded EOF")
	n, _ := successor(t, m, c)
	if _, err := p.in.Write([]byte("\n")); err != nil { // now that the successor is connected
		t.Fatal(err)
	}
	p.expect("flooded again EOF")
	if err := n.Status("warm"); err != nil {
		t.Fatal(err)
	}
	m.hasAll() // it waits at the relay, which the successor has not lost
	go opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: os.Getpid(), Generation: 1})
	m.gets("STATUS=warm")
	m.gets("MAINPID=" + strconv.Itoa(os.Getpid()) + "\nREADY=1")
	m.barrier()()
	m.hasAll()
}

// Send sends lines for which there is no method, and refuses those that the
// package itself sends.
func TestSend(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, _, _ := hooked(t, m)
	if err := n.Send("ERRNO=2\nX_MINE=1\n"); err != nil {
		t.Fatal(err)
	}
	m.gets("ERRNO=2\nX_MINE=1")
	for _, lines := range []string{"", "x", "=1", "READY=1", "A=b\nMAINPID=1", "STOPPING=1", "A=b\n\nC=d"} {
		if err := n.Send(lines); err == nil || !strings.HasPrefix(err.Error(), "systemd: send: the line ") {
			t.Errorf("Send(%q): %v; want an error that names the line", lines, err)
		}
	}
	m.hasAll()
}
