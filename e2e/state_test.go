package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Options.SendState, and State in the successor.

// patternBlock is what a state of these tests consists of, each time with its
// number at the front.
var patternBlock = sync.OnceValue(func() []byte {
	b := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
})

// pattern fills b with what a state has at an offset.
func pattern(b []byte, offset int64) {
	block := patternBlock()
	for len(b) > 0 {
		number, in := offset/int64(len(block)), int(offset%int64(len(block)))
		n := copy(b, block[in:])
		for i := in; i < 8 && i-in < n; i++ {
			b[i-in] = byte(number >> (8 * i))
		}
		b, offset = b[n:], offset+int64(n)
	}
}

// atSendState is the point at which SendState is called.
const atSendState proctest.Point = "SendState"

// A sending is what SendState does. It writes Size bytes of the pattern, if it
// does nothing else.
type sending struct {
	Size int64
	Else elsewise
}

type elsewise int

const (
	writesBytes elsewise = iota + 1 // one at a time
	fails                           // after 100 bytes
	panics                          // after 100 bytes
	fillsUp                         // ignores that the system takes no more, and returns nil
	keepsWriter                     // for writeLate
)

// sends says what SendState does. It must be planned AtStart, and may be called
// again later.
var sends = proctest.Define("set SendState", func(d *proctest.Daemon, s sending) (proctest.None, error) {
	d.Set("sending", s)
	d.Options.SendState = func(w io.Writer) error {
		d.Point(atSendState)
		return proctest.Get[sending](d, "sending").write(d, w)
	}
	return proctest.None{}, nil
})

func (s sending) write(d *proctest.Daemon, w io.Writer) error {
	switch s.Else {
	case fails, panics:
		if _, err := w.Write(make([]byte, 100)); err != nil {
			return err
		}
		if s.Else == panics {
			panic("planned")
		}
		return fmt.Errorf("no state today: %w", os.ErrPermission)
	case fillsUp:
		return fillUp(d, w)
	case keepsWriter:
		d.Set("writer", w)
	}
	for offset := int64(0); offset < s.Size; {
		b := make([]byte, min(s.Size-offset, 1<<20+17)) // pieces of no round size
		if s.Else == writesBytes {
			b = b[:1]
		}
		pattern(b, offset)
		if m, err := w.Write(b); err != nil || m != len(b) {
			return fmt.Errorf("wrote %d of %d bytes: %w", m, len(b), err)
		}
		offset += int64(len(b))
	}
	return nil
}

// fillUp writes more than a file may have for the moment, and then something for
// which there would be room.
func fillUp(d *proctest.Daemon, w io.Writer) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGXFSZ)
	old := limit
	limit.Cur = 4096
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	defer func() { _ = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old) }()
	_, err1 := w.Write(make([]byte, 5000))
	_ = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old)
	n, err2 := w.Write([]byte("more"))
	d.Set("filled", filled{Full: errors.Is(err1, syscall.EFBIG), N: n, Refused: err2 != nil})
	return nil
}

// A filled is what the two writes of fillUp have returned.
type filled struct {
	Full    bool // the first one: EFBIG
	N       int  // the second one
	Refused bool
}

var hasFilled = proctest.Define("has filled up", func(d *proctest.Daemon, _ proctest.None) (filled, error) {
	return proctest.Get[filled](d, "filled"), nil
})

// writeLate uses SendState's writer after that has returned.
var writeLate = proctest.Define("write late", func(d *proctest.Daemon, text string) (proctest.None, error) {
	_, err := io.WriteString(proctest.Get[io.Writer](d, "writer"), text)
	return proctest.None{}, err
})

// A stateRead is how many bytes of the state are read, -1 for all, and how many
// by each call of Read at most.
type stateRead struct {
	N     int64
	Piece int
}

// A stateGot is how many bytes came, and whether the end did.
type stateGot struct {
	N   int64
	EOF bool
}

