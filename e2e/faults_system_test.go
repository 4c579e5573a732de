package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Faults of what is around the two processes: descriptors, the file system, the
// log, and the stream between them.

// faultUser is the user of processes that must not be root.
const faultUser = 65534

// Signals by which the test lets a process do something to itself, whatever it
// is waiting for.
const (
	sigExhaust = syscall.SIGWINCH // take all descriptors
	sigHeal    = syscall.SIGIO    // give them back
	sigCut     = syscall.SIGTTIN  // cut the stream to the other process
	sigShrink  = syscall.SIGTTOU  // make that stream's buffer small
)

// atHarmed is the point at which a process has done what one of these signals
// asks for.
const atHarmed proctest.Point = "harmed"

// obeyHarm makes the daemon do what the signals above ask for.
var obeyHarm = proctest.Define("faults: obey harm", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	c := make(chan os.Signal, 10)
	signal.Notify(c, sigExhaust, sigHeal, sigCut, sigShrink)
	go func() {
		var taken []int
		var before syscall.Rlimit
		for s := range c {
			var err error
			switch s {
			case sigExhaust:
				taken, before, err = takeDescriptors()
			case sigHeal:
				err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before)
				for _, fd := range taken {
					syscall.Close(fd)
				}
			case sigCut:
				err = onStream(func(fd int) error { return syscall.Shutdown(fd, syscall.SHUT_RDWR) })
			case sigShrink:
				err = onStream(func(fd int) error { return syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 1) })
			}
			if err != nil {
				d.Fatal(err)
			}
			d.Point(atHarmed)
		}
	}()
	return proctest.None{}, nil
})

// takeDescriptors takes all descriptors that there are, below a limit that it
// sets for that.
func takeDescriptors() (taken []int, before syscall.Rlimit, err error) {
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		return nil, before, err
	}
	low := before
	setNumber(&low.Cur, len(proctest.OpenFDs())+20)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		return nil, before, err
	}
	for {
		fd, err := syscall.Dup(2)
		if err != nil {
			return taken, before, nil
		}
		syscall.CloseOnExec(fd)
		taken = append(taken, fd)
	}
}

// setNumber sets a field whose type differs by system.
func setNumber[T int64 | uint64](field *T, n int) { *field = T(n) }

// onStream calls f with the descriptor of the stream to the other process: a
// connection of Unix sockets without names, or one to the takeover socket.
func onStream(f func(fd int) error) error {
	take := proctest.Dir() + "/take"
	for fd := 3; fd < 10_000; fd++ {
		if typ, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil || typ != syscall.SOCK_STREAM {
			continue
		}
		local, lerr := syscall.Getsockname(fd)
		peer, perr := syscall.Getpeername(fd)
		a, isUnix := local.(*syscall.SockaddrUnix)
		b, _ := peer.(*syscall.SockaddrUnix)
		if lerr != nil || perr != nil || !isUnix || b == nil {
			continue
		}
		if (a.Name == "" || a.Name == "@") && (b.Name == "" || b.Name == "@") || a.Name == take || b.Name == take {
			return f(fd)
		}
	}
	return fmt.Errorf("process %d has no stream to another one", os.Getpid())
}

// writeLog writes a line to $DIR/log, as a program does with each event.
var writeLog = proctest.Define("faults: write to the log", func(*proctest.Daemon, proctest.None) (_ proctest.None, err error) {
	f, err := os.OpenFile(proctest.Dir()+"/log", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return proctest.None{}, err
	}
	defer f.Close()
	if _, err = syscall.Write(int(f.Fd()), []byte("an event\n")); err != nil { // which waits, because Fd makes it so
		return proctest.None{}, os.NewSyscallError("write", err)
	}
	return proctest.None{}, nil
})

// harm lets a process do what one of the signals above asks for, and waits
// until it has.
func (x *faultRun) harm(p *proctest.Proc, s syscall.Signal) {
	x.Helper()
	if err := obeyHarm.ErrAt(p, proctest.AtStart); err != nil {
		x.Fatal(err)
	}
	n := 0
	for _, at := range p.Points() {
		if at == atHarmed {
			n++
		}
	}
	x.signal(p, s)
	p.AtAgain(atHarmed, n)
}

