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
	keeperVar  = "ECDYSIS_KEEPER" // by which a keeper's program and its child know what they are
	childRole  = "child gate=%d"
	keeperRole = "keeper group=%d youngest=%d dir=%d signals=%d gate=%d"
)

// Signals are forwarded, but for those in own and unused. Until the first
// generation is ready only those in ending are: a SIGHUP that it does not catch
// yet would end it, and the keeper with it.
var (
	ending = []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGQUIT}
	own    = []unix.Signal{unix.SIGCHLD, unix.SIGIO, unix.SIGTSTP} // the keeper itself acts on them
	// Those of a terminal for a process in its background, those that Go and
	// libc use themselves, and those that cannot be caught.
	unused = []unix.Signal{unix.SIGPIPE, unix.SIGURG, unix.SIGTTIN, unix.SIGTTOU, 32, 33, unix.SIGKILL, unix.SIGSTOP}
)

// A keeper is the process that stays. It waits for signals alone: a child's end
// and a change of the PID file are signals, too. All of them are blocked, from
// the first instruction of its program on, and read from a signalfd(2). So none
// is lost when it executes its next program: they wait in the system.
type keeper struct {
	pidFile string
	dir     int // the directory of pidFile, which signals changes
	signals int // the signalfd
	gate    int // a byte into it lets the first generation go; -1: it has gone

	ready       bool             // the first generation has been ready
	seen        os.FileInfo      // of the PID file that was read last
	group       int              // the process group of all generations
	generations []int            // those that live; the youngest is the last one
	youngest    int              // named by the PID file last; it may have ended
	status      *unix.WaitStatus // how; nil: it has not, as far as is known
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

// start begins the first generation, and becomes the keeper by executing the
// program again. All that can fail is done here.
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
	// Signals that have to wait are caught until this process blocks them,
	// because they would end it.
	early := make(chan os.Signal, 64)
	for s := unix.Signal(1); s <= 64; s++ {
		if !slices.Contains(slices.Concat(ending, own, unused), s) && !signal.Ignored(s) { // as by nohup(1), which the child inherits
			signal.Notify(early, s)
		}
	}
	defer signal.Stop(early)
	// The child waits at a gate until the keeper runs. If this process is
	// killed before, it ends, too.
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
	// What is not close-on-exec was there at the start, and the child has it.
	list, _ := os.ReadDir("/proc/self/fd")
	for _, e := range list {
		if fd, _ := strconv.Atoi(e.Name()); fd > 2 {
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC)
		}
	}
	if err = hold(); err == nil {
		raiseAgain(early)
		err = k.execute(program)
	}
	_ = unix.Kill(k.youngest, unix.SIGKILL)
	_, _ = unix.Wait4(k.youngest, nil, 0, nil)
	return err
}

// hold blocks all signals in this thread, for every program that it executes.
// The Go runtime unblocks some of them when a program starts, before anything
// could catch them: so a filter (seccomp(2)) makes rt_sigprocmask(2) do nothing.
func hold() error {
	runtime.LockOSThread() // for good: it is no thread for a program any more
	var old unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, allBut(), &old)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_RT_SIGPROCMASK},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO}, // 0: success
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	p := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) // or it would take privileges
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(p)), 0, 0)
	}
	if err != nil {
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	}
	return os.NewSyscallError("seccomp", err)
}

// raiseAgain makes the signals that were caught pending in this thread, which
// blocks them, so that the next program has them.
func raiseAgain(caught chan os.Signal) {
	none := make(chan os.Signal, 1)
	signal.Notify(none, unix.SIGWINCH)
	signal.Stop(none) // returns when all that has come is in its channel
	for len(caught) > 0 {
		_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), (<-caught).(unix.Signal))
	}
}

// execute makes this process run the program, as the keeper that it is.
func (k *keeper) execute(program string) error {
	role := fmt.Sprintf(keeperRole, k.group, k.youngest, k.dir, k.signals, k.gate)
	fds := []int{k.dir, k.signals, k.gate}
	for _, fd := range fds {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
	}
	err := syscall.Exec(program, os.Args, append(os.Environ(), keeperVar+"="+role))
	return &os.PathError{Op: "exec", Path: program, Err: err}
}

// only is the set of the signals in the lists.
func only(lists ...[]unix.Signal) *unix.Sigset_t {
	set := &unix.Sigset_t{}
	bits := uint(unsafe.Sizeof(set.Val[0])) * 8
	for _, s := range slices.Concat(lists...) {
		set.Val[uint(s-1)/bits] |= 1 << (uint(s-1) % bits)
	}
	return set
}

