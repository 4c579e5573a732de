package e2e

import (
	"fmt"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// DatagramPair: two neighbours in a chain have sockets to each other.

// isFirst lets p make a pair to its successor, and fails the test if it has one
// to its predecessor.
func isFirst(p *proctest.Proc, name, key string) {
	p.T.Helper()
	finds(p, pair, name, key, nothing)
}

// isPaired fails the test unless p has a pair to its predecessor. It makes one
// to its successor.
func isPaired(p *proctest.Proc, name, key string) {
	p.T.Helper()
	finds(p, pair, name, key, "*net.UnixConn")
}

// Neighbours talk both ways, over generations, and only neighbours.
func TestDatagramPair(t *testing.T) {
	t.Parallel()
	p := proctest.New(t, proctest.Holding).Launch()
	p.At(proctest.AtNew)
	isFirst(p, "talk", "x")
	isFirst(p, "other", "y")
	proctest.Want(t, pair.Err(p, named{"talk", "z"}), nil, `"talk"`, "already")
	p.Resume()
	p.At(proctest.AtServing)
	chain := []*proctest.Proc{p}
	for n := range 4 {
		writes(p, "x.down", fmt.Sprint("early ", n)) // before there is anybody
		writes(p, "y.down", fmt.Sprint("other ", n))
		s := p.UpgradeHolding(func(s *proctest.Proc) {
			isPaired(s, "talk", "x")
			if n == 3 {
				isFirst(s, "no such", "none")
			}
			isPaired(s, "other", "y")
			reads(s, "x.up", fmt.Sprint("early ", n))
			writes(s, "x.up", "before Ready")
			reads(p, "x.down", "before Ready")
		})
		s.HasUnclaimed()
		reads(s, "y.up", fmt.Sprint("other ", n))
		p, chain = s, append(chain, s)
	}
	for i, old := range chain[:len(chain)-1] {
		s := chain[i+1]
		for j := range 3 {
			writes(old, "x.down", fmt.Sprint("down ", i, j))
			writes(s, "x.up", fmt.Sprint("up ", i, j))
			writes(old, "y.down", fmt.Sprint("DOWN ", i, j))
		}
		for j := range 3 {
			reads(s, "x.up", fmt.Sprint("down ", i, j))
			reads(old, "x.down", fmt.Sprint("up ", i, j))
			reads(s, "y.up", fmt.Sprint("DOWN ", i, j))
		}
	}
	// The older one's end has gone with it, while the others live.
	chain[1].Kill()
	cannotWrite(chain[2], "x.up", proctest.ClosedPeer())
	cannotWrite(chain[0], "x.down", proctest.ClosedPeer())
	writes(chain[2], "x.down", "still")
	reads(chain[3], "x.up", "still")
}

// After a failed upgrade the next successor gets the same pair, with what the
// failed one has not read, and what that one has sent is there.
func TestDatagramPairFailedUpgrade(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	isFirst(p, "talk", "x")
	writes(p, "x.down", "first")
	writes(p, "x.down", "second")
	p.KillHolding(func(s *proctest.Proc) {
		isPaired(s, "talk", "x")
		reads(s, "x.up", "first")
		writes(s, "x.up", "from the failed one")
	})
	p.KillHolding(func(s *proctest.Proc) {})
	writes(p, "x.down", "third")
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		isPaired(s, "talk", "x")
		writes(s, "x.up", "from the next one")
	})
	reads(s, "x.up", "second")
	reads(s, "x.up", "third")
	reads(p, "x.down", "from the failed one")
	reads(p, "x.down", "from the next one")
}

// The old process's end is a datagram socket like any other: it has what the
// successor has sent when that has ended, and is this process's to close.
func TestDatagramPairClosed(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	isFirst(p, "a", "a")
	isFirst(p, "b", "b")
	closes(p, "a.down") // which withdraws nothing
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		isPaired(s, "a", "a")
		isPaired(s, "b", "b")
	})
	cannotWrite(s, "a.up", proctest.ClosedPeer())
	writes(s, "b.up", "last words")
	s.Kill()
	reads(p, "b.down", "last words")
}
