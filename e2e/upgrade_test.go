package e2e

import (
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Upgrades of each network that has connections, while clients come. Those for
// packets are in packet_test.go.

// listenSeqpacket makes one more socket by ListenSeqpacket.
var listenSeqpacket = proctest.Define("ListenSeqpacket", func(d *proctest.Daemon, path string) (proctest.None, error) {
	ln, err := d.U.ListenSeqpacket(strings.ReplaceAll(path, "$DIR", proctest.Dir()))
	if err == nil {
		d.Keep(ln)
	}
	return proctest.None{}, err
})

// everyListener has a listener of each sort, and files are the names of their
// files.
func everyListener() (s proctest.Spec, files []string) {
	s, files = proctest.TCP.And("unix", "$DIR/stream"), []string{"stream"}
	if runtime.GOOS != "darwin" {
		s = s.And("unixpacket", "$DIR/packet").At(proctest.AtNew, listenSeqpacket.Do("$DIR/seqpacket"))
		files = []string{"packet", "seqpacket", "stream"}
	}
	if runtime.GOOS == "linux" {
		s = s.And("unix", "@ecdysis-test-stream-$DIR").And("unixpacket", "@ecdysis-test-packet-$DIR")
	}
	return s, files
}

// A client never sees an upgrade, whatever its network, and what a process has
// accepted is its own until the client goes.
func TestUpgrades(t *testing.T) {
	t.Parallel()
	s, files := everyListener()
	s.Wait = true
	p := proctest.Start(t, s)
	c := p.Chain
	addrs, inodes := p.Addrs(), p.Inodes()
	l := p.Load(1)
	for i := range 4 * len(addrs) {
		client := p.Dial(i % len(addrs))
		l.More(5)
		if i%10 == 5 {
			c.Specs(s.At(proctest.AtListened, proctest.Exit(1)), s)
			p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
			p.Serves()
		}
		predecessor := p
		p = p.Upgrade()
		l.More(5)
		p.HasUnclaimed()
		if pid, g, err := proctest.Ask(client); err != nil || pid != predecessor.PID || g != i {
			t.Fatalf("%v: process %d of generation %d answers on a connection that process %d has accepted, %v", addrs[i%len(addrs)], pid, g, predecessor.PID, err)
		}
		client.Close()
		predecessor.Ended() // because its clients have gone
	}
	l.More(20)
	l.Check()
	p.Serves()
	if got := p.Addrs(); !slices.Equal(got, addrs) {
		t.Errorf("addresses %v; want %v", got, addrs)
	}
	if got := p.Inodes(); !slices.Equal(got, inodes) {
		t.Errorf("sockets %v, handed on as %v", inodes, got)
	}
	c.HasFiles(files...)
	p.Stop()
	p.Ended()
	c.HasFiles()
}

// A successor that dies in its probation gives the sockets back.
func TestProbationOfEveryListener(t *testing.T) {
	t.Parallel()
	spec, files := everyListener()
	p := proctest.Start(t, spec.Probation(time.Minute), spec)
	c := p.Chain
	var clients []net.Conn
	for i := range p.Addrs() {
		clients = append(clients, p.Dial(i))
	}
	for range 3 {
		a := p.BeginUpgrade()
		s := a.Successor()
		s.At(proctest.AtServing)
		s.Serves()
		s.Kill()
		a.Fails(ecdysis.StepProbation, io.ErrUnexpectedEOF)
		p.Serves()
		c.HasFiles(files...)
	}
	l := p.Load(2)
	l.More(20)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	l.More(20)
	for _, c := range clients {
		p.Answers(c)
	}
	s.Serves()
	p.Stop() // makes it final
	a.OK()
	l.More(20)
	l.Check()
	s.Stop()
	s.AwaitExit()
	c.HasFiles()
}
