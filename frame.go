//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"math"
)

// The codec of the conversation between two generations, which docs/protocol.md
// describes.

// A frame is its kind, the length of its payload in four bytes, most
// significant first, and the payload: records, each a list of "key=value"
// fields. A field is its length (a varint) and its bytes. An empty field ends
// the record. Unknown keys are ignored. In a SOCKETS frame each record comes
// with a descriptor.
type frame struct {
	kind    byte
	records []record
	fds     []int

	// Most frames have room here for what they hold. The first allocation of each
	// size class costs a process two page faults, and with these fields a frame is
	// of one class with an entry, a stream and an Event.
	oneRecord   [1]record
	eightFields [8]string
}

type record []string

const (
	frameTake    = 'T' // new to old, in a takeover: version, unit; answered by frameHello or frameFail
	frameHello   = 'H' // old to new: version, generation, pid, network, unit, retired (repeated)
	frameSockets = 'S' // old to new: what is handed on; answered by frameAck
	frameEnd     = 'E' // old to new: that was all
	frameAck     = 'K' // new to old: a batch has arrived
	frameReady   = 'R' // new to old: pid, unclaimed, label
	frameFail    = 'F' // new to old: reason, inuse, network, address; old to new, in the place of frameHello: reason, retired
	frameCommit  = 'C' // old to new: probation; the old process accepts no more
	frameAbort   = 'A' // old to new: reason; the new process is given up
	frameDone    = 'D' // new to old: the new process serves
	frameBye     = 'B' // new to old, within probation: the new process was stopped, so the old one must not come back
	frameStop    = 'O' // old to new, before frameFinal: kind, signal, socket; a stop that has come since frameCommit
	frameFinal   = 'L' // old to new: the old process will not come back
)

const (
	protocolVersion = "1"

	frameHeader = 5
	maxFrame    = 64 << 10
	maxBatch    = 16 << 10 // bytes of records in a SOCKETS frame, one record aside
	maxFDs      = 254      // a message's most, on any system
)

var (
	errAgain     = errors.New("nothing has come yet")
	errTruncated = errors.New("the system delivered fewer descriptors than were sent: the limit of open files (RLIMIT_NOFILE) is too low for what this process inherits")
)

// number returns the number that a field's value is, in decimal digits alone.
func number(text string) (n int, ok bool) {
	u, ok := number64(text)
	return int(u), ok && u <= math.MaxInt
}

// number64 is number, likewise. The package strconv has an error for each
// reason, which nobody would see.
func number64(text string) (n uint64, ok bool) {
	for _, c := range []byte(text) {
		digit := uint64(c - '0')
		if digit > 9 || n > (math.MaxUint64-digit)/10 {
			return 0, false
		}
		n = n*10 + digit
	}
	return n, text != ""
}

func (r record) get(key string) string {
	for _, f := range r {
		if k, v, ok := cut(f, '='); ok && k == key {
			return v
		}
	}
	return ""
}

// all returns the values of a key that is repeated.
func (r record) all(key string) (values []string) {
	for _, f := range r {
		if k, v, ok := cut(f, '='); ok && k == key {
			values = append(values, v)
		}
	}
	return values
}

// first returns the value of a key in a frame of one record.
func (f *frame) first(key string) string {
	if len(f.records) == 0 {
		return ""
	}
	return f.records[0].get(key)
}

// appendField appends the field "key=value" to a record that is being appended
// to b. An empty value needs no field. Inlined, it would take much of a small
// stack where many calls follow one another.
//
//go:noinline
func appendField(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	b = appendLength(b, len(key)+1+len(value))
	return append(append(append(b, key...), '='), value...)
}

func appendLength(b []byte, n int) []byte {
	for ; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}

func endRecord(b []byte) []byte { return append(b, 0) }

func appendRecord(b []byte, r record) []byte {
	for _, f := range r {
		b = append(appendLength(b, len(f)), f...)
	}
	return endRecord(b)
}

// usualFrame is the room for a frame, in bytes. Most frames have one record, and
// most records fit. The allocator has one size class for it and for a channel,
// which saves page faults as it does for the type frame.
const usualFrame = 112

// beginFrame begins a frame behind b, to which records are appended until
// endFrame.
func beginFrame(b []byte, kind byte) []byte { return append(b, kind, 0, 0, 0, 0) }

// endFrame sets the length of the frame b.
func endFrame(b []byte) []byte {
	n := len(b) - frameHeader
	b[1], b[2], b[3], b[4] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return b
}

// payload returns the length of the payload of the frame at the front of b.
func payload(b []byte) uint32 {
	return uint32(b[1])<<24 | uint32(b[2])<<16 | uint32(b[3])<<8 | uint32(b[4])
}

func makeFrame(kind byte, records []record) []byte {
	b := beginFrame(make([]byte, 0, usualFrame), kind)
	for _, r := range records {
		b = appendRecord(b, r)
	}
	return endFrame(b)
}

// parseFrame takes a frame from the front of b. It returns the frame's length,
// or 0 and no frame if b does not hold a whole one yet.
func parseFrame(b []byte) (f *frame, n int, err error) {
	if len(b) < frameHeader {
		return nil, 0, nil
	}
	size := payload(b)
	if size > maxFrame {
		return nil, 0, errorf("a frame %q of %d bytes, more than the %d that there can be: the peer does not use this protocol", b[0], size, maxFrame)
	}
	n = frameHeader + int(size)
	if len(b) < n {
		return nil, 0, nil
	}
	p := string(b[frameHeader:n]) // the fields are parts of it
	f = &frame{kind: b[0]}
	f.records = f.oneRecord[:0]
	fields := record(f.eightFields[:0])
	if many := int(size / 64); many > 1 { // records of usual size: five fields each
		f.records, fields = make([]record, 0, many), make(record, 0, 5*many)
	}
	for len(p) > 0 {
		start := len(fields)
		for {
			l, w := uvarint(p)
			if w == 0 || l > len(p)-w {
				return nil, 0, errorf("a frame %q that is not made of records: the peer does not use this protocol", f.kind)
			}
			field := p[w : w+l]
			p = p[w+l:]
			if l == 0 {
				break
			}
			fields = append(fields, field)
		}
		f.records = append(f.records, fields[start:len(fields):len(fields)])
	}
	return f, n, nil
}

// uvarint returns the number at the front of b and its length, which is 0 if
// there is no number or it is larger than a field can be.
func uvarint(b string) (n, size int) {
	for size < len(b) && size < 3 {
		c := b[size]
		n |= int(c&0x7f) << (7 * size)
		size++
		if c < 0x80 {
			return n, size
		}
	}
	return 0, 0
}
