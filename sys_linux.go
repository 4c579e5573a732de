package ecdysis

import (
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Variables, so that a test can take another system's part.
var (
	dualStack        = true
	maxBatchFDs      = 100 // descriptors in one message; the system takes 253
	marksLate        = false
	shrinkingBuffers = false
	lateNotConnected = false
	dropsDescriptors = false // a stream holds what its buffer takes, descriptors included
)

const (
	maxUnixPath = 107
	reusePort   = unix.SO_REUSEPORT
)

// dup3 makes the descriptor to refer to what from refers to, close-on-exec.
func dup3(from, to int) error { return unix.Dup3(from, to, syscall.O_CLOEXEC) }

// findDoubtful sets Revents of the descriptors that may not listen. A socket that
// listens is never writable and has not hung up. One call of poll(2) for all takes
// less time than one of getsockopt(2) for each. It misses a connection whose buffer
// is full.
func findDoubtful(list []unix.PollFd) {
	for i := range list {
		list[i].Events = unix.POLLOUT
	}
	if _, err := unix.Poll(list, 0); err != nil { // so that nothing is known
		for i := range list {
			list[i].Revents = unix.POLLOUT
		}
	}
}

// abortReserve is how much of a stream's buffer is kept for an ABORT.
const abortReserve = 64 << 10

// keepReserve makes a stream's buffer as large as the system allows, less a
// reserve. SO_SNDBUF is read as twice the value that was set (socket(7)).
func keepReserve(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 1<<20)
	if n, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF); err == nil {
		_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, (n-abortReserve)/2)
	}
}

func useReserve(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 1<<20)
}

func peerCred(fd int) (Cred, error) {
	c, err := syscall.GetsockoptUcred(fd, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	if err != nil {
		return Cred{}, err
	}
	return Cred{PID: int(c.Pid), UID: int(c.Uid)}, nil
}

var senderSpace = syscall.CmsgSpace(syscall.SizeofUcred)

// wantSender makes every message on a socket come with its sender's process
// ID as it is seen from here (unix(7)).
func wantSender(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_PASSCRED, 1)
}

// nameSender returns nothing: the receiver has asked for it.
func nameSender() []byte { return nil }

func senderOf(m *unix.SocketControlMessage) int {
	c, err := unix.ParseUnixCredentials(m)
	if err != nil {
		return 0
	}
	return int(c.Pid)
}

// A watch tells when a process exits, by a pidfd (pidfd_open(2)), or by
// waitid(2) where there is none and the process is a child.
type watch struct {
	pid, pidfd int
	refused    bool // there is none, and the process is no child
}

func (w *watch) prepare(attr *syscall.ProcAttr, sibling bool) error {
	w.pidfd = -1
	attr.Sys = &syscall.SysProcAttr{PidFD: &w.pidfd}
	if sibling {
		attr.Sys.Cloneflags = syscall.CLONE_PARENT
	}
	return nil
}

// without takes the pidfd out of attr, and reports whether there was one.
func (w *watch) without(attr *syscall.ProcAttr) bool {
	had := attr.Sys.PidFD != nil
	attr.Sys.PidFD, w.pidfd = nil, -1
	return had
}

func (w *watch) begin(pid int) { w.pid = pid }

// find begins to watch a process that is not a child.
func (w *watch) find(pid int) {
	w.pid = pid
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil { // it has ended, or the kernel is older than 5.3 or forbids it
		fd, w.refused = -1, err != syscall.ESRCH
	}
	w.pidfd = fd
}

// exited waits at most d for the process to exit, and reports whether it has.
func (w *watch) exited(d time.Duration) bool {
	for end := time.Now().Add(d); ; {
		if w.pidfd >= 0 {
			fds := []unix.PollFd{{Fd: int32(w.pidfd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, int((d+time.Millisecond-1)/time.Millisecond))
			if err != syscall.EINTR {
				return n > 0
			}
		} else {
			var info unix.Siginfo
			err := unix.Waitid(unix.P_PID, w.pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
			if err == nil && info.Signo != 0 || err == syscall.ECHILD && syscall.Kill(w.pid, 0) == syscall.ESRCH {
				return true
			}
			time.Sleep(min(d, 5*time.Millisecond))
		}
		if d = time.Until(end); d <= 0 {
			if w.pidfd < 0 {
				return false
			}
			d = 0
		}
	}
}

// standsForOthers reports whether a user ID is the one by which a user namespace
// shows each user that it does not map (user_namespaces(7)), and is not mapped
// itself. Without /proc it reports false.
func standsForOthers(uid int) bool {
	b, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err != nil || string(b) != strconv.Itoa(uid)+"\n" {
		return false
	}
	if b, err = os.ReadFile("/proc/self/uid_map"); err != nil {
		return false
	}
	// A line of the map is the first ID here, the first one outside, and how many.
	for m := numbers(b); len(m) >= 3; m = m[3:] {
		if id := int64(uid); m[0] <= id && id-m[0] < m[2] {
			return false
		}
	}
	return true
}

// numbers returns the numbers in a text, which have spaces or line ends between
// them. The usual count of IDs is no int where that has 32 bits.
func numbers(text []byte) (list []int64) {
	inNumber := false
	for _, c := range text {
		digit := '0' <= c && c <= '9'
		if digit && !inNumber {
			list = append(list, 0)
		}
		if digit {
			n := &list[len(list)-1]
			*n = *n*10 + int64(c-'0')
		}
		inNumber = digit
	}
	return list
}

// networkOfSocket returns a number that is the network namespace's of a socket
// (SO_NETNS_COOKIE, from Linux 5.14 on), or 0 if the system does not tell.
func networkOfSocket(fd int) uint64 {
	n, err := unix.GetsockoptUint64(fd, syscall.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0
	}
	return n
}

// kill kills the process by its pidfd. It reports false if there is none, or if
// a sandbox denies the call.
func (w *watch) kill() (done bool, err error) {
	if w.pidfd < 0 {
		return false, nil
	}
	err = unix.PidfdSendSignal(w.pidfd, syscall.SIGKILL, nil, 0)
	if err == syscall.ESRCH { // it has ended
		err = nil
	}
	return err == nil, os.NewSyscallError("pidfd_send_signal", err)
}

// statExecutable tells which file this process runs, also if it was replaced.
func statExecutable(exe string, st *syscall.Stat_t) error {
	if err := stat("/proc/self/exe", st); err == nil {
		return nil
	}
	return stat(exe, st)
}

func (w *watch) close() {
	if w.pidfd >= 0 {
		syscall.Close(w.pidfd)
		w.pidfd = -1
	}
}

// memfd returns memory that can be handed on like a file (memfd_create(2),
// from Linux 3.17 on).
func memfd() (*os.File, error) {
	fd, err := unix.MemfdCreate("ecdysis", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "memfd"), nil
}
