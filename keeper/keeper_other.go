//go:build !linux

package keeper

import (
	"errors"
	"fmt"
	"runtime"
)

func stay(string) error {
	return fmt.Errorf("not on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
