package interop

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// The programs that a running tableflip process moves to: one that has changed
// its import path, and one that calls package ecdysis.
func movers(t *testing.T) map[string]string {
	return map[string]string{
		"by the import path": build(t, ours, "daemon"),
		"to package ecdysis": build(t, ours, "core"),
	}
}

// startTheirs starts a daemon with the other library.
func startTheirs(t *testing.T, args ...string) (c *chain, pid int, addrs []proctest.Addr) {
	t.Helper()
	c = start(t, build(t, theirs, "daemon"), append([]string{"-unix", "DIR/s", "-lock", "DIR/lock", "-pid-file", "DIR/pid"}, args...)...)
	pid, addrs = c.addrs(0)
	return c, pid, addrs
}

// TestMove moves a running tableflip process to this package under load, and
// upgrades twice more.
func TestMove(t *testing.T) {
	for name, exe := range movers(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, pid, addrs := startTheirs(t)
			// Theirs goes on accepting until it has closed its listeners.
			load := proctest.StartLoad(t, proctest.Clients{N: 2, Requests: 3, Resumes: true}, addrs...)
			load.More(50)
			kept := dial(t, find(t, addrs, "tcp"))
			if got := keep(t, kept); got != 0 {
				t.Fatalf("generation %d has the connection; want 0", got)
			}
			c.install(exe)
			moved, next := c.upgrade(pid, 0)
			if fmt.Sprint(next) != fmt.Sprint(addrs) {
				t.Errorf("it serves at %v; want %v", next, addrs)
			}
			c.await(1, "lock inherited")
			c.await(0, "done")
			c.gone(pid)
			load.More(50)
			load.Check()
			if got := keep(t, kept); got != 1 {
				t.Errorf("generation %d has the connection; want 1", got)
			}
			pidFileSays(t, c, moved)

			// From here on it is this package's own.
			load = proctest.StartLoad(t, proctest.Clients{N: 2, Requests: 3}, addrs...)
			pid = moved
			for gen := 1; gen < 3; gen++ {
				load.More(50)
				next, _ := c.upgrade(pid, gen)
				c.await(gen+1, "lock inherited")
				c.gone(pid)
				if got := keep(t, kept); got != gen+1 {
					t.Errorf("generation %d has the connection; want %d", got, gen+1)
				}
				pid = next
			}
			load.More(50)
			load.Check()
			c.signal(pid, syscall.SIGTERM)
			c.await(3, "done")
			c.gone(pid)
			if name == "by the import path" {
				if _, err := os.Lstat(filepath.Join(c.dir, "s")); !os.IsNotExist(err) {
					t.Errorf("the Unix socket's file after the stop: %v; want that it has gone", err)
				}
			}
		})
	}
}

func pidFileSays(t *testing.T, c *chain, pid int) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "pid"))
	if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(pid) {
		t.Errorf("the PID file says %q, %v; want %d", b, err, pid)
	}
}

// TestMoveOften moves again and again: whether the parent and this process agree
// on who serves depends on which of them is faster.
func TestMoveOften(t *testing.T) {
	for name, exe := range movers(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			answered := 0
			for range 10 {
				c, pid, addrs := startTheirs(t)
				load := proctest.StartLoad(t, proctest.Clients{N: 3, Resumes: true}, addrs...)
				load.More(20)
				c.install(exe)
				moved, _ := c.upgrade(pid, 0)
				c.gone(pid)
				load.More(20)
				load.Check()
				answered += load.Answered()
				for _, a := range addrs {
					if got := ask(t, a); got != 1 {
						t.Errorf("%v: generation %d answers; want 1", a, got)
					}
				}
				c.signal(moved, syscall.SIGTERM)
				c.await(1, "done")
			}
			t.Logf("%d requests were answered", answered)
		})
	}
}

// TestMoveFails lets the new process end at each step before the tableflip
// process is told. That one serves on, loses nothing, and moves at the next
// attempt.
func TestMoveFails(t *testing.T) {
	for name, exe := range movers(t) {
		for _, f := range []struct{ point, order string }{
			{"begun", "exit"}, {"begun", "kill"},
			{"inherited", "kill"},
			{"listened", "exit"}, {"listened", "kill"},
			{"told", "kill"}, // the last moment: the PID file is written
		} {
			if f.point == "told" && name == "by the import path" {
				continue // its program has no hook there
			}
			t.Run(name+"/"+f.order+" when "+f.point, func(t *testing.T) {
				t.Parallel()
				c, pid, addrs := startTheirs(t)
				load := proctest.StartLoad(t, proctest.Clients{N: 2, Resumes: true}, addrs...)
				load.More(20)
				c.install(exe)
				c.order(1, f.point, f.order)
				c.signal(pid, syscall.SIGHUP)
				c.await(1, "at "+f.point)
				c.await(0, "upgrade failed: child")
				load.More(20)
				for _, a := range addrs {
					if got := ask(t, a); got != 0 {
						t.Errorf("%v: generation %d answers; want 0", a, got)
					}
				}
				c.release(1, f.point)
				if _, next := c.upgrade(pid, 0); fmt.Sprint(next) != fmt.Sprint(addrs) {
					t.Errorf("it serves at %v; want %v", next, addrs)
				}
				c.await(0, "done")
				load.More(20)
				load.Check()
			})
		}
	}
}

