package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A stop is an order for the service: given at any moment of an upgrade, it ends
// the successor, too.

// stopAndExit is what a program does that exits when Stop has returned.
var stopAndExit = proctest.Define("stop and exit", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	d.U.Stop()
	os.Exit(0)
	return proctest.None{}, nil
})

// A Stop that comes before COMMIT aborts the successor before it returns.
func TestStopAbortsBeforeItReturns(t *testing.T) {
	t.Parallel()
	for _, hold := range []proctest.Point{proctest.AtStart, proctest.AtNew, proctest.AtListened} {
		t.Run(string(hold), func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Both, proctest.Both.At(hold, proctest.Hold), proctest.Both)
			a := p.BeginUpgrade()
			s := a.Successor()
			s.At(hold)
			stopAndExit.Begin(p)
			p.Ended()
			s.Resume()
			err := s.ErrAt(s.AtAny(proctest.AtNewFailed, proctest.AtReadyFailed))
			proctest.Want(t, err, ecdysis.ErrAborted, "has been stopped")
			s.Ended()
		})
	}
}

var readAbort = proctest.Define("read up to ABORT", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	_, err := proctest.ReadUntil(d.Stream, 'A')
	return proctest.None{}, err
})

// The successor's end is not the reason of an upgrade that was stopped, even if
// the predecessor sees it first.
func TestStopThatEndsTheSuccessorAtOnce(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtStart, readAbort.Do(), proctest.Exit(0)))
	a := p.BeginUpgrade(proctest.Successor{Role: proctest.Raw})
	a.Successor()
	p.Stop()
	a.Fails(ecdysis.StepInit, ecdysis.ErrStopped)
}

// A stop that comes between COMMIT and FINAL is passed on to the successor,
// whatever gives it.
func TestStopIsPassedOn(t *testing.T) {
	t.Parallel()
	waits := proctest.Both
	waits.Wait = true
	waits.Options.Probation = time.Minute
	waits.Options.StopSignals = []os.Signal{syscall.SIGTERM}
	waits.Options.PartialStopSignals = []os.Signal{syscall.SIGUSR1}
	waits.Options.StopSocket = "$DIR/stop"
	for _, c := range []struct {
		name string
		stop func(p *proctest.Proc)
		want func(e ecdysis.Event) bool
		kind ecdysis.EventKind
	}{
		{"call", func(p *proctest.Proc) { p.Stop() },
			func(e ecdysis.Event) bool { return e.Signal == nil && e.Socket == "" }, ecdysis.EventStopping},
		{"signal", func(p *proctest.Proc) { p.Signal(syscall.SIGTERM) },
			func(e ecdysis.Event) bool { return e.Signal == syscall.SIGTERM }, ecdysis.EventStopping},
		{"partial stop", func(p *proctest.Proc) { p.Signal(syscall.SIGUSR1) },
			func(e ecdysis.Event) bool { return e.Signal == syscall.SIGUSR1 }, ecdysis.EventPartialStop},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, waits, waits.At(proctest.On(ecdysis.EventReady), proctest.Hold), waits)
			a := p.BeginUpgrade()
			s := a.Successor()
			s.At(proctest.On(ecdysis.EventReady)) // COMMIT has come
			c.stop(p)
			s.Resume()
			a.OK()
			e := s.Event(c.kind, 0)
			if !e.PassedOn || !c.want(e) {
				t.Errorf("the successor's event is %v; want one that was passed on by %s", e, c.name)
			}
			if got := s.WaitReturned(); got.Kind != c.kind {
				t.Errorf("the successor's Wait returned %v; want %v", got, c.kind)
			}
			if slices.Contains(p.Kinds(), ecdysis.EventStopping) {
				t.Errorf("events of the predecessor: %v; want no stop, because it was replaced", p.Kinds())
			}
		})
	}
}

