package proctest

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// Triggered is a daemon with all triggers. They are the sockets $DIR/upgrade,
// $DIR/stop, $DIR/partial and $DIR/take, and the signals SIGHUP, SIGTERM and
// SIGUSR1 for an upgrade, a stop and a partial stop.
var Triggered = Spec{
	Listen: TCP.Listen,
	Wait:   true,
	Options: ecdysis.Options{
		UpgradeSignals:     []os.Signal{syscall.SIGHUP},
		StopSignals:        []os.Signal{syscall.SIGTERM},
		PartialStopSignals: []os.Signal{syscall.SIGUSR1},
		UpgradeSocket:      "$DIR/upgrade",
		StopSocket:         "$DIR/stop",
		PartialStopSocket:  "$DIR/partial",
		TakeoverSocket:     "$DIR/take",
	},
}

// Reply is what a control socket answers about p, if p is of this generation.
func (p *Proc) Reply(generation int) ecdysis.Reply {
	return ecdysis.Reply{PID: p.PID, Generation: generation}
}

// InWait returns when Upgrader.Wait runs in p and catches signals. Only the stack
// of its goroutine shows this.
func (p *Proc) InWait() { p.T.Helper(); callInWait.On(p) }

var waits = regexp.MustCompile(`\[select[^\n]*\n[^\n]*\*Upgrader\)\.Wait\(`)

var callInWait = Define("in Wait", func(*Daemon, None) (None, error) {
	for stacks := make([]byte, 1<<20); !waits.Match(stacks[:runtime.Stack(stacks, true)]); {
		time.Sleep(time.Millisecond)
	}
	return None{}, nil
})

// BeginRequest calls ecdysis.Request on a goroutine of its own, because a request
// for a stop returns when the process has exited. The function that it returns
// waits for the results.
func BeginRequest(t testing.TB, path string) (wait func() (ecdysis.Reply, error)) {
	t.Helper()
	type result struct {
		reply ecdysis.Reply
		err   error
	}
	ch := make(chan result, 1)
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	go func() {
		defer cancel()
		reply, err := ecdysis.Request(ctx, path)
		ch <- result{reply, err}
	}()
	return func() (ecdysis.Reply, error) { r := <-ch; return r.reply, r.err }
}

// A Client is a connection to a control socket, for tests of each byte.
type Client struct {
	net.Conn
	T testing.TB

	r *bufio.Reader
}

// Connect connects to a control socket.
func Connect(t testing.TB, path string) *Client {
	t.Helper()
	c, err := net.DialTimeout("unix", path, Patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		t.Fatal(err)
	}
	return &Client{c, t, bufio.NewReader(c)}
}

// Wants fails the test unless the next line is "ok" and this reply.
func (c *Client) Wants(r ecdysis.Reply) {
	c.T.Helper()
	c.WantsLine("ok " + r.String())
}

// WantsLine fails the test unless the next line is this one. The other end may
// send no more, and close.
func (c *Client) WantsLine(want string) {
	c.T.Helper()
	if line, err := c.r.ReadString('\n'); err != nil || line != want+"\n" {
		c.T.Fatalf("the answer is %q, %v; want %q", line, err, want)
	}
}

// HungUp fails the test unless the other end closes, and sends no more.
func (c *Client) HungUp() {
	c.T.Helper()
	if b, err := io.ReadAll(c.r); err != nil || len(b) > 0 {
		c.T.Fatalf("%q, %v; want the end", b, err)
	}
}
