//go:build arm || mips || mipsle

package udpflow

// GOARM=7 has 64-bit atomics, and programs for it share tables with those for 5
// and 6.
type stateWord = split
