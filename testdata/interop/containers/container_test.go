// Package containers runs daemons in containers that runc makes, and tests what
// the documentation promises for them.
package containers

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// programs is where the programs are that the containers run, and what runc
// remembers.
var programs string

func TestMain(m *testing.M) {
	if slices.ContainsFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "ECDYSIS_PROCTEST_") }) {
		proctest.Main(m)
	}
	var err error
	if programs, err = os.MkdirTemp("", "ecd"); err != nil {
		panic(err)
	}
	status := m.Run()
	os.RemoveAll(programs)
	os.Exit(status)
}

// missing skips a test that lacks something, and fails it where nothing may be
// skipped.
func missing(t testing.TB, a ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(a...)
	}
	t.Skip(a...)
}

// program returns the path of a program that needs no library: one of the
// examples, or the test binary if the name is empty.
func program(t testing.TB, name string) string {
	t.Helper()
	if name == "" {
		path, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		static(t, path)
		return path
	}
	p := &built{}
	if v, ok := all.LoadOrStore(name, p); ok {
		p = v.(*built)
	}
	p.once.Do(func() {
		p.path = filepath.Join(programs, name)
		c := exec.Command("go", "build", "-o", p.path, "github.com/ecdysis-go/ecdysis/examples/"+name)
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			p.err = errors.New(string(out))
		}
	})
	if p.err != nil {
		t.Fatal(p.err)
	}
	return p.path
}

var all sync.Map // of *built, by name

type built struct {
	once sync.Once
	path string
	err  error
}

func static(t testing.TB, path string) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			missing(t, "the test binary needs libraries, which the container has not; run it with CGO_ENABLED=0")
		}
	}
}

// A container is one of runc's, on the host's network. Its root directory has
// the program as /daemon, a tmpfs at /run, and nothing else.
type container struct {
	*specs.Spec
	t   testing.TB
	id  string
	dir string
}

