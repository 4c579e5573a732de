package udpflow

import "golang.org/x/sys/unix"

// clockID is the clock that time.Since uses. It stops while the system sleeps.
const clockID = unix.CLOCK_UPTIME_RAW
