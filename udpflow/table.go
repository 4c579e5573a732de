package udpflow

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A table says which socket each flow belongs to. Its memory is mapped by all
// generations, so that all of them see a change at once.
//
// Each flow has a slot of 16 bytes in one of two buckets that its hash chooses.
// Nothing in the table is locked, because a process can be killed or stopped
// at any instruction. A slot is written in three steps. Its state becomes busy,
// its hash is stored, and its state becomes the owner and expiry. A process that
// ends in between leaves one slot unused for good.
//
// Two processes that open a flow at the same moment may make two slots for it.
// Every later look-up finds the same one of the two, and the other expires.
type table struct {
	mem     []byte // the mapping
	h       *header
	buckets []bucket
}

// A header is the beginning of a table's memory.
type header struct {
	magic           [8]byte
	layout          uint32
	buckets         uint32
	k0, k1          uint64        // the key of the hash
	keyPrint        uint64        // of Config.Key
	generationPrint uint64        // of Config.Generation
	owners          atomic.Uint32 // the last number that newOwner has returned
	changes         atomic.Uint32 // how often a flow has changed its owner
}

type bucket [bucketSlots]slot

// A slot's hash and state belong together if the state is the same before and
// after the hash is read. No state comes twice, because a slot is used again only
// when its flow has expired, and its next flow expires later.
//
// So the hash may be stored by a lock of the process, as sync/atomic does it on
// some processors, but the state must not.
type slot struct {
	hash  atomic.Uint64 // never 0 in a slot that was used
	state stateWord     // 0 in a slot that was never used
}

const (
	headerSize  = 4096
	bucketSlots = 8
	bucketSize  = int(unsafe.Sizeof(bucket{}))

	// A state is an owner, in the upper bits, and the time of the expiry in
	// milliseconds, which take 34 years to overflow.
	expiryBits = 40
	maxExpiry  = 1<<expiryBits - 1
	busy       = maxExpiry // no owner is 0
	maxOwner   = 1<<(64-expiryBits) - 1
)

var tableMagic = [8]byte{'u', 'd', 'p', 'f', 'l', 'o', 'w', '\n'}

// layout is the version of everything that generations share, which is the header,
// the slots, the hash and the records of an inbox. It is a variable so that tests
// can change it.
var layout uint32 = 1

// prints are fingerprints of the functions of a Config.
type prints struct{ key, generation uint64 }

// tableSize returns the number of buckets and of bytes of a table for that many
// flows. Half of its slots remain free then, so that the two buckets of a flow are
// practically never both full with fewer flows.
func tableSize(flows int) (buckets, size int) {
	buckets = max(2, (2*flows+bucketSlots-1)/bucketSlots)
	return buckets, headerSize + buckets*bucketSize
}

// createTable makes an empty table in f.
func createTable(f *os.File, flows int, p prints) (*table, error) {
	buckets, size := tableSize(flows)
	// Zeros are written so that the file has no holes. A write to a hole kills the
	// process if the disk is full.
	zeros := make([]byte, 64<<10)
	for n := 0; n < size; {
		m, err := f.Write(zeros[:min(len(zeros), size-n)])
		if err != nil {
			return nil, err
		}
		n += m
	}
	mem, err := mapFile(f, size)
	if err != nil {
		return nil, err
	}
	t := tableIn(mem)
	t.h.layout, t.h.buckets = layout, uint32(buckets)
	t.h.keyPrint, t.h.generationPrint = p.key, p.generation
	var key [16]byte
	_, _ = rand.Read(key[:]) // never fails
	t.h.k0, t.h.k1 = *(*uint64)(unsafe.Pointer(&key[0])), *(*uint64)(unsafe.Pointer(&key[8]))
	t.h.magic = tableMagic
	return t, nil
}

// openTable maps a table that another process has made.
func openTable(f *os.File, p prints) (*table, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() < headerSize {
		return nil, errNoTable
	}
	// The header is mapped alone first, because it tells the size of the rest. It is
	// not read by read(2), which does not show writes to a mapping on all systems.
	mem, err := mapFile(f, headerSize)
	if err != nil {
		return nil, err
	}
	h := (*header)(unsafe.Pointer(&mem[0]))
	magic, has, buckets, theirs := h.magic, h.layout, h.buckets, prints{h.keyPrint, h.generationPrint}
	if err := unix.Munmap(mem); err != nil {
		return nil, os.NewSyscallError("munmap", err)
	}
	switch {
	case magic != tableMagic:
		return nil, errNoTable
	case has != layout:
		return nil, fmt.Errorf("the table of flows has layout %d, but this program knows only layout %d", has, layout)
	case theirs.key != p.key:
		return nil, errors.New("Config.Key is another function than in the predecessor")
	case theirs.generation != p.generation:
		return nil, errors.New("Config.Generation is another function than in the predecessor")
	case buckets < 2 || fi.Size() != headerSize+int64(buckets)*int64(bucketSize):
		return nil, fmt.Errorf("the table of flows has %d bytes, which is not the size of %d buckets", fi.Size(), buckets)
	}
	if mem, err = mapFile(f, int(fi.Size())); err != nil {
		return nil, err
	}
	return tableIn(mem), nil
}

