package e2e

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Which inherited socket a call of Listen or ListenPacket finds.

// unixNetworks are the networks whose addresses are paths.
func unixNetworks() []string {
	if runtime.GOOS == "darwin" {
		return []string{"unix", "unixgram"}
	}
	return []string{"unix", "unixgram", "unixpacket"}
}

// portOf is the port of p's i-th address.
func portOf(p *proctest.Proc, i int) string {
	p.T.Helper()
	_, port, err := net.SplitHostPort(p.Addr(i).Address)
	if err != nil {
		p.T.Fatal(err)
	}
	return port
}

// What the words resolve to decides, and among equals the order. TCP and UDP
// are apart.
func TestMatchingPorts(t *testing.T) {
	t.Parallel()
	first := [][2]string{ // what follows "tcp" or "udp", and the address
		{"", "127.0.0.1:0"}, {"", "127.0.0.1:0"}, {"", "127.0.0.1:0"}, {"", "localhost:0"},
		{"6", ":0"}, {"", ":0"}, {"", ":0"}, {"", ":0"}, {"4", ":0"}, {"6", "[::1]:0"},
	}
	second := func(port func(int) string) [][2]string {
		return [][2]string{
			{"4", "localhost:0"},         // 0: the first of 127.0.0.1:0
			{"", "127.0.0.1:" + port(1)}, // 1: by its port
			{"", "127.0.0.1:0"},          // 2: what is left
			{"4", "127.0.0.1:0"},         // 3: the last one
			{"", "[::]:0"},               // 5: both versions of IP, the first of these
			{"6", "[::]:" + port(4)},     // 4: IPv6 alone
			{"", ":" + port(6)},          // 6: likewise, by its port
			{"", "[::]:" + port(7)},      // 7: likewise
			{"4", "0.0.0.0:" + port(8)},  // 8
			{"", "[::1]:" + port(9)},     // 9
		}
	}
	var spec, renamed proctest.Spec
	protocols := []string{"tcp", "udp"}
	for _, n := range protocols {
		for _, l := range first {
			spec = spec.And(n+l[0], l[1])
		}
	}
	p := proctest.Start(t, spec)
	for i, n := range protocols {
		for _, l := range second(func(j int) string { return portOf(p, i*len(first)+j) }) {
			renamed = renamed.And(n+l[0], l[1])
		}
	}
	p.Chain.Specs(renamed)
	addrs, inodes := slices.Clone(p.Addrs()), p.Inodes()
	s := p.Upgrade()
	s.HasUnclaimed()
	for i := 4; i < len(addrs); i += len(first) {
		addrs[i], addrs[i+1] = addrs[i+1], addrs[i]
		inodes[i], inodes[i+1] = inodes[i+1], inodes[i]
	}
	same := func(p *proctest.Proc) {
		t.Helper()
		a, n := p.Addrs(), p.Inodes()
		for i, l := range renamed.Listen {
			if a[i] != addrs[i] || n[i] != inodes[i] {
				t.Errorf("generation %d: %s %s is socket %d at %v; want socket %d at %v", p.Generation(), l.Network, l.Address, n[i], a[i], inodes[i], addrs[i])
			}
		}
	}
	same(s)
	s.Serves()
	g := s.Upgrade()
	same(g)
	g.Serves()
}

// Equal words find a socket before an equal address does, in any order.
func TestMatchingWords(t *testing.T) {
	t.Parallel()
	one, two := "127.0.0.1:0", "localhost:0"
	p := proctest.Start(t, proctest.Spec{}.And("tcp4", one).And("tcp4", two), proctest.Spec{}.And("tcp4", two).And("tcp4", one))
	inodes := p.Inodes()
	slices.Reverse(inodes)
	s := p.Upgrade()
	if got := s.Inodes(); !slices.Equal(got, inodes) {
		t.Errorf("asked for in reverse order: sockets %v; want %v", got, inodes)
	}
	s.HasUnclaimed()
	s.Serves()
}

