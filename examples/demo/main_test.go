package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// demo builds the demo and prepares a run of it with a directory of its own
// for temporary files.
func demo(t *testing.T, args ...string) (cmd *exec.Cmd, temp string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "demo") // short, for the sockets' names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd = exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	return cmd, dir
}

// leavesNothing asserts that the directory for temporary files is empty, and
// that none of the processes is left.
func leavesNothing(t *testing.T, temp string, pids ...int) {
	t.Helper()
	left, err := os.ReadDir(temp)
	if err != nil || len(left) > 0 {
		t.Errorf("left in the directory for temporary files: %v, %v", left, err)
	}
	for _, pid := range pids {
		// Those that have ended may wait to be reaped by the system's first
		// process; they have no files then. Where /proc is not Linux's, this
		// says nothing.
		if target, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe"); err == nil && strings.HasPrefix(target, temp) {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestDemo(t *testing.T) {
	t.Parallel()
	svg := filepath.Join(t.TempDir(), "tour.svg")
	cmd, temp := demo(t, "-json", "-svg", svg)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, stderr.String(), out)
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !r.OK || r.Failed != 0 || len(r.Errors) != 0 || r.Verdict == "" || strings.Contains(stderr.String(), "\r") {
		t.Errorf("result %s\nprogress %q", out, stderr.String())
	}
	if len(r.Generations) != 9 {
		t.Fatalf("%d generations; want 9: the first, five good upgrades, the orphan, the one that takes over, the one that is killed", len(r.Generations))
	}
	answered := 0
	var pids []int
	for i, g := range r.Generations {
		if g.Number != i || g.PID <= 0 || g.ReadyMS <= 0 || g.Answered == 0 || g.Failed != 0 || g.Killed != (i == 5 || i == 8) || g.InHands > 0 && !g.Killed {
			t.Errorf("generation %d: %+v", i, *g)
		}
		answered += g.Answered
		pids = append(pids, g.PID)
	}
	if answered != r.Answered || answered < 5000 {
		t.Errorf("%d requests answered, the sum says %d; want 5000 or more", answered, r.Answered)
	}
	want := []struct {
		reason string
		serves int
	}{{"exit status 3", 2}, {"timeout", 3}, {"no such file", 4}, {"failed at probation", 7}}
	if len(r.FailedUpgrades) != len(want) {
		t.Fatalf("failed upgrades: %+v", r.FailedUpgrades)
	}
	for i, f := range r.FailedUpgrades {
		if f.Serves != want[i].serves || !strings.Contains(f.Reason, want[i].reason) {
			t.Errorf("failed upgrade %+v; want %q and generation %d serving", f, want[i].reason, want[i].serves)
		}
	}
	if w := r.Web; w.Upgrades != 5 || w.Answered < 3000 || w.Failed != 0 {
		t.Errorf("the web server: %+v; want 5 upgrades and 3000 requests or more", w)
	}
	b, err := os.ReadFile(svg)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"tcp", "unix", "http", crash, hang, missing, killed, takenOver, probation} {
		if !strings.Contains(string(b), ">"+want+"<") {
			t.Errorf("no %q in the picture", want)
		}
	}
	leavesNothing(t, temp, pids...)
}

// On a terminal a line changes below those that stay. Elsewhere lines are all
// there is.
func TestProgress(t *testing.T) {
	t.Parallel()
	for _, live := range []bool{false, true} {
		f, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		p := newProgress(f)
		p.live = live
		p.follow(func() string { return "status" })
		p.say("one")
		p.end()
		f.Close()
		want := "one\n"
		if live {
			want = "\r\x1b[Kone\nstatus\r\x1b[K"
		}
		if got, err := os.ReadFile(f.Name()); err != nil || string(got) != want {
			t.Errorf("live %v: %q, %v; want %q", live, got, err, want)
		}
	}
}

// The picture has who served when, and an answer of each place once.
func TestPicture(t *testing.T) {
	t.Parallel()
	began := time.Now()
	at := func(s float64) time.Time { return began.Add(time.Duration(s * float64(time.Second))) }
	p := &picture{began: began,
		generations: []*generation{{served: at(1)}, {Number: 1, served: at(2), Killed: true, died: at(3)}, {Number: 2, served: at(4)}},
		answers:     []answer{{at(1), "tcp", 0}, {at(1.0001), "tcp", 0}, {at(1.5), "unix", 0}, {at(5), "tcp", 2}},
		faults:      []event{{at(2.5), killed}}}
	plot := p.figure().Plots[0]
	bars, tcp, unix := plot.Series[0].Points, plot.Series[1].Points, plot.Series[2].Points
	if len(bars) != 6 || bars[1].X != 2 || bars[3].X != 3 || bars[5].X != 5 || len(tcp) != 2 || len(unix) != 1 || len(plot.Marks) != 1 || plot.Marks[0].Name != killed {
		t.Errorf("bars %v, tcp %v, unix %v, marks %v", bars, tcp, unix, plot.Marks)
	}
}

// A failed request, and nothing but that, spoils the verdict; the killed
// process's do not.
func TestVerdict(t *testing.T) {
	t.Parallel()
	killed := time.Now()
	good, victim := &generation{Answered: 10}, &generation{Number: 1, Answered: 10, Killed: true, began: killed.Add(-time.Minute), died: killed}
	before, after := killed.Add(-time.Second), killed.Add(time.Second)
	for _, c := range []struct {
		name                  string
		f                     failure
		answered, failed, hit int
	}{
		{"the killed one's", failure{victim, unknown, before, errors.New("reset")}, 20, 0, 1},
		{"after its death", failure{victim, unknown, after, errors.New("reset")}, 20, 1, 0},
		{"of another", failure{good, unknown, before.Add(-time.Hour), errors.New("reset")}, 20, 1, 0},
		{"accepted by it, as it has said", failure{good, 1, before.Add(-time.Hour), errors.New("reset")}, 20, 0, 1},
		{"accepted by another, as that has said", failure{victim, 0, before, errors.New("reset")}, 20, 1, 0},
		{"accepted while it took over", failure{good, unknown, before, errors.New("reset")}, 20, 0, 1},
	} {
		g, v := *good, *victim
		if c.f.generation == good {
			c.f.generation = &g
		} else {
			c.f.generation = &v
		}
		var r report
		r.count([]*generation{&g, &v}, &load{failures: []failure{c.f}})
		if r.Answered != c.answered || r.Failed != c.failed || r.Killed != c.hit || r.OK != (c.failed == 0) || len(r.Errors) != c.failed {
			t.Errorf("a failure %s: %+v", c.name, r)
		}
	}
	r := report{OK: true}
	if r.countWeb(nil); !r.OK {
		t.Errorf("a web server without a failure: %+v", r)
	}
	if r.countWeb([]failure{{err: errors.New("reset")}}); r.OK || len(r.Errors) != 1 {
		t.Errorf("a failure of the web server: %+v", r)
	}
}

// Ctrl-C ends everything that the demo has started.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	cmd, temp := demo(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	process := regexp.MustCompile(`process (\d+)`)
	var pids []int
	for s := bufio.NewScanner(r); s.Scan(); { // until the demo has ended
		line := s.Text()
		if m := process.FindStringSubmatch(line); m != nil {
			pid, _ := strconv.Atoi(m[1])
			pids = append(pids, pid)
		}
		if strings.HasPrefix(line, "the successor crashes") {
			_ = cmd.Process.Signal(syscall.SIGINT)
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("exit after an interrupt: %v; want status 1", err)
	}
	if len(pids) < 3 {
		t.Errorf("processes %v; want three", pids)
	}
	leavesNothing(t, temp, pids...)
}
