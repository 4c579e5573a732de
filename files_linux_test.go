package ecdysis_test

import (
	"fmt"
	"os"
	"strings"
)

// availableMemory is what new programs can have, in bytes.
func availableMemory() (n uint64) {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &n); err == nil {
			return n << 10
		}
	}
	return 0
}
