//go:build !linux

package keeper

import "errors"

func stay(string) error { return errors.ErrUnsupported }
