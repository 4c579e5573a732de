package systemd

import (
	"time"

	"golang.org/x/sys/unix"
)

const supported = true

// monotonic returns the time of CLOCK_MONOTONIC, which systemd uses.
func monotonic() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	return time.Duration(ts.Nano())
}
