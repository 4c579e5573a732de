package udpflow

// clockID is CLOCK_MONOTONIC, the clock that time.Since uses. x/sys has no name
// for it.
const clockID = 3
