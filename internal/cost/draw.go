//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/chart"
)

// Draw writes two pictures into the directory: cost-upgrade.svg, the time of an
// upgrade over the number of listeners, and cost-latency.svg, the latency of
// requests through upgrades.
func (r *Result) Draw(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cost-upgrade.svg"), r.upgradeFigure().SVG(), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "cost-latency.svg"), r.latencyFigure().SVG(), 0o644)
}

func (r *Result) upgradeFigure() chart.Figure {
	upgrade := chart.Series{Name: "upgrade"}
	floor := chart.Series{Name: "fork and exec, and net's listeners", Colour: 1}
	bare := chart.Series{Name: "fork and exec alone", Colour: 4}
	silent := chart.Series{Colour: 2}
	for _, u := range r.Upgrades {
		n := float64(u.Listeners)
		upgrade.Points = append(upgrade.Points, chart.Point{X: n, Y: u.Took / 1e6})
		floor.Points = append(floor.Points, chart.Point{X: n, Y: u.Floor() / 1e6})
		bare.Points = append(bare.Points, chart.Point{X: n, Y: u.ForkExec / 1e6})
		silent.Points = append(silent.Points, chart.Point{X: n, Y: u.Silent / 1e3})
	}
	listeners := chart.Axis{Label: "listeners", Log: true}
	return chart.Figure{Title: "What an upgrade costs, " + r.Date.Format("2006-01-02"), Plots: []chart.Plot{
		{Title: "Until Upgrade returns", X: listeners, Y: chart.Axis{Label: "ms", Log: true}, Height: 280, Series: []chart.Series{bare, floor, upgrade}},
		{Title: "Nobody accepts", X: listeners, Y: chart.Axis{Label: "µs", Log: true}, Height: 160, Series: []chart.Series{silent}},
	}}
}

func (r *Result) latencyFigure() chart.Figure {
	axis := chart.Axis{Label: "ms", Log: true} // the same for both
	for _, l := range []*Latency{&r.Upgraded, &r.Forked} {
		for _, q := range l.Requests {
			v := float64(q.Took) / 1e6
			if axis.Min == 0 {
				axis.Min = v
			}
			axis.Min, axis.Max = min(axis.Min, v), max(axis.Max, v)
		}
	}
	plot := func(title, events string, l Latency, colour int) chart.Plot {
		p := chart.Plot{Title: title, Y: axis, X: chart.Axis{Label: "s; each dashed line is " + events, Min: 0, Max: (time.Duration(len(l.Events)) * window).Seconds()},
			Series: []chart.Series{
				{Name: "slowest answer in 5 ms", Kind: chart.Dots, Colour: colour, Points: l.bins(5*time.Millisecond, 1)},
				{Name: "median of 50 ms", Colour: 2, Points: l.bins(50*time.Millisecond, .5)},
			}}
		for _, at := range l.Events {
			p.Marks = append(p.Marks, chart.Mark{X: at.Seconds()})
		}
		return p
	}
	return chart.Figure{Title: fmt.Sprintf("Latency of %d requests a second, %s", r.Rate, r.Date.Format("2006-01-02")), Plots: []chart.Plot{
		plot("Through upgrades", "an upgrade", r.Upgraded, 0),
		plot("While the daemon starts another program", "a fork and exec", r.Forked, 1),
	}}
}

// bins returns a quantile of each stretch of time.
func (l Latency) bins(width time.Duration, q float64) (points []chart.Point) {
	bins := make(map[time.Duration]*Latency)
	for _, r := range l.Requests {
		k := r.At / width
		if bins[k] == nil {
			bins[k] = new(Latency)
		}
		bins[k].Requests = append(bins[k].Requests, r)
	}
	for k, b := range bins {
		points = append(points, chart.Point{X: (time.Duration(k) * width).Seconds(), Y: float64(b.quantile(q)) / 1e6})
	}
	slices.SortFunc(points, func(a, b chart.Point) int { return int((a.X - b.X) * 1e6) })
	return points
}
