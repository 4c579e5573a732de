//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// pair calls DatagramPair, which must find a parent, or none.
func (p *proc) pair(name, key string, parent bool) {
	p.t.Helper()
	want := "nil"
	if parent {
		want = "*net.UnixConn"
	}
	p.gives(want, "DatagramPair", name, key)
}

// finds writes until that fails: a process that was killed may just be closing
// its files.
func (p *proc) finds(is, key string) {
	p.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		m := p.call("thing write", key, "x")
		if m.Err != nil && slices.Contains(m.Err.Is, is) {
			return
		}
		if m.Err != nil || time.Now().After(end) {
			p.t.Fatalf("write: %+v; want %s", m.Err, is)
		}
	}
}

// Neighbours talk both ways, over generations, and only neighbours.
func TestDatagramPair(t *testing.T) {
	t.Parallel()
	p := newHub(t, holding()).start()
	p.at("new")
	p.pair("talk", "x", false)
	p.pair("other", "y", false)
	p.noThing("", []string{`"talk"`, "already"}, "DatagramPair", "talk", "z")
	p.resume()
	p.at("serving")
	chain := []*proc{p}
	for n := range 4 {
		p.thing("write", "x.down", fmt.Sprint("early ", n)) // before there is anybody
		p.thing("write", "y.down", fmt.Sprint("other ", n))
		s := p.succeed(func(s *proc) {
			s.pair("talk", "x", true)
			if n == 3 {
				s.pair("no such", "none", false)
			}
			s.pair("other", "y", true)
			s.gives(fmt.Sprint("early ", n), "read", "x.up", "7")
			s.thing("write", "x.up", "before Ready")
			p.gives("before Ready", "read", "x.down", "12")
		})
		s.unclaimed()
		s.gives(fmt.Sprint("other ", n), "read", "y.up", "7")
		p, chain = s, append(chain, s)
	}
	for i, old := range chain[:len(chain)-1] {
		s := chain[i+1]
		for j := range 3 {
			old.thing("write", "x.down", fmt.Sprint("down ", i, j))
			s.thing("write", "x.up", fmt.Sprint("up ", i, j))
			old.thing("write", "y.down", fmt.Sprint("DOWN ", i, j))
		}
		for j := range 3 {
			s.gives(fmt.Sprint("down ", i, j), "read", "x.up", "8")
			old.gives(fmt.Sprint("up ", i, j), "read", "x.down", "6")
			s.gives(fmt.Sprint("DOWN ", i, j), "read", "y.up", "8")
		}
	}
	// The older one's end has gone with it, while the others live.
	chain[1].kill()
	chain[2].finds("closed peer", "x.up")
	chain[0].finds("closed peer", "x.down")
	chain[2].thing("write", "x.down", "still")
	chain[3].gives("still", "read", "x.up", "5")
}

// After a failed upgrade the next successor gets the same pair, with what the
// failed one has not read, and what that one has sent is there.
func TestDatagramPairFailedUpgrade(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	p.pair("talk", "x", false)
	p.thing("write", "x.down", "first")
	p.thing("write", "x.down", "second")
	p.perish(func(s *proc) {
		s.pair("talk", "x", true)
		s.gives("first", "read", "x.up", "5")
		s.thing("write", "x.up", "from the failed one")
	})
	p.perish(func(s *proc) {})
	p.thing("write", "x.down", "third")
	s := p.succeed(func(s *proc) {
		s.pair("talk", "x", true)
		s.thing("write", "x.up", "from the next one")
	})
	s.gives("second", "read", "x.up", "6")
	s.gives("third", "read", "x.up", "5")
	p.gives("from the failed one", "read", "x.down", "19")
	p.gives("from the next one", "read", "x.down", "17")
}

// The old process's end is a datagram socket like any other: it has what the
// successor has sent when that has ended, and is this process's to close.
func TestDatagramPairClosed(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	p.pair("a", "a", false)
	p.pair("b", "b", false)
	p.thing("close", "a.down") // which withdraws nothing
	s := p.succeed(func(s *proc) {
		s.pair("a", "a", true)
		s.pair("b", "b", true)
	})
	s.noThing("closed peer", nil, "write", "a.up", "x")
	s.thing("write", "b.up", "last words")
	s.kill()
	p.gives("last words", "read", "b.down", "10")
}
