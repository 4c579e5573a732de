//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"io"
	"os"
	"sync"
	"syscall"
)

// State returns what the older process's Options.SendState has written. It is
// never nil: if there is nothing, it is at its end. io.EOF comes after the last
// byte and only there. All calls return the same reader.
//
// Ready closes it, so that no memory stays behind: what was not read by then
// is lost, a later Read fails with os.ErrClosed, and EventReady names "state"
// among what was unclaimed.
func (u *Upgrader) State() io.Reader {
	if u.state == nil {
		return (*stateReader)(nil)
	}
	return u.state
}

// A stateReader reads a state from its descriptor, which it closes at the end.
// A nil one is at its end.
type stateReader struct {
	mu   sync.Mutex
	f    *os.File // nil: closed
	left int64
}

func newStateReader(e *entry) *stateReader {
	f := os.NewFile(uintptr(e.moveOut()), kindState)
	return &stateReader{f: f, left: e.size}
}

func (r *stateReader) Read(p []byte) (int, error) {
	if r == nil {
		return 0, io.EOF
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.left == 0:
		return 0, io.EOF
	case r.f == nil:
		return 0, errorf("ecdysis: state: %d bytes were not read before Ready: %w", r.left, os.ErrClosed)
	case len(p) == 0:
		return 0, nil
	}
	n, err := r.f.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if r.left == 0 {
		r.f.Close()
		r.f = nil
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = errorf("ecdysis: state: with %d bytes to come: %w", r.left, err)
	}
	return n, err
}

func (r *stateReader) unread() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left
}

func (r *stateReader) close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.f != nil {
		r.f.Close()
		r.f = nil
	}
}

// writeState lets the program write its state into memory or, where there is no
// such memory, an unlinked file. It returns nil if there is none.
func writeState(write func(io.Writer) error) (*os.File, *entry, error) {
	if write == nil {
		return nil, nil, nil
	}
	f, err := memoryFile()
	if err != nil {
		return nil, nil, err
	}
	done := false
	defer func() {
		if !done { // a hook that panics leaves nothing behind, too
			f.Close()
		}
	}()
	w := &stateWriter{f: f}
	err = write(w)
	if werr := w.end(); err == nil {
		err = werr // and the program did not say so
	}
	if err != nil {
		return nil, nil, err
	}
	fd := int(f.Fd())
	size, err := syscall.Seek(fd, 0, io.SeekCurrent)
	if err == nil {
		_, err = syscall.Seek(fd, 0, io.SeekStart)
	}
	if err != nil {
		return nil, nil, os.NewSyscallError("lseek", err)
	}
	done = true
	e := &entry{wire: wire{kind: kindState, size: size}}
	e.setBare(fd)
	return f, e, nil
}

// A stateWriter is all that SendState may do to the file, and only until it
// returns. It keeps the first error: a state that lacks a part is none.
type stateWriter struct {
	mu  sync.Mutex
	f   *os.File
	err error
}

// end makes every later Write fail, and returns the first error so far.
func (w *stateWriter) end() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.err
	w.err = errorf("ecdysis: SendState has returned: %w", os.ErrClosed)
	return err
}

func (w *stateWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.f.Write(p)
	w.err = err
	return n, err
}

// MemoryFile returns an empty file that has no name. On Linux it lives in memory
// (memfd_create(2)), elsewhere it is an unlinked file in the temporary
// directory. Handed on by AddFile and mapped with MAP_SHARED, it is memory that
// generations share. The caller closes it, which ends no mapping.
func MemoryFile() (*os.File, error) {
	f, err := memoryFile()
	if err != nil {
		return nil, errorf("ecdysis: memory file: %w", err)
	}
	return f, nil
}

func memoryFile() (*os.File, error) {
	if f, err := memfd(); err == nil {
		return f, nil
	}
	return unlinkedFile() // the system has none, or a sandbox denies it
}

func unlinkedFile() (*os.File, error) {
	f, err := os.CreateTemp("", "ecdysis")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