// needsRunning says why a process that is halted cannot do anything to itself.
func needsRunning(c cell) string {
	if c.ofHalted() {
		return "The test halts a process that takes over to keep it at this step, so that nothing can happen in it."
	}
	return ""
}

// needsEither is the first reason that one of the functions gives.
func needsEither(list ...func(c cell) string) func(c cell) string {
	return func(c cell) string {
		for _, f := range list {
			if r := f(c); r != "" {
				return r
			}
		}
		return ""
	}
}

func obedient(_ cell, p, s *proctest.Spec) {
	*p = p.At(proctest.AtStart, obeyHarm.Do(), p.Plan[proctest.AtStart])
	*s = s.At(proctest.AtStart, obeyHarm.Do(), s.Plan[proctest.AtStart])
}

// goneOn returns when what follows from the cell has come, as far as the cell
// wants anything.
func (x *faultRun) goneOn() {
	x.Helper()
	if len(x.want.steps) > 0 {
		x.p.Event(ecdysis.EventUpgradeFailed, 0)
		return
	}
	if x.s == nil {
		x.s = x.successor()
	}
	x.s.At(proctest.AtServing)
}

// systemFaults are the faults of this file.
func systemFaults() []*fault {
	return []*fault{
		{
			name: "predecessor out of descriptors",
			what: "The old process has as many open files as `RLIMIT_NOFILE` allows, until the attempt is over. Clients wait to be accepted.",
			want: func(c cell) outcome {
				if c.at == inPrepare && c.mode != takeover {
					o := c.givenUp(syscall.EMFILE)
					o.steps = []ecdysis.Step{ecdysis.StepStart}
					return o
				}
				return undisturbed(c)
			},
			specs: obedient,
			strike: func(x *faultRun) {
				x.harm(x.p, sigExhaust)
				x.release()
				x.goneOn()
				if x.p.Living() {
					x.signal(x.p, sigHeal)
				}
			},
		},
		{
			name: "successor out of descriptors",
			what: "The new process has as many open files as `RLIMIT_NOFILE` allows, until the attempt is over. When it serves, clients wait to be accepted.",
			out:  needsEither(needsSuccessor, needsRunning),
			want: func(c cell) outcome {
				if c.at >= readied {
					return undisturbed(c)
				}
				o := c.givenUp(nil)
				o.says, o.steps = "RLIMIT_NOFILE", []ecdysis.Step{ecdysis.StepInit}
				switch c.at {
				case made, listened:
					o.says = syscall.EMFILE.Error()
				case inPrepare: // its answer may come while the predecessor sends
					o.steps = []ecdysis.Step{ecdysis.StepStart, ecdysis.StepInit}
				}
				return o
			},
			specs: obedient,
			strike: func(x *faultRun) {
				x.harm(x.s, sigExhaust)
				x.release()
				x.goneOn()
				if x.want.serves == bySuccessor {
					x.harm(x.s, sigHeal)
				}
			},
		},
		{
			name: "no space for the PID file",
			what: "The file system of the PID file is full: ENOSPC.",
			want: func(c cell) outcome {
				if c.at >= readied { // it is written
					return undisturbed(c)
				}
				o := c.givenUp(nil)
				o.steps, o.says, o.told = []ecdysis.Step{ecdysis.StepInit}, syscall.ENOSPC.Error(), syscall.ENOSPC
				return o
			},
			setUp:  (*faultRun).mountRun,
			launch: (*faultRun).inMount,
			strike: func(x *faultRun) {
				fill := x.inRun(x.p, "fill")
				f, err := os.Create(fill)
				for b := make([]byte, 4096); err == nil; {
					_, err = f.Write(b)
				}
				f.Close()
				x.release()
				x.goneOn()
				_ = os.Remove(fill)
				if x.want.serves == bySuccessor { // the predecessor may have ended
					_ = os.Remove(x.inRun(x.s, "fill"))
				}
			},
		},
		{
			name:   "no permission for the socket's directory",
			what:   "The directory of a Unix socket may not be written to any more, and stays so.",
			want:   undisturbed,
			setUp:  (*faultRun).ownDirectories,
			launch: (*faultRun).asUser,
			strike: func(x *faultRun) { x.closeDirectory(); x.release() },
		},
		{
			name: "no permission for the directory of a socket that has lost its file",
			what: "The file was deleted before the upgrade, and would be made anew. The directory may be written to again after the attempt.",
			want: func(c cell) outcome {
				if c.at >= listened {
					o := undisturbed(c)
					o.lost = c.at < committed
					return o
				}
				o := c.givenUp(nil)
				o.steps, o.says = []ecdysis.Step{ecdysis.StepInit}, syscall.EACCES.Error()
				return o
			},
			unreached: func(c cell) bool { return c.at < committed || c.at == resuming },
			setUp:     (*faultRun).ownDirectories,
			launch:    (*faultRun).asUser,
			begin: func(x *faultRun) {
				if err := os.Remove(x.chain.Path("in/sock")); err != nil {
					x.Fatal(err)
				}
			},
			strike: func(x *faultRun) {
				x.closeDirectory()
				x.release()
				x.goneOn()
				if err := os.Chown(x.chain.Path("in"), faultUser, faultUser); err != nil {
					x.Fatal(err)
				}
			},
		},
		{
			name: "stalled log",
			what: "`Notify` of both processes writes to a pipe that nobody reads, until the attempt is over.",
			want: func(c cell) outcome {
				if c.at >= inProbation && c.at != resuming {
					return undisturbed(c)
				}
				if c.at == resuming {
					o := undisturbed(c)
					o.slow, o.wait = true, "5 s"
					return o
				}
				o := c.givenUp(os.ErrDeadlineExceeded)
				o.steps = []ecdysis.Step{ecdysis.StepHandover}
				o.slow, o.wait = true, "10 s"
				return o
			},
			setUp: (*faultRun).openLog,
			specs: func(_ cell, p, s *proctest.Spec) {
				for _, k := range []ecdysis.EventKind{ecdysis.EventReady, ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventResumed,
					ecdysis.EventUpgradeFailed, ecdysis.EventUpgraded, ecdysis.EventStopping} {
					at := proctest.On(k)
					*p, *s = p.At(at, p.Plan[at], writeLog.Do()), s.At(at, s.Plan[at], writeLog.Do())
				}
			},
			strike: func(x *faultRun) {
				x.stallLog()
				x.release()
				if len(x.want.steps) > 0 {
					x.p.Event(ecdysis.EventUpgradeFailed, 0)
					x.p.Serves() // though Upgrade has not returned
				}
				x.readLog()
				for _, k := range x.p.Kinds() { // the hooks that have waited return
					if len(x.want.steps) > 0 {
						_ = writeLog.ErrAt(x.p, proctest.On(k))
					}
				}
			},
		},
		{
			name: "stream cut",
			what: "One of the two processes shuts the stream between them down by mistake, and both live.",
			out: needsEither(needsSuccessor, needsRunning, func(c cell) string {
				if c.at == inPrepare {
					return "The process that takes over has heard nothing yet, and connects again."
				}
				return ""
			}),
			want: func(c cell) outcome {
				switch {
				case c.at == final: // the successor takes it for the predecessor's end
					return outcome{serves: bySuccessor}
				case c.mode == takeover && c.at <= listened:
					o := c.givenUp(io.ErrUnexpectedEOF)
					o.serves = byBoth
					return o
				}
				o := c.givenUp(io.ErrUnexpectedEOF)
				o.killed = 1 // the successor may have served before the predecessor has ended it
				return o
			},
			specs:  obedient,
			strike: func(x *faultRun) { x.harm(x.s, sigCut); x.release() },
		},
		{
			name: "short write",
			what: "The system takes no more than a part of a frame, because its buffers are small. The frame is READY, with the names of 2,500 files.",
			out: func(c cell) string {
				if c.at != listened {
					return "Only SOCKETS and READY can be larger than the smallest buffer. TestRestIsSent is about SOCKETS, because no other process can make the predecessor's buffer small."
				}
				return ""
			},
			want:  undisturbed,
			files: 2500,
			specs: obedient,
			strike: func(x *faultRun) {
				x.harm(x.s, sigShrink)
				x.release()
			},
		},
	}
}

