package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The PID file names the process that serves, at every moment.

func TestPIDFile(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, proctest.Both.Hold(proctest.On(ecdysis.EventReady)), proctest.Both.Hold(proctest.AtListened), proctest.Both)
	path := c.Path("pid")
	p := c.Launch()
	p.At(proctest.On(ecdysis.EventReady))
	p.HasPIDFile() // so that a hook for EventReady finds it
	p.Resume()
	p.At(proctest.AtServing)
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm() != 0o644 {
		t.Errorf("PID file: %v, %v; want a file of mode 0644", fi, err)
	}
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.AtListened)
	p.HasPIDFile()
	s.Resume()
	a.OK()
	s.HasPIDFile()
	p.Stop() // the file is not its own any more
	s.HasPIDFile()
	if err := os.WriteFile(path, []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.At(proctest.AtServing)
	s.Stop()
	c.HasFiles("pid")
	if b, err := os.ReadFile(path); err != nil || string(b) != "1\n" {
		t.Errorf("another process's PID file holds %q, %v", b, err)
	}
}

// The PID file is there at every moment, and whole.
func TestPIDFileNeverAbsent(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Both)
	path := p.Chain.Path("pid")
	seen := make(map[string]bool)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		whole := regexp.MustCompile("^[1-9][0-9]*\n$")
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			b, err := os.ReadFile(path)
			if err != nil || !whole.Match(b) {
				done <- fmt.Errorf("read %d: %q, %v", n, b, err)
				return
			}
			seen[string(b)] = true
		}
	}()
	for range 20 {
		s := p.Upgrade()
		s.HasPIDFile()
		p.Kill()
		p = s
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if len(seen) < 2 {
		t.Errorf("only %v were seen", seen)
	}
	p.Chain.HasFiles("pid", "sock")
}

// inDirectory has its PID file in a directory of its own, $DIR/run.
var inDirectory = func() proctest.Spec {
	s := proctest.TCP
	s.Options.PIDFile = "$DIR/run/d.pid"
	return s
}()

// makeRun makes that directory and returns the path of the file.
func makeRun(c *proctest.Chain) (path string) {
	c.T.Helper()
	if err := os.Mkdir(c.Path("run"), 0o755); err != nil {
		c.T.Fatal(err)
	}
	return c.Path("run/d.pid")
}

func TestPIDFileDirectory(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, inDirectory.Hold(proctest.AtListened), inDirectory)
	p := c.Launch()
	p.At(proctest.AtListened)
	proctest.Want(t, p.Ready(), os.ErrNotExist, c.Path("run/d.pid"))
	p.RefusesUpgrade(ecdysis.ErrNotReady)
	path := makeRun(c)
	if err := p.Ready(); err != nil {
		t.Fatalf("Ready: %v", err)
	}
	p.Resume()
	p.At(proctest.AtServing)
	p.Serves()

	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	f := p.FailUpgrade(ecdysis.StepInit, nil)
	proctest.Want(t, f, nil, path, syscall.ENOENT.Error())
	proctest.Want(t, f.Successor.ErrAt(proctest.AtReadyFailed), os.ErrNotExist)
	f.Successor.Reaped()
	p.Serves()
	p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventUpgradeFailed)
	makeRun(c)
	s := p.Upgrade()
	s.Serves()
	if b, err := os.ReadFile(path); err != nil || string(b) != strconv.Itoa(s.PID)+"\n" {
		t.Errorf("the PID file holds %q, %v; want %d", b, err, s.PID)
	}
}

// A directory may take no file, or a file but no content.
func TestPIDFileDirectoryFull(t *testing.T) {
	t.Parallel()
	proctest.OnlyOn(t, "it has no mount namespaces", "linux")
	if out, err := exec.Command("unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt").CombinedOutput(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("a file system: %v: %s", err, out)
		}
		t.Skipf("no file system can be mounted here: %v: %s", err, out)
	}
	for name, size := range map[string]string{
		"files": "size=1m,nr_inodes=2",
		"bytes": "size=4k,nr_inodes=10",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := proctest.New(t, inDirectory.Hold(proctest.AtStart), inDirectory)
			path := makeRun(c)
			dir := filepath.Dir(path)
			p := c.Launch(func(cmd *exec.Cmd) {
				unshare, err := exec.LookPath("unshare")
				if err != nil {
					t.Fatal(err)
				}
				cmd.Path, cmd.Args = unshare, append([]string{"unshare", "-m"}, cmd.Args...)
			})
			sh := func(script string) string {
				t.Helper()
				out, err := p.Run("sh", "-c", "cd "+dir+"; "+script)
				if err != nil {
					t.Fatalf("%s: %v: %q", script, err, out)
				}
				return strings.Join(strings.Fields(out), " ")
			}
			names := func(p *proctest.Proc) {
				t.Helper()
				if got := sh("cat d.pid; ls"); got != strconv.Itoa(p.PID)+" d.pid" {
					t.Errorf("content of the PID file, and files there: %q; want process %d and no other file", got, p.PID)
				}
			}
			p.At(proctest.AtStart)
			sh("mount -t tmpfs -o " + size + " tmpfs " + dir)
			p.Resume()
			p.At(proctest.AtServing)
			f := p.FailUpgrade(ecdysis.StepInit, nil)
			proctest.Want(t, f, nil, path, syscall.ENOSPC.Error())
			proctest.Want(t, f.Successor.ErrAt(proctest.AtReadyFailed), syscall.ENOSPC)
			f.Successor.Reaped()
			p.Serves()
			names(p)
			sh("mount -o remount,size=1m,nr_inodes=100 " + dir)
			s := p.Upgrade()
			s.Serves()
			names(s)
		})
	}
}

// A predecessor that resumes after COMMIT and cannot write its PID file again
// serves all the same, and says so.
func TestPIDFileNotRestored(t *testing.T) {
	t.Parallel()
	c := proctest.New(t, inDirectory, inDirectory.Hold(proctest.On(ecdysis.EventReady)), inDirectory)
	path := makeRun(c)
	p := c.Start()
	a := p.BeginUpgrade()
	s := a.Successor()
	s.At(proctest.On(ecdysis.EventReady))
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	f := a.Fails(ecdysis.StepHandover, io.ErrUnexpectedEOF)
	proctest.Want(t, f, nil, path)
	p.Serves()
	makeRun(c)
	p.Upgrade().Serves()
}
