//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A Sample is what the daemon's processes had at a moment. It is taken from
// Linux's /proc; other systems have no samples.
type Sample struct {
	At          time.Duration
	Processes   int // those included that have ended and were not reaped by one of them
	Descriptors int
	Memory      int64 // resident, in bytes
	Alone       bool  // there were no clients, and one process
}

// A sampler takes samples until its end.
type sampler struct {
	log  *history
	exe  string
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	list []Sample
}

func startSampler(log *history, exe string) *sampler {
	if p, err := filepath.EvalSymlinks(exe); err == nil {
		exe = p
	}
	s := &sampler{log: log, exe: exe, stop: make(chan struct{})}
	if !procIsThere() {
		return s
	}
	s.wg.Go(func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.add(s.take())
			case <-s.stop:
				return
			}
		}
	})
	return s
}

func procIsThere() bool {
	_, err := os.Readlink("/proc/self/exe")
	return err == nil
}

func (s *sampler) add(v Sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, v)
}

func (s *sampler) end() []Sample {
	close(s.stop)
	s.wg.Wait()
	return s.list
}

// take looks at every process that has said something.
func (s *sampler) take() Sample {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	v := Sample{At: time.Since(s.log.started)}
	live := make(map[int]bool)
	for pid := range s.log.pids {
		dir := "/proc/" + strconv.Itoa(pid)
		exe, err := os.Readlink(dir + "/exe")
		if err != nil || exe != s.exe {
			continue
		}
		live[pid] = true
		v.Processes++
		if fds, err := os.ReadDir(dir + "/fd"); err == nil {
			v.Descriptors += len(fds)
		}
		if b, err := os.ReadFile(dir + "/statm"); err == nil {
			var size, resident int64
			_, _ = fmt.Sscan(string(b), &size, &resident)
			v.Memory += resident * int64(os.Getpagesize())
		}
	}
	for pid := range s.log.pids {
		if live[pid] {
			continue
		}
		if state, parent := status(pid); state == "Z" && live[parent] {
			v.Processes++
		} else {
			delete(s.log.pids, pid) // it has ended
		}
	}
	return v
}

// status returns a process's state, and its parent.
func status(pid int) (state string, parent int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	_, _ = fmt.Sscan(rest, &state, &parent)
	return state, parent
}

// alone takes a sample when one process is left, and fails if it has more than
// those before it.
func (s *sampler) alone() error {
	if !procIsThere() {
		return nil
	}
	v := s.take()
	limit := time.Now().Add(2 * patience)
	for settled := 0; settled < 5; { // it closes its clients' connections
		if time.Now().After(limit) {
			return fmt.Errorf("without clients %d processes are left; want 1", v.Processes)
		}
		time.Sleep(20 * time.Millisecond)
		was := v
		if v = s.take(); v.Processes == 1 && v.Descriptors == was.Descriptors {
			settled++
		} else {
			settled = 0
		}
	}
	v.Alone = true
	s.add(v)
	return s.growth()
}

// growth compares the first and the last of the processes that were alone. Each
// is a younger generation than the one before it.
func (s *sampler) growth() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var fds, memory []int64
	for _, v := range s.list {
		if v.Alone {
			fds, memory = append(fds, int64(v.Descriptors)), append(memory, v.Memory)
		}
	}
	const few = 3
	n := len(fds)
	if n < 2*few {
		return nil
	}
	if first, last := middle(fds[:few]), middle(fds[n-few:]); last > first+few {
		return fmt.Errorf("the descriptors of a process without clients have grown from %d to %d", first, last)
	}
	if first, last := middle(memory[:few]), middle(memory[n-few:]); last > first+first/2+4<<20 {
		return fmt.Errorf("the memory of a process without clients has grown from %d to %d bytes", first, last)
	}
	return nil
}

func middle(v []int64) int64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
