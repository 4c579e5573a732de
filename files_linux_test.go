package ecdysis_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	verbs["thing memfd"] = func(d *daemon, c command) message {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
		if err != nil {
			return message{Err: toErrMsg(os.NewSyscallError("memfd_create", err))}
		}
		setThing(c.Args[0], os.NewFile(uintptr(fd), "memfd"))
		return message{}
	}
}

func TestMemfdMoves(t *testing.T) {
	t.Parallel()
	p := newHub(t, spec{}, holding()).serving()
	p.thing("memfd", "f")
	p.thing("write", "f", "0123456789")
	p.thing("seek", "f", "4")
	s := p.handFile("f")
	s.gives("456789", "read", "f", "6")
	s.thing("write", "f", "more")
	g := s.handFile("f")
	g.thing("seek", "f", "8")
	g.gives("89more", "read", "f", "6")
}

// availableMemory is what new programs can have, in bytes.
func availableMemory() (n uint64) {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &n); err == nil {
			return n << 10
		}
	}
	return 0
}
