//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFileNames(t *testing.T) {
	names := func(u *Upgrader, prefix string, want ...string) {
		t.Helper()
		if got := u.FileNames(prefix); !slices.Equal(got, want) {
			t.Errorf("FileNames(%q): %q; want %q", prefix, got, want)
		}
	}
	u := &Upgrader{}
	names(u, "")
	add := func(u *Upgrader, name string) {
		t.Helper()
		f, err := MemoryFile()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := u.AddFile(name, f); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"b/2", "a/1", "b/1", "b/1"} {
		add(u, name)
	}
	names(u, "", "b/2", "a/1", "b/1", "b/1")
	names(u, "b/", "b/2", "b/1", "b/1")
	names(u, "b/1", "b/1", "b/1")
	names(u, "c")
	take := func(u *Upgrader, name string) {
		t.Helper()
		f, err := u.File(name)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	take(u, "b/1")
	names(u, "b/", "b/2", "b/1")

	// In a successor what was inherited comes first, as long as it can be had.
	s := &Upgrader{reg: registry{inherited: u.reg.entries}}
	s.reg.inherited = append(s.reg.inherited, &entry{wire: wire{kind: kindPair, name: "b/pair"}})
	for _, e := range s.reg.inherited {
		e.state = unclaimed
	}
	add(s, "b/0")
	names(s, "b/", "b/2", "b/1", "b/0")
	take(s, "b/2")
	names(s, "b/", "b/1", "b/0")
	for _, name := range s.FileNames("") {
		take(s, name)
	}
	names(s, "")
}

func TestMemoryFile(t *testing.T) {
	f, err := MemoryFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := os.Lstat(f.Name()); !os.IsNotExist(err) {
		t.Errorf("it has the name %s: %v", f.Name(), err)
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %#x, %v; want close-on-exec", flags, err)
	}
	if _, err := f.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	var mem [2][]byte
	for i := range mem {
		if mem[i], err = unix.Mmap(int(f.Fd()), 0, 100, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem[i])
	}
	f.Close()
	mem[0][99] = 7
	if mem[1][99] != 7 {
		t.Error("what one mapping writes the other does not show")
	}
}