var stateOffset int64 // of this process's next read

// readPattern reads from the state and compares it with the pattern.
var readPattern = proctest.Define("read the pattern", func(d *proctest.Daemon, a stateRead) (got stateGot, err error) {
	r := d.U.State()
	if r == nil || r != d.U.State() {
		return got, errors.New("State returned nil or something else the second time")
	}
	b, want := make([]byte, a.Piece), make([]byte, a.Piece)
	for got.N != a.N {
		size := a.Piece
		if a.N >= 0 {
			size = int(min(int64(size), a.N-got.N))
		}
		m, err := r.Read(b[:size])
		pattern(want[:m], stateOffset)
		if !bytes.Equal(b[:m], want[:m]) {
			return got, fmt.Errorf("%d bytes at %d are not those that were written", m, stateOffset)
		}
		got.N, stateOffset = got.N+int64(m), stateOffset+int64(m)
		if err == io.EOF {
			got.EOF = true
			return got, nil
		}
		if err != nil {
			return got, err
		}
		if m == 0 {
			return got, errors.New("Read returned 0, nil")
		}
	}
	return got, nil
})

// readsPart lets p read so many bytes, which must be there.
func readsPart(p *proctest.Proc, n int64, piece int) {
	p.T.Helper()
	if got := readPattern.On(p, stateRead{n, piece}); got.N != n || got.EOF {
		p.T.Fatalf("process %d has read %+v of its state; want %d bytes and not the end", p.PID, got, n)
	}
}

// readsRest lets p read to the end, before which this many bytes must come.
func readsRest(p *proctest.Proc, n int64, piece int) {
	p.T.Helper()
	if got := readPattern.On(p, stateRead{-1, piece}); got.N != n || !got.EOF {
		p.T.Fatalf("process %d has read %+v of its state; want %d bytes and the end", p.PID, got, n)
	}
}

// sendingState returns spec with a SendState.
func sendingState(spec proctest.Spec, s sending) proctest.Spec {
	return spec.At(proctest.AtStart, sends.Do(s))
}

// sendsAndHolds is a chain of daemons that send a state and, as successors, hold
// after New. Its first process serves.
func sendsAndHolds(t *testing.T, s sending) *proctest.Proc {
	t.Helper()
	next := sendingState(proctest.Holding.UpgradeTimeout(2*proctest.Patience), s) // a read for each byte takes long
	first := sendingState(proctest.Holding.UpgradeTimeout(2*proctest.Patience), s)
	first.Plan[proctest.AtNew] = nil
	return proctest.Start(t, first, next)
}

// hasNoState fails the test if p has a descriptor of a state.
func hasNoState(p *proctest.Proc) {
	p.T.Helper()
	for _, fd := range p.FDs() {
		if strings.Contains(fd, "memfd") || strings.Contains(fd, "/ecdysis") {
			p.T.Errorf("process %d has the descriptor %s", p.PID, fd)
		}
	}
}

// Every size arrives whole, whatever the pieces, and EOF is after the last byte.
func TestState(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 1, 2, 511, 4096, 100_000, 1<<20 + 3, 5 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			all := int64(size)
			p := sendsAndHolds(t, sending{})
			readsRest(p, 0, 10) // the first process
			sends.On(p, sending{Size: all})
			for _, piece := range []int{size, size + 1, max(size-1, 1), 4096, 1} {
				if piece == 0 || size/piece > 200_000 {
					continue
				}
				s := p.UpgradeHolding(func(s *proctest.Proc) {
					if piece == size { // no EOF with the last byte, and none before
						readsPart(s, all, size)
						readsRest(s, 0, 1)
					} else {
						readsRest(s, all, piece)
					}
					readsRest(s, 0, 1)
				})
				s.HasUnclaimed()
				readsRest(s, 0, 1) // as before Ready
				hasNoState(p)
				hasNoState(s)
				p.Kill()
				sends.On(s, sending{Size: all})
				p = s
			}
		})
	}
}

