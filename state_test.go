//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

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

// stateHook is what SendState does, as the test has said last.
var stateHook atomic.Value

var stateGo = make(chan struct{}) // what a "hold" waits for

func init() {
	stateHook.Store("")
	adjust = append(adjust, func(d *daemon, o *ecdysis.Options) {
		if d.spec.Extra["state"] != "" {
			stateHook.Store(d.spec.Extra["state"])
			o.SendState = func(w io.Writer) error { return d.sendState(w, stateHook.Load().(string)) }
		}
	})
	for name, f := range stateVerbs {
		verbs["thing "+name] = func(d *daemon, c command) message {
			text, err := f(d, c.Args)
			return message{Text: text, Err: toErrMsg(err)}
		}
	}
}

func (d *daemon) sendState(w io.Writer, what string) error {
	what, arg, _ := strings.Cut(what, " ")
	n, _ := strconv.ParseInt(arg, 10, 64)
	switch what {
	case "hold":
		d.send(message{At: "sendstate"})
		<-stateGo
	case "error":
		if _, err := w.Write(make([]byte, 100)); err != nil {
			return err
		}
		return fmt.Errorf("no state today: %w", os.ErrPermission)
	case "panic":
		_, _ = w.Write(make([]byte, 100))
		panic("planned")
	case "stop":
		d.u.Stop()
	case "full": // the file may not be so large, and nobody looks at the errors
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
		n, err2 := w.Write([]byte("more")) // for which there would be room
		d.send(message{At: "written", Text: []string{strconv.FormatBool(errors.Is(err1, syscall.EFBIG)), fmt.Sprint(n, err2 != nil)}})
		return nil
	case "late": // the writer outlives the call
		setThing("late writer", w)
	}
	for offset := int64(0); offset < n; {
		b := make([]byte, min(n-offset, 1<<20+17)) // pieces of no round size
		if what == "tiny" {
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

var stateVerbs = func() map[string]func(d *daemon, a []string) ([]string, error) {
	var offset int64
	return map[string]func(d *daemon, a []string) ([]string, error){
		"state": func(d *daemon, a []string) ([]string, error) {
			stateHook.Store(a[0])
			return nil, nil
		},
		"state go": func(*daemon, []string) ([]string, error) {
			close(stateGo)
			return nil, nil
		},
		"heap": func(*daemon, []string) ([]string, error) {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return []string{strconv.FormatUint(m.HeapSys, 10)}, nil
		},
		// So many bytes (-1: all), in pieces of at most so many, against the
		// pattern: how many came, and how it ended.
		"state read": func(d *daemon, a []string) ([]string, error) {
			left, _ := strconv.ParseInt(a[0], 10, 64)
			piece, _ := strconv.Atoi(a[1])
			if left < 0 {
				left = 1<<63 - 1
			}
			r := d.u.State()
			if r == nil || r != d.u.State() {
				return nil, errors.New("State returned nil or something else the second time")
			}
			b, want := make([]byte, piece), make([]byte, piece)
			for n := int64(0); ; {
				if n == left {
					return []string{strconv.FormatInt(n, 10), "more"}, nil
				}
				m, err := r.Read(b[:min(int64(piece), left-n)])
				pattern(want[:m], offset)
				if string(b[:m]) != string(want[:m]) {
					return nil, fmt.Errorf("%d bytes at %d are not those that were written", m, offset)
				}
				n, offset = n+int64(m), offset+int64(m)
				if err == io.EOF {
					return []string{strconv.FormatInt(n, 10), "EOF"}, nil
				}
				if err != nil {
					return nil, err
				}
				if m == 0 && piece > 0 {
					return nil, errors.New("Read returned 0, nil")
				}
			}
		},
		"late write": func(d *daemon, a []string) ([]string, error) {
			_, err := io.WriteString(thing[io.Writer]("late writer"), a[0])
			return nil, err
		},
	}
}()

// sending is a daemon that sends a state and, as a successor, waits after New.
func sending(what string) spec {
	s := holding()
	s.Extra = map[string]string{"state": what}
	return s
}

// begins starts a first process that holds at "new".
func (h *hub) begins() *proc {
	h.t.Helper()
	p := h.start()
	p.at("new")
	p.resume()
	p.at("serving")
	return p
}

// noState asserts that p has none of a state's descriptors.
func (p *proc) noState() {
	p.t.Helper()
	for _, fd := range p.call("fds").Text {
		if strings.Contains(fd, "memfd") || strings.Contains(fd, "/ecdysis") {
			p.t.Errorf("process %d has the descriptor %s", p.pid, fd)
		}
	}
}

// Every size arrives whole, whatever the pieces, and EOF is after the last byte.
func TestState(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 1, 2, 511, 4096, 100_000, 1<<20 + 3, 5 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			p := newHub(t, sending("size 0")).begins()
			p.gives("0|EOF", "state read", "-1", "10") // the first process
			p.thing("state", fmt.Sprint("size ", size))
			all := fmt.Sprint(size)
			for _, piece := range []int{size, size + 1, max(size-1, 1), 4096, 1} {
				if piece == 0 || size/piece > 200_000 {
					continue
				}
				s := p.succeed(func(s *proc) {
					if piece == size { // no EOF with the last byte, and none before
						s.gives(all+"|more", "state read", all, all)
						s.gives("0|EOF", "state read", "1", "1")
					} else {
						s.gives(all+"|EOF", "state read", "-1", strconv.Itoa(piece))
					}
					s.gives("0|EOF", "state read", "1", "1")
				})
				s.unclaimed()
				s.gives("0|EOF", "state read", "1", "1") // as before Ready
				p.noState()
				s.noState()
				p.kill()
				s.thing("state", fmt.Sprint("size ", size))
				p = s
			}
		})
	}
}