// newContainer returns a container that is not started, whose specification
// can be changed until then.
func newContainer(t testing.TB, path string, args ...string) *container {
	t.Helper()
	if _, err := exec.LookPath("runc"); err != nil {
		missing(t, err)
	}
	if os.Getuid() != 0 {
		missing(t, "runc needs root")
	}
	c := &container{t: t, dir: proctest.ShortDir(t), Spec: new(specs.Spec)}
	if err := os.Chmod(c.dir, 0o755); err != nil { // root of a user namespace is somebody else here
		t.Fatal(err)
	}
	c.id = filepath.Base(c.dir)
	c.runc("spec", "--bundle", c.dir)
	b, err := os.ReadFile(c.file("config.json"))
	if err == nil {
		err = json.Unmarshal(b, c.Spec)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.Root.Readonly = false
	c.Process.Terminal = false
	c.Process.Rlimits = nil // they need CAP_SYS_RESOURCE
	c.Process.Args = append([]string{"/daemon"}, args...)
	c.without(specs.NetworkNamespace)
	for _, name := range []string{"proc", "dev", "sys", "run"} {
		if err := os.MkdirAll(c.file("rootfs/"+name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install(t, path, c.file("rootfs/daemon"))
	return c
}

// install puts a copy of a program at a path, by a rename.
func install(t testing.TB, program, path string) {
	t.Helper()
	from, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err == nil {
		_, err = io.Copy(to, from)
		err = errors.Join(err, to.Close(), os.Rename(path+".new", path))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// file is the path of a file in the container's bundle.
func (c *container) file(name string) string { return filepath.Join(c.dir, name) }

// without takes a namespace away: the container has the host's.
func (c *container) without(kind specs.LinuxNamespaceType) {
	c.Linux.Namespaces = slices.DeleteFunc(c.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
}

// bind mounts a directory of the host.
func (c *container) bind(host, path string) {
	c.t.Helper()
	if err := os.MkdirAll(c.file("rootfs"+path), 0o755); err != nil {
		c.t.Fatal(err)
	}
	c.Mounts = append(c.Mounts, specs.Mount{Destination: path, Type: "bind", Source: host, Options: []string{"rbind", "rw"}})
}

// A change is one of the things that distinguish containers.
type change func(*container)

// readOnly is what docker run --read-only does.
func readOnly(c *container) { c.Root.Readonly = true }

// confined has Docker's default seccomp profile.
func confined(c *container) {
	var err error
	if c.Linux.Seccomp, err = seccomp.GetDefaultProfile(c.Spec); err != nil {
		c.t.Fatal(err)
	}
}

// hardened is what docker run --read-only --cap-drop ALL --security-opt
// no-new-privileges does.
func hardened(c *container) {
	readOnly(c)
	c.Process.NoNewPrivileges = true
	c.Process.Capabilities = &specs.LinuxCapabilities{}
	confined(c)
}

// notRoot is what docker run --user 1000:1000 does.
func notRoot(c *container) { c.Process.User = specs.User{UID: user, GID: user} }

// user is an ID that is nobody's in particular.
const user = 1000

// few is what docker run --ulimit nofile=64 does.
func few(c *container) {
	c.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 64, Soft: 64}}
}

// runc runs a command that must succeed.
func (c *container) runc(args ...string) string {
	c.t.Helper()
	out, err := runc(args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("runc %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func runc(args ...string) *exec.Cmd {
	return exec.Command("runc", append([]string{"--root", filepath.Join(programs, "runc")}, args...)...)
}

// command returns what runs the container in the foreground: its standard
// error and its exit status are the container's.
func (c *container) command() *exec.Cmd {
	c.t.Helper()
	// Older versions of runc give a tmpfs the mode of the directory in the
	// image, whatever its options say; so it belongs to the user.
	tmpfs := specs.Mount{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev",
		fmt.Sprintf("uid=%d", c.Process.User.UID), fmt.Sprintf("gid=%d", c.Process.User.GID)}}
	c.Mounts = append(c.Mounts, tmpfs)
	b, err := json.Marshal(c.Spec)
	if err == nil {
		err = os.WriteFile(c.file("config.json"), b, 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return runc("run", "--pid-file", c.file("pid"), "--bundle", c.dir, c.id)
}

// deleted removes the container at the end of the test, before what has been
// registered until now.
func (c *container) deleted() {
	c.t.Cleanup(func() { _ = runc("delete", "--force", c.id).Run() })
}

// kill sends PID 1 a signal.
func (c *container) kill(signal string) {
	c.t.Helper()
	c.runc("kill", c.id, signal)
}

// pid is the container's PID 1, as the host sees it.
func (c *container) pid() int {
	c.t.Helper()
	var state specs.State
	if err := json.Unmarshal([]byte(c.runc("state", c.id)), &state); err != nil {
		c.t.Fatal(err)
	}
	return state.Pid
}

// ended returns how runc, and so the container, has ended.
func ended(t testing.TB, p *proctest.Program, status int) {
	t.Helper()
	if s := p.End(); s.ExitCode() != status {
		t.Fatalf("the container: %v; want exit status %d", s, status)
	}
}

// echoes is clients of an echo server, one connection after the other.
type echoes struct {
	t      testing.TB
	stop   chan struct{}
	wg     sync.WaitGroup
	served atomic.Int64
	failed atomic.Int64
	first  sync.Once
	err    error
}

func startEchoes(t testing.TB, dial func() (net.Conn, error), clients int) *echoes {
	e := &echoes{t: t, stop: make(chan struct{})}
	for range clients {
		e.wg.Go(func() {
			for {
				select {
				case <-e.stop:
					return
				default:
				}
				if err := echo(dial); err != nil {
					e.failed.Add(1)
					e.first.Do(func() { e.err = err })
				} else {
					e.served.Add(1)
				}
			}
		})
	}
	t.Cleanup(e.end)
	return e
}

func echo(dial func() (net.Conn, error)) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	return echoOn(c)
}

func echoOn(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(proctest.Patience))
	b := []byte("hello")
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// more returns when n more clients were served.
func (e *echoes) more(n int64) {
	e.t.Helper()
	want, end := e.served.Load()+n, time.Now().Add(proctest.Patience)
	for ; e.served.Load() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			e.t.Fatalf("no %d more clients were served; %d failed", n, e.failed.Load())
		}
	}
}

func (e *echoes) end() {
	select {
	case <-e.stop:
	default:
		close(e.stop)
	}
	e.wg.Wait()
}

// check ends the clients, and fails the test if one was not served.
func (e *echoes) check() {
	e.t.Helper()
	e.end()
	if n := e.failed.Load(); n > 0 {
		e.t.Errorf("%d of %d clients failed, the first one: %v", n, n+e.served.Load(), e.err)
	}
	e.t.Logf("%d clients were served", e.served.Load())
}

// exists reports whether there is a file.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