// A state may be written a byte at a time, be empty, or not be sent at all.
func TestStateSmall(t *testing.T) {
	t.Parallel()
	p := sendsAndHolds(t, sending{Size: 300, Else: writesBytes})
	s := p.UpgradeHolding(func(s *proctest.Proc) { readsRest(s, 300, 1000) })
	s.HasUnclaimed()
	sends.On(s, sending{})
	n := s.UpgradeHolding(func(n *proctest.Proc) { readsRest(n, 0, 10) })
	n.HasUnclaimed()
	hasNoState(n)
	p = proctest.Start(t, proctest.TCP, proctest.Holding) // no SendState
	s = p.UpgradeHolding(func(s *proctest.Proc) { readsRest(s, 0, 10) })
	s.HasUnclaimed("tcp 127.0.0.1:0")
	readsRest(s, 0, 10)
}

// What is not read by Ready is lost, and said to be.
func TestStateUnread(t *testing.T) {
	t.Parallel()
	for name, read := range map[string]int64{"none": 0, "half": 5000, "all but one": 9999} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := sendsAndHolds(t, sending{Size: 10000})
			s := p.UpgradeHolding(func(s *proctest.Proc) { readsPart(s, read, 1000) })
			s.HasUnclaimed("state")
			unread := fmt.Sprintf("%d bytes were not read", 10000-read)
			proctest.Want(t, readPattern.Err(s, stateRead{1, 1}), os.ErrClosed, unread)
			proctest.Want(t, readPattern.Err(s, stateRead{-1, 100000}), os.ErrClosed, unread)
			hasNoState(s)
			hasNoState(p)
			sends.On(s, sending{Size: 10})
			s.UpgradeHolding(func(n *proctest.Proc) { readsRest(n, 10, 100) }).HasUnclaimed()
		})
	}
}

// Each attempt has a state of its own, as it is at that moment, which has no
// part of what an earlier successor has read.
func TestStateOfEachAttempt(t *testing.T) {
	t.Parallel()
	p := sendsAndHolds(t, sending{Size: 1000})
	p.KillHolding(func(s *proctest.Proc) { readsPart(s, 600, 100) })
	hasNoState(p)
	sends.On(p, sending{Size: 2000})
	p.KillHolding(func(s *proctest.Proc) {})
	hasNoState(p)
	sends.On(p, sending{Size: 3000})
	p.UpgradeHolding(func(s *proctest.Proc) { readsRest(s, 3000, 999) }).HasUnclaimed()
}

// SendState that fails ends the attempt before anything is started.
func TestStateFails(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		what elsewise
		is   error
	}{
		{"error", fails, os.ErrPermission},
		{"full", fillsUp, syscall.EFBIG},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.what == fillsUp {
				proctest.OnlyOn(t, "the limit is one of memory files here", "linux")
			}
			p := proctest.Start(t, sendingState(proctest.TCP, sending{Else: c.what}), sendingState(proctest.Holding, sending{}))
			keeps := p.Keeps()
			for range 3 {
				f := p.FailUpgrade(ecdysis.StepPrepare, c.is)
				proctest.Want(t, f, c.is, "state: ")
				if f.PID != 0 {
					t.Errorf("error %v has PID %d; want none", f, f.PID)
				}
			}
			if c.what == fillsUp {
				if got := hasFilled.On(p); got != (filled{Full: true, Refused: true}) {
					t.Errorf("the writes beyond the limit and after it: %+v; want EFBIG, and that nothing is taken", got)
				}
			}
			p.Chain.None()
			keeps()
			p.Serves()
			sends.On(p, sending{Size: 5000})
			p.UpgradeHolding(func(s *proctest.Proc) { readsRest(s, 5000, 5001) })
		})
	}
}

