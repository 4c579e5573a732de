package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/ecdysis-go/ecdysis/internal/cost"
)

// measure prints what an upgrade costs. It draws pictures into the directory
// svg, and renews the page in the directory page, unless they are empty.
func measure(ctx context.Context, svg, page string) error {
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	r, err := cost.Measure(ctx, cost.UnderAMinute, say)
	if err == nil && page != "" {
		err = r.MeasureSizes(ctx, say)
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if err != nil {
		return err
	}
	r.Print(os.Stdout)
	if n := r.Failed(); n > 0 {
		return fmt.Errorf("%d requests have failed", n)
	}
	if svg != "" {
		if err := r.Draw(svg); err != nil {
			return err
		}
	}
	if page != "" {
		return r.WritePage(page)
	}
	return nil
}
