package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A successor ends, hangs or sends nonsense before it serves. The predecessor
// serves on, says why the upgrade failed, and is left as it was.

// A successor that accepts before it is ready has no client to take with it.
func TestAcceptLoopsBeforeReady(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		end  proctest.Action
		how  string
	}{
		{"exit", proctest.Exit(3), "exit status 3"},
		{"panic", proctest.Panic, "exit status 2"},
		{"kill", proctest.Kill, "signal: killed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := survive(proctest.New(t, proctest.TCP,
				proctest.TCP.At(proctest.AtListened, proctest.CallAccept.Do(), proctest.Hold, tt.end)))
			a := v.BeginUpgrade()
			s := a.Successor()
			if err := proctest.CallAccept.ErrAt(s, proctest.AtListened); err != nil {
				t.Fatal(err)
			}
			v.load.More(100)
			s.Resume()
			v.fails(a, failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF, how: tt.how})
			if n := v.load.Newest(); n != 0 {
				t.Errorf("generation %d has answered", n)
			}
			v.survived(proctest.TCP)
		})
	}
}

// TestSuccessorKilled has the kills at other points.
func TestSuccessorEnds(t *testing.T) {
	t.Parallel()
	const reason = "the database\nis away: \xc3\xa9"
	long := strings.Repeat("0123456789", 10<<10)
	exits := func(step ecdysis.Step, how string) failure {
		return failure{step: step, is: io.ErrUnexpectedEOF, how: how}
	}
	gives := func(reason string) failure {
		return failure{step: ecdysis.StepInit, how: "exit status 1", says: reason}
	}
	committed := proctest.On(ecdysis.EventReady)
	for _, tt := range []struct {
		point proctest.Point
		name  string
		end   proctest.Action
		want  failure
	}{
		{proctest.AtStart, "exit 3", proctest.Exit(3), exits(ecdysis.StepInit, "exit status 3")},
		{proctest.AtStart, "exit 0", proctest.Exit(0), exits(ecdysis.StepInit, "exit status 0")},
		{proctest.AtStart, "panic", proctest.Panic, exits(ecdysis.StepInit, "exit status 2")},
		{proctest.AtNew, "exit 3", proctest.Exit(3), exits(ecdysis.StepInit, "exit status 3")},
		{proctest.AtNew, "exit 0", proctest.Exit(0), exits(ecdysis.StepInit, "exit status 0")},
		{proctest.AtNew, "panic", proctest.Panic, exits(ecdysis.StepInit, "exit status 2")},
		{proctest.AtNew, "fail", proctest.Fail(reason), gives(reason)},
		{proctest.AtNew, "fail with 20 KiB", proctest.Fail(long[:20<<10]), gives(long[:20<<10])},
		{proctest.AtNew, "fail with more than a frame takes", proctest.Fail(long), gives(long[:20<<10])},
		{proctest.AtListened, "exit 3", proctest.Exit(3), exits(ecdysis.StepInit, "exit status 3")},
		{proctest.AtListened, "exit 0", proctest.Exit(0), exits(ecdysis.StepInit, "exit status 0")},
		{proctest.AtListened, "panic", proctest.Panic, exits(ecdysis.StepInit, "exit status 2")},
		{proctest.AtListened, "fail", proctest.Fail(reason), gives(reason)},
		{committed, "exit 3", proctest.Exit(3), exits(ecdysis.StepHandover, "exit status 3")},
		{committed, "kill", proctest.Kill, exits(ecdysis.StepHandover, "signal: killed")},
	} {
		t.Run(fmt.Sprint(tt.point, ", ", tt.name), func(t *testing.T) {
			t.Parallel()
			v := survive(proctest.New(t, proctest.TCP, proctest.TCP.At(tt.point, tt.end)))
			v.fails(v.BeginUpgrade(), tt.want)
			if resumed := slices.Contains(v.Kinds(), ecdysis.EventResumed); resumed != (tt.want.step == ecdysis.StepHandover) {
				t.Errorf("events %q of a failure at %s", v.Kinds(), tt.want.step)
			}
			v.survived(proctest.TCP)
		})
	}
}

