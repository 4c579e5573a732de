package proctest

import (
	"runtime"
	"slices"
	"syscall"
	"testing"
)

// SkipOn skips the test on the systems with these values of GOOS. The reason says
// what is different there.
func SkipOn(t testing.TB, reason string, systems ...string) {
	t.Helper()
	if slices.Contains(systems, runtime.GOOS) {
		t.Skipf("not on %s: %s", runtime.GOOS, reason)
	}
}

// OnlyOn skips the test on all other systems. The reason says what only these
// systems have.
func OnlyOn(t testing.TB, reason string, systems ...string) {
	t.Helper()
	if !slices.Contains(systems, runtime.GOOS) {
		t.Skipf("not on %s: %s", runtime.GOOS, reason)
	}
}

// ClosedPeer is the error of a write to a Unix datagram socket that is closed.
func ClosedPeer() syscall.Errno {
	if runtime.GOOS == "linux" {
		return syscall.ECONNREFUSED
	}
	return syscall.ECONNRESET
}
