package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

const (
	keeperVar  = "ECDYSIS_KEEPER" // tells a keeper's next program, and its child, which of the two it is
	childRole  = "child gate=%d"
	keeperRole = "keeper group=%d youngest=%d dir=%d signals=%d gate=%d"
)

// Signals are forwarded, except those in own and unused. Until the first
// generation is ready, only those in ending are forwarded. A SIGHUP would end a
// generation that does not catch it yet, and the keeper would end with it.
var (
	ending = []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGQUIT}
	own    = []unix.Signal{unix.SIGCHLD, unix.SIGIO, unix.SIGTSTP} // the keeper itself acts on them
	// A terminal sends SIGTTIN and SIGTTOU to processes in its background. Go
	// and libc use SIGPIPE, SIGURG, 32 and 33 themselves. The last two cannot be
	// caught.
	unused = []unix.Signal{unix.SIGPIPE, unix.SIGURG, unix.SIGTTIN, unix.SIGTTOU, 32, 33, unix.SIGKILL, unix.SIGSTOP}
)

// A keeper is the process that stays. It waits for nothing but signals, because
// a child's end and a change of the PID file also arrive as signals. All signals
// are blocked from the first instruction of its program on, and are read from a
// signalfd(2). While it executes its next program they wait in the system, so
// that none is lost.
type keeper struct {
	pidFile string
	dir     int // the directory of pidFile; each rename in it raises SIGIO
	signals int // the signalfd
	gate    int // a byte written to it starts the first generation; -1 after that

	ready       bool             // the first generation has become ready
	seen        os.FileInfo      // of the PID file that was read last
	group       int              // the process group of all generations
	generations []int            // the PIDs of those that are alive, the youngest last
	youngest    int              // the PID that the file named last; it may have ended
	status      *unix.WaitStatus // of youngest; nil if its end was not seen
}

func stay(pidFile string) error {
	role := os.Getenv(keeperVar)
	_ = os.Unsetenv(keeperVar)
	if ecdysis.Successor() {
		return nil
	}
	k := &keeper{pidFile: pidFile}
	if n, _ := fmt.Sscanf(role, childRole, &k.gate); n == 1 {
		defer unix.Close(k.gate)
		if n, _ := unix.Read(k.gate, []byte{0}); n != 1 {
			return errors.New("the keeper has ended")
		}
		return nil
	}
	if n, _ := fmt.Sscanf(role, keeperRole, &k.group, &k.youngest, &k.dir, &k.signals, &k.gate); n == 5 {
		return k.run()
	}
	return k.start()
}