// A state written a byte at a time, and one that is not sent at all.
func TestStateSmall(t *testing.T) {
	t.Parallel()
	p := newHub(t, sending("tiny 300")).begins()
	s := p.succeed(func(s *proc) { s.gives("300|EOF", "state read", "-1", "1000") })
	s.unclaimed()
	s.thing("state", "size 0") // SendState that writes nothing
	g := s.succeed(func(g *proc) { g.gives("0|EOF", "state read", "-1", "10") })
	g.unclaimed()
	g.noState()
	h := newHub(t, holding()) // no SendState
	p = h.begins()
	s = p.succeed(func(s *proc) { s.gives("0|EOF", "state read", "-1", "10") })
	s.unclaimed()
	s.gives("0|EOF", "state read", "-1", "10")
}

// What is not read by Ready is lost, and said to be.
func TestStateUnread(t *testing.T) {
	t.Parallel()
	for name, read := range map[string]int{"none": 0, "half": 5000, "all but one": 9999} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newHub(t, sending("size 10000")).begins()
			s := p.succeed(func(s *proc) {
				s.gives(fmt.Sprint(read)+"|more", "state read", strconv.Itoa(read), "1000")
			})
			s.unclaimed("state")
			says := []string{fmt.Sprintf("%d bytes were not read", 10000-read)}
			s.noThing("os.ErrClosed", says, "state read", "1", "1")
			s.noThing("os.ErrClosed", says, "state read", "-1", "100000")
			s.noState()
			p.noState()
			s.thing("state", "size 10")
			s.succeed(func(g *proc) { g.gives("10|EOF", "state read", "-1", "100") }).unclaimed()
		})
	}
}

// Each attempt has a state of its own, as it is at that moment, which has no
// part of what an earlier successor has read.
func TestStateOfEachAttempt(t *testing.T) {
	t.Parallel()
	p := newHub(t, sending("size 1000")).begins()
	p.perish(func(s *proc) { s.gives("600|more", "state read", "600", "100") })
	p.noState()
	p.thing("state", "size 2000")
	p.perish(func(s *proc) {})
	p.noState()
	p.thing("state", "size 3000")
	p.succeed(func(s *proc) { s.gives("3000|EOF", "state read", "-1", "999") }).unclaimed()
}

// SendState that fails ends the attempt before anything is started.
func TestStateFails(t *testing.T) {
	t.Parallel()
	for what, is := range map[string]string{"error": "permission", "full": "EFBIG"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			if what == "full" && runtime.GOOS != "linux" {
				t.Skip("the limit is one of Linux's memory files here")
			}
			sp := tcp()
			sp.Extra = map[string]string{"state": what}
			h := newHub(t, sp, sending("size 0"))
			p := h.serving()
			before := p.call("fds").Text
			for range 3 {
				e := p.failUpgrade(command{}, "prepare", is)
				if !strings.Contains(e.Text, "state: ") || e.PID != 0 {
					t.Errorf("error %+v; want that it says state, and no PID", e)
				}
			}
			if what == "full" {
				if got := p.at("written").Text; !slices.Equal(got, []string{"true", "0 true"}) {
					t.Errorf("the write beyond the limit is EFBIG, the one after it: %q", got)
				}
			}
			h.none()
			p.serves()
			sameFiles(p, before)
			p.thing("state", "size 5000")
			p.succeed(func(s *proc) { s.gives("5000|EOF", "state read", "-1", "5001") })
		})
	}
}

