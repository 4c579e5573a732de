package udpflow

import "sync/atomic"

// A split is a slot's state in two words. It has the methods of atomic.Uint64
// that a table needs, and their effect is the same as far as a table can tell. It
// is for processors on which sync/atomic stores 64 bits under a lock of the
// process, which other processes do not know.
//
// The upper word has the owner and the lower one the expiry, except for its upper
// eight bits, which change every 50 days. A change of both words is two changes,
// the owner's first. A process that ends in between leaves the flow its earlier
// expiry. A process that is stopped right before them, until the flow has expired,
// may change the owner of the slot's next flow, if both flows had one owner.
type split struct {
	lower, upper atomic.Uint32
}

const lowerBusy = busy & (1<<32 - 1)

func halves(state uint64) (lower, upper uint32) {
	lower, upper = uint32(state), uint32(state>>32)
	if lower == lowerBusy && state != busy {
		lower-- // a millisecond less, because this value has a meaning
	}
	return lower, upper
}

// Load returns busy while a slot is not yet all written.
func (s *split) Load() uint64 {
	for {
		lower := s.lower.Load()
		if lower == lowerBusy {
			return busy
		}
		upper := s.upper.Load()
		// The slot may have been used again in between. Its expiry is later then.
		if s.lower.Load() == lower {
			return uint64(upper)<<32 | uint64(lower)
		}
	}
}

// Store ends the state busy.
func (s *split) Store(state uint64) {
	lower, upper := halves(state)
	s.upper.Store(upper)
	s.lower.Store(lower)
}

// CompareAndSwap compares both words, but not at once. So a flow's owner may
// change while it gets a later expiry, and the later expiry remains.
func (s *split) CompareAndSwap(old, state uint64) bool {
	if s.Load() != old {
		return false
	}
	oldLower, oldUpper := halves(old)
	lower, upper := halves(state)
	if state == busy {
		return s.lower.CompareAndSwap(oldLower, lower)
	}
	if upper == oldUpper {
		return s.lower.CompareAndSwap(oldLower, lower) && s.upper.Load() == upper
	}
	if !s.upper.CompareAndSwap(oldUpper, upper) {
		return false
	}
	if lower != oldLower {
		// If this fails, another has set an expiry that is about as late, or the flow
		// has just expired.
		s.lower.CompareAndSwap(oldLower, lower)
	}
	return true
}
