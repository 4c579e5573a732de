package main

import (
	"time"

	"github.com/ecdysis-go/ecdysis/internal/chart"
)

// An event is something that was done.
type event struct {
	at   time.Time
	what string
}

// A picture is what is drawn of a tour.
type picture struct {
	began       time.Time
	generations []*generation
	answers     []answer
	faults      []event
	web         []event // upgrades of the web server
	webAnswers  []answer
}

// figure draws who answered which request, over time.
func (p *picture) figure() chart.Figure {
	serves := chart.Series{Name: "serves", Kind: chart.Bars, Colour: 4}
	for i, g := range p.generations {
		end := p.last(p.answers)
		if i+1 < len(p.generations) {
			end = p.generations[i+1].served
		}
		if g.Killed && g.died.Before(end) {
			end = g.died
		}
		y := float64(g.Number)
		serves.Points = append(serves.Points, chart.Point{X: p.x(g.served), Y: y}, chart.Point{X: p.x(end), Y: y})
	}
	daemon := p.plot("The echo daemon: each point is an answer", p.answers, "tcp", "unix")
	daemon.Series = append([]chart.Series{serves}, daemon.Series...)
	daemon.Height = 320
	for _, e := range p.faults {
		daemon.Marks = append(daemon.Marks, chart.Mark{X: p.x(e.at), Name: e.what})
	}
	web := p.plot("The web server; dashed lines are upgrades", p.webAnswers, "http")
	for _, e := range p.web {
		web.Marks = append(web.Marks, chart.Mark{X: p.x(e.at)})
	}
	return chart.Figure{Title: "Who answered which request", Plots: []chart.Plot{daemon, web}}
}

// x returns seconds from the beginning.
func (p *picture) x(at time.Time) float64 { return at.Sub(p.began).Seconds() }

func (p *picture) last(list []answer) time.Time {
	if len(list) == 0 {
		return p.began
	}
	return list[len(list)-1].at
}

// plot draws answers, those of each network a little above those before it. No
// more points are drawn than can be seen.
func (p *picture) plot(title string, answers []answer, networks ...string) chart.Plot {
	plot := chart.Plot{Title: title, Y: chart.Axis{Label: "generation", Whole: true}, X: chart.Axis{Label: "s"}}
	if len(answers) == 0 {
		return plot
	}
	plot.X.Min, plot.X.Max = p.x(answers[0].at), p.x(p.last(answers))
	for i, network := range networks {
		s := chart.Series{Name: network, Kind: chart.Dots, Colour: i}
		type place struct{ column, generation int }
		drawn := make(map[place]bool)
		for _, a := range answers {
			x := p.x(a.at)
			at := place{int((x - plot.X.Min) / (plot.X.Max - plot.X.Min) * 400), a.by}
			if a.network == network && !drawn[at] {
				drawn[at] = true
				s.Points = append(s.Points, chart.Point{X: x, Y: float64(a.by) + 0.2*float64(i+1)})
			}
		}
		plot.Series = append(plot.Series, s)
	}
	return plot
}