func TestStatePanics(t *testing.T) {
	t.Parallel()
	sp := tcp()
	sp.Extra = map[string]string{"state": "panic"}
	h := newHub(t, sp, sending("size 0"))
	p := h.serving()
	before := p.call("fds").Text
	for range 3 {
		if m := p.call("recover", "upgrade"); !slices.Equal(m.Text, []string{"planned"}) {
			t.Fatalf("Upgrade: %+v", m)
		}
	}
	h.none()
	p.serves()
	sameFiles(p, before)
	p.noState()
	p.thing("state", "size 5000")
	p.succeed(func(s *proc) { s.gives("5000|EOF", "state read", "-1", "5001") })
}

// The process serves while it writes its state, and can be stopped meanwhile,
// from without and by the hook itself.
func TestStopDuringSendState(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"hold", "stop"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			sp := tcp()
			sp.Extra = map[string]string{"state": what + " 10000"}
			h := newHub(t, sp)
			p := h.serving()
			answer := p.begin(command{Verb: "upgrade"})
			if what == "hold" {
				p.at("sendstate")
				p.serves()
				p.call("stop")
				p.serves() // the upgrade does the rest
				p.thing("state go")
			}
			checkErr(t, answer().Err, "start", "ErrStopped")
			p.call("awaitexit")
			h.none()
			p.noState()
			p.hasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed, ecdysis.EventStopping)
			p.refuses()
		})
	}
}

// The state is there, whole, though the old process has ended before the new
// one has done anything.
func TestStateOfKilledParent(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere the system may keep less")
	}
	sp := sending("size 3000000")
	next := sending("size 0")
	next.Do["start"] = "hold"
	h := newHub(t, sp, next)
	p := h.begins()
	_ = p.begin(command{Verb: "upgrade"})
	s := h.proc()
	s.at("start")
	p.kill()
	s.resume()
	s.at("new")
	s.gives("3000000|EOF", "state read", "-1", "100001")
	s.resume()
	s.at("serving")
	s.unclaimed()
	s.noState()
}

// A writer that is used after SendState has returned must not change what the
// successor reads.
func TestStateLateWrite(t *testing.T) {
	t.Parallel()
	p := newHub(t, sending("late 10000")).begins()
	p.succeed(func(s *proc) {
		s.gives("100|more", "state read", "100", "100")
		p.noThing("", nil, "late write", "not the state any more")
		s.gives("9900|EOF", "state read", "-1", "10000")
	}).unclaimed()
	p.noThing("", nil, "late write", "neither")
}

// A gibibyte goes through, and none of it over the heap. Not parallel: it takes
// much of the machine.
func TestStateHuge(t *testing.T) {
	const size = 1 << 30
	if testing.Short() {
		t.Skip("it takes a gibibyte of memory and seconds")
	}
	if free := availableMemory(); free < 3<<30 {
		t.Skipf("the machine has %d MB of memory available; want 3072", free>>20)
	}
	p := newHub(t, sending(fmt.Sprint("size ", size))).begins()
	begun := time.Now()
	var written, read time.Duration
	s := p.succeed(func(s *proc) {
		written = time.Since(begun)
		s.gives(fmt.Sprint(size, "|EOF"), "state read", "-1", fmt.Sprint(1<<20))
		read = time.Since(begun) - written
	})
	s.unclaimed()
	p.noState()
	s.noState()
	for _, p := range []*proc{p, s} {
		n, err := strconv.ParseUint(p.thing("heap")[0], 10, 64)
		if err != nil || n > size/8 {
			t.Errorf("the heap has had %d bytes, %v", n, err)
		}
		t.Log("heap:", n>>10, "KiB")
	}
	t.Logf("written, and the successor started, in %v; read in %v", written, read)
}
