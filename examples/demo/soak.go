package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/soak"
)

// soakFor upgrades a daemon with faults at random moments, for a time. It draws
// what has happened into the file svg, unless it is empty.
func soakFor(ctx context.Context, d time.Duration, seed uint64, svg string) error {
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	fmt.Printf("soak of %v with -seed %d\n", d, seed)
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	r, err := soak.Run(ctx, d, seed, say)
	if r == nil {
		return err
	}
	r.Print(os.Stdout)
	if svg != "" {
		if err := os.WriteFile(svg, r.Figure().SVG(), 0o644); err != nil {
			return err
		}
	}
	return err
}