// The stop sockets are paused in a handover, so that a client that connects then
// waits in the queue. It is answered by the process that serves afterwards, and
// stops that one, on either side of COMMIT.
func TestStopSocketInHandover(t *testing.T) {
	t.Parallel()
	handover, ready := proctest.On(ecdysis.EventHandover), proctest.On(ecdysis.EventReady)
	for _, what := range []order{stop, partial} {
		for _, c := range []struct {
			name                   string
			predecessor, successor proctest.Action // at EventHandover, which is before COMMIT, and at EventReady, which is after it
			fails                  bool            // the successor, after COMMIT
		}{
			{name: "before COMMIT", predecessor: proctest.Hold},
			{name: "after COMMIT", successor: proctest.Hold},
			{name: "before COMMIT to a successor that fails", predecessor: proctest.Hold, successor: proctest.Exit(3), fails: true},
			{name: "after COMMIT to a successor that fails", successor: proctest.Seq(proctest.Hold, proctest.Exit(3)), fails: true},
		} {
			for _, probation := range []time.Duration{0, time.Minute} {
				t.Run(fmt.Sprintf("%s/%s/probation %v", what.name, c.name, probation), func(t *testing.T) {
					t.Parallel()
					spec := proctest.Triggered.Probation(probation).At(proctest.AtWaitReturned, proctest.CallStop.Do())
					p := proctest.Start(t, spec.At(handover, c.predecessor), spec.At(ready, c.successor))
					p.InWait()
					a := p.BeginUpgrade()
					s := a.Successor()
					holds, at := p, handover
					if c.predecessor == nil {
						holds, at = s, ready
					}
					holds.At(at)
					client := proctest.Connect(t, p.Chain.Path(what.name))
					holds.Resume()
					if c.fails {
						a.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
						client.Wants(p.Reply(0))
						hasReturned(p, what.kind, asked(p.Chain, what.name))
					} else {
						client.Wants(s.Reply(1))
						a.OK()
						hasReturned(s, what.kind, asked(p.Chain, what.name))
						hasReturned(p, ecdysis.EventUpgraded, cause{})
						if e := s.Event(what.kind, 0); e.PassedOn {
							t.Errorf("event %v; want none that was passed on, because the successor has the client", e)
						}
					}
					p.Ended()
					s.Ended()
					client.HungUp()
					p.Refuses()
					p.Chain.HasFiles()
				})
			}
		}
	}
}

// A successor without a call of Wait obeys at the next call that looks.
func TestStopIsPassedOnToTheNextCall(t *testing.T) {
	t.Parallel()
	for name, looks := range map[string]func(s *proctest.Proc){
		"Upgrade": func(s *proctest.Proc) { s.RefusesUpgrade(ecdysis.ErrStopped) },
		"WaitForParent": func(s *proctest.Proc) {
			if err := s.WaitForPredecessor(); err != nil {
				s.T.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, proctest.Both.Probation(time.Minute), proctest.Both.At(proctest.On(ecdysis.EventReady), proctest.Hold), proctest.Both)
			a := p.BeginUpgrade()
			s := a.Successor()
			s.At(proctest.On(ecdysis.EventReady))
			p.Stop()
			s.Resume()
			a.OK()
			p.Exit(0)
			s.At(proctest.AtServing)
			looks(s)
			if e := s.Event(ecdysis.EventStopping, 0); !e.PassedOn {
				t.Errorf("event %v; want one that was passed on", e)
			}
		})
	}
}

// A TERM that comes when the process is ready, and before it calls Wait, is a
// stop and kills nobody.
func TestStopSignalBeforeWait(t *testing.T) {
	t.Parallel()
	spec := proctest.Both
	spec.Wait = true
	spec.Options.StopSignals = []os.Signal{syscall.SIGTERM}
	spec.Options.Probation = time.Minute
	successor := spec.At(proctest.On(ecdysis.EventReady), proctest.Hold)
	p := proctest.Start(t, spec, successor, spec)
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.On(ecdysis.EventReady))
	s.Signal(syscall.SIGTERM)
	s.Resume()
	if e := s.Event(ecdysis.EventStopping, 0); e.Signal != syscall.SIGTERM {
		t.Errorf("event %v; want one by SIGTERM", e)
	}
	s.Ended()
	a.OK() // the predecessor has not come back
}

// collectGarbage closes connections to which nothing refers.
var collectGarbage = proctest.Define("collect garbage", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	runtime.GC()
	runtime.GC()
	return proctest.None{}, nil
})

// The client of a stop socket has its answer when accepting has ended, and waits
// until the process has exited.
func TestStopRequestWaitsForTheExit(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP
	spec.Wait = true
	spec.Options.StopSocket = "$DIR/stop"
	p := proctest.Start(t, spec)
	client := p.Dial(0)
	type result struct {
		reply ecdysis.Reply
		err   error
	}
	want := ecdysis.Reply{PID: p.PID}
	done := make(chan result, 1)
	go func() {
		r, err := ecdysis.Request(t.Context(), p.Chain.Path("stop"))
		done <- result{r, err}
	}()
	p.Event(ecdysis.EventStopping, 0)
	p.AwaitExit() // after the answer
	collectGarbage.On(p)
	p.Answers(client)
	select {
	case r := <-done:
		t.Fatalf("the request returned %v, %v while a client was served", r.reply, r.err)
	default:
	}
	client.Close()
	if r := <-done; r.reply != want || r.err != nil {
		t.Errorf("the request returned %v, %v; want %v", r.reply, r.err, want)
	}
	p.Ended()
}

