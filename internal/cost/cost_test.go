//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// page is what docs/cost.md must have for WritePage.
const page = `# Cost
<!-- table run -->
<!-- end -->
<!-- table upgrade -->
old
<!-- end -->
Between.
<!-- table listener -->
<!-- end -->
<!-- table stage -->
<!-- end -->
<!-- table calls -->
<!-- end -->
<!-- table latency -->
<!-- end -->
<!-- table size -->
<!-- end -->
The end.
`

// A short measurement has every figure, and the page and the pictures have them.
func TestMeasure(t *testing.T) {
	t.Parallel()
	r, err := Measure(t.Context(), Plan{Listeners: []int{1, 20, 1 << 30}, Pairs: []int{2, 1, 1}, Calls: 2, Events: 2, Rate: 100}, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Upgrades) != 2 || len(r.Skipped) != 1 {
		t.Fatalf("upgrades %+v, skipped %q; want 1 and 20 listeners, and those skipped that no process can have", r.Upgrades, r.Skipped)
	}
	for _, u := range r.Upgrades {
		if u.Took <= 0 || u.ForkExec <= 0 || u.Ratio <= 0 || u.Silent <= 0 || u.Observed <= 0 || (u.Net > 0) != (u.Listeners > 1) || (u.Further != 0) != (u.Listeners > 1) {
			t.Errorf("%+v", u)
		}
		sum := 0.0
		for _, d := range u.Stages {
			sum += d
		}
		if u.Pairs == 1 && sum != u.Observed {
			t.Errorf("the stages take %v, and the upgrade %v", u.Stages, u.Observed)
		}
	}
	for _, c := range r.Calls {
		if c.Pairs < 2 || c.Took <= 0 || c.Net <= 0 || c.Ratio <= 0 {
			t.Errorf("%+v", c)
		}
	}
	for _, l := range []Latency{r.Upgraded, r.Forked} {
		if len(l.Events) != 2 || len(l.Requests) == 0 || l.Failed != 0 || l.quantile(.5) <= 0 || l.quantile(1) < l.quantile(.5) {
			t.Errorf("%d events, %d requests, %d failed, %v, %v", len(l.Events), len(l.Requests), l.Failed, l.quantile(.5), l.quantile(1))
		}
	}

	r.Sizes = []Size{{"upgrades", []int64{1e6, 2e6, 3e6, 4e6, 5e6, 6e6}}}
	dir := t.TempDir()
	path := filepath.Join(dir, "cost.md")
	if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it replaces what the first has written
		if err := r.WritePage(dir); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]int{"\nold\n": 0, "\nBetween.\n": 1, "\nThe end.\n": 1, "Measured on ": 1, "| 20 | ": 2, "| Accept | ": 1, "| 2 upgrades | ": 1, "| upgrades | 1000 | ": 1} {
		if n := strings.Count(string(b), text); n != want {
			t.Errorf("%q is %d times in the page; want %d:\n%s", text, n, want, b)
		}
	}
	for _, name := range []string{"cost-upgrade.svg", "cost-latency.svg"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || xml.Unmarshal(b, new(struct{})) != nil {
			t.Errorf("%s: %v\n%s", name, err, b)
		}
	}
	var out strings.Builder
	if r.Print(&out); !strings.Contains(out.String(), "not measured: 1073741824 listeners") {
		t.Errorf("printed:\n%s", out.String())
	}
}

// A request is counted to the event next to it, and the failed ones apart.
func TestLatency(t *testing.T) {
	t.Parallel()
	at := func(ms int, err error) outcome {
		return outcome{Request{time.Duration(ms) * time.Millisecond, time.Duration(ms)}, err}
	}
	var l Latency
	l.add(time.Second, window/2, []outcome{at(700, nil), at(760, nil), at(1000, nil), at(1100, os.ErrInvalid), at(1240, nil), at(1300, nil)})
	if len(l.Requests) != 3 || l.Failed != 1 || l.Requests[0].At != 10*time.Millisecond || l.quantile(.5) != 1000 || l.quantile(1) != 1240 {
		t.Errorf("%+v", l)
	}
}

// What the command measures leaves nothing out.
func TestUnderAMinute(t *testing.T) {
	t.Parallel()
	p := UnderAMinute
	if len(p.Listeners) != len(p.Pairs) || p.Calls == 0 || p.Events == 0 || p.Rate == 0 {
		t.Errorf("%+v", p)
	}
}

func TestReplace(t *testing.T) {
	t.Parallel()
	for _, page := range []string{"", "<!-- table a -->\n", "<!-- end -->\n<!-- table b -->\n<!-- end -->\n"} {
		if got, err := replace(page, "a", "text"); err == nil {
			t.Errorf("%q without a place for the table becomes %q", page, got)
		}
	}
}
