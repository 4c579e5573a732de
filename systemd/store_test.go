//go:build linux

package systemd_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

// stores asserts that text is the next message, with a socket.
func (m *manager) stores(text string, ino uint64) {
	m.t.Helper()
	if got := m.next(); got.text != text || len(got.files) != 1 || inode(m.t, got.files[0]) != ino {
		m.t.Fatalf("systemd got %q with %d descriptors; want %q with the socket", got.text, len(got.files), text)
	}
}

func listenTCP(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func TestStore(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	n, opts, _ := hooked(t, m, "FDSTORE=3")
	a, b := listenTCP(t), listenTCP(t)
	conn, err := net.Dial("tcp", a.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// store calls Store, whose barrier waits for the test.
	store := func(sockets map[string]any) chan error {
		done := make(chan error, 1)
		go func() { done <- n.Store(sockets) }()
		return done
	}
	ok := func(done chan error) {
		t.Helper()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}

	done := store(map[string]any{"b": b, "a": a, "c": conn})
	m.stores("FDSTORE=1\nFDNAME=a\nFDPOLL=0", inode(t, a))
	m.stores("FDSTORE=1\nFDNAME=b\nFDPOLL=0", inode(t, b))
	m.stores("FDSTORE=1\nFDNAME=c", inode(t, conn.(*net.TCPConn))) // systemd drops a connection when it ends
	answer := m.barrier()
	select {
	case err := <-done:
		t.Fatalf("Store has returned before systemd has the sockets: %v", err)
	default:
	}
	answer()
	ok(done)
	ok(store(map[string]any{"a": a, "b": b, "c": conn})) // all three are stored already
	m.hasAll()
	c := listenTCP(t)
	done = store(map[string]any{"a": a, "b": c}) // another socket under "b", and one less
	m.gets("FDSTOREREMOVE=1\nFDNAME=b")
	m.gets("FDSTOREREMOVE=1\nFDNAME=c")
	m.stores("FDSTORE=1\nFDNAME=b\nFDPOLL=0", inode(t, c))
	m.barrier()()
	ok(done)

	// A successor knows what is in the store.
	cmd := prepare(t, m, opts)
	next, _ := successor(t, m, cmd)
	if err := next.Store(map[string]any{"a": a}); err != nil {
		t.Fatal(err)
	}
	m.hasAll()
	go opts.Notify(ecdysis.Event{Kind: ecdysis.EventUpgraded, PID: os.Getpid()})
	m.gets("FDSTOREREMOVE=1\nFDNAME=b")
	m.gets(fmt.Sprintf("MAINPID=%d\nREADY=1", os.Getpid()))
	m.barrier()()
	// The sockets stay the caller's.
	if _, err := a.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if err := next.Store(map[string]any{"a": a}); err == nil || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("a closed listener is stored: %v", err)
	}
	if err := next.Store(nil); err != nil {
		t.Fatal(err)
	}
	m.gets("FDSTOREREMOVE=1\nFDNAME=a")
	m.hasAll()
}

func TestStoreErrors(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	a := listenTCP(t)
	many := make(map[string]any)
	for i := range 101 {
		many[fmt.Sprint(i)] = a
	}
	for _, c := range []struct {
		env     []string
		sockets map[string]any
		says    string
	}{
		{nil, map[string]any{"": a}, "a name is empty; want 1 to 255 characters"},
		{nil, map[string]any{strings.Repeat("x", 256): a}, "has 256 characters; systemd takes 255"},
		{nil, map[string]any{"a:b": a}, `the name "a:b" has ":" in it; systemd takes printable ASCII without a colon`},
		{nil, map[string]any{"a\nb": a}, `has "\n" in it`},
		{nil, map[string]any{"grün": a}, `the name "grün" has `},
		{nil, map[string]any{"x\x7f": a}, `has "\x7f" in it`},
		{nil, map[string]any{"a": a, "b:": a}, `the name "b:"`}, // and a is not stored
		{nil, map[string]any{"a": "tcp"}, `"a": a string has no descriptor`},
		{nil, map[string]any{"a": nil}, `"a": a <nil> has no descriptor`},
		{nil, many, "101 sockets; there can be 100"},
		{[]string{"FDSTORE=1"}, map[string]any{"a": a, "b": a}, "2 sockets; the unit has FileDescriptorStoreMax=1"},
		{[]string{"FDSTORE=0"}, map[string]any{"a": a}, "1 sockets; the unit has FileDescriptorStoreMax=0"},
	} {
		n, _, _ := hooked(t, m, c.env...)
		if err := n.Store(c.sockets); err == nil || !strings.Contains(err.Error(), c.says) || !strings.HasPrefix(err.Error(), "systemd: store: ") {
			t.Errorf("Store of %d sockets: %v; want %q", len(c.sockets), err, c.says)
		}
		m.hasAll()
	}
	n, _, _ := hooked(t, m)
	longest := strings.Repeat("~", 254) + " "
	done := make(chan error, 1)
	go func() { done <- n.Store(map[string]any{longest: a}) }()
	m.stores("FDSTORE=1\nFDNAME="+longest+"\nFDPOLL=0", inode(t, a))
	m.barrier()()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Sockets that systemd has kept are restored. A socket that is not wanted any
// more is removed from the store and closed. A Unix socket that no client finds
// is made anew.
func TestRestore(t *testing.T) {
	t.Parallel()
	m := newManager(t, socketPath(t))
	f := kinds(t)
	local := func(kind string) string {
		t.Helper()
		sa, err := unix.Getsockname(int(f[kind].Fd()))
		if err != nil {
			t.Fatal(err)
		}
		if su, ok := sa.(*unix.SockaddrUnix); ok {
			return su.Name
		}
		return fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
	}
	web, extra, path := local("tcp"), local("tcp2"), local("unix")
	kept := inode(t, f["tcp"])
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(conf, []byte("store=yes\nlisten=web tcp "+web+"\nlisten=x unix "+path+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := program(t, "mydaemon", func(c *exec.Cmd) {
		c.Args = []string{"sh", "-c", passing, c.Path}
		c.Path = "/bin/sh"
		c.Env = append(c.Env, "NOTIFY_SOCKET="+m.address, "MYDAEMON_CONF="+conf, "FDSTORE=5", "LISTEN_FDS=4", "LISTEN_FDNAMES=web:extra:x:extra")
		c.ExtraFiles = []*os.File{f["tcp"], f["tcp2"], f["unix"], f["udp"]}
	})
	for _, kind := range []string{"tcp", "tcp2", "unix"} {
		f[kind].Close()
	}
	m.gets("FDSTOREREMOVE=1\nFDNAME=extra")
	m.gets("FDSTOREREMOVE=1\nFDNAME=x")
	if got := m.next(); got.text != "FDSTORE=1\nFDNAME=x\nFDPOLL=0" || len(got.files) != 1 {
		t.Fatalf("systemd got %q with %d descriptors; want the new socket", got.text, len(got.files))
	}
	m.barrier()()
	m.gets("STATUS=starting as 0")
	m.gets("READY=1")
	for _, a := range [][2]string{{"tcp", web}, {"unix", path}} {
		c, err := net.Dial(a[0], a[1])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var pid int
		if _, err := fmt.Fscan(c, &pid); err != nil || pid != p.cmd.Process.Pid {
			t.Fatalf("%s: process %d, %v; want %d", a, pid, err, p.cmd.Process.Pid)
		}
	}
	sockets, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(sockets, func(s string) bool {
		to, _ := os.Readlink(s)
		return to == fmt.Sprintf("socket:[%d]", kept)
	}) {
		t.Error("the daemon listens with another socket than the one that was kept")
	}
	if c, err := net.Dial("tcp", extra); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%s, which nobody listens on any more: %v, %v; want ECONNREFUSED", extra, c, err)
	}
}
