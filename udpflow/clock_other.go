//go:build dragonfly || freebsd || linux || openbsd

package udpflow

import "golang.org/x/sys/unix"

// clockID is the clock that time.Since uses.
const clockID = unix.CLOCK_MONOTONIC