// start starts the first generation, and executes the program again, which
// makes this process the keeper. Every step that can fail is done here.
func (k *keeper) start() (err error) {
	program, err := exec.LookPath(os.Args[0])
	if err != nil {
		return err
	}
	if k.pidFile == "" {
		return errors.New("the path of the PID file is empty; want that of Options.PIDFile")
	}
	dir := filepath.Dir(k.pidFile)
	if k.dir, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(k.dir)
	if k.signals, err = unix.Signalfd(-1, only(ending, own), unix.SFD_CLOEXEC); err != nil {
		return os.NewSyscallError("signalfd", err)
	}
	defer unix.Close(k.signals)
	// Signals that have to wait are caught until this process blocks them.
	// Otherwise they would end it. A signal that is ignored, for example by
	// nohup(1), stays ignored, because the child inherits that.
	early := make(chan os.Signal, 64)
	for s := unix.Signal(1); s <= 64; s++ {
		if !slices.Contains(slices.Concat(ending, own, unused), s) && !signal.Ignored(s) {
			signal.Notify(early, s)
		}
	}
	defer signal.Stop(early)
	// The child waits at the gate, a pipe, until the keeper runs. If this process
	// is killed before that, the child ends, too.
	var gate [2]int
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(gate[1])
	k.gate = gate[1]
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	_, _ = unix.FcntlInt(uintptr(gate[0]), unix.F_SETFD, 0)
	k.youngest, err = syscall.ForkExec(program, os.Args, &syscall.ProcAttr{
		Env:   append(os.Environ(), keeperVar+"="+fmt.Sprintf(childRole, gate[0])),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	unix.Close(gate[0])
	if err != nil {
		return &os.PathError{Op: "fork/exec", Path: program, Err: err}
	}
	k.group = k.youngest
	// A descriptor that is not close-on-exec was there at the start. The child
	// has a copy, so the keeper's next program does not need it.
	list, _ := os.ReadDir("/proc/self/fd")
	for _, e := range list {
		if fd, _ := strconv.Atoi(e.Name()); fd > 2 {
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC)
		}
	}
	if err = blockSignals(); err == nil {
		raiseAgain(early)
		err = k.execute(program)
	}
	_ = unix.Kill(k.youngest, unix.SIGKILL)
	_, _ = unix.Wait4(k.youngest, nil, 0, nil)
	return err
}

// blockSignals blocks all signals in this thread and in every program that the
// thread executes. The Go runtime unblocks some of them when a program starts,
// before the program can catch them. So a filter (seccomp(2)) makes
// rt_sigprocmask(2) do nothing.
func blockSignals() error {
	runtime.LockOSThread() // for good, because no other code may run on this thread any more
	var old unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, allBut(), &old)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_RT_SIGPROCMASK},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO}, // 0: success
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	p := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) // without it, only a privileged process may set a filter
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(p)), 0, 0)
	}
	if err != nil {
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	}
	return os.NewSyscallError("seccomp", err)
}

// raiseAgain sends the signals that were caught to this thread again. The thread
// blocks them, so that they are pending when the next program starts.
func raiseAgain(caught chan os.Signal) {
	none := make(chan os.Signal, 1)
	signal.Notify(none, unix.SIGWINCH)
	signal.Stop(none) // returns when every signal that has arrived is in its channel
	for len(caught) > 0 {
		_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), (<-caught).(unix.Signal))
	}
}

// execute replaces this process's program. The new program goes on as the
// keeper.
func (k *keeper) execute(program string) error {
	role := fmt.Sprintf(keeperRole, k.group, k.youngest, k.dir, k.signals, k.gate)
	fds := []int{k.dir, k.signals, k.gate}
	for _, fd := range fds {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
	}
	err := syscall.Exec(program, os.Args, append(os.Environ(), keeperVar+"="+role))
	return &os.PathError{Op: "exec", Path: program, Err: err}
}

// only returns the set of the signals in the lists.
func only(lists ...[]unix.Signal) *unix.Sigset_t {
	set := &unix.Sigset_t{}
	bits := uint(unsafe.Sizeof(set.Val[0])) * 8
	for _, s := range slices.Concat(lists...) {
		set.Val[uint(s-1)/bits] |= 1 << (uint(s-1) % bits)
	}
	return set
}

// allBut returns the set of all signals except those in the lists.
func allBut(lists ...[]unix.Signal) *unix.Sigset_t {
	set := only(lists...)
	for i := range set.Val {
		set.Val[i] = ^set.Val[i]
	}
	return set
}

// run is the keeper's work until no generation is left.
func (k *keeper) run() error {
	runtime.LockOSThread() // signals are raised, and programs executed, on this thread
	if k.ready = k.gate < 0; !k.ready {
		k.named() // a PID file that is there now is left from an earlier run
		_, _ = unix.Write(k.gate, []byte{0})
		unix.Close(k.gate)
		k.gate = -1
	}
	k.generations = []int{k.youngest}
	for {
		k.updateGenerations(0)
		k.reap()
		switch {
		case len(k.generations) > 0:
		case k.status == nil:
			return fmt.Errorf("no generation is left, and the end of process %d was not seen: another process has reaped it, or it has left the process group %d", k.youngest, k.group)
		case k.status.Signaled():
			_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // the generation's core is the useful one
			raise(k.status.Signal())
			os.Exit(128 + int(k.status.Signal())) // reached only by PID 1
		default:
			os.Exit(k.status.ExitStatus())
		}
		k.renew()
		var info unix.SignalfdSiginfo
		if n, _ := unix.Read(k.signals, (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:]); n > 0 {
			k.updateGenerations(0)
			k.forward(unix.Signal(info.Signo))
		}
	}
}