var errNoTable = errors.New("the predecessor's file is not a table of flows")

func mapFile(f *os.File, size int) (mem []byte, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		mem, err = unix.Mmap(int(fd), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	})
	if cerr != nil {
		return nil, cerr
	}
	return mem, os.NewSyscallError("mmap", err)
}

// tableIn returns the table in mem, which begins at a multiple of 8 bytes.
func tableIn(mem []byte) *table {
	return &table{
		mem:     mem,
		h:       (*header)(unsafe.Pointer(&mem[0])),
		buckets: unsafe.Slice((*bucket)(unsafe.Pointer(&mem[headerSize])), (len(mem)-headerSize)/bucketSize),
	}
}

// newOwner returns a number that no other socket of any generation has in this
// table.
func (t *table) newOwner() (uint32, error) {
	n := t.h.owners.Add(1)
	if n > maxOwner {
		t.h.owners.Store(maxOwner)
		return 0, fmt.Errorf("the table of flows has had %d sockets, and cannot number more; a restart makes a new table", maxOwner)
	}
	return n, nil
}

// hash returns the hash of a flow's key.
func (t *table) hash(key []byte) uint64 {
	return max(1, sipHash(t.h.k0, t.h.k1, key))
}

// places returns the two buckets of a hash, which may be the same.
func (t *table) places(hash uint64) [2]*bucket {
	n := uint32(len(t.buckets))
	i, _ := bits.Mul32(uint32(hash), n)
	j, _ := bits.Mul32(uint32(hash>>32), n)
	return [2]*bucket{&t.buckets[i], &t.buckets[j]}
}

func stateOf(owner uint32, expiry uint64) uint64 {
	return uint64(owner)<<expiryBits | min(expiry, maxExpiry-1)
}

func ownerOf(state uint64) uint32  { return uint32(state >> expiryBits) }
func expiryOf(state uint64) uint64 { return state & maxExpiry }

// live reports whether a state belongs to a flow that has not expired.
func live(state, now uint64) bool { return ownerOf(state) != 0 && expiryOf(state) > now }

// find returns the slot of a live flow and its state, or nil if there is none.
func (t *table) find(hash, now uint64) (*slot, uint64) {
	for _, b := range t.places(hash) {
		for i := range b {
			s := &b[i]
			for s.hash.Load() == hash {
				state := s.state.Load()
				if s.hash.Load() != hash || !live(state, now) {
					break
				}
				if s.state.Load() == state {
					return s, state
				}
			}
		}
	}
	return nil, 0
}

// open makes a slot for a flow that find has not found. It returns false if both
// buckets are full.
func (t *table) open(hash uint64, owner uint32, now, expiry uint64) bool {
	for {
		s, state := t.free(hash, now)
		if s == nil {
			return false
		}
		if s.state.CompareAndSwap(state, busy) {
			s.hash.Store(hash)
			s.state.Store(stateOf(owner, expiry))
			return true
		}
	}
}

// free returns a slot for a new flow in the emptier one of its buckets, or the
// slot that the same flow had before it expired.
func (t *table) free(hash, now uint64) (best *slot, bestState uint64) {
	least := bucketSlots
	for _, b := range t.places(hash) {
		var s *slot
		var sState uint64
		used := 0
		for i := range b {
			state := b[i].state.Load()
			if state == busy || live(state, now) {
				used++
				continue
			}
			if s == nil {
				s, sState = &b[i], state
			}
			if state != 0 && b[i].hash.Load() == hash {
				return &b[i], state
			}
		}
		if used < least {
			least, best, bestState = used, s, sState
		}
	}
	return best, bestState
}

// refresh sets a later expiry for a flow that find has found. It need not try
// again if another process or goroutine changes the state meanwhile.
func (s *slot) refresh(state, expiry uint64) {
	if expiry > expiryOf(state) {
		s.state.CompareAndSwap(state, stateOf(ownerOf(state), expiry))
	}
}

// take gives a flow that find has found another owner. It returns false if the
// state has changed since.
func (s *slot) take(state uint64, owner uint32, expiry uint64) bool {
	return s.state.CompareAndSwap(state, stateOf(owner, max(expiry, expiryOf(state))))
}

// claim gives a flow this owner, and makes a slot for it if there is none. It
// returns false if the table is full.
func (t *table) claim(hash uint64, owner uint32, now, expiry uint64) bool {
	for {
		s, state := t.find(hash, now)
		if s == nil {
			return t.open(hash, owner, now, expiry)
		}
		if s.take(state, owner, expiry) {
			t.h.changes.Add(1)
			return true
		}
	}
}

// last returns the time at which the last flow of an owner expires, or 0 if it has
// none.
func (t *table) last(owner uint32, now uint64) (expiry uint64) {
	for i := range t.buckets {
		for j := range t.buckets[i] {
			state := t.buckets[i][j].state.Load()
			if ownerOf(state) == owner && live(state, now) {
				expiry = max(expiry, expiryOf(state))
			}
		}
	}
	return expiry
}