// TestMoveLate is a new process that is not ready in time: the tableflip process
// kills it and serves on.
func TestMoveLate(t *testing.T) {
	for name, exe := range movers(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, pid, addrs := startTheirs(t, "-timeout", "500ms")
			load := proctest.StartLoad(t, proctest.Clients{N: 2, Resumes: true}, addrs...)
			c.install(exe)
			c.order(1, "listened", "hold")
			c.signal(pid, syscall.SIGHUP)
			late := c.await(1, "at listened")
			c.await(0, "upgrade failed: new child")
			c.gone(late.pid)
			load.More(20)
			load.Check()
			for _, a := range addrs {
				if got := ask(t, a); got != 0 {
					t.Errorf("%v: generation %d answers; want 0", a, got)
				}
			}
		})
	}
}

// TestMoveOrphaned kills the tableflip process at each step of the move. The new
// process goes on and serves: each client that waits then gets its answer.
func TestMoveOrphaned(t *testing.T) {
	for name, exe := range movers(t) {
		for _, point := range []string{"begun", "inherited", "listened", "told"} {
			if point == "told" && name == "by the import path" {
				continue // its program has no hook there
			}
			t.Run(name+"/"+point, func(t *testing.T) {
				t.Parallel()
				c, pid, addrs := startTheirs(t)
				c.install(exe)
				c.order(1, point, "hold")
				c.signal(pid, syscall.SIGHUP)
				c.await(1, "at "+point)
				// It must have nobody in its hands when it is killed.
				c.signal(pid, syscall.SIGSTOP)
				c.stopped(pid)
				var waiting []net.Conn
				for _, a := range addrs {
					conn := dial(t, a)
					if _, err := io.WriteString(conn, "who\n"); err != nil {
						t.Fatal(err)
					}
					waiting = append(waiting, conn)
				}
				c.signal(pid, syscall.SIGKILL)
				c.gone(pid)
				c.release(1, point)
				c.addrs(1)
				for i, conn := range waiting {
					if gen, err := answer(conn); err != nil || gen != 1 {
						t.Errorf("%v: generation %d answers, %v; want 1", addrs[i], gen, err)
					}
				}
				if name == "by the import path" {
					c.await(1, "alone")
				}
			})
		}
	}
}

// TestMoveStopped stops the tableflip process for good just before it is told:
// the new process does not wait for it for ever.
func TestMoveStopped(t *testing.T) {
	t.Parallel()
	c, pid, addrs := startTheirs(t)
	c.install(build(t, ours, "core"))
	c.order(1, "told", "hold")
	c.signal(pid, syscall.SIGHUP)
	c.await(1, "at told")
	c.signal(pid, syscall.SIGSTOP)
	c.stopped(pid)
	c.release(1, "told")
	for _, a := range addrs {
		if got := ask(t, a); got != 1 {
			t.Errorf("%v: generation %d answers; want 1", a, got)
		}
	}
	c.signal(pid, syscall.SIGCONT)
	c.await(0, "done")
	if n := c.count(0, "upgrade failed"); n > 0 {
		t.Error("the tableflip process has not read that it was told")
	}
}

// TestMoveUnnamed kills the tableflip process before it has said what it hands
// on: the sockets are found by their addresses.
func TestMoveUnnamed(t *testing.T) {
	for name, exe := range movers(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := proctest.ShortDir(t)
			path := filepath.Join(dir, "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			ln.(*net.UnixListener).SetUnlinkOnClose(false)
			f, err := ln.(*net.UnixListener).File()
			if err != nil {
				t.Fatal(err)
			}
			// What such a process leaves: its pipes, of which nobody has the
			// other ends any more, and the socket.
			readyR, readyW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			namesR, namesW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			readyR.Close()
			namesW.Close()
			ln.Close()
			conn := dial(t, proctest.Addr{Network: "unix", Address: path})
			if _, err := io.WriteString(conn, "who\n"); err != nil {
				t.Fatal(err)
			}
			c := startWith(t, exe, []string{"-unix", path, "-lock", "DIR/lock"}, "TABLEFLIP_HAS_PARENT_7DIU3=yes", readyW, namesR, f)
			c.addrs(0)
			if _, err := answer(conn); err != nil {
				t.Errorf("the client that has waited: %v", err)
			}
		})
	}
}

