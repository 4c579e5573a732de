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

	"golang.org/x/sys/unix"
)

const (
	parentVar = "ECDYSIS_PARENT" // by which a successor finds its older process
	keeperVar = "ECDYSIS_KEEPER" // by which a keeper's child, and its next program, knows what it is
	childRole = "child of %d"
	nextRole  = "keeper %d of %d, group %d"
)

// A keeper is the process that stays. It has one goroutine, which waits for
// signals alone: a child's end and a change of the PID file are signals, too.
type keeper struct {
	pidFile string
	dir     int // its directory, which signals changes
	program string
	self    os.FileInfo    // of the program that this process runs
	changes chan os.Signal // there is something to look at; one stands for many
	signals chan os.Signal // to be forwarded

	seen        os.FileInfo      // of the PID file that was read last
	group       int              // the process group of all generations
	generations []int            // those that live; the youngest is the last one
	youngest    int              // named by the PID file last; it may have ended
	status      *unix.WaitStatus // how; nil: it has not, as far as is known
}

func stay(pidFile string) error {
	role := os.Getenv(keeperVar)
	_ = os.Unsetenv(keeperVar)
	if _, ok := os.LookupEnv(parentVar); ok || role == fmt.Sprintf(childRole, os.Getppid()) {
		return nil
	}
	program, err := exec.LookPath(os.Args[0])
	if pidFile == "" {
		err = errors.New("the path of the PID file is empty; want that of Options.PIDFile")
	}
	k := &keeper{pidFile: pidFile, program: program, changes: make(chan os.Signal, 1), signals: make(chan os.Signal, 64)}
	k.self, _ = os.Stat("/proc/self/exe") // without /proc it stays as it is
	dir := filepath.Dir(pidFile)
	var derr error
	if k.dir, derr = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil && derr != nil {
		err = &os.PathError{Op: "open", Path: dir, Err: derr}
	}
	var pid int
	if n, _ := fmt.Sscanf(role, nextRole, &pid, &k.youngest, &k.group); n == 3 && pid == os.Getpid() {
		// The service runs: what is missing now must not end it.
		k.generations = []int{k.youngest}
		k.catch(caught())
	} else if err == nil {
		err = k.start()
	}
	if len(k.generations) == 0 {
		unix.Close(k.dir)
		return err
	}
	k.run()
	return nil // never
}

// start begins the first generation.
func (k *keeper) start() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	k.named() // whatever is there now is of an earlier life
	// Caught before there is a child, none is lost. But what is ignored, as by
	// nohup(1), is to be so for the child, and is caught when that is there.
	k.catch(slices.DeleteFunc(caught(), signal.Ignored))
	pid, err := syscall.ForkExec(k.program, os.Args, &syscall.ProcAttr{
		Env:   append(os.Environ(), keeperVar+"="+fmt.Sprintf(childRole, os.Getpid())),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		signal.Reset()
		return &os.PathError{Op: "fork/exec", Path: k.program, Err: err}
	}
	k.catch(caught())
	k.group, k.youngest, k.generations = pid, pid, []int{pid}
	list, _ := os.ReadDir("/proc/self/fd")
	for _, e := range list { // what is not close-on-exec was there at the start, and the child has it
		fd, _ := strconv.Atoi(e.Name())
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd > 2 && err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	return nil
}

// caught are the signals that a keeper forwards.
func caught() (list []os.Signal) {
	for s := unix.Signal(1); s <= 64; s++ {
		switch s {
		case unix.SIGCHLD, unix.SIGIO, unix.SIGPIPE, unix.SIGURG, unix.SIGTTIN, unix.SIGTTOU, 32, 33: // the last two are Go's and libc's
		default:
			list = append(list, s)
		}
	}
	return list
}

func (k *keeper) catch(list []os.Signal) {
	signal.Notify(k.changes, unix.SIGCHLD, unix.SIGIO)
	signal.Notify(k.signals, list...)
}

func (k *keeper) run() {
	for {
		k.look(0)
		k.reap()
		if len(k.generations) == 0 {
			if k.status.Signaled() {
				_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // the core that counts is there
				raise(k.status.Signal())
				os.Exit(128 + int(k.status.Signal())) // PID 1
			}
			os.Exit(k.status.ExitStatus())
		}
		k.renew()
		select {
		case <-k.changes:
		case s := <-k.signals:
			k.look(0)
			k.forward(s.(unix.Signal))
		}
	}
}

// look finds out which generations there are. ended is a child that was just
// reaped, and may be one; 0: none.
func (k *keeper) look(ended int) {
	// A signal at the next rename in the directory (fcntl(2), dnotify): unlike
	// inotify(7), it is not limited in number for all containers of a user.
	const dnRename = 0x10
	_, _ = unix.FcntlInt(uintptr(k.dir), unix.F_NOTIFY, dnRename)
	lives := func(pid int) bool {
		group, err := unix.Getpgid(pid) // also of one that is not reaped yet
		return pid == ended || err == nil && group == k.group
	}
	k.generations = slices.DeleteFunc(k.generations, func(pid int) bool { return !lives(pid) })
	if pid := k.named(); pid > 0 && lives(pid) {
		k.generations = append(slices.DeleteFunc(k.generations, func(p int) bool { return p == pid }), pid)
		k.youngest, k.status = pid, nil
	}
	if n := len(k.generations); n > 0 && k.status == nil {
		k.youngest = k.generations[n-1] // the one before may have failed, and been reaped by its parent
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
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid == 0 {
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
	if s == unix.SIGTSTP { // the whole job stops, and goes on when this process does
		_ = unix.Kill(-k.group, s)
		signal.Reset(s)
		raise(s)
		signal.Notify(k.signals, s)
		_ = unix.Kill(-k.group, unix.SIGCONT)
	} else if n := len(k.generations); n > 0 {
		_ = unix.Kill(k.generations[n-1], s) // fails only if it has just ended
	}
}

// renew makes this process run the program that the only generation runs, if
// that is a new one.
func (k *keeper) renew() {
	if len(k.generations) != 1 || k.status != nil {
		return
	}
	file, _ := os.Stat(k.program)
	runs, _ := os.Stat("/proc/" + strconv.Itoa(k.youngest) + "/exe")
	if os.SameFile(file, k.self) || !os.SameFile(file, runs) {
		return
	}
	k.self = file // one attempt
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all := everySignal()
	// Blocked in every thread, or with cgo in this one, signals wait in the
	// system for the next program, which unblocks what it catches.
	_ = unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil)
	if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_BLOCK, uintptr(unsafe.Pointer(&all)), 0, 8, 0, 0); e == 0 {
		signal.Stop(k.signals) // waits until what was caught before is there
	}
	for len(k.signals) > 0 {
		k.forward((<-k.signals).(unix.Signal))
	}
	role := fmt.Sprintf(nextRole, os.Getpid(), k.youngest, k.group)
	_ = syscall.Exec(k.program, os.Args, append(os.Environ(), keeperVar+"="+role))
	k.catch(caught()) // it cannot be run: this program goes on
}

// raise does to this process what s does to one that does not catch it.
func raise(s unix.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var dfl [8]uint64                       // a struct sigaction, and more, of SIG_DFL
	for _, size := range []uintptr{8, 16} { // of a signal set: 16 on mips
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&dfl)), 0, size, 0, 0)
	}
	all := everySignal()
	_ = unix.PthreadSigmask(unix.SIG_UNBLOCK, &all, nil)
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), s)
}

func everySignal() (set unix.Sigset_t) {
	for i := range set.Val {
		set.Val[i] = ^set.Val[i]
	}
	return set
}
