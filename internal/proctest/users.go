package proctest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// rootVar makes a program that is owned by root and has the setuid bit become root
// entirely, so that the user who has started it cannot kill it.
const rootVar = "ECDYSIS_PROCTEST_ROOT"

func becomeRoot() {
	if os.Getenv(rootVar) != "" {
		if err := syscall.Setuid(0); err != nil {
			os.Exit(4)
		}
	}
}

// Users lets processes of other users join the chain. It returns the options with
// which Launch starts such a process. It skips the test unless the test runs as
// root.
func (c *Chain) Users() (as func(uid int) func(*exec.Cmd)) {
	c.T.Helper()
	if os.Getuid() != 0 {
		c.T.Skip("a process of another user takes root to start")
	}
	binary := c.program(0o755)
	for _, err := range []error{os.Chmod(c.Dir, 0o777), os.Chmod(c.Hub(), 0o777)} {
		if err != nil {
			c.T.Fatal(err)
		}
	}
	return func(uid int) func(*exec.Cmd) {
		return func(cmd *exec.Cmd) {
			cmd.Path, cmd.Args[0], cmd.Dir = binary, binary, c.Dir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		}
	}
}

// program copies this program to a path that every user can reach. Another process
// writes the copy, so that no concurrent fork of this one has it open for writing
// when it is started.
func (c *Chain) program(mode os.FileMode) string {
	c.T.Helper()
	dir := ShortDir(c.T)
	if err := os.Chmod(dir, 0o755); err != nil {
		c.T.Fatal(err)
	}
	path := filepath.Join(dir, "program")
	if out, err := exec.Command("cp", self(), path).CombinedOutput(); err != nil {
		c.T.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(path, mode); err != nil {
		c.T.Fatal(err)
	}
	return path
}

// nobody is a role that ends at once.
var nobody = DefineRole("nobody", func() {})

// Unkillable starts a first process p that is not root. It also returns how to start
// a successor that is root, so that p may not kill it. It skips the test if that is
// not possible.
func Unkillable(t testing.TB, specs ...Spec) (p *Proc, root Successor) {
	t.Helper()
	c := New(t, specs...)
	as := c.Users()(65534)
	setuid := c.program(0o755 | os.ModeSetuid)
	probe := exec.Command(setuid, noTests)
	probe.Env = append(os.Environ(), nobody.Env(), rootVar+"=1")
	as(probe)
	probe.Path = setuid
	if probe.Run() != nil {
		t.Skip("the setuid bit has no effect at ", setuid)
	}
	return c.Start(as), Successor{Path: setuid, SetEnv: []string{rootVar + "=1"}}
}
