package containers

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A supervisor is a section of docs/supervisors.md.
type supervisor struct {
	name     string
	files    map[string]string
	commands map[string]string // by the first word of what they do
}

var (
	docFile    = regexp.MustCompile("(?ms)^`(/[^`]*)`[^\n]*:\n\n```\\w*\n(.*?)^```$")
	docCommand = regexp.MustCompile("(?m)^\\| (\\w+)[^|]* \\| `(.*)` \\|$")
)

// supervisors reads the documentation.
func supervisors(t *testing.T) (list []supervisor) {
	t.Helper()
	b, err := os.ReadFile("../../../docs/supervisors.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, section := range strings.Split(string(b), "\n## ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		s := supervisor{name, map[string]string{}, map[string]string{}}
		for _, m := range docFile.FindAllStringSubmatch(text, -1) {
			s.files[m[1]] = m[2]
		}
		for _, m := range docCommand.FindAllStringSubmatch(text, -1) {
			s.commands[m[1]] = m[2]
		}
		if s.commands["run"] != "" {
			list = append(list, s)
		}
	}
	if len(list) != 5 {
		t.Fatalf("%d supervisors are documented; want 5", len(list))
	}
	return list
}

// A supervised is a container with a network and a supervisor of its own.
type supervised struct {
	*proctest.Program
	supervisor
	c    *container
	proc string // the /proc directory of PID 1
}

// start runs the supervisor as it is documented, but with another daemon if
// there is a change.
func (s supervisor) start(t *testing.T, daemon func(command string) string) *supervised {
	t.Helper()
	c := newContainer(t, program(t, "kept"))
	c.Process.Args = strings.Fields(s.commands["run"])
	if _, err := exec.LookPath(c.Process.Args[0]); err != nil {
		missing(t, err)
	}
	if c.Process.Args[0] != "busybox" { // which can be nothing else than PID 1
		c.Process.Args = append([]string{"tini", "--"}, c.Process.Args...)
	}
	c.Linux.Namespaces = append(c.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	c.Process.Env = []string{"PATH=/usr/local/bin:/usr/bin:/usr/sbin"}
	userland(c)
	c.Process.Capabilities.Bounding = append(c.Process.Capabilities.Bounding, "CAP_SYS_ADMIN")
	bin := c.file("bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	c.bind(bin, "/usr/local/bin")
	install(t, program(t, "kept"), filepath.Join(bin, "kept"))
	install(t, program(t, ""), filepath.Join(bin, "simple"))
	for path, text := range s.files {
		if daemon != nil {
			text = regexp.MustCompile("/usr/local/bin/kept .*").ReplaceAllStringFunc(text, daemon)
		}
		c.write(path, text)
	}
	p := &supervised{supervisor: s, c: c}
	p.Program = proctest.Run(t, c.command())
	c.deleted()
	p.eventually("the container runs", func() bool {
		b, _ := os.ReadFile(c.file("pid"))
		p.proc = "/proc/" + string(b)
		return len(b) > 0
	})
	p.serves()
	return p
}

// userland gives a container the programs of the host.
func userland(c *container) {
	c.t.Helper()
	for _, dir := range []string{"/usr", "/lib", "/lib64"} {
		if exists(dir) {
			c.bind(dir, dir)
			c.Mounts[len(c.Mounts)-1].Options = []string{"rbind", "ro"}
		}
	}
	for _, dir := range []string{"/tmp", "/var/log/supervisor", "/etc"} {
		if err := os.MkdirAll(c.file("rootfs"+dir), 0o1777); err != nil {
			c.t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"/bin": "usr/bin", "/sbin": "usr/sbin", "/var/run": "/run"} {
		if err := os.Symlink(to, c.file("rootfs"+link)); err != nil {
			c.t.Fatal(err)
		}
	}
	c.write("/etc/passwd", "root:x:0:0:root:/:/bin/sh\n")
	c.write("/etc/group", "root:x:0:\n")
	if b, err := os.ReadFile("/etc/supervisor/supervisord.conf"); err == nil {
		c.write("/etc/supervisor/supervisord.conf", string(b))
	}
}

// write makes an executable file in the container's root directory.
func (c *container) write(path, text string) {
	c.t.Helper()
	path = c.file("rootfs" + path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		c.t.Fatal(err)
	}
}

// do runs the documented command for something.
func (s *supervised) do(what string) {
	s.T.Helper()
	command, ok := s.commands[what]
	if !ok {
		s.T.Fatalf("no command to %s %s is documented", what, s.name)
	}
	s.c.runc("exec", s.c.id, "/bin/sh", "-c", command)
}

// eventually waits for what happens in another process, of which no event tells.
func (s *supervised) eventually(what string, f func() bool) {
	s.T.Helper()
	for end := time.Now().Add(proctest.Patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.T.Fatalf("not within %v: %s; the log:\n%s", proctest.Patience, what, s.log())
		}
	}
}

// log is what the daemon has written, if not to standard error.
func (s *supervised) log() string {
	b, _ := os.ReadFile(s.proc + "/root/var/log/simple.log")
	if len(b) == 0 {
		b, _ = os.ReadFile(s.proc + "/root/var/log/kept.log")
	}
	return string(b)
}

// dial connects from inside the container's network.
func (s *supervised) dial() (c net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // this thread ends with the goroutine
		var fd int
		if fd, err = unix.Open(s.proc+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
			c, err = net.DialTimeout("tcp", "127.0.0.1:7000", proctest.Patience)
		}
	}()
	<-done
	return c, err
}

func (s *supervised) serves() {
	s.T.Helper()
	s.eventually("a client is served", func() bool { return echo(s.dial) == nil })
}

// generation returns the process that the PID file names, by its number here,
// or "" if that cannot be told at this moment.
func (s *supervised) generation() string {
	named, err := os.ReadFile(s.proc + "/root/run/kept.pid")
	if err != nil {
		return ""
	}
	pid, _ := strconv.Atoi(filepath.Base(s.proc))
	for _, p := range descendants(pid) {
		status, _ := os.ReadFile("/proc/" + p + "/status")
		if strings.Contains(string(status), "\nNSpid:\t"+p+"\t"+strings.TrimSpace(string(named))+"\n") {
			return p
		}
	}
	return ""
}

// upgrade returns when another generation serves, and the one before has ended.
func (s *supervised) upgrade() {
	s.T.Helper()
	old := s.known()
	s.do("upgrade")
	s.another(old)
}

// known is generation, when that can be told.
func (s *supervised) known() (pid string) {
	s.T.Helper()
	s.eventually("the PID file names a process", func() bool { pid = s.generation(); return pid != "" })
	return pid
}

// another returns when the PID file names another process than this one, which
// has ended.
func (s *supervised) another(old string) {
	s.T.Helper()
	s.eventually("another process serves", func() bool {
		now := s.generation()
		return now != "" && now != old && !exists("/proc/"+old)
	})
}

// daemons lists the processes of the container that run a daemon of ours.
func (s *supervised) daemons() (list []string) {
	s.T.Helper()
	pid, _ := strconv.Atoi(filepath.Base(s.proc))
	for _, p := range descendants(pid) {
		exe, _ := os.Readlink("/proc/" + p + "/exe")
		if name := filepath.Base(exe); name == "kept" || name == "simple" {
			list = append(list, p)
		}
	}
	return list
}

// parent is the parent of the generation that serves, by its number here, or ""
// if that cannot be told at this moment.
func (s *supervised) parent() string {
	g := s.generation()
	b, err := os.ReadFile("/proc/" + g + "/stat")
	_, after, ok := strings.Cut(string(b), ") ")
	if g == "" || err != nil || !ok {
		return ""
	}
	return strings.Fields(after)[1]
}

// keeper is the parent of the generation that serves.
func (s *supervised) keeper() (pid string) {
	s.T.Helper()
	s.eventually("a generation has a parent", func() bool { pid = s.parent(); return pid != "" })
	return pid
}

func kill(t *testing.T, pid string) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err == nil {
		err = syscall.Kill(n, syscall.SIGKILL)
	}
	if err != nil {
		t.Fatalf("kill %q: %v", pid, err)
	}
}

