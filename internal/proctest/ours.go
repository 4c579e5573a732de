package proctest

import (
	"sync"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// Ours returns the test process's own Upgrader, which serves. There can be only
// one, so that all tests and benchmarks of a package share it.
func Ours(t testing.TB) *ecdysis.Upgrader {
	t.Helper()
	u, err := ours()
	if err != nil {
		t.Fatal(err)
	}
	return u
}

var ours = sync.OnceValues(func() (*ecdysis.Upgrader, error) {
	u, err := ecdysis.New(ecdysis.Options{})
	if err == nil {
		err = u.Ready()
	}
	return u, err
})
