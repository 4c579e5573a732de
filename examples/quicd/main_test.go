package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/quic-go/quic-go"
)

const childVar = "QUICD_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A connection stays with its process through an upgrade, and that process exits
// when the connection has ended.
func TestUpgrade(t *testing.T) {
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := free.LocalAddr().String()
	free.Close()
	cmd := exec.Command(os.Args[0], "-listen", to)
	cmd.Env = append(os.Environ(), childVar+"=1")
	d := proctest.Run(t, cmd)
	p := d.Ready(0)
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	connect := func() (*quic.Conn, func(pid int)) {
		c, err := quic.DialAddr(ctx, to, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"echo"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.OpenStreamSync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.SetDeadline(time.Now().Add(proctest.Patience))
		answers := bufio.NewReader(s)
		return c, func(pid int) {
			t.Helper()
			fmt.Fprintln(s, "hello")
			if got, err := answers.ReadString('\n'); err != nil || got != fmt.Sprintf("%d: hello\n", pid) {
				t.Fatalf("%q, %v; want the answer of process %d", got, err, pid)
			}
		}
	}
	c, says := connect()
	says(p.Pid)
	if err := p.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s := d.Ready(1)
	d.Await(`upgraded by signal`)
	for range 10 {
		says(p.Pid)
	}
	c2, says2 := connect()
	says2(s.Pid)
	says(p.Pid)
	_ = c.CloseWithError(0, "")
	says2(s.Pid) // the successor has forwarded the end of the first connection by then
	_ = c2.CloseWithError(0, "")
	if err := s.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if state := d.End(); !state.Success() {
		t.Errorf("the first process ended by %v", state)
	}
}
