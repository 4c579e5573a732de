//go:build linux

package systemd_test

import (
	"bufio"
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
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/systemd"
	"golang.org/x/sys/unix"
)

// A process is this test binary, run under another name.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // of standard output and error, closed at their end
	found string      // the last line that expect has returned
}

// passing is a shell script that starts a program as systemd does. The script
// sets LISTEN_PID, because only the process itself knows its PID. Tests put
// commands that close descriptors before it.
const passing = `LISTEN_PID=${LISTEN_PID-$$} exec "$0" "$@"`

func program(t *testing.T, name string, start func(*exec.Cmd), args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(path, args...), lines: make(chan string, 10000)}
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains(variables, name) {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	p.cmd.Env = append(p.cmd.Env, "GORACE=atexit_sleep_ms=0") // the race detector would sleep for a second
	if start != nil {
		start(p.cmd)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = w, w
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	err = p.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		t.Fatal(err)
	}
	go func() {
		defer r.Close()
		defer close(p.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		p.in.Close()
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// line returns the next line, or "" if there are no more.
func (p *process) line() string {
	p.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case l := <-p.lines:
		return l
	case <-timer.C:
		p.t.Fatal("the program says nothing")
		return ""
	}
}

// expect returns the lines up to the first with this prefix.
func (p *process) expect(prefix string) []string {
	p.t.Helper()
	var list []string
	for {
		l := p.line()
		if strings.HasPrefix(l, prefix) {
			p.found = l
			return list
		}
		if list = append(list, l); l == "" {
			p.t.Fatalf("the program ended without %q:\n%s", prefix, strings.Join(list, "\n"))
		}
	}
}

// wait ends all generations of a program that reads its standard input. It
// returns the exit status of the first generation.
func (p *process) wait() int {
	p.t.Helper()
	p.in.Close()
	for range p.lines {
	}
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

func inode(t *testing.T, c syscall.Conn) uint64 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	cerr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err := errors.Join(err, cerr); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func init() { mains["adopter"] = adopterMain }

// adopterMain adopts. In every generation it prints what it finds by the queries
// in its arguments. SIGHUP upgrades it, and all generations end with their
// standard input.
func adopterMain() {
	die := func(err error) {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	u, err := ecdysis.New(ecdysis.Options{UpgradeSignals: []os.Signal{syscall.SIGHUP}})
	if err != nil {
		die(err)
	}
	before := openSockets()
	if err := systemd.Adopt(u); err != nil {
		fmt.Println("sockets", before, "then", openSockets())
		die(u.Fail(err))
	}
	if err := systemd.Adopt(u); err != nil { // a second call does nothing
		die(u.Fail(err))
	}
	for _, q := range os.Args[1:] {
		what, arg, _ := strings.Cut(q, " ")
		var found any
		var is bool
		switch what {
		case "Listener":
			l, e := u.Listener(arg)
			if errors.Is(e, fs.ErrNotExist) {
				e = nil
			}
			found, err, is = l, e, l != nil
		case "PacketConn":
			c, e := u.PacketConn(arg)
			if errors.Is(e, fs.ErrNotExist) {
				e = nil
			}
			found, err, is = c, e, c != nil
		case "Conn":
			c, e := u.Conn(arg)
			if errors.Is(e, fs.ErrNotExist) {
				e = nil
			}
			if found, err, is = c, e, c != nil; is {
				if err := u.AddConn(arg, c); err != nil {
					die(u.Fail(err))
				}
			}
		case "File":
			f, e := u.File(arg)
			if errors.Is(e, fs.ErrNotExist) {
				e = nil
			}
			if found, err, is = f, e, f != nil; is {
				if err := u.AddFile(arg, f); err != nil {
					die(u.Fail(err))
				}
			}
		case "Listen":
			network, address, _ := strings.Cut(arg, " ")
			l, e := u.Listen(network, address)
			found, err, is = l, e, l != nil
		}
		if err != nil {
			die(u.Fail(err))
		}
		if !is {
			fmt.Println(q, "none")
			continue
		}
		raw, err := found.(syscall.Conn).SyscallConn()
		if err != nil {
			die(u.Fail(err))
		}
		var st unix.Stat_t
		_ = raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
		if err != nil {
			die(u.Fail(err))
		}
		mode := 0
		_ = raw.Control(func(fd uintptr) { mode, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
		if wait := st.Mode&unix.S_IFMT != unix.S_IFCHR; err != nil || wait != (mode&unix.O_NONBLOCK != 0) {
			die(u.Fail(fmt.Errorf("%s: flags %#x, %v; want all but devices to be non-blocking", q, mode, err)))
		}
		fmt.Printf("%s %T %d\n", q, found, st.Ino)
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			fmt.Println("left", v)
		}
	}
	var passed int
	_, _ = fmt.Sscan(os.Getenv("PASSED"), &passed)
	for fd := 3; fd < 3+passed; fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fmt.Println("not close-on-exec", fd)
		}
	}
	if err := u.Ready(); err != nil {
		die(err)
	}
	fmt.Println("ready", u.Generation(), os.Getpid())
	u.Wait()
}

func openSockets() int {
	n := 0
	list, _ := filepath.Glob("/proc/self/fd/*")
	for _, f := range list {
		if to, err := os.Readlink(f); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// kinds returns a file of each kind that systemd passes.
func kinds(t *testing.T) map[string]*os.File {
	t.Helper()
	files := make(map[string]*os.File)
	put := func(kind string, f *os.File, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files[kind] = f
	}
	dir := filepath.Dir(socketPath(t))
	for _, kind := range []string{"tcp", "tcp2", "unix"} {
		network, address := strings.TrimSuffix(kind, "2"), "127.0.0.1:0"
		if kind == "unix" {
			address = filepath.Join(dir, "stream")
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(interface{ File() (*os.File, error) }).File()
		put(kind, f, err)
		if kind == "unix" {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
		}
		l.Close()
	}
	for _, kind := range []string{"udp", "unixgram"} {
		address := "127.0.0.1:0"
		if kind == "unixgram" {
			address = filepath.Join(dir, "dgram")
		}
		c, err := net.ListenPacket(kind, address)
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.(interface{ File() (*os.File, error) }).File()
		put(kind, f, err)
		c.Close()
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "seqpacket")}), unix.Listen(fd, 5))
	}
	put("seqpacket", os.NewFile(uintptr(fd), "seqpacket"), err)
	err = unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "fifo"), os.O_RDWR, 0)
	put("fifo", f, err)
	f, err = os.Open("/dev/null")
	put("device", f, err)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	put("connection", os.NewFile(uintptr(pair[0]), "a"), err)
	put("peer", os.NewFile(uintptr(pair[1]), "b"), err)
	return files
}