// allBut is the set of all signals but those in the lists.
func allBut(lists ...[]unix.Signal) *unix.Sigset_t {
	set := only(lists...)
	for i := range set.Val {
		set.Val[i] = ^set.Val[i]
	}
	return set
}

// run keeps the generations, until none is left.
func (k *keeper) run() error {
	runtime.LockOSThread() // the thread that raises signals, and executes
	if k.ready = k.gate < 0; !k.ready {
		k.named() // whatever is there now is of an earlier life
		_, _ = unix.Write(k.gate, []byte{0})
		unix.Close(k.gate)
		k.gate = -1
	}
	k.generations = []int{k.youngest}
	for {
		k.look(0)
		k.reap()
		switch {
		case len(k.generations) > 0:
		case k.status == nil:
			return fmt.Errorf("no generation is left, and the end of %d was not seen: another has reaped it, or it has left the process group %d", k.youngest, k.group)
		case k.status.Signaled():
			_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // the core that counts is there
			raise(k.status.Signal())
			os.Exit(128 + int(k.status.Signal())) // PID 1
		default:
			os.Exit(k.status.ExitStatus())
		}
		k.renew()
		var info unix.SignalfdSiginfo
		if n, _ := unix.Read(k.signals, (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:]); n > 0 {
			k.look(0)
			k.forward(unix.Signal(info.Signo))
		}
	}
}

// look finds out which generations there are. ended is a child that was just
// reaped, and may be one; 0: none.
func (k *keeper) look(ended int) {
	// A signal at the next rename in the directory (fcntl(2), dnotify): unlike
	// inotify(7), it is not limited in number for all containers of a user.
	_, _ = unix.FcntlInt(uintptr(k.dir), unix.F_NOTIFY, 0x10) // DN_RENAME
	lives := func(pid int) bool {
		group, err := unix.Getpgid(pid) // also of one that is not reaped yet
		return pid == ended || err == nil && group == k.group
	}
	k.generations = slices.DeleteFunc(k.generations, func(pid int) bool { return !lives(pid) })
	if pid := k.named(); pid > 0 && lives(pid) {
		k.generations = append(slices.DeleteFunc(k.generations, func(p int) bool { return p == pid }), pid)
		k.youngest, k.status = pid, nil
		if !k.ready { // what has waited comes now
			k.ready = true
			_, _ = unix.Signalfd(k.signals, allBut(unused), 0)
		}
	}
}

// named returns the process that the PID file names; 0: there is no new one.
func (k *keeper) named() int {
	fi, err := os.Stat(k.pidFile)
	if err != nil || os.SameFile(fi, k.seen) && fi.ModTime().Equal(k.seen.ModTime()) {
		return 0
	}
	k.seen = fi // if it is replaced before the next line, that makes another signal
	b, _ := os.ReadFile(k.pidFile)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return pid
}

// reap takes every child that has ended.
func (k *keeper) reap() {
	for {
		var status unix.WaitStatus
		pid, _ := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if pid <= 0 {
			return
		}
		k.look(pid)
		if pid == k.youngest {
			k.status = &status
		}
		k.generations = slices.DeleteFunc(k.generations, func(p int) bool { return p == pid })
	}
}

func (k *keeper) forward(s unix.Signal) {
	switch n := len(k.generations); {
	case s == unix.SIGCHLD || s == unix.SIGIO: // for the keeper itself
	case s == unix.SIGTSTP: // the whole job stops, and goes on when this process does
		_ = unix.Kill(-k.group, s)
		raise(s)
		_ = unix.Kill(-k.group, unix.SIGCONT)
	case n > 0:
		_ = unix.Kill(k.generations[n-1], s) // fails only if it has just ended
	}
}

// renew makes this process run the program that the only generation runs, if
// that is a new one.
func (k *keeper) renew() {
	if !k.ready || len(k.generations) != 1 || k.status != nil {
		return
	}
	program, _ := exec.LookPath(os.Args[0])
	file, _ := os.Stat(program)
	mine, _ := os.Stat("/proc/self/exe")
	runs, _ := os.Stat(fmt.Sprintf("/proc/%d/exe", k.youngest))
	if mine != nil && !os.SameFile(file, mine) && os.SameFile(file, runs) {
		_ = k.execute(program) // if it fails, this program goes on
	}
}

// raise does to this process what s does to one that does not catch it.
func raise(s unix.Signal) {
	var dfl [8]uint64                       // a struct sigaction, and more, of SIG_DFL
	for _, size := range []uintptr{8, 16} { // of a signal set: 16 on mips
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&dfl)), 0, size, 0, 0)
	}
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), s)
	_, _ = unix.Pselect(0, nil, nil, nil, &unix.Timespec{}, allBut([]unix.Signal{s})) // which unblocks it
}
