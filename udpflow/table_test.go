package udpflow

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// heapTable returns a table in memory that the race detector watches.
func heapTable(flows int) *table {
	buckets, size := tableSize(flows)
	words := make([]uint64, size/8)
	t := tableIn(unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), size))
	t.h.layout, t.h.buckets, t.h.k0, t.h.k1 = layout, uint32(buckets), 1, 2
	return t
}

func TestSipHash(t *testing.T) {
	// An empty message, under the key 00 01 … 0f.
	if got, want := sipHash(0x0706050403020100, 0x0f0e0d0c0b0a0908, nil), uint64(0xabac0158050fc4dc); got != want {
		t.Errorf("%#x; want %#x", got, want)
	}
	// Each bit of a longer one counts.
	seen := map[uint64]int{}
	var b [20]byte
	for n := range len(b) + 1 {
		for bit := range 8 * n {
			b[bit/8] ^= 1 << (bit % 8)
			seen[sipHash(1, 2, b[:n])]++
			b[bit/8] ^= 1 << (bit % 8)
		}
		seen[sipHash(1, 2, b[:n])]++
	}
	if want := 8*20*21/2 + 21; len(seen) != want {
		t.Errorf("%d hashes of %d messages", len(seen), want)
	}
}

// A model does what a table must do, without a limit of flows.
type model struct {
	t     *table
	now   uint64
	flows map[uint64]modelFlow
}

type modelFlow struct {
	owner  uint32
	expiry uint64
}

func (m *model) live(hash uint64) (f modelFlow, ok bool) {
	f, ok = m.flows[hash]
	return f, ok && f.expiry > m.now
}

// full reports whether the buckets of a hash have no slot without a live flow.
func (m *model) full(hash uint64) bool {
	for _, b := range m.t.places(hash) {
		n := 0
		for i := range b {
			h := b[i].hash.Load()
			// A flow that has expired and begun again may have left its hash in another
			// slot.
			if f, ok := m.live(h); ok && b[i].state.Load() == stateOf(f.owner, f.expiry) {
				n++
			}
		}
		if n < bucketSlots {
			return false
		}
	}
	return true
}

// step does one operation on the table and the model, and returns an error if they
// differ. There are only a few hashes, so that flows share buckets.
func (m *model) step(op byte, hash uint64, owner uint32, d uint64) error {
	expiry := m.now + d + 1 // a flow lives at least a millisecond
	f, ok := m.live(hash)
	s, state := m.t.find(hash, m.now)
	if (s != nil) != ok || ok && (ownerOf(state) != f.owner || expiryOf(state) != f.expiry) {
		return fmt.Errorf("find: %v %v; want %v %v", s != nil, modelFlow{ownerOf(state), expiryOf(state)}, ok, f)
	}
	switch op % 5 {
	case 0: // as a packet does
		if ok {
			s.refresh(state, expiry)
			m.flows[hash] = modelFlow{f.owner, max(f.expiry, expiry)}
			break
		}
		full := m.full(hash)
		if got := m.t.open(hash, owner, m.now, expiry); got == full {
			return fmt.Errorf("open: %v in full buckets: %v", got, full)
		} else if got {
			m.flows[hash] = modelFlow{owner, expiry}
		}
	case 1:
		full := !ok && m.full(hash)
		if got := m.t.claim(hash, owner, m.now, expiry); got == full {
			return fmt.Errorf("claim: %v in full buckets: %v", got, full)
		} else if got && ok {
			expiry = max(expiry, f.expiry)
		}
		if !full {
			m.flows[hash] = modelFlow{owner, expiry}
		}
	case 2:
		if ok {
			if !s.take(state, owner, expiry) {
				return fmt.Errorf("take: false")
			}
			m.flows[hash] = modelFlow{owner, max(expiry, f.expiry)}
			if s.state.Load() != state && s.take(state, owner+1, expiry+1) {
				return fmt.Errorf("take succeeds by a state that has changed")
			}
		}
	case 3:
		m.now += d
	case 4:
		var want uint64
		for _, f := range m.flows {
			if f.owner == owner && f.expiry > m.now {
				want = max(want, f.expiry)
			}
		}
		if got := m.t.last(owner, m.now); got != want {
			return fmt.Errorf("last: %d; want %d", got, want)
		}
	}
	return nil
}

