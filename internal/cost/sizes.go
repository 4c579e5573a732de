//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// architectures are those whose sizes are told, all of Linux.
var architectures = []string{"amd64", "arm64", "arm", "mipsle", "riscv64", "386"}

// features are programs in testdata/size, each beside the one that it adds
// something to.
var features = []struct{ what, program, base string }{
	{"the echo daemon without an upgrade", "plain", ""},
	{"upgrades, added to it", "ecdysis", "plain"},
	{"a socket for packets", "packets", "ecdysis"},
	{"drain", "drain", "ecdysis"},
	{"systemd", "systemd", "ecdysis"},
	{"keeper", "keeper", "ecdysis"},
	{"udpflow", "udpflow", "ecdysis"},
	{"a net/http server without an upgrade", "httpplain", ""},
	{"upgrades and httpdrain, added to it", "httpdrain", "httpplain"},
}

// A Size is the bytes that a feature adds to a stripped program, by
// architecture. Those of a program without a base are its whole.
type Size struct {
	What  string
	Bytes []int64
}

// MeasureSizes builds the programs for all architectures.
func (r *Result) MeasureSizes(ctx context.Context, say func(format string, args ...any)) error {
	dir, err := os.MkdirTemp("", "ecdysis-cost")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	list := make([]Size, len(features))
	for _, arch := range architectures {
		say("sizes for %s", arch)
		size := make(map[string]int64)
		for i, f := range features {
			path := filepath.Join(dir, f.program)
			if err := build(ctx, path, "github.com/ecdysis-go/ecdysis/testdata/size/"+f.program, "GOOS=linux", "GOARCH="+arch); err != nil {
				return err
			}
			fi, err := os.Stat(path)
			if err != nil {
				return err
			}
			size[f.program] = fi.Size()
			list[i].What = f.what
			list[i].Bytes = append(list[i].Bytes, fi.Size()-size[f.base])
		}
	}
	r.Sizes = list
	return nil
}

func (r *Result) sizes() *table {
	t := &table{name: "size"}
	t.add(append([]string{"kB"}, architectures...)...)
	for _, s := range r.Sizes {
		row := []string{s.What}
		for _, n := range s.Bytes {
			row = append(row, fmt.Sprintf("%.0f", float64(n)/1e3))
		}
		t.add(row...)
	}
	return t
}
