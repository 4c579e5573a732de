package udpflow

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// A split does what a table needs of an atomic.Uint64.
func TestSplit(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var s split
	var w atomic.Uint64
	check := func(op string) {
		t.Helper()
		if got, want := s.Load(), w.Load(); got != want {
			t.Fatalf("after %s: %#x; want %#x", op, got, want)
		}
	}
	var old uint64 // a former state
	for range 10000 {
		state := w.Load()
		if state == busy {
			state = stateOf(1+uint32(r.IntN(3)), expiryOf(old)+1+r.Uint64N(10))
			s.Store(state)
			w.Store(state)
			check("store")
			continue
		}
		op, next := "open", uint64(busy)
		switch r.IntN(3) {
		case 0:
			op, next = "refresh", stateOf(ownerOf(state), expiryOf(state)+1+r.Uint64N(10))
		case 1:
			op, next = "take", stateOf(ownerOf(state)+1, expiryOf(state)+r.Uint64N(10))
		}
		if !s.CompareAndSwap(state, next) || !w.CompareAndSwap(state, next) {
			t.Fatalf("%s fails", op)
		}
		check(op)
		if op == "refresh" && s.CompareAndSwap(state, next+1) {
			t.Fatal("a refresh succeeds by an expiry that has changed")
		}
		if op == "take" && s.CompareAndSwap(state, stateOf(maxOwner, expiryOf(state))) {
			t.Fatal("another owner is taken from one that has lost the flow")
		}
		old = state
	}

	// The expiry reaches the value that the lower word has in a busy slot.
	s.Store(stateOf(1, 1<<32-2))
	for i := range uint64(3) {
		next := stateOf(1, 1<<32-1+i)
		if !s.CompareAndSwap(s.Load(), next) {
			t.Fatalf("%#x does not follow %#x", next, s.Load())
		}
		if got := s.Load(); got != next && got != next-1 {
			t.Errorf("%#x; want %#x or 1 less", got, next)
		}
	}
}

// The state busy excludes all others, and no owner or expiry is seen that was not
// stored. The expiries are near a change of the upper word, so that both words
// change often.
func TestSplitConcurrent(t *testing.T) {
	const start = 5<<32 - 20000
	var s split
	s.Store(stateOf(1, start))
	var writers atomic.Int32
	var hash uint64 // of the one writer, so that the race detector watches
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(g, 2))
			for range 50000 {
				state := s.Load()
				if state == busy {
					continue
				}
				owner, expiry := ownerOf(state), expiryOf(state)
				if owner < 1 || owner > 4 || expiry < start || expiry > start+1<<32 {
					t.Errorf("owner %d, expiry %d", owner, expiry)
					return
				}
				switch r.IntN(3) {
				case 0:
					if s.CompareAndSwap(state, busy) {
						if n := writers.Add(1); n != 1 {
							t.Errorf("%d write a slot at once", n)
						}
						hash++
						writers.Add(-1)
						s.Store(stateOf(1+r.Uint32N(4), expiry+1))
					}
				case 1:
					s.CompareAndSwap(state, stateOf(owner, expiry+1))
				default:
					s.CompareAndSwap(state, stateOf(1+r.Uint32N(4), expiry+1))
				}
			}
		})
	}
	wg.Wait()
	if s.Load() == busy || hash == 0 {
		t.Errorf("the state is %#x after %d changes", s.Load(), hash)
	}
}
