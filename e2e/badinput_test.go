package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What cannot be meant is an error that names what is wrong and what would be
// right, and nothing is made.

// isPackets reports whether a network is ListenPacket's.
func isPackets(network string) bool {
	return strings.HasPrefix(network, "udp") || network == "unixgram"
}

// listenAs calls ListenWith or, for packets, ListenPacketWith.
func listenAs(u *ecdysis.Upgrader, packets bool, lc ecdysis.ListenConfig, network, address string) (io.Closer, error) {
	if packets {
		c, err := u.ListenPacketWith(lc, network, address)
		if c == nil {
			return nil, err
		}
		return c, err
	}
	ln, err := u.ListenWith(lc, network, address)
	if ln == nil {
		return nil, err
	}
	return ln, err
}

func TestListenBadInput(t *testing.T) {
	t.Parallel()
	u := proctest.Ours(t)
	dir := proctest.ShortDir(t)
	long := filepath.Join(dir, strings.Repeat("x", 120))
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := filepath.Join(dir, "s")
	type input struct {
		network, address string
		lc               ecdysis.ListenConfig
		says             []string
	}
	var none ecdysis.ListenConfig
	listeners := []input{
		{"", ":0", none, []string{"unknown network", "want tcp, tcp4, tcp6, unix or unixpacket"}},
		{"udp", ":0", none, []string{"udp", "want tcp"}},
		{"unixgram", s, none, []string{"unixgram", "want tcp"}},
		{"TCP", ":0", none, []string{"TCP", "want tcp"}},
		{"unix", s, ecdysis.ListenConfig{ReusePort: true}, []string{"ReusePort", "TCP"}},
	}
	packets := []input{
		{"", ":0", none, []string{"unknown network", "want udp, udp4, udp6 or unixgram"}},
		{"tcp", ":0", none, []string{"unknown network tcp", "want udp"}},
		{"unix", s, none, []string{"unknown network unix", "or unixgram"}},
		{"unixpacket", s, none, []string{"unknown network unixpacket", "or unixgram"}},
		{"UDP", ":0", none, []string{"UDP", "want udp"}},
		{"ip", "127.0.0.1", none, []string{"unknown network ip", "want udp"}},
		{"ip4:icmp", "127.0.0.1", none, []string{"unknown network ip4:icmp", "want udp"}},
		{"unixgram", s, ecdysis.ListenConfig{ReusePort: true}, []string{"ReusePort", "UDP"}},
		{"unixgram", s, ecdysis.ListenConfig{Backlog: 5}, []string{"Backlog is 5", "for connections"}},
		{"udp", "127.0.0.1:0", ecdysis.ListenConfig{Backlog: 5}, []string{"Backlog is 5", "for connections"}},
	}
	for _, n := range []string{"tcp", "udp"} {
		var taken io.Closer
		var address string
		var err error
		if n == "tcp" {
			var ln net.Listener
			if ln, err = net.Listen(n, "127.0.0.1:0"); err == nil {
				taken, address = ln, ln.Addr().String()
			}
		} else {
			var c net.PacketConn
			if c, err = net.ListenPacket(n, "127.0.0.1:0"); err == nil {
				taken, address = c, c.LocalAddr().String()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		of := &listeners
		if n == "udp" {
			of = &packets
		}
		*of = append(*of, []input{
			{n, "80", none, []string{"80", "missing port", "want host:port"}},
			{n, "::1:80", none, []string{"::1:80", "too many colons"}},
			{n, ":99999", none, []string{"99999", "invalid port"}},
			{n, ":-1", none, []string{"-1", "invalid port"}},
			{n, ":no such service", none, []string{"no such service"}},
			{n + "4", "[::1]:0", none, []string{"::1"}},
			{n + "6", "127.0.0.1:0", none, []string{"127.0.0.1"}},
			{n, "[fe80::1%nosuchif]:0", none, []string{"nosuchif"}},
			{n, "192.0.2.1:0", none, []string{"192.0.2.1", "bind"}},
			{n, address, none, []string{address, "address already in use"}},
			{n, "127.0.0.1:0", ecdysis.ListenConfig{Mode: 0o600}, []string{"Mode", "Unix"}},
			{n, "127.0.0.1:0", ecdysis.ListenConfig{Backlog: -1}, []string{"Backlog is -1"}},
		}...)
	}
	for _, n := range unixNetworks() {
		of := &listeners
		if n == "unixgram" {
			of = &packets
		}
		*of = append(*of, []input{
			{n, "", none, []string{"address is empty", "want the path"}},
			{n, "a\x00b", none, []string{`"a\x00b"`, "zero byte"}},
			{n, long, none, []string{long, fmt.Sprint(len(long)), "at most"}},
			{n, file, none, []string{file, "not a socket"}},
			{n, dir, none, []string{dir, "not a socket"}},
			{n, filepath.Join(dir, "no", "such"), none, []string{"no/such", "no such file"}},
			{n, s, ecdysis.ListenConfig{Mode: os.ModeSetuid | 0o600}, []string{"Mode", "permission bits", "0o660"}},
			{n, s, ecdysis.ListenConfig{Mode: os.ModeSocket | 0o600}, []string{"Mode", "permission bits"}},
			{n, s, ecdysis.ListenConfig{ReusePort: true}, []string{"ReusePort"}},
		}...)
		if runtime.GOOS == "linux" {
			*of = append(*of, input{n, "@ecdysis-test-mode", ecdysis.ListenConfig{Mode: 0o600}, []string{"Mode"}})
		}
	}
	for i, list := range [][]input{listeners, packets} {
		for _, c := range list {
			what := fmt.Sprintf("%s(%+v, %q, %q)", []string{"ListenWith", "ListenPacketWith"}[i], c.lc, c.network, c.address)
			got, err := listenAs(u, i == 1, c.lc, c.network, c.address)
			if got != nil {
				got.Close()
				t.Errorf("%s: %v, %v", what, got, err)
			}
			var op *net.OpError
			if !errors.As(err, &op) || op.Op != "listen" || op.Net != c.network {
				t.Errorf("%s: %v; want a net.OpError", what, err)
				continue
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%s: %v; want that it says %q", what, err, s)
				}
			}
		}
	}
	var unknown net.UnknownNetworkError
	if _, err := u.Listen("udp", ":0"); !errors.As(err, &unknown) || string(unknown) != "udp" {
		t.Errorf("Listen: %v; want net.UnknownNetworkError", err)
	}
	if _, err := u.ListenPacket("tcp", ":0"); !errors.As(err, &unknown) || string(unknown) != "tcp" {
		t.Errorf("ListenPacket: %v; want net.UnknownNetworkError", err)
	}
	if _, err := u.ListenSeqpacket(""); err == nil {
		t.Error("ListenSeqpacket of an empty path: no error")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// What Control refuses is closed, and never bound.
func TestListenControlRefuses(t *testing.T) {
	t.Parallel()
	u := proctest.Ours(t)
	dir := proctest.ShortDir(t)
	refused := errors.New("from Control")
	cases := [][4]string{ // asked for, and what Control is told
		{"tcp", "127.0.0.1:0", "tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0", "tcp6", "[::1]:0"},
		{"udp", "127.0.0.1:0", "udp4", "127.0.0.1:0"}, {"udp6", "[::1]:0", "udp6", "[::1]:0"}, {"udp", ":0", "udp6", ":0"},
	}
	for _, n := range unixNetworks() {
		cases = append(cases, [4]string{n, filepath.Join(dir, n), n, filepath.Join(dir, n)})
	}
	for _, c := range cases {
		var before, after syscall.Stat_t
		number := -1
		lc := ecdysis.ListenConfig{Control: func(network, address string, rc syscall.RawConn) error {
			if network != c[2] || address != c[3] {
				t.Errorf("Control(%q, %q); want %q", network, address, c[2:])
			}
			if err := rc.Control(func(fd uintptr) { number = int(fd) }); err != nil || syscall.Fstat(number, &before) != nil {
				t.Errorf("RawConn.Control: %d, %v", number, err)
			}
			return refused
		}}
		if got, err := listenAs(u, isPackets(c[0]), lc, c[0], c[1]); got != nil || !errors.Is(err, refused) {
			t.Errorf("%s: %v, %v; want the error of Control", c[0], got, err)
		}
		if syscall.Fstat(number, &after) == nil && after.Ino == before.Ino && after.Dev == before.Dev {
			t.Errorf("%s: the socket that Control has refused is still open", c[0])
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// badOptions calls New with options that cannot be meant, and returns what is
// wrong with its errors.
var badOptions = proctest.Define("bad options", func(*proctest.Daemon, proctest.None) (wrong []string, err error) {
	for _, c := range []struct {
		options ecdysis.Options
		says    []string
	}{
		{ecdysis.Options{UpgradeTimeout: -1}, []string{"UpgradeTimeout is -1ns", "want 0"}},
		{ecdysis.Options{Probation: -time.Second}, []string{"Probation is -1s", "want 0"}},
		{ecdysis.Options{PIDFile: "/tmp/"}, []string{`PIDFile is "/tmp/"`}},
		{ecdysis.Options{StopSignals: []os.Signal{syscall.SIGKILL}}, []string{"StopSignals", "SIGKILL"}},
		{ecdysis.Options{UpgradeSignals: []os.Signal{nil}}, []string{"UpgradeSignals", "nil"}},
		{ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}, StopSignals: []os.Signal{syscall.SIGHUP}}, []string{"hangup is in StopSignals"}},
	} {
		u, err := ecdysis.New(c.options)
		if err == nil || u != nil {
			wrong = append(wrong, fmt.Sprintf("New(%+v): %v, %v", c.options, u, err))
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				wrong = append(wrong, fmt.Sprintf("New(%+v): %v; want that it says %q", c.options, err, s))
			}
		}
	}
	return wrong, nil
})

// Options that cannot be meant change nothing.
func TestNewBadInput(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP.At(proctest.AtStart, badOptions.Do()))
	wrong, err := badOptions.At(p, proctest.AtStart)
	for _, w := range wrong {
		t.Error(w)
	}
	if err != nil {
		t.Error(err)
	}
	p.Serves()
}

var newAgain = proctest.Define("New again", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	_, err := ecdysis.New(ecdysis.Options{})
	return proctest.None{}, err
})

// A process has one Upgrader.
func TestSecondNew(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	proctest.Want(t, newAgain.Err(p), nil, "one Upgrader")
	p.Serves()
	p.Upgrade().Serves()
}