func TestStatePanics(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, sendingState(proctest.TCP, sending{Else: panics}), sendingState(proctest.Holding, sending{}))
	keeps := p.Keeps()
	for range 3 {
		panicsInUpgrade(p)
	}
	p.Chain.None()
	keeps()
	p.Serves()
	hasNoState(p)
	sends.On(p, sending{Size: 5000})
	p.UpgradeHolding(func(s *proctest.Proc) { readsRest(s, 5000, 5001) })
}

// The process serves while it writes its state, and can be stopped meanwhile,
// from without and by the hook itself.
func TestStopDuringSendState(t *testing.T) {
	t.Parallel()
	for name, does := range map[string]proctest.Action{"from without": proctest.Hold, "by the hook": proctest.CallStop.Do()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, sendingState(proctest.TCP, sending{Size: 10000}).At(atSendState, does))
			a := p.BeginUpgrade()
			if name == "from without" {
				p.At(atSendState)
				p.Serves()
				p.Stop()
				p.Serves() // the upgrade does the rest
				p.Resume()
			}
			a.Fails(ecdysis.StepStart, ecdysis.ErrStopped)
			p.AwaitExit()
			p.Chain.None()
			hasNoState(p)
			p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)
			p.Refuses()
		})
	}
}

// The state is there, whole, though the predecessor has ended before the
// successor has done anything.
func TestStateOfKilledPredecessor(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "the system may keep less for a successor", "linux")
	p := proctest.Start(t, sendingState(proctest.TCP, sending{Size: 3000000}), proctest.Holding.Hold(proctest.AtStart, proctest.AtNew))
	s := p.BeginUpgrade().Successor()
	s.At(proctest.AtStart)
	p.Kill()
	s.Resume()
	s.At(proctest.AtNew)
	readsRest(s, 3000000, 100001)
	s.Resume()
	s.At(proctest.AtServing)
	s.HasUnclaimed("tcp 127.0.0.1:0")
	hasNoState(s)
}

// A writer that is used after SendState has returned must not change what the
// successor reads.
func TestStateLateWrite(t *testing.T) {
	t.Parallel()
	p := sendsAndHolds(t, sending{Size: 10000, Else: keepsWriter})
	p.UpgradeHolding(func(s *proctest.Proc) {
		readsPart(s, 100, 100)
		proctest.Want(t, writeLate.Err(p, "not the state any more"), nil)
		readsRest(s, 9900, 10000)
	}).HasUnclaimed()
	proctest.Want(t, writeLate.Err(p, "neither"), nil)
}

// heapSys is how much memory the heap has had.
var heapSys = proctest.Define("heap", func(*proctest.Daemon, proctest.None) (uint64, error) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapSys, nil
})

// availableMemory is what new programs can have, in bytes.
func availableMemory() (n uint64) {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &n); err == nil {
			return n << 10
		}
	}
	return 0
}

// A gibibyte goes through, and none of it over the heap. Not parallel, because
// it takes much of the machine.
func TestStateHuge(t *testing.T) {
	const size = 1 << 30
	proctest.OnlyOn(t, "a state is held in a file", "linux")
	if testing.Short() {
		t.Skip("it takes a gibibyte of memory and seconds")
	}
	if free := availableMemory(); free < 3<<30 {
		t.Skipf("the machine has %d MB of memory available; want 3072", free>>20)
	}
	p := sendsAndHolds(t, sending{Size: size})
	begun := time.Now()
	var written, read time.Duration
	s := p.UpgradeHolding(func(s *proctest.Proc) {
		written = time.Since(begun)
		readsRest(s, size, 1<<20)
		read = time.Since(begun) - written
	})
	s.HasUnclaimed()
	hasNoState(p)
	hasNoState(s)
	for _, p := range []*proctest.Proc{p, s} {
		n := heapSys.On(p)
		if n > size/8 {
			t.Errorf("the heap of process %d has had %d bytes", p.PID, n)
		}
		t.Log("heap:", n>>10, "KiB")
	}
	t.Logf("written, and the successor started, in %v; read in %v", written, read)
}