// TestMarker is a program that a tableflip process has started otherwise: it has
// the variable, and perhaps descriptors of those numbers, but not the pipes.
func TestMarker(t *testing.T) {
	for name, exe := range movers(t) {
		for _, n := range []int{0, 3} {
			t.Run(fmt.Sprintf("%s/%d descriptors", name, n), func(t *testing.T) {
				t.Parallel()
				var files []*os.File
				for range n {
					f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
					if err != nil {
						t.Fatal(err)
					}
					files = append(files, f)
				}
				c := startWith(t, exe, []string{"-unix", "DIR/s", "-lock", "DIR/lock"}, "TABLEFLIP_HAS_PARENT_7DIU3=yes", files...)
				pid, addrs := c.addrs(0)
				c.await(0, "lock new")
				c.upgrade(pid, 0) // to which the variable is not passed on
				if got := ask(t, addrs[0]); got != 1 {
					t.Errorf("generation %d answers; want 1", got)
				}
			})
		}
	}
}

// TestMoveDrops is a new process that asks for less: what nobody asks for is
// closed, and the files of these Unix sockets are removed.
func TestMoveDrops(t *testing.T) {
	t.Parallel()
	more := func(c *chain) string { return filepath.Join(c.orders(), "more") }
	c := prepare(t, build(t, theirs, "daemon"))
	if err := os.WriteFile(more(c), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.start([]string{"-unix", "DIR/s", "-lock", "DIR/lock"}, "")
	pid, _ := c.addrs(0)
	for _, name := range []string{"s-more", "s-others"} {
		conn := dial(t, proctest.Addr{Network: "unix", Address: filepath.Join(c.dir, name)})
		conn.Close()
	}
	if err := os.Remove(more(c)); err != nil {
		t.Fatal(err)
	}
	c.install(build(t, ours, "daemon"))
	moved, _ := c.upgrade(pid, 0)
	c.await(1, "alone")
	for _, name := range []string{"s-more", "s-others"} {
		if _, err := os.Lstat(filepath.Join(c.dir, name)); !os.IsNotExist(err) {
			t.Errorf("the file of the socket %s: %v; want that it has gone", name, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(c.dir, "s")); err != nil {
		t.Errorf("the file of the socket that was asked for: %v", err)
	}
	cold := start(t, build(t, ours, "daemon"), "-unix", "DIR/s", "-lock", "DIR/lock")
	first, _ := cold.addrs(0)
	if got, want := descriptors(t, moved), descriptors(t, first); got != want {
		t.Errorf("the new process has the descriptors %s; want %s, as one that has no parent", got, want)
	}
}

// TestMoveDescriptors is what the move leaves in a program that calls package
// ecdysis: nothing.
func TestMoveDescriptors(t *testing.T) {
	t.Parallel()
	c, pid, _ := startTheirs(t)
	c.install(build(t, ours, "core"))
	moved, _ := c.upgrade(pid, 0)
	cold := start(t, build(t, ours, "core"), "-unix", "DIR/s", "-lock", "DIR/lock")
	first, _ := cold.addrs(0)
	if got, want := descriptors(t, moved), descriptors(t, first); got != want {
		t.Errorf("the new process has the descriptors %s; want %s, as one that has no parent", got, want)
	}
}

// descriptors lists what those of a process are, without what tells one socket
// from another.
func descriptors(t *testing.T, pid int) string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, e := range list {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, strings.TrimRight(filepath.Base(to), "[]0123456789"))
	}
	slices.Sort(kinds)
	return strings.Join(kinds, " ")
}

// TestMoveSpawns starts another program before New, and one after it. Neither
// inherits anything of the move.
func TestMoveSpawns(t *testing.T) {
	for name, exe := range movers(t) {
		for _, point := range []string{"begun", "inherited"} {
			t.Run(name+"/"+point, func(t *testing.T) {
				t.Parallel()
				c, pid, _ := startTheirs(t)
				c.install(exe)
				c.order(1, point, "spawn")
				c.upgrade(pid, 0)
				// 3 is the directory that ls reads.
				const want = "spawned 0 1 2 3 marker= <nil>"
				if got := c.await(1, "spawned").words; got != want {
					t.Errorf("%s; want %s", got, want)
				}
			})
		}
	}
}