// The daemon of the documentation is upgraded, crashes, loses its keeper, is
// stopped and started again.
func TestSupervisors(t *testing.T) {
	for _, doc := range supervisors(t) {
		t.Run(doc.name, func(t *testing.T) {
			t.Parallel()
			s := doc.start(t, nil)
			keeper := s.keeper()
			e := startEchoes(t, s.dial, 2)
			for range 3 {
				e.more(10)
				install(t, program(t, "kept"), s.c.file("bin/kept"))
				s.upgrade()
			}
			e.more(10)
			if now := s.keeper(); now != keeper {
				t.Fatalf("the keeper was process %s, and is %s", keeper, now)
			}

			// The next keeper takes over from what the killed one has left.
			old := s.known()
			kill(t, keeper)
			s.another(old)
			e.more(10)
			s.upgrade()
			e.more(10)
			e.check()

			// A crash is noticed.
			crashed := s.known()
			kill(t, crashed)
			s.another(crashed)
			s.serves()

			if s.commands["stop"] == "" {
				return
			}
			client, err := s.dial()
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if err := echoOn(client); err != nil {
				t.Fatal(err)
			}
			stopped := make(chan error, 1)
			go func() {
				out, err := runc("exec", s.c.id, "/bin/sh", "-c", s.commands["stop"]).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				stopped <- err
			}()
			s.eventually("new clients are refused", func() bool { return echo(s.dial) != nil })
			if err := echoOn(client); err != nil {
				t.Fatalf("a client, while the daemon stops: %v", err)
			}
			client.Close()
			if err := <-stopped; err != nil {
				t.Fatal(err)
			}
			s.eventually("all is over", func() bool { return len(s.daemons()) == 0 })
			s.do("start")
			s.serves()
		})
	}
}