// A request for any port finds a socket that was requested in this way, and none
// of a port that was requested.
func TestMatchingAnyPort(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	inodes := p.Inodes()
	asksFor := func(address string, same bool) {
		t.Helper()
		p.Chain.Specs(proctest.Spec{}.And("tcp", address))
		p = p.Upgrade()
		if got := p.Inodes(); slices.Equal(got, inodes) != same {
			t.Errorf("asked for as %s: sockets %v, and %v before; want the same: %t", address, got, inodes, same)
		}
		inodes = p.Inodes()
		p.Serves()
	}
	asksFor("127.0.0.1:", true)
	asksFor("127.0.0.1:0", true)
	asksFor("127.0.0.1:"+portOf(p, 0), true)
	asksFor("127.0.0.1:0", false)
	asksFor("127.0.0.1:"+portOf(p, 0), true)
	asksFor("127.0.0.1:", false)
}

// A Unix socket is found by its path, however that is written, or by another
// path of its file.
func TestMatchingPaths(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Spec{})
	if err := os.Mkdir(c.Path("sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub", c.Path("link")); err != nil {
		t.Fatal(err)
	}
	// by returns a spec that asks with these words. Packets are the last, and may
	// be asked for by ListenSeqpacket.
	by := func(words string, seqpacket bool) (s proctest.Spec) {
		for _, n := range unixNetworks() {
			if runtime.GOOS == "linux" {
				s = s.And(n, "@ecdysis-test-match-"+n+"-$DIR")
			}
			if word := strings.ReplaceAll(words, "NAME", n); seqpacket && n == "unixpacket" {
				s = s.At(proctest.AtListened, listenSeqpacket.Do(word))
			} else {
				s = s.And(n, word)
			}
		}
		return s
	}
	serves := func(p *proctest.Proc) {
		t.Helper()
		for _, n := range unixNetworks() {
			p.ServesAt(proctest.Addr{Network: n, Address: c.Path("sub/" + n)})
		}
	}
	c.Specs(by("sub/NAME", false)) // a relative path is one of the directory in which the program started
	p := c.Start(func(cmd *exec.Cmd) { cmd.Dir = c.Dir })
	serves(p)
	inodes := p.Inodes()
	for _, n := range unixNetworks() {
		if err := os.Symlink(filepath.Join("sub", n), c.Path("file-"+n)); err != nil {
			t.Fatal(err)
		}
	}
	for _, seqpacket := range []bool{false, true} {
		for _, words := range []string{"$DIR/sub/NAME", "sub/NAME", "./link/../sub//NAME", "$DIR/link/../link/./NAME", "$DIR/file-NAME"} {
			c.Specs(by(words, seqpacket))
			p = p.Upgrade()
			if got := p.Inodes(); !slices.Equal(got, inodes) {
				t.Fatalf("asked for as %s: sockets %v; want %v", words, got, inodes)
			}
			p.HasUnclaimed()
			serves(p)
		}
	}
	links := unixNetworks()
	if runtime.GOOS == "darwin" {
		links = nil // not each of its file systems has hard links of sockets
	}
	for _, n := range links {
		if err := os.Link(c.Path("sub/"+n), c.Path("copy-"+n)); err != nil {
			t.Fatal(err)
		}
		p.ServesAt(proctest.Addr{Network: n, Address: c.Path("copy-" + n)})
	}
	p.Stop()
	p.AwaitExit()
	if files, err := os.ReadDir(c.Path("sub")); err != nil || len(files) != 0 {
		t.Errorf("after Stop: %v, %v", files, err)
	}
	for _, n := range links {
		if n == "unixgram" {
			continue // what this process has read it may answer
		}
		if _, err := net.Dial(n, c.Path("copy-"+n)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s after Stop: %v", n, err)
		}
	}
}

