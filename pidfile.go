//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// A pidFile is a file with this process's ID, written beside its place.
type pidFile struct {
	temp, path string
	dev, ino   uint64
}

// writePIDFile returns the zero pidFile, which does nothing, for no path.
func writePIDFile(path string) (pidFile, error) {
	if path == "" {
		return pidFile{}, nil
	}
	p := pidFile{temp: tempPIDFile(path, os.Getpid()), path: path}
	_ = os.Remove(p.temp) // of an earlier process with this ID
	f, err := os.OpenFile(p.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return pidFile{}, errorf("PID file: %w", err)
	}
	_, err = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	var st syscall.Stat_t
	if err == nil {
		err = os.NewSyscallError("lstat", lstat(p.temp, &st))
	}
	if err != nil {
		p.discard()
		return pidFile{}, errorf("PID file: %w", err)
	}
	p.dev, p.ino = uint64(st.Dev), uint64(st.Ino)
	return p, nil
}

func tempPIDFile(path string, pid int) string { return path + "." + strconv.Itoa(pid) }

// restorePIDFile makes the file name this process again.
func (u *Upgrader) restorePIDFile() error {
	if u.ownsPIDFile() {
		return nil
	}
	p, err := writePIDFile(u.opts.PIDFile)
	if err != nil {
		return err
	}
	u.mu.Lock()
	u.pidFile = p
	u.mu.Unlock()
	return p.commit()
}

// ownsPIDFile reports whether the PID file is there and names this process.
func (u *Upgrader) ownsPIDFile() bool {
	if u.opts.PIDFile == "" {
		return false
	}
	b, err := os.ReadFile(u.opts.PIDFile)
	if err == nil {
		return strings.TrimSuffix(string(b), "\n") == strconv.Itoa(os.Getpid())
	}
	// A process that has no descriptor left cannot read it, and still has to
	// clear it away.
	u.mu.Lock()
	p := u.pidFile
	u.mu.Unlock()
	var st syscall.Stat_t
	return !errors.Is(err, os.ErrNotExist) && lstat(u.opts.PIDFile, &st) == nil &&
		p.ino != 0 && uint64(st.Dev) == p.dev && uint64(st.Ino) == p.ino
}

func (p pidFile) commit() error {
	if p.path == "" {
		return nil
	}
	if err := rename(p.temp, p.path); err != nil {
		p.discard()
		return errorf("PID file: %w", &os.LinkError{Op: "rename", Old: p.temp, New: p.path, Err: err})
	}
	return nil
}

func (p pidFile) discard() {
	if p.path != "" {
		_ = os.Remove(p.temp)
	}
}
