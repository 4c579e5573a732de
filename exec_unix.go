//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"os"
	"path" // paths here have slashes, and path/filepath would cost more bytes
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Starting and ending the successor, and what the program was at its own start.

// What the command line means can only be told at the start, before the program
// changes directory. The strings are copied, because a program that sets its
// title writes over the system's.
var (
	startDir, _ = workingDir()
	startArgs   = copyArgs()
	startArg0   = ownName()
)

func copyArgs() []string {
	args := make([]string, len(os.Args))
	for i, a := range os.Args {
		args[i] = strings.Clone(a)
	}
	return args
}

// ownName is the name by which this program can be started again: os.Args[0], or
// the executable's own path if os.Args[0] does not lead to the executable. A
// supervisor may choose any name.
func ownName() string {
	arg0 := ""
	if len(startArgs) > 0 {
		arg0 = startArgs[0]
	}
	exe, err := os.Executable()
	if err != nil {
		return arg0 // the system does not tell
	}
	var own, named syscall.Stat_t
	if statExecutable(exe, &own) != nil {
		return arg0
	}
	if file, err := lookUp(arg0); err == nil && stat(file, &named) == nil && named.Dev == own.Dev && named.Ino == own.Ino {
		return arg0
	}
	return exe
}

// A child is the successor: the process that Upgrade has started, or one that
// takes over.
type child struct {
	pid int // 0 if the system does not name it; nothing is known of it then
	watch
	sibling bool // it is not this process's own child: its status is another's
}

// foundChild returns a process that others have started.
func foundChild(pid int) *child {
	c := &child{pid: pid, sibling: true}
	if pid != 0 {
		c.find(pid)
	}
	return c
}

// watched reports whether the system lets this process see c exit. If not, the
// stream is all that is known of c.
func (c *child) watched() bool { return c.pid != 0 && !c.watch.refused }

// exited waits at most d for c to exit, and reports whether it is known to
// have.
func (c *child) exited(d time.Duration) bool {
	if !c.watched() {
		time.Sleep(d)
		return false
	}
	return c.watch.exited(d)
}

// defaultCommand is the command by which this process was started.
func defaultCommand() *Command {
	c := &Command{Path: startPath(), Env: os.Environ(), Dir: startDir}
	if len(startArgs) > 0 {
		c.Args = slices.Clone(startArgs[1:])
	}
	if enterable(c.Dir) != nil {
		c.Dir = "" // gone, or closed to the user that this process has become
	}
	return c
}

// enterable returns an error that says why a directory cannot be entered.
func enterable(dir string) error {
	var st syscall.Stat_t
	return stat(dir+"/.", &st)
}

// startPath is what the program's name meant at the start. A name without a
// slash was looked up in $PATH, and is looked up again.
func startPath() string {
	if startDir != "" && hasSlash(startArg0) && !path.IsAbs(startArg0) {
		return path.Clean(startDir + "/" + startArg0)
	}
	return startArg0
}

// startChild runs cmd. It gets the standard descriptors of this process and its
// end of the stream, as descriptor 3. Everything else of this package and of
// Go's is close-on-exec.
func startChild(cmd *Command, streamFD int, peer string) (*child, error) {
	program, err := lookUp(cmd.Path)
	if err != nil {
		return nil, err
	}
	name := cmd.Path
	if name == startPath() && (cmd.Dir == startDir || path.IsAbs(startArg0) || !hasSlash(startArg0)) {
		name = startArg0 // so that its successor, too, looks it up as it was
	}
	files := []uintptr{0, 1, 2, uintptr(streamFD)}
	for fd := range 3 {
		if inherits(fd) {
			continue
		}
		// Closed; what has its number now is not the caller's to give.
		null, err := syscall.Open(os.DevNull, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
		}
		defer syscall.Close(null)
		files[fd] = uintptr(null)
	}
	env := make([]string, 0, len(cmd.Env)+1)
	for _, s := range cmd.Env {
		if !strings.HasPrefix(s, envName+"=") {
			env = append(env, s)
		}
	}
	env = append(env, envName+"=fd=3 "+peer)
	c := &child{sibling: cmd.Sibling}
	attr := &syscall.ProcAttr{
		Dir:   cmd.Dir,
		Env:   env,
		Files: files,
	}
	if err := c.prepare(attr, cmd.Sibling); err != nil {
		return nil, err
	}
	argv := append([]string{name}, cmd.Args...)
	for end := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		c.pid, _, err = syscall.StartProcess(program, argv, attr)
		if (err == syscall.EINVAL || err == syscall.EPERM || err == syscall.ENOSYS) && c.without(attr) {
			continue // a sandbox may have refused what only makes it easier to watch
		}
		// A program that was written a moment ago may still be open for
		// writing in a process that is just being started elsewhere.
		if err != syscall.ETXTBSY || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return nil, startError(program, cmd.Dir, err)
	}
	c.begin(c.pid)
	return c, nil
}

