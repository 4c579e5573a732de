package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// An upgrade starts a program: by which path, in which directory, with which
// arguments and environment, and what it means that it cannot be started.

// realDir is a new directory. Its path is short, and no part of it is a link.
func realDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(proctest.ShortDir(t))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// copySelf makes the test's own program available under another name, and
// returns that.
func copySelf(t *testing.T, to string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	// Of a file with two names, other systems than Linux may tell either one.
	if runtime.GOOS == "linux" && os.Link(self, to) == nil {
		return to
	}
	return copyFile(t, self, to)
}

// copyFile writes a program of its own.
func copyFile(t *testing.T, from, to string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	// A process that is being started by another test must not have the file
	// open for writing.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

// putFile writes a file, and returns its path.
func putFile(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	syscall.ForkLock.RLock() // see copyFile
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// pointLink lets the symbolic link at path lead elsewhere, at once.
func pointLink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// called starts a program by this path and name.
func called(path, name string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Path, cmd.Args[0] = path, name }
}

// runs fails the test unless p runs the file at this path, where the system
// tells.
func runs(p *proctest.Proc, path string) {
	p.T.Helper()
	if runtime.GOOS == "darwin" || runtime.GOOS == "openbsd" {
		return // os.Executable has the name by which it was started
	}
	if got := executable.On(p); got != path {
		p.T.Errorf("process %d runs %s; want %s", p.PID, got, path)
	}
}

// worksIn fails the test unless this is p's working directory.
func worksIn(p *proctest.Proc, dir string) {
	p.T.Helper()
	wd, err := p.Getwd()
	if err == nil {
		wd, err = filepath.EvalSymlinks(wd) // it may be what $PWD says
	}
	if err != nil || wd != dir {
		p.T.Errorf("process %d works in %q, %v; want %q", p.PID, wd, err, dir)
	}
}

// isCalled fails the test unless this is the first of p's arguments.
func isCalled(p *proctest.Proc, name string) {
	p.T.Helper()
	if args := p.Args(); args[0] != name {
		p.T.Errorf("process %d has the arguments %q; want %q first", p.PID, args, name)
	}
}

// TestDirectoryCannotBeEntered is about a working directory that is missing.
func TestProgramCannotRun(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	dir := realDir(t)
	for _, tt := range []struct {
		name, path string
		want       failure
	}{
		{"missing", dir + "/none", failure{step: ecdysis.StepStart, is: os.ErrNotExist, says: "/none"}},
		{"missing in PATH", "ecdysis-none", failure{step: ecdysis.StepStart, says: "ecdysis-none"}},
		{"not executable", putFile(t, dir+"/plain", "#!/bin/sh\n", 0o644),
			failure{step: ecdysis.StepStart, is: os.ErrPermission, says: "/plain"}},
		{"no format", putFile(t, dir+"/text", "hello, world\n", 0o755),
			failure{step: ecdysis.StepStart, is: syscall.ENOEXEC, says: "/text"}},
		{"missing interpreter", putFile(t, dir+"/script", "#!/nonexistent/sh\n", 0o755),
			failure{step: ecdysis.StepStart, is: os.ErrNotExist, says: "/script"}},
		{"directory", dir, failure{step: ecdysis.StepStart, is: os.ErrPermission}},
		{"true", program, failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF, how: "exit status 0", noSuccessor: true}},
		{"false, in PATH", "false", failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF, how: "exit status 1", noSuccessor: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := survive(proctest.New(t, proctest.TCP))
			v.fails(v.BeginUpgrade(proctest.Successor{Path: tt.path}), tt.want)
			v.survived(proctest.TCP)
		})
	}
}