// If ctx ends before the process has exited, the answer is returned with ctx's
// error.
func TestStopRequestGivenUp(t *testing.T) {
	t.Parallel()
	spec := proctest.TCP
	spec.Wait = true
	spec.Options.StopSocket = "$DIR/stop"
	p := proctest.Start(t, spec)
	client := p.Dial(0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		p.AtAny(proctest.AtWaitReturned) // which is after the answer
		cancel()
	}()
	r, err := ecdysis.Request(ctx, p.Chain.Path("stop"))
	if (r != ecdysis.Reply{PID: p.PID}) || !errors.Is(err, context.Canceled) {
		t.Errorf("the request returned %v, %v; want the reply of process %d and context.Canceled", r, err, p.PID)
	}
	p.Answers(client)
}

// A stop during a takeover is consent: the old process serves until the taker
// does. A client that has requested it is told so, because the taker is not
// given the stop.
func TestStopDuringTakeoverIsConsent(t *testing.T) {
	t.Parallel()
	spec := proctest.Triggered.And("unix", "$DIR/sock")
	for _, by := range []string{"signal", "socket"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, spec, spec.Hold(proctest.AtListened))
			p := c.Start()
			l := p.Load(2)
			n := c.Launch()
			n.At(proctest.AtListened)
			var client *proctest.Client
			if by == "signal" {
				p.Signal(syscall.SIGTERM)
			} else {
				client = proctest.Connect(t, c.Path("stop"))
			}
			p.Event(ecdysis.EventStopDeferred, 0)
			p.Serves()
			l.More(10)
			n.Resume()
			n.At(proctest.AtServing)
			if client != nil {
				client.WantsLine(fmt.Sprintf("error: %v: %v serves", ecdysis.ErrUpgraded, n.Reply(1)))
				client.HungUp()
			}
			hasReturned(p, ecdysis.EventUpgraded, asked(c, "take"))
			n.Serves()
			l.More(10)
			l.Check()
			if slices.Contains(n.Kinds(), ecdysis.EventStopping) {
				t.Errorf("events of the taker: %v; the stop was for the other unit", n.Kinds())
			}
		})
	}
}

// A taker that fails leaves the old process to its stop.
func TestStopDuringTakeoverThatFails(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Triggered, proctest.Triggered.At(proctest.AtListened, proctest.Seq(proctest.Hold, proctest.Fail("no disk"))))
	p := c.Start()
	n := c.Launch()
	n.At(proctest.AtListened)
	client := proctest.Connect(t, c.Path("stop"))
	p.Event(ecdysis.EventStopDeferred, 0)
	p.Serves()
	n.Resume()
	p.Event(ecdysis.EventUpgradeFailed, 0)
	client.Wants(p.Reply(0))
	hasReturned(p, ecdysis.EventStopping, asked(c, "stop"))
	p.Ended()
}

// Nothing keeps the service silent.

// hang is a hook that does not return before the test lets it.
var hang = proctest.Define("hang", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	select {}
})

// A hook for EventHandover that does not return fails the attempt, and the
// service goes on.
func TestHandoverHookHangs(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.At(proctest.On(ecdysis.EventHandover), proctest.Once(hang.Do())), proctest.Both)
	l := p.Load(1)
	l.More(5)
	f := p.FailUpgrade(ecdysis.StepHandover, os.ErrDeadlineExceeded)
	proctest.Want(t, f, os.ErrDeadlineExceeded, "Options.Notify", "handover")
	p.Serves()
	s := p.Upgrade()
	s.Serves()
	l.More(5)
	l.Check()
}

// A stop that comes while such a hook hangs is obeyed at once.
func TestHandoverHookHangsAndStop(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.At(proctest.On(ecdysis.EventHandover), hang.Do()), proctest.Both)
	a := p.BeginUpgrade()
	p.At(proctest.On(ecdysis.EventHandover))
	p.Stop()
	a.Fails(ecdysis.StepHandover, ecdysis.ErrStopped)
	p.AwaitExit()
}

// A hook for EventResumed that does not return holds up nothing but itself.
func TestResumedHookHangs(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.At(proctest.On(ecdysis.EventResumed), proctest.Once(hang.Do())),
		proctest.Both.At(proctest.On(ecdysis.EventReady), proctest.Exit(3)), proctest.Both)
	p.FailUpgrade(ecdysis.StepHandover, nil)
	p.Serves()
	p.Upgrade().Serves()
}

// meddle sets a deadline on the connection within a UDPConn while a read waits,
// as no program should.
var meddle = proctest.Define("meddle", func(d *proctest.Daemon, forever bool) (proctest.None, error) {
	c := d.PacketConn(0).(*ecdysis.UDPConn)
	go func() {
		for {
			_ = c.UDPConn.SetReadDeadline(time.Now().Add(time.Hour))
			if !forever {
				return
			}
		}
	}()
	return proctest.None{}, nil
})

