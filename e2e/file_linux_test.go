package e2e

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

var openMemfd = proctest.Define("memfd_create", func(d *proctest.Daemon, key string) (proctest.None, error) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		return proctest.None{}, os.NewSyscallError("memfd_create", err)
	}
	d.Set(key, os.NewFile(uintptr(fd), "memfd"))
	return proctest.None{}, nil
})

func TestMemfdMoves(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.Spec{}, proctest.Holding)
	openMemfd.On(p, "f")
	writes(p, "f", "0123456789")
	seeks(p, "f", 4)
	s := handFile(p, "f")
	reads(s, "f", "456789")
	writes(s, "f", "more")
	g := handFile(s, "f")
	seeks(g, "f", 8)
	reads(g, "f", "89more")
}
