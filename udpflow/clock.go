package udpflow

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A clock tells a time that is the same in all processes, in milliseconds since
// the system was started.
type clock struct {
	start time.Time
	at    uint64 // the clock's time at start
}

func newClock() (clock, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(clockID, &ts)
	return clock{time.Now(), uint64(ts.Nano()/1e6) + 1}, os.NewSyscallError("clock_gettime", err)
}

func (c *clock) now() uint64 { return c.at + uint64(time.Since(c.start)/time.Millisecond) }
