package systemd

import (
	"time"

	"golang.org/x/sys/unix"
)

const supported = true

// monotonic is the time of CLOCK_MONOTONIC, by which systemd reckons.
func monotonic() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // fails for no clock that is there
	return time.Duration(ts.Nano())
}