func adopter(t *testing.T, shell string, files []*os.File, env []string, queries ...string) *process {
	t.Helper()
	return program(t, "adopter", func(c *exec.Cmd) {
		c.Args = append([]string{"sh", "-c", shell, c.Path}, queries...)
		c.Path = "/bin/sh"
		c.ExtraFiles = files
		c.Env = append(append(c.Env, env...), "PASSED="+fmt.Sprint(len(files)))
	})
}

// All kinds are found by their names, in the first process and two successors.
func TestAdopt(t *testing.T) {
	t.Parallel()
	f := kinds(t)
	address := func(kind string) string {
		sa, err := unix.Getsockname(int(f[kind].Fd()))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
	}
	order := []string{"tcp", "tcp2", "unix", "udp", "unixgram", "seqpacket", "fifo", "device", "connection"}
	var files []*os.File
	for _, kind := range order {
		files = append(files, f[kind])
	}
	want := []struct{ query, kind, is string }{
		{"Listener web", "tcp", "*ecdysis.listener"},
		{"Listener web", "tcp2", "*ecdysis.listener"}, // the second socket of that name
		{"Listener web", "", ""},
		{"Listener my.socket", "unix", "*ecdysis.listener"}, // the unit's name, without FileDescriptorName=
		{"PacketConn dns", "udp", "*ecdysis.UDPConn"},
		{"PacketConn unknown", "unixgram", "*ecdysis.UnixgramConn"}, // an empty name counts as no name
		{"Listener seq", "seqpacket", "*ecdysis.SeqpacketListener"},
		{"File fifo", "fifo", "*os.File"},
		{"File stored", "device", "*os.File"},
		{"Conn connection", "connection", "*net.UnixConn"},
		{"Listener no", "", ""},
		{"PacketConn no", "", ""},
		{"Conn no", "", ""},
		{"File no", "", ""},
	}
	var queries, lines []string
	for _, w := range want {
		queries = append(queries, w.query)
		if w.kind == "" {
			lines = append(lines, w.query+" none")
		} else {
			lines = append(lines, fmt.Sprintf("%s %s %d", w.query, w.is, inode(t, f[w.kind])))
		}
	}
	p := adopter(t, passing, files, []string{"LISTEN_FDS=9", "LISTEN_FDNAMES=web:web:my.socket:dns::seq:fifo:stored:connection", "LISTEN_PIDFDID=7"}, queries...)
	for generation := range 3 {
		if generation > 0 {
			p.upgrade()
		}
		if got := p.expect(fmt.Sprint("ready ", generation)); !slices.Equal(got, lines) {
			t.Fatalf("generation %d:\n%s\nwant:\n%s", generation, strings.Join(got, "\n"), strings.Join(lines, "\n"))
		}
	}
	p.wait()

	// Sockets without names are found by their addresses.
	queries = []string{"Listen tcp " + address("tcp2"), "Listener unknown", "Listener unknown"}
	lines = []string{
		fmt.Sprintf("%s *ecdysis.listener %d", queries[0], inode(t, f["tcp2"])),
		fmt.Sprintf("%s *ecdysis.listener %d", queries[1], inode(t, f["tcp"])),
		fmt.Sprintf("%s none", queries[1]),
	}
	p = adopter(t, passing, files[:2], []string{"LISTEN_FDS=2"}, queries...)
	if got := p.expect("ready 0"); !slices.Equal(got, lines) {
		t.Fatalf("without names:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
	p.wait()
}

// upgrade upgrades the generation that became ready last.
func (p *process) upgrade() {
	p.t.Helper()
	var generation, pid int
	if _, err := fmt.Sscanf(p.found, "ready %d %d", &generation, &pid); err != nil {
		p.t.Fatalf("%q: %v", p.found, err)
	}
	if err := unix.Kill(pid, unix.SIGHUP); err != nil {
		p.t.Fatal(err)
	}
}

func TestAdoptNothing(t *testing.T) {
	t.Parallel()
	f := kinds(t)
	for name, env := range map[string][]string{
		"no variables":       {"LISTEN_PID="},
		"another process's":  {"LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=web"},
		"another's nonsense": {"LISTEN_PID=1", "LISTEN_FDS=x"},
		"no descriptors":     {"LISTEN_FDS=0", "LISTEN_FDNAMES="},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			shell := passing
			if name == "no variables" {
				shell = `unset LISTEN_PID; exec "$0" "$@"`
			}
			p := adopter(t, shell, []*os.File{f["tcp"]}, env, "Listener web", "Listener unknown")
			got := p.expect("ready 0")
			// A descriptor that was not passed to this process is left alone.
			if want := []string{"Listener web none", "Listener unknown none", "not close-on-exec 3"}; !slices.Equal(got, want) {
				t.Fatalf("%q; want %q", got, want)
			}
			p.wait()
		})
	}
}

