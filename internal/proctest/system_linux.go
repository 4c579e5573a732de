package proctest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// look returns the system's data about a process, if there is such a process.
func look(pid int) (process, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, false
	}
	// The line is "pid (name) state ppid …", and the name may have any bytes.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	parent, _ := strconv.Atoi(f[1])
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return process{pid: pid, parent: parent, state: f[0], threads: len(threads)}, true
}

// standsStill reports whether every thread of a process is stopped.
func standsStill(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range threads {
		b, rerr := os.ReadFile(name)
		if rerr != nil || !strings.HasPrefix(string(b[bytes.LastIndexByte(b, ')')+1:]), " T ") {
			return false
		}
	}
	return err == nil && len(threads) > 0
}

// processes lists all processes.
func processes() (list []process, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if p, ok := look(pid); ok {
			list = append(list, p)
		}
	}
	return list, err
}

// openFDs lists the descriptors of this process and what they are.
func openFDs() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return []string{err.Error()}
	}
	var list []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			list = append(list, e.Name()+" "+target)
		}
	}
	return list
}