// A failed attempt does not make the next one fail, and leaves no descriptor
// to the garbage collector. There are no clients, whose sockets come and go.
func TestManyFailures(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP)
	unchanged := p.Keeps()
	for i := range 10 {
		point := []proctest.Point{proctest.AtStart, proctest.AtNew, proctest.AtListened, proctest.On(ecdysis.EventReady)}[i%4]
		p.Chain.Specs(proctest.TCP.At(point, proctest.Exit(3)))
		step := ecdysis.StepInit
		if point == proctest.On(ecdysis.EventReady) {
			step = ecdysis.StepHandover
		}
		if f := p.FailUpgrade(step, io.ErrUnexpectedEOF); f.Successor == nil || f.How != "exit status 3" {
			t.Errorf("failure %d: %v; want that the successor has exited with status 3", i, f)
		}
		unchanged()
	}
	p.Serves()
	p.Chain.Specs(proctest.TCP)
	p.Upgrade().Serves()
}

func TestSuccessorHangs(t *testing.T) {
	t.Parallel()
	for point, least := range map[proctest.Point]time.Duration{
		proctest.AtStart:                shortTimeout,
		proctest.AtNew:                  shortTimeout,
		proctest.AtListened:             shortTimeout,
		proctest.On(ecdysis.EventReady): 5 * time.Second, // whatever the time-out is
	} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			first, step := proctest.TCP, ecdysis.StepHandover
			if least == shortTimeout {
				first, step = first.UpgradeTimeout(shortTimeout), ecdysis.StepInit
			}
			v := survive(proctest.New(t, first, proctest.TCP.At(point, proctest.Hang)))
			begun := time.Now()
			f := v.fails(v.BeginUpgrade(), failure{step: step, is: os.ErrDeadlineExceeded, how: "signal: killed"})
			if d := time.Since(begun); d < least {
				t.Errorf("Upgrade returned after %v; want %v", d, least)
			}
			f.Successor.Ended()
			v.survived(proctest.TCP)
		})
	}
}

// A speech is what a Raw successor sends.
type speech struct {
	Ready int // READY frames with its own process ID come first
	Bytes []byte
}

var speak = proctest.Define("speak", func(d *proctest.Daemon, s speech) (proctest.None, error) {
	ready := proctest.Frame('R', proctest.Record{fmt.Sprint("pid=", os.Getpid())})
	_, err := d.Stream.Write(slices.Concat(bytes.Repeat(ready, s.Ready), s.Bytes))
	return proctest.None{}, err
})

// speaking is a Raw successor that sends this, and exits with status 0 if it is
// to.
func speaking(s speech, exits bool) proctest.Spec {
	actions := []proctest.Action{speak.Do(s)}
	if exits {
		actions = append(actions, proctest.Exit(0))
	}
	return proctest.TCP.At(proctest.AtStart, actions...)
}