// startError says which step of starting a program has failed.
func startError(program, dir string, err error) error {
	if dir != "" && enterable(dir) != nil {
		return &os.PathError{Op: "chdir", Path: dir, Err: err}
	}
	return &os.PathError{Op: "fork/exec", Path: program, Err: err}
}

func hasSlash(name string) bool { return strings.IndexByte(name, '/') >= 0 }

// lookUp finds a program without a slash in its name in $PATH, as a shell
// does, but never in the current directory.
func lookUp(name string) (string, error) {
	if name == "" {
		return "", errors.New("Command.Path is empty; want a program")
	}
	if hasSlash(name) {
		return name, nil
	}
	err := error(syscall.ENOENT)
	for _, dir := range split(os.Getenv("PATH"), ':') {
		file := dir + "/" + name
		if !path.IsAbs(dir) {
			continue
		}
		var st syscall.Stat_t
		switch {
		case stat(file, &st) != nil || st.Mode&syscall.S_IFMT == syscall.S_IFDIR:
		case syscall.Access(file, unix.X_OK) != nil:
			err = syscall.EACCES
		default:
			return file, nil
		}
	}
	return "", &os.PathError{Op: "look up in $PATH", Path: name, Err: err}
}

// workingDir is os.Getwd without its search for a directory's name, for which
// the system call suffices: $PWD, if that is it, keeps the symbolic links that
// led here, and a link that is flipped is followed anew.
func workingDir() (string, error) {
	if dir := os.Getenv("PWD"); path.IsAbs(dir) {
		var a, b syscall.Stat_t
		if stat(dir, &a) == nil && stat(".", &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino {
			return dir, nil
		}
	}
	dir, err := syscall.Getwd()
	return dir, os.NewSyscallError("getwd", err)
}

// absolute makes a path independent of the working directory.
func absolute(name string) (string, error) {
	if path.IsAbs(name) {
		return path.Clean(name), nil
	}
	dir, err := workingDir()
	if err != nil {
		return "", errorf("the path %q is relative to a working directory that has gone: %w", name, err)
	}
	return path.Clean(dir + "/" + name), nil
}

// uncatchable reports whether no process can catch s.
func uncatchable(s os.Signal) bool { return s == syscall.SIGKILL || s == syscall.SIGSTOP }

// inherits reports whether a standard descriptor is there to be inherited.
func inherits(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), syscall.F_GETFD, 0)
	return err == nil && flags&syscall.FD_CLOEXEC == 0
}

// kill kills c. A process that has ended is no error. It is done by a handle that
// names the process beyond doubt. By its number it is done only to a child of
// this process's own that was not reaped.
func (c *child) kill() error {
	if c.pid == 0 {
		return errors.New("the system does not name the process")
	}
	done, err := c.watch.kill()
	if done {
		return err
	}
	if c.sibling {
		if err == nil {
			err = errors.ErrUnsupported
		} else {
			err = errorf("%w: %w", err, errors.ErrUnsupported)
		}
		return errorf("process %d is no child of this one, and the system has refused a handle for it: %w", c.pid, err)
	}
	if err := syscall.Kill(c.pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return os.NewSyscallError("kill", err)
	}
	return nil
}

// wait reaps c, which has exited, and returns how. It returns nil if that is not
// known.
func (c *child) wait() *os.ProcessState {
	defer c.release()
	if c.sibling {
		return nil
	}
	proc, err := os.FindProcess(c.pid) // its number is its own until it is reaped
	if err != nil {
		return nil
	}
	state, err := proc.Wait()
	if err != nil { // reaped by another part of the program
		return nil
	}
	return state
}

// release gives up what the system keeps for c in this process.
func (c *child) release() {
	if c.pid != 0 {
		c.watch.close()
	}
}
