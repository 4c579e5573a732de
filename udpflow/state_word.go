//go:build !arm && !mips && !mipsle

package udpflow

import "sync/atomic"

type stateWord = atomic.Uint64