// A program that was replaced a moment ago may still be open for writing.
func TestTextFileBusy(t *testing.T) {
	t.Parallel()
	open := func(t *testing.T) (string, *os.File) {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		path := copyFile(t, self, realDir(t)+"/daemon")
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return path, f
	}
	t.Run("for a moment", func(t *testing.T) {
		t.Parallel()
		path, f := open(t)
		v := survive(proctest.New(t, proctest.TCP))
		a := v.BeginUpgrade(proctest.Successor{Path: path})
		v.At(proctest.AtPrepare)
		closing := make(chan struct{})
		time.AfterFunc(100*time.Millisecond, func() { close(closing); f.Close() }) // as the scenario wants it
		s := a.Successor()
		a.OK()
		s.At(proctest.AtServing)
		select {
		case <-closing:
		default:
			t.Error("the program was started while it was open for writing, so that this test shows nothing")
		}
		runs(s, path)
		v.load.More(10)
		s.Serves()
		v.load.Check()
	})
	t.Run("for good", func(t *testing.T) {
		t.Parallel()
		path, _ := open(t)
		v := survive(proctest.New(t, proctest.TCP))
		begun := time.Now()
		v.fails(v.BeginUpgrade(proctest.Successor{Path: path}), failure{step: ecdysis.StepStart, is: syscall.ETXTBSY, says: path})
		if d := time.Since(begun); d < time.Second {
			t.Errorf("Upgrade returned after %v; want a second", d)
		}
		v.survived(proctest.TCP)
	})
}

func TestFlippedSymlink(t *testing.T) {
	t.Parallel()
	dir := realDir(t)
	a, b, link := copySelf(t, dir+"/a/daemon"), copySelf(t, dir+"/b/daemon"), dir+"/current"
	pointLink(t, "a/daemon", link)
	p := proctest.New(t, proctest.TCP).Start(called(link, link))
	runs(p, a)
	for _, path := range []string{b, a, b} {
		pointLink(t, path, link)
		p = p.Upgrade()
		runs(p, path)
		isCalled(p, link)
		p.Serves()
	}
}

// The successor runs the program that has replaced the predecessor's by a
// rename, though the predecessor runs a file that has no name any more.
func TestReplacedProgram(t *testing.T) {
	t.Parallel()
	dir := realDir(t)
	path := copySelf(t, dir+"/daemon")
	v := survive(proctest.New(t, proctest.TCP), called(path, path))
	if err := os.Rename(putFile(t, dir+"/broken", "#!/bin/sh\nexit 9\n", 0o755), path); err != nil {
		t.Fatal(err)
	}
	v.fails(v.BeginUpgrade(), failure{step: ecdysis.StepInit, is: io.ErrUnexpectedEOF, how: "exit status 9", noSuccessor: true})
	if err := os.Rename(copySelf(t, dir+"/repaired"), path); err != nil {
		t.Fatal(err)
	}
	runs(v.survived(proctest.TCP), path)
}

// The program and its working directory are found by the link that $PWD names,
// whenever it was changed. TestWorkingDirectoryIsALink has what it is without.
func TestFlippedWorkingDirectory(t *testing.T) {
	t.Parallel()
	dir := realDir(t)
	a, b, link := copySelf(t, dir+"/a/daemon"), copySelf(t, dir+"/b/daemon"), dir+"/current"
	pointLink(t, "a", link)
	p := proctest.New(t, proctest.TCP).Start(called(link+"/daemon", "./daemon"), func(cmd *exec.Cmd) {
		cmd.Dir = link
		cmd.Env = append(cmd.Env, "PWD="+link) // as a shell sets it
	})
	runs(p, a)
	worksIn(p, filepath.Dir(a))
	for _, path := range []string{b, a, b} {
		pointLink(t, filepath.Dir(path), link)
		p = p.Upgrade()
		runs(p, path)
		worksIn(p, filepath.Dir(path))
		isCalled(p, "./daemon")
		p.Serves()
	}
}