// A path is found by its own network alone.
func TestMatchingNetworks(t *testing.T) {
	t.Parallel()
	var spec proctest.Spec
	for _, n := range unixNetworks() {
		spec = spec.And(n, "$DIR/"+n)
	}
	p := proctest.Start(t, spec, spec.Hold(proctest.AtNew))
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		for _, has := range unixNetworks() {
			for _, asks := range unixNetworks() {
				if asks == has {
					continue
				}
				if _, err := s.Listen(asks, "$DIR/"+has); !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("asked for as %s, inherited as %s: %v", asks, has, err)
				}
			}
		}
		p.Serves()
	})
	s.HasUnclaimed()
	s.Inherits(p)
	s.Serves()
}

var startIn = proctest.Define("start in", func(_ *proctest.Daemon, dir string) (proctest.None, error) {
	return proctest.None{}, os.Chdir(dir)
})

// A relative path means a file, not words.
func TestMatchingRelativePaths(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Spec{})
	dir, err := filepath.EvalSymlinks(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for _, d := range []string{one, two} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	in := func(dir, prefix string) (s proctest.Spec) {
		for _, n := range unixNetworks() {
			s = s.And(n, prefix+n)
		}
		return s.At(proctest.AtStart, startIn.Do(dir))
	}
	c.Specs(in(one, ""))
	p := c.Start()
	inodes := p.Inodes()
	for _, by := range []struct{ dir, prefix string }{{one, "./"}, {two, "../one/"}, {two, one + "/"}, {one, ""}} {
		c.Specs(in(by.dir, by.prefix))
		p = p.Upgrade()
		if got := p.Inodes(); !slices.Equal(got, inodes) {
			t.Errorf("asked for as %sNETWORK in %s: sockets %v; want %v", by.prefix, by.dir, got, inodes)
		}
		p.HasUnclaimed()
	}
	// The same words, elsewhere.
	c.Specs(in(two, ""))
	p = p.Upgrade()
	var unclaimed []string
	for i, inode := range p.Inodes() {
		if inode == inodes[i] {
			t.Errorf("%s: a path in another directory has found the same socket", unixNetworks()[i])
		}
		unclaimed = append(unclaimed, unixNetworks()[i]+" "+unixNetworks()[i])
	}
	p.HasUnclaimed(unclaimed...)
	if files, err := os.ReadDir(one); err != nil || len(files) != 0 {
		t.Errorf("the files of dropped sockets: %v, %v", files, err)
	}
	for _, n := range unixNetworks() {
		p.ServesAt(proctest.Addr{Network: n, Address: filepath.Join(two, n)})
	}
}

// listenOnOnePort makes a socket for UDP and one for TCP.
var listenOnOnePort = proctest.Define("listen on one port", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	for {
		udp, err := d.U.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			return proctest.None{}, err
		}
		tcp, err := d.U.Listen("tcp", udp.LocalAddr().String())
		if err == nil {
			d.Keep(udp)
			d.Keep(tcp)
			return proctest.None{}, nil
		}
		if err = errors.Join(udp.Close(), err); !errors.Is(err, syscall.EADDRINUSE) {
			return proctest.None{}, err
		}
	}
})

// UDP and TCP have ports of their own.
func TestMatchingSamePort(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}.At(proctest.AtListened, listenOnOnePort.Do()))
	if err := listenOnOnePort.ErrAt(p, proctest.AtListened); err != nil {
		t.Fatal(err)
	}
	address, inodes := p.Addr(0).Address, p.Inodes()
	for _, suffix := range []string{"4", "", ""} { // by place, by place, by words
		p.Chain.Specs(proctest.Spec{}.And("udp"+suffix, address).And("tcp"+suffix, address))
		s := p.Upgrade()
		s.HasUnclaimed()
		if got := s.Inodes(); !slices.Equal(got, inodes) {
			t.Errorf("sockets %v, handed on as %v", inodes, got)
		}
		s.Serves()
		p = s
	}
	// One of them dropped leaves the other.
	p.Chain.Specs(proctest.Spec{}.And("tcp", address))
	s := p.Upgrade()
	s.HasUnclaimed("udp " + address)
	s.Serves()
}