func TestTableModel(t *testing.T) {
	for seed := range uint64(10) {
		r := rand.New(rand.NewPCG(seed, 0))
		flows := 1 + r.IntN(100)
		m := &model{t: heapTable(flows), now: 1, flows: map[uint64]modelFlow{}}
		hashes := make([]uint64, 4*flows)
		for i := range hashes {
			hashes[i] = r.Uint64() | 1
		}
		var opened, failed bool
		for i := range 10000 {
			op := byte(r.IntN(5))
			if op == 3 && r.IntN(10) > 0 {
				op = 0 // so that the table becomes full
			}
			if err := m.step(op, hashes[r.IntN(len(hashes))], 1+uint32(r.IntN(20)), r.Uint64N(2000)); err != nil {
				t.Fatalf("seed %d, operation %d: %v", seed, i, err)
			}
			_, live := m.live(hashes[0])
			opened = opened || live
			failed = failed || m.full(hashes[0])
		}
		if !opened || !failed {
			t.Errorf("seed %d: a flow was opened: %v; the table was full: %v; want both", seed, opened, failed)
		}
	}
}

// FuzzTable makes an operation on a table and its model of every four bytes.
func FuzzTable(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03\x01\x01\x04\x05\x03\x00\x00\x09\x02\x01\x06\x07\x04\x00\x06\x00"))
	var fill []byte
	for i := range byte(40) {
		fill = append(fill, 0, i, 1, 9)
	}
	f.Add(fill)
	f.Fuzz(func(t *testing.T, ops []byte) {
		m := &model{t: heapTable(4), now: 1, flows: map[uint64]modelFlow{}}
		for ; len(ops) >= 4; ops = ops[4:] {
			hash := m.t.hash(ops[1:2])
			if err := m.step(ops[0], hash, 1+uint32(ops[2]%4), uint64(ops[3])); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzOpenTable opens a table with bytes that another process may have written.
func FuzzOpenTable(f *testing.F) {
	want := prints{3, 4}
	good := func() []byte {
		t := heapTable(1)
		t.h.magic, t.h.keyPrint, t.h.generationPrint = tableMagic, want.key, want.generation
		return append([]byte(nil), t.mem...)
	}()
	f.Add(good)
	f.Add(good[:headerSize])
	f.Add(good[:100])
	f.Add([]byte{})
	file := tempFile(f) // one file for all inputs, because making a file takes longer than opening a table
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := file.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		table, err := openTable(file, want)
		if err != nil {
			return
		}
		if table.h.layout != layout || table.h.keyPrint != want.key || table.h.generationPrint != want.generation {
			t.Error("a table that is another's was opened")
		}
		hash := table.hash([]byte("key"))
		if s, state := table.find(hash, 1); s == nil {
			table.open(hash, 1, 1, 100)
		} else {
			s.take(state, 1, 100)
		}
		table.last(1, 1)
		unmap(t, table)
	})
}

func tempFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "table")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func unmap(t *testing.T, tab *table) {
	t.Helper()
	if err := unix.Munmap(tab.mem); err != nil {
		t.Error(err)
	}
}

func TestOpenTable(t *testing.T) {
	f := tempFile(t)
	mine := prints{5, 6}
	first, err := createTable(f, 1000, mine)
	if err != nil {
		t.Fatal(err)
	}
	defer unmap(t, first)
	second, err := openTable(f, mine)
	if err != nil {
		t.Fatal(err)
	}
	defer unmap(t, second)
	hash := first.hash([]byte("a flow"))
	if got := second.hash([]byte("a flow")); got != hash {
		t.Errorf("the second mapping's hash is %#x; the first's %#x", got, hash)
	}
	if other, err := createTable(tempFile(t), 1000, mine); err != nil {
		t.Fatal(err)
	} else {
		if other.hash([]byte("a flow")) == hash {
			t.Error("two tables have one key")
		}
		unmap(t, other)
	}
	for i, tab := range []*table{first, second, first} {
		if n, err := tab.newOwner(); err != nil || n != uint32(i+1) {
			t.Errorf("owner %d, %v; want %d", n, err, i+1)
		}
	}
	if !first.open(hash, 7, 10, 20) {
		t.Fatal("a new table is full")
	}
	if s, state := second.find(hash, 19); s == nil || ownerOf(state) != 7 {
		t.Error("the second mapping does not show what the first has stored")
	}
	if s, _ := second.find(hash, 20); s != nil {
		t.Error("an expired flow is found")
	}

	for _, tt := range []struct {
		want       string
		mine       prints
		prep, undo func()
	}{
		{want: "layout 1, but this program knows only layout 2", prep: func() { layout = 2 }, undo: func() { layout = 1 }, mine: mine},
		{want: "Config.Key", mine: prints{7, 6}},
		{want: "Config.Generation", mine: prints{5, 7}},
		{want: "not a table", prep: func() { first.h.magic[0]++ }, undo: func() { first.h.magic[0]-- }, mine: mine},
		{want: "not the size of 251 buckets", prep: func() { first.h.buckets++ }, undo: func() { first.h.buckets-- }, mine: mine},
	} {
		if tt.prep != nil {
			tt.prep()
		}
		_, err := openTable(f, tt.mine)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v; want an error with %q", err, tt.want)
		}
		if tt.undo != nil {
			tt.undo()
		}
	}
	if _, err := openTable(tempFile(t), mine); err != errNoTable {
		t.Errorf("an empty file: %v; want %v", err, errNoTable)
	}
}