// block reads by a function that does not return.
var block = proctest.Define("block", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	raw, err := d.PacketConn(0).(*ecdysis.UDPConn).SyscallConn()
	if err != nil {
		return proctest.None{}, err
	}
	started := make(chan struct{})
	go func() {
		_ = raw.Read(func(uintptr) bool {
			close(started)
			select {}
		})
	}()
	// Wake it, so that the function runs.
	addr := d.PacketConn(0).LocalAddr()
	c, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		return proctest.None{}, err
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return proctest.None{}, err
	}
	<-started
	return proctest.None{}, nil
})

// A socket that does not pause fails the attempt after a second, by its name.
func TestSocketThatDoesNotPause(t *testing.T) {
	t.Parallel()
	udp := proctest.Spec{Listen: []proctest.Listen{{Network: "udp", Address: "127.0.0.1:0"}, {Network: "tcp", Address: "127.0.0.1:0"}}, NoAccept: true}
	p := proctest.Start(t, udp)
	block.On(p)
	f := p.FailUpgrade(ecdysis.StepHandover, os.ErrDeadlineExceeded)
	proctest.Want(t, f, os.ErrDeadlineExceeded, "udp 127.0.0.1:0", "read")
}

// A deadline that the program moves does not keep the package's from ending a
// read.
func TestMovedDeadline(t *testing.T) {
	t.Parallel()
	udp := proctest.Spec{Listen: []proctest.Listen{{Network: "udp", Address: "127.0.0.1:0"}}}
	p := proctest.Start(t, udp)
	p.Serves()
	meddle.On(p, false)
	s := p.Upgrade()
	s.Serves()
}

// What a stop removes.

// A successor that was stopped within its probation has ended the service, even
// if the predecessor learns of that later than of the successor's exit.
func TestStoppedWhilePredecessorIsPaused(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both.Probation(time.Minute))
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtServing)
	p.Halt()
	s.Stop()
	s.Exit(0)
	p.Signal(syscall.SIGCONT)
	a.OK()
	p.AwaitExit()
	p.Refuses()
	p.Chain.HasFiles()
}

// The file of an inherited socket that is closed too early to be removed goes
// when it is this process's own.
func TestFilesOfClosed(t *testing.T) {
	t.Parallel()
	spec := proctest.Spec{Listen: []proctest.Listen{{Network: "unix", Address: "$DIR/sock"}}}.Probation(time.Minute)
	spec.Options.PartialStopSignals = []os.Signal{syscall.SIGUSR1}
	for _, when := range []string{"before Ready", "within probation", "by a partial stop"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			successor := spec
			switch when {
			case "before Ready":
				successor = spec.At(proctest.AtListened, proctest.CallClose.Do(0))
			case "by a partial stop":
				successor.Wait = true
			}
			p := proctest.Start(t, spec, successor)
			s := p.BeginUpgrade().Successor()
			s.At(proctest.AtServing)
			switch when {
			case "before Ready":
				if err := proctest.CallClose.ErrAt(s, proctest.AtListened); err != nil {
					t.Fatal(err)
				}
			case "within probation":
				if err := s.Close(0); err != nil {
					t.Fatal(err)
				}
			case "by a partial stop":
				s.InWait()
				s.Signal(syscall.SIGUSR1)
				s.Event(ecdysis.EventPartialStop, 0)
			}
			p.Chain.HasFiles("sock") // which the predecessor may need again
			p.Kill()                 // which ends the probation, as its time would
			if when == "by a partial stop" {
				s.Ended()
				return // it exits without Stop
			}
			if err := s.WaitForPredecessor(); err != nil {
				t.Fatal(err)
			}
			p.Chain.HasFiles()
		})
	}
}

// exhaust takes all descriptors that there are.
var exhaust = proctest.Define("exhaust", func(*proctest.Daemon, proctest.None) (proctest.None, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return proctest.None{}, err
	}
	limit.Cur = 64
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return proctest.None{}, err
	}
	for {
		if _, err := syscall.Dup(2); err != nil {
			return proctest.None{}, nil
		}
	}
})

// A process that is out of descriptors still removes what is its own.
func TestStopWithoutDescriptors(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	exhaust.On(p)
	p.Stop()
	p.Chain.HasFiles()
}

// A listener that is closed after a stop leaves the file alone that another
// process has bound since, though the system may have given it the same inode.
func TestCloseAfterStop(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	p.Stop()
	p.AwaitExit()
	ln, err := net.Listen("unix", p.Chain.Path("sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := p.Close(1); err != nil {
		t.Fatalf("Close: %v", err)
	}
	p.Chain.HasFiles("sock")
}
