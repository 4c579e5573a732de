//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package soak

import (
	"fmt"
	"io"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/chart"
)

// Figure draws what was done, and what the processes had meanwhile.
func (r *Result) Figure() chart.Figure {
	unit, name := time.Second, "s"
	if r.Duration > 5*time.Minute {
		unit, name = time.Minute, "min"
	}
	x := chart.Axis{Label: name, Max: float64(r.Duration) / float64(unit)}
	at := func(d time.Duration) float64 { return float64(d) / float64(unit) }

	var names []string
	var rows []chart.Series
	for _, k := range kinds {
		s := chart.Series{Kind: chart.Dots}
		for _, a := range r.Done {
			if a.Kind == k.name {
				s.Points = append(s.Points, chart.Point{X: at(a.At), Y: float64(len(names))})
			}
		}
		if s.Points != nil {
			s.Colour = 1
			if k.name == "upgrade" || k.name == "takeover" {
				s.Colour = 0
			}
			names, rows = append(names, k.name), append(rows, s)
		}
	}
	plots := []chart.Plot{{Title: "What was done", X: x, Y: chart.Axis{Names: names}, Height: 20 * float64(len(names)), Series: rows}}
	for _, p := range []struct {
		title, label string
		value        func(s Sample) float64
	}{
		{"Processes", "", func(s Sample) float64 { return float64(s.Processes) }},
		{"Descriptors of all processes", "", func(s Sample) float64 { return float64(s.Descriptors) }},
		{"Memory of all processes", "MB", func(s Sample) float64 { return float64(s.Memory) / 1e6 }},
	} {
		all := chart.Series{Name: "with clients", Colour: 4}
		alone := chart.Series{Name: "one process without clients", Kind: chart.Dots, Colour: 2}
		// Of many samples, each stretch has its largest: a line has no more
		// points than can be seen.
		const points = 700
		for _, s := range r.Samples {
			q := chart.Point{X: at(s.At), Y: p.value(s)}
			if s.Alone {
				alone.Points = append(alone.Points, q)
				continue
			}
			last := len(all.Points) - 1
			if last >= 0 && int(q.X*points/x.Max) == int(all.Points[last].X*points/x.Max) {
				all.Points[last].Y = max(all.Points[last].Y, q.Y)
				continue
			}
			all.Points = append(all.Points, q)
		}
		plots = append(plots, chart.Plot{Title: p.title, X: x, Y: chart.Axis{Label: p.label, Whole: true}, Height: 120, Series: []chart.Series{all, alone}})
	}
	return chart.Figure{Title: fmt.Sprintf("A soak of %v with seed %d: %d upgrades, %d requests", r.Duration.Round(time.Second), r.Seed, r.Upgrades, r.Answered), Plots: plots}
}

// Print writes what was done.
func (r *Result) Print(w io.Writer) {
	rounds := 0
	for _, k := range kinds {
		if n := r.Rounds[k.name]; n > 0 {
			rounds += n
			fmt.Fprintf(w, "%6d  %s\n", n, k.name)
		}
	}
	fmt.Fprintf(w, "%d rounds in %v, %d upgrades; %d requests were answered\n", rounds, r.Duration.Round(time.Second), r.Upgrades, r.Answered)
	fmt.Fprintf(w, "%d requests ended with the process that was killed; %d came while the daemon was stopped\n", r.Killed, r.Refused)
}