func TestAdoptErrors(t *testing.T) {
	t.Parallel()
	f := kinds(t)
	two := []*os.File{f["tcp"], f["unix"]}
	for name, c := range map[string]struct {
		shell string
		files []*os.File
		env   []string
		says  string
		left  int // sockets that stay open
	}{
		"PID":            {passing, two, []string{"LISTEN_PID=me", "LISTEN_FDS=2"}, `LISTEN_PID is "me"; want a process ID`, 2},
		"PID 0":          {passing, two, []string{"LISTEN_PID=0", "LISTEN_FDS=2"}, `LISTEN_PID is "0"; want a process ID`, 2},
		"count":          {passing, two, []string{"LISTEN_FDS=two"}, `LISTEN_FDS is "two"; want a number of descriptors`, 2},
		"negative":       {passing, two, []string{"LISTEN_FDS=-1"}, `LISTEN_FDS is "-1"; want a number of descriptors`, 2},
		"too few names":  {passing, two, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=a"}, `LISTEN_FDNAMES is "a", which is 1 names for the 2 descriptors`, 0},
		"too many names": {passing, two, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=a:b:c"}, `LISTEN_FDNAMES is "a:b:c", which is 3 names for the 2 descriptors`, 0},
		"a name":         {passing, []*os.File{f["tcp"], f["udp"], f["unix"]}, []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=a:" + strings.Repeat("x", 5000) + ":b"}, "descriptor 4: ", 0},
		"too many":       {passing, two, []string{"LISTEN_FDS=3"}, "LISTEN_FDS is 3, but descriptor 5 was not passed", 0},
		"far too many":   {passing, two, []string{"LISTEN_FDS=2000000000"}, "descriptor 5 was not passed", 0},
		"closed":         {"exec 3<&-; " + passing, two, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=a:b"}, "descriptor 3 was not passed", 1},
		"closed, second": {"exec 4<&-; " + passing, two, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=a:b"}, "descriptor 4 was not passed", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := adopter(t, c.shell, c.files, c.env)
			var all []string
			for l := p.line(); l != ""; l = p.line() {
				all = append(all, l)
			}
			if n := len(all); n != 2 || !strings.HasPrefix(all[1], "error: systemd: adopt") || !strings.Contains(all[1], c.says) {
				t.Fatalf("%q; want an error: %s", all, c.says)
			}
			var before, after int
			if _, err := fmt.Sscanf(all[0], "sockets %d then %d", &before, &after); err != nil || before == 0 || after != c.left {
				t.Fatalf("%q; want %d sockets left open", all, c.left)
			}
			if p.wait() != 1 {
				t.Fatal(p.cmd.ProcessState)
			}
		})
	}
}