func TestGarbage(t *testing.T) {
	t.Parallel()
	reason := func(text string) []byte { return proctest.Frame('F', proctest.Record{"reason=" + text}) }
	readyWith := func(field string) []byte { return proctest.Frame('R', proctest.Record{field}) }
	killed := func(step ecdysis.Step, says string) failure {
		return failure{step: step, how: "signal: killed", says: says}
	}
	const foreign = "does not use this protocol"
	alien := killed(ecdysis.StepInit, foreign)
	late := failure{step: ecdysis.StepInit, is: os.ErrDeadlineExceeded, how: "signal: killed"}
	ended := func(step ecdysis.Step) failure {
		return failure{step: step, is: io.ErrUnexpectedEOF, how: "exit status 0"}
	}
	long := strings.Repeat("0123456789", 3<<10)
	for _, tt := range []struct {
		name  string
		says  speech
		exits bool
		want  failure
	}{
		{"another protocol", speech{0, []byte("GET / HTTP/1.1\r\n\r\n")}, false, alien},
		{"zeros", speech{0, make([]byte, 5)}, false, alien},
		{"noise", speech{0, []byte("\x9d\x00\x00\x00\x05\x80\x80\x80\x80\x80")}, false, alien},
		{"4 GiB", speech{0, []byte("\x52\xff\xff\xff\xff")}, false, alien},
		{"field beyond the end", speech{0, []byte("R\x00\x00\x00\x03\x09ab")}, false, alien},
		{"record without an end", speech{0, []byte("R\x00\x00\x00\x03\x02ab")}, false, alien},
		{"length that overflows", speech{0, []byte("R\x00\x00\x00\x0b\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")}, false, alien},
		{"half a frame, then exit", speech{0, []byte("R\x00\x00\x00\x09\x05pid")}, true, ended(ecdysis.StepInit)},
		{"half a header, then exit", speech{0, []byte("R\x00")}, true, ended(ecdysis.StepInit)},
		{"half a frame, then silence", speech{0, []byte("R\x00\x00\x00\x09\x05pid")}, false, late},
		{"acknowledgements, then silence", speech{0, bytes.Repeat(proctest.Frame('K'), 1000)}, false, late},
		{"READY without a record", speech{0, proctest.Frame('R')}, false, killed(ecdysis.StepInit, `""`)},
		{"READY with no number", speech{0, readyWith("pid=x7")}, false, killed(ecdysis.StepInit, `"x7"`)},
		{"READY with a negative number", speech{0, readyWith("pid=-1")}, false, killed(ecdysis.StepInit, `"-1"`)},
		{"READY with 0", speech{0, readyWith("pid=0")}, false, killed(ecdysis.StepInit, `"0"`)},
		{"READY with too large a number", speech{0, readyWith("pid=" + strings.Repeat("9", 30))}, false, killed(ecdysis.StepInit, "999")},
		{"READY twice", speech{2, nil}, false, killed(ecdysis.StepHandover, foreign)},
		{"READY, then exit", speech{1, nil}, true, ended(ecdysis.StepHandover)},
		{"READY, then FAIL", speech{1, reason("no, wait")}, false, killed(ecdysis.StepHandover, "no, wait")},
		{"READY, then garbage", speech{1, []byte("\xff\xff\xff\xff\xff")}, false, killed(ecdysis.StepHandover, foreign)},
		{"DONE before READY", speech{0, proctest.Frame('D')}, false, alien},
		{"BYE before READY", speech{0, proctest.Frame('B')}, false, alien},
		{"COMMIT, which is the predecessor's", speech{0, proctest.Frame('C')}, false, alien},
		{"unknown frame", speech{0, proctest.Frame('Z', proctest.Record{"pid=1"})}, false, alien},
		{"FAIL without a reason", speech{0, proctest.Frame('F')}, true, failure{step: ecdysis.StepInit, how: "exit status 0"}},
		{"FAIL with 30 KiB", speech{0, reason(long)}, true, failure{step: ecdysis.StepInit, how: "exit status 0", says: long}},
		{"FAIL with too much", speech{0, reason(long + long + long)}, false, alien},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first := proctest.TCP
			if tt.want.is == os.ErrDeadlineExceeded {
				first = first.UpgradeTimeout(shortTimeout)
			}
			v := survive(proctest.New(t, first, speaking(tt.says, tt.exits)))
			v.fails(v.BeginUpgrade(proctest.Successor{Role: proctest.Raw}), tt.want).Successor.Ended()
			v.survived(proctest.TCP)
		})
	}
}

// A successor that has sent DONE and ends the conversation, but not itself, has
// not heard that it is the service: the predecessor ends it and resumes.
func TestStreamEndsBeforeFinal(t *testing.T) {
	t.Parallel()
	v := survive(proctest.New(t, proctest.TCP, proctest.TCP.Hold(proctest.AtStart)))
	a := v.BeginUpgrade(proctest.Successor{Role: proctest.Raw})
	s := a.Successor()
	s.At(proctest.AtStart)
	s.RawReadUntil('E')
	rawWrite(s, 'R', proctest.Record{fmt.Sprint("pid=", s.PID)})
	s.RawReadUntil('C')
	v.Halt() // it has sent COMMIT, and finds the end of the stream with DONE
	rawWrite(s, 'D')
	closeStream.On(s, proctest.None{})
	v.Signal(syscall.SIGCONT)
	v.fails(a, failure{step: ecdysis.StepProbation, is: io.ErrUnexpectedEOF, how: "signal: killed"})
	v.survived(proctest.TCP)
}

var closeStream = proctest.Define("close stream", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	return proctest.None{}, d.Stream.Close()
})

// A READY that names another process does not make the predecessor end that
// process, be it the predecessor itself or a bystander.
func TestReadyNamesAnotherProcess(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"the predecessor", "a bystander"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := survive(proctest.New(t, proctest.TCP))
			other := v.Proc
			if name == "a bystander" {
				other = proctest.Start(t, proctest.TCP)
			}
			ready := proctest.Frame('R', proctest.Record{fmt.Sprint("pid=", other.PID)})
			v.Chain.Specs(speaking(speech{0, ready}, true))
			a := v.BeginUpgrade(proctest.Successor{Role: proctest.Raw})
			a.Successor()
			if err := a.Err(); err == nil {
				t.Fatal("the upgrade has not failed")
			}
			other.Serves()
			if !other.Living() {
				t.Fatalf("%s was killed", name)
			}
			v.survived(proctest.TCP)
		})
	}
}