// updateGenerations finds out which generations there are. ended is the PID of a
// child that was just reaped and may have been a generation, or 0.
func (k *keeper) updateGenerations(ended int) {
	// The next rename in the directory raises SIGIO (fcntl(2), F_NOTIFY). Unlike
	// inotify(7), this has no limit that all containers of a user share.
	_, _ = unix.FcntlInt(uintptr(k.dir), unix.F_NOTIFY, 0x10) // DN_RENAME
	lives := func(pid int) bool {
		group, err := unix.Getpgid(pid) // succeeds until the process is reaped
		return pid == ended || err == nil && group == k.group
	}
	k.generations = slices.DeleteFunc(k.generations, func(pid int) bool { return !lives(pid) })
	if pid := k.named(); pid > 0 && lives(pid) {
		k.generations = append(slices.DeleteFunc(k.generations, func(p int) bool { return p == pid }), pid)
		k.youngest, k.status = pid, nil
		if !k.ready { // from here on the signals that have waited can be read
			k.ready = true
			_, _ = unix.Signalfd(k.signals, allBut(unused), 0)
		}
	}
}

// named returns the PID in the PID file, or 0 if the file has not changed since
// the last call.
func (k *keeper) named() int {
	fi, err := os.Stat(k.pidFile)
	if err != nil || os.SameFile(fi, k.seen) && fi.ModTime().Equal(k.seen.ModTime()) {
		return 0
	}
	k.seen = fi // a replacement before the next line raises another signal
	b, _ := os.ReadFile(k.pidFile)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return pid
}

// reap reaps every child that has ended.
func (k *keeper) reap() {
	for {
		var status unix.WaitStatus
		pid, _ := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if pid <= 0 {
			return
		}
		k.updateGenerations(pid)
		if pid == k.youngest {
			k.status = &status
		}
		k.generations = slices.DeleteFunc(k.generations, func(p int) bool { return p == pid })
	}
}

func (k *keeper) forward(s unix.Signal) {
	switch n := len(k.generations); {
	case s == unix.SIGCHLD || s == unix.SIGIO: // for the keeper itself
	case s == unix.SIGTSTP: // all generations stop, and go on when this process does
		_ = unix.Kill(-k.group, s)
		raise(s)
		_ = unix.Kill(-k.group, unix.SIGCONT)
	case n > 0:
		_ = unix.Kill(k.generations[n-1], s) // fails only if the process has just ended
	}
}

// renew replaces this process's program if only one generation is left and that
// generation runs a new program.
func (k *keeper) renew() {
	if !k.ready || len(k.generations) != 1 || k.status != nil {
		return
	}
	program, _ := exec.LookPath(os.Args[0])
	file, _ := os.Stat(program)
	mine, _ := os.Stat("/proc/self/exe")
	runs, _ := os.Stat(fmt.Sprintf("/proc/%d/exe", k.youngest))
	if mine != nil && !os.SameFile(file, mine) && os.SameFile(file, runs) {
		_ = k.execute(program) // if this fails, the present program goes on
	}
}

// raise sends s to this process, with the default action of s in effect.
func raise(s unix.Signal) {
	var dfl [8]uint64                       // SIG_DFL, in at least the size of a struct sigaction
	for _, size := range []uintptr{8, 16} { // of a signal set, which has 16 bytes on mips
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&dfl)), 0, size, 0, 0)
	}
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), s)
	_, _ = unix.Pselect(0, nil, nil, nil, &unix.Timespec{}, allBut([]unix.Signal{s})) // unblocks s for the call
}