func TestOwnersEnd(t *testing.T) {
	tab := heapTable(1)
	tab.h.owners.Store(maxOwner - 1)
	if n, err := tab.newOwner(); err != nil || n != maxOwner {
		t.Errorf("%d, %v; want %d", n, err, maxOwner)
	}
	for range 2 {
		if n, err := tab.newOwner(); err == nil {
			t.Errorf("owner %d; want an error, because a state has no room for it", n)
		}
	}
}

// A table must have room for the flows that it is made for, and takes at most 48
// bytes for each.
func TestTableRoom(t *testing.T) {
	for _, flows := range []int{1, 10, 1000, 65536} {
		tab := heapTable(flows)
		if n := len(tab.mem) - headerSize; flows >= 1000 && n > 48*flows {
			t.Errorf("%d flows: %d bytes, %.1f each; want at most 48", flows, n, float64(n)/float64(flows))
		}
		n := 0
		var key [8]byte
		for ; ; n++ {
			binary.LittleEndian.PutUint64(key[:], uint64(n))
			if !tab.open(tab.hash(key[:]), 1, 1, 100) {
				break
			}
		}
		if n < flows {
			t.Errorf("a table for %d flows is full after %d", flows, n)
		}
		t.Logf("%d flows: %d bytes, full after %d", flows, len(tab.mem), n)
	}
}

// The owner of a flow follows from its hash, so that the test sees a slot whose
// hash and state do not belong together.
func TestTableConcurrent(t *testing.T) {
	tab := heapTable(64)
	ownerFor := func(hash uint64) uint32 { return uint32(hash%maxOwner) + 1 }
	var now atomic.Uint64
	now.Store(1)
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(g, 1))
			for range 50000 {
				hash := sipHash(0, 0, []byte{byte(r.IntN(200))}) | 1
				n := now.Load()
				switch r.IntN(4) {
				case 0:
					now.Add(1)
				case 1:
					tab.claim(hash, ownerFor(hash), n, n+1+r.Uint64N(20))
				default:
					s, state := tab.find(hash, n)
					if s == nil {
						tab.open(hash, ownerFor(hash), n, n+1+r.Uint64N(20))
					} else if ownerOf(state) != ownerFor(hash) {
						t.Errorf("a flow's owner is %d; want %d", ownerOf(state), ownerFor(hash))
						return
					} else {
						s.refresh(state, n+1+r.Uint64N(20))
					}
				}
			}
		})
	}
	wg.Wait()
	for i := range tab.buckets {
		for j := range tab.buckets[i] {
			if tab.buckets[i][j].state.Load() == busy {
				t.Error("a slot is busy, and nobody writes it")
			}
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, flows := range []int{100, 65536} {
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			tab := heapTable(65536)
			keys := make([][6]byte, flows)
			for i := range keys {
				binary.LittleEndian.PutUint32(keys[i][:], uint32(i))
				tab.open(tab.hash(keys[i][:]), 1, 1, 1<<30)
			}
			r := rand.New(rand.NewPCG(1, 1))
			order := r.Perm(flows)
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; b.Loop(); i++ {
				if i == flows {
					i = 0
				}
				if s, _ := tab.find(tab.hash(keys[order[i]][:]), 5); s == nil {
					b.Fatal("not found")
				}
			}
		})
	}
}