// ownDirectories makes the directories the user's whose processes are started.
func (x *faultRun) ownDirectories() {
	x.Helper()
	x.as = x.chain.Users()
	for _, dir := range []string{"in", "run"} {
		if err := os.Chown(x.chain.Path(dir), faultUser, faultUser); err != nil {
			x.Fatal(err)
		}
	}
}

func (x *faultRun) asUser(cmd *exec.Cmd) { x.as(faultUser)(cmd) }

// closeDirectory takes the directory of the Unix socket from its user.
func (x *faultRun) closeDirectory() {
	x.Helper()
	if err := os.Chown(x.chain.Path("in"), 0, 0); err != nil {
		x.Fatal(err)
	}
}

// mayMount tells why no file system can be mounted.
var mayMount = sync.OnceValue(func() string {
	if out, err := exec.Command("unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt").CombinedOutput(); err != nil {
		return fmt.Sprintf("no file system can be mounted here: %v: %s", err, out)
	}
	return ""
})

// mountRun lets the processes have a small file system as $DIR/run.
func (x *faultRun) mountRun() {
	x.Helper()
	if why := mayMount(); why != "" && os.Getenv("CI") != "" {
		x.Fatal(why)
	} else if why != "" {
		x.Skip(why)
	}
	x.mounted = true
}