// simple is a daemon without a keeper.
var simple = proctest.DefineRole("simple", func() {
	flags := flag.NewFlagSet("simple", flag.ExitOnError)
	sibling := flags.Bool("sibling", false, "")
	takeover := flags.String("takeover", "", "")
	pipes := flags.Bool("ignore-pipes", false, "")
	_ = flags.Parse(proctest.Args())
	if *pipes {
		signal.Ignore(syscall.SIGPIPE)
	}
	file, err := os.OpenFile("/var/log/simple.log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	log.SetOutput(file)
	say := func(a ...any) {
		log.Print(a...)
		fmt.Fprintln(os.Stderr, a...)
	}
	fatal := func(err error) {
		say(err)
		os.Exit(1)
	}
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        "/run/kept.pid",
		TakeoverSocket: *takeover,
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Prepare:        func(c *ecdysis.Command) error { c.Sibling = *sibling; return nil },
		Notify:         func(e ecdysis.Event) { say(e) },
	})
	if err != nil {
		fatal(err)
	}
	ln, err := u.Listen("tcp", ":7000")
	if err != nil {
		fatal(u.Fail(err))
	}
	srv := &drain.Server{Handler: func(c net.Conn) { _, _ = io.Copy(c, c) }}
	go srv.Serve(ln)
	if err := u.Ready(); err != nil {
		fatal(err)
	}
	u.Wait()
	_ = srv.Shutdown(context.Background())
})

func runSimple(t *testing.T, doc supervisor, args string) *supervised {
	t.Helper()
	return doc.start(t, func(string) string {
		return "/usr/bin/env " + simple.Env() + " /usr/local/bin/simple -test.run=^$ " + args
	})
}

// Without a keeper the supervisor starts another process after an upgrade, and
// that one finds the address in use.
func TestSupervisorsWithoutKeeper(t *testing.T) {
	for _, doc := range supervisors(t) {
		for _, args := range []string{"-ignore-pipes", "-ignore-pipes -sibling"} {
			t.Run(doc.name+strings.TrimPrefix(args, "-ignore-pipes"), func(t *testing.T) {
				t.Parallel()
				s := runSimple(t, doc, args)
				s.upgrade()
				second := s.known()
				s.eventually("it is started again and again", func() bool { return strings.Count(s.log(), "address already in use") >= 3 })
				if now := s.known(); now != second {
					t.Fatalf("process %s serves; want %s", now, second)
				}
				s.serves()
				if doc.name != "supervisord" {
					kill(t, second)
					s.another(second) // which finds the address free
					s.serves()
					return
				}
				s.eventually("it has given up", func() bool {
					out, _ := runc("exec", s.c.id, "supervisorctl", "status").CombinedOutput()
					return strings.Contains(string(out), "FATAL")
				})
				s.serves()
				kill(t, second)
				s.eventually("clients are refused", func() bool { return errors.Is(echo(s.dial), syscall.ECONNREFUSED) })
			})
		}
	}
}

// A TakeoverSocket ends that: the process that the supervisor starts takes over
// from the successor.
func TestSupervisorsTakeover(t *testing.T) {
	for _, doc := range supervisors(t) {
		t.Run(doc.name, func(t *testing.T) {
			t.Parallel()
			s := runSimple(t, doc, "-ignore-pipes -takeover /run/kept.takeover")
			e := startEchoes(t, s.dial, 2)
			for i := range 3 {
				e.more(10)
				s.do("upgrade")
				s.eventually("the supervisor's next process has taken over", func() bool {
					return strings.Count(s.log(), "upgraded by socket") > i && len(s.daemons()) == 1
				})
			}
			e.more(10)
			e.check()
			if strings.Contains(s.log(), "address already in use") {
				t.Fatal("the address was in use")
			}
		})
	}
}

// supervisord closes the pipe to which its process has written, when that has
// ended. The next line ends a successor that does not ignore SIGPIPE.
func TestSupervisordPipe(t *testing.T) {
	doc := supervisors(t)[0]
	for args, survives := range map[string]bool{"-ignore-pipes": true, "": false} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			s := runSimple(t, doc, args)
			s.upgrade()
			second := s.known()
			s.eventually("the first one is reaped", func() bool { return strings.Contains(s.log(), "address already in use") })
			pid, _ := strconv.Atoi(second)
			if err := syscall.Kill(pid, syscall.SIGHUP); err != nil { // it has something to say
				t.Fatal(err)
			}
			if survives {
				s.eventually("the next upgrade", func() bool { return strings.Contains(s.log(), "generation=2") })
				return
			}
			s.eventually("the second one has died", func() bool { return !exists("/proc/" + second) })
			if strings.Contains(s.log(), "generation=2") {
				t.Fatal("it was upgraded")
			}
		})
	}
}
