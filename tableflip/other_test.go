//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package tableflip_test

import (
	"errors"
	"testing"

	"github.com/ecdysis-go/ecdysis/tableflip"
	stub "github.com/ecdysis-go/ecdysis/tableflip/testing"
)

// TestNotSupported does what a program does on a system without upgrades.
func TestNotSupported(t *testing.T) {
	u, err := tableflip.New(tableflip.Options{})
	if !errors.Is(err, tableflip.ErrNotSupported) || u != nil {
		t.Fatalf("New: %v, %v; want tableflip.ErrNotSupported", u, err)
	}
	s, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := s.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
}