// inMount starts the first process in a mount namespace of its own, and those
// that take over in the same one.
func (x *faultRun) inMount(cmd *exec.Cmd) {
	x.Helper()
	prefix := []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"`, x.chain.Path("run")}
	if x.p != nil {
		living := x.p
		if !living.Living() {
			living = x.s
		}
		prefix = []string{"nsenter", "-m", "-t", fmt.Sprint(living.PID), "--"}
	}
	path, err := exec.LookPath(prefix[0])
	if err != nil {
		x.Fatal(err)
	}
	cmd.Args = slices.Concat(prefix, []string{cmd.Path}, cmd.Args[1:])
	cmd.Path = path
}

// inRun is the path of a file in $DIR/run as p sees it.
func (x *faultRun) inRun(p *proctest.Proc, name string) string {
	path := x.chain.Path("run/" + name)
	if x.mounted {
		path = fmt.Sprintf("/proc/%d/root%s", p.PID, path)
	}
	return path
}

// openLog makes the pipe that is the log, and reads it.
func (x *faultRun) openLog() {
	x.Helper()
	if err := syscall.Mkfifo(x.chain.Path("log"), 0o600); err != nil {
		x.Fatal(err)
	}
	var err error
	if x.log, err = os.OpenFile(x.chain.Path("log"), os.O_RDWR, 0); err != nil {
		x.Fatal(err)
	}
	x.Cleanup(func() { x.log.Close() })
	x.readLog()
}

// readLog reads the log until stallLog is called.
func (x *faultRun) readLog() {
	x.Helper()
	if err := x.log.SetReadDeadline(time.Time{}); err != nil {
		x.Fatal(err)
	}
	done := make(chan struct{})
	x.logRead = done
	log := x.log
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, log)
	}()
}

// stallLog fills the log.
func (x *faultRun) stallLog() {
	x.Helper()
	past := time.Unix(1, 0)
	if err := x.log.SetReadDeadline(past); err != nil {
		x.Fatal(err)
	}
	<-x.logRead
	raw, err := x.log.SyscallConn()
	if err != nil {
		x.Fatal(err)
	}
	for _, size := range []int{4096, 1} { // the bytes fill what is left of a page
		var werr error
		if err := raw.Write(func(fd uintptr) bool {
			for werr == nil {
				_, werr = syscall.Write(int(fd), make([]byte, size))
			}
			return true
		}); err != nil || !errors.Is(werr, syscall.EAGAIN) {
			x.Fatalf("fill the log: %v, %v", err, werr)
		}
	}
}