func TestDeletedWorkingDirectory(t *testing.T) {
	t.Parallel()
	dir := realDir(t) + "/here"
	mkdir := func() {
		t.Helper()
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() {
		t.Helper()
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
	mkdir()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := proctest.New(t, proctest.TCP).Start(called(path, path), func(cmd *exec.Cmd) { cmd.Dir = dir })
	worksIn(p, dir)
	remove()
	mkdir() // another one
	p = p.Upgrade()
	worksIn(p, dir)
	p.Serves()
	remove()
	for range 3 {
		p = p.Upgrade()
		if runtime.GOOS == "linux" {
			wd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.PID))
			if want := dir + " (deleted)"; err != nil || wd != want {
				t.Errorf("process %d works in %q, %v; want %q", p.PID, wd, err, want)
			}
		} else if wd, err := p.Getwd(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("process %d works in %q, %v; want a directory that is gone", p.PID, wd, err)
		}
		isCalled(p, path)
		p.Serves()
	}
}

var chdirAtStart = proctest.Define("chdir at start", func(_ *proctest.Daemon, dir string) (proctest.None, error) {
	return proctest.None{}, os.Chdir(dir)
})

// What a relative os.Args[0] means is found at the start, and not after a chdir.
func TestRelativeProgram(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"./daemon", "bin/daemon", "../here/./daemon"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := realDir(t) + "/here"
			path := copySelf(t, filepath.Join(dir, name))
			spec := proctest.TCP.At(proctest.AtStart, chdirAtStart.Do("/"))
			v := survive(proctest.New(t, spec), called(path, name), func(cmd *exec.Cmd) { cmd.Dir = dir })
			worksIn(v.Proc, "/")
			// The program of the first process is not used in its absence.
			if err := os.Rename(path, path+".away"); err != nil {
				t.Fatal(err)
			}
			v.fails(v.BeginUpgrade(), failure{step: ecdysis.StepStart, is: os.ErrNotExist, says: path})
			if err := os.Rename(path+".away", path); err != nil {
				t.Fatal(err)
			}
			s := v.survived(spec)
			for range 2 {
				worksIn(s, "/")
				runs(s, path)
				isCalled(s, name)
				s.Serves()
				s = s.Upgrade()
			}
		})
	}
}

// A successor starts in the directory in which its predecessor has started.
func TestWorkingDirectoryOfStart(t *testing.T) {
	t.Parallel()
	dir := realDir(t)
	p := proctest.New(t, proctest.TCP).Start(func(cmd *exec.Cmd) { cmd.Dir = dir })
	if err := p.Chdir("/"); err != nil {
		t.Fatal(err)
	}
	s := p.Upgrade()
	worksIn(s, dir)
	s.Serves()
}

func TestProgramInPath(t *testing.T) {
	t.Parallel()
	const name = "ecdysis-test-daemon"
	dir := realDir(t)
	second := copySelf(t, dir+"/second/"+name)
	p := proctest.New(t, proctest.TCP).Start(called(second, name), func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "PATH="+dir+"/first:"+dir+"/second:"+os.Getenv("PATH"))
	})
	p.Serves()
	p = p.Upgrade()
	runs(p, second)
	isCalled(p, name)
	first := copySelf(t, dir+"/first/"+name)
	for range 2 {
		p = p.Upgrade()
		runs(p, first)
		isCalled(p, name)
		p.Serves()
	}
}

// Arguments and the environment are bytes.
func TestBytesArrive(t *testing.T) {
	t.Parallel()
	args := []string{"\xff\xfe \x80", "", "a\nb", "\xed\xa0\x80", "--x=\xc3\x28"}
	env := []string{"ECD_\xff\x80=\xfe\x01\n=", "ECD_EMPTY="}
	p := proctest.New(t, proctest.TCP).Start(func(cmd *exec.Cmd) {
		cmd.Args = append(cmd.Args, args...)
		cmd.Env = append(cmd.Env, env...)
	})
	all := p.Args()
	if n := len(all) - len(args); n < 0 || !slices.Equal(all[n:], args) {
		t.Fatalf("arguments %q; want %q last", all, args)
	}
	for range 3 {
		if got := p.Args(); !slices.Equal(got, all) {
			t.Errorf("arguments %q; want %q", got, all)
		}
		vars := p.Environ()
		for _, e := range env {
			if !slices.Contains(vars, e) {
				t.Errorf("the variable %q has not arrived", e)
			}
		}
		p = p.Upgrade()
	}
	p.Serves()
}
