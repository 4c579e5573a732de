//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package proctest

import (
	"fmt"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// look returns the system's data about a process, if there is such a process.
func look(pid int) (process, bool) {
	// ps fails if there is no such process.
	list, err := ps("-p", fmt.Sprint(pid))
	if err != nil || len(list) != 1 {
		return process{}, false
	}
	return list[0], true
}

// standsStill reports whether a process is stopped.
func standsStill(pid int) bool {
	p, ok := look(pid)
	return ok && p.state == "T"
}

// processes lists all processes.
func processes() ([]process, error) { return ps("-ax") }

func ps(which ...string) (list []process, err error) {
	out, err := exec.Command("ps", append(which, "-o", "pid=", "-o", "ppid=", "-o", "stat=")...).Output()
	for line := range strings.Lines(string(out)) {
		p := process{threads: 1}
		if _, err := fmt.Sscan(line, &p.pid, &p.parent, &p.state); err != nil {
			return nil, fmt.Errorf("ps: %q: %w", line, err)
		}
		p.state = p.state[:1]
		list = append(list, p)
	}
	return list, err
}

// openFDs lists the descriptors of this process and what they are, as far as
// fstat(2) tells.
func openFDs() (list []string) {
	var limit unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	for fd := range int(min(uint64(limit.Cur), 1<<16)) {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil {
			list = append(list, fmt.Sprintf("%d mode %o inode %d:%d", fd, st.Mode, st.Dev, st.Ino))
		}
	}
	return list
}
