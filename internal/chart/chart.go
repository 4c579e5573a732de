// Package chart draws plots as SVG: the pictures in docs, and those of
// examples/demo. A picture follows the reader's choice of a light or dark
// scheme.
package chart

import (
	"bytes"
	"fmt"
	"html"
	"math"
)

// A Figure is plots, one below the other.
type Figure struct {
	Title string
	Plots []Plot
}

// A Plot is series of points with common axes.
type Plot struct {
	Title  string
	X, Y   Axis
	Height float64 // of the area with the points; 0 is 240
	Series []Series
	Marks  []Mark
}

// An Axis is one of a plot's two. If Min and Max are equal, the points say
// how far it reaches.
type Axis struct {
	Label    string
	Log      bool // all values are above zero
	Whole    bool // no ticks between whole numbers
	Min, Max float64
	Names    []string // of the values 0, 1 and so on, in place of numbers
}

// A Kind says how a series is drawn.
type Kind int

const (
	Line Kind = iota
	Dots
	Bars // each two points are the ends of a bar
)

// A Series is points that belong together. Colour is an index into the colours
// of the style, which are used again when there are no more.
type Series struct {
	Name   string // in the legend; empty: not there
	Kind   Kind
	Colour int
	Points []Point
}

// A Point is where X and Y say.
type Point struct{ X, Y float64 }

// A Mark is a vertical line, with a text if it has a name.
type Mark struct {
	X    float64
	Name string
}

const (
	width  = 760.0
	left   = 76.0  // of a plot's area
	right  = 730.0 // likewise
	above  = 46.0  // from a plot's title to its area
	below  = 54.0  // from the area to the next plot
	colour = 5     // colours that the style has
)

const style = `<style>
text{font:13px system-ui,sans-serif;fill:#1f2328}
.h{font-size:16px;font-weight:600}.b{font-weight:600}.e{text-anchor:end}.m{text-anchor:middle}.s{font-size:11px}
.bg{fill:#fff}.g{stroke:#d8dee4;fill:none}.a{stroke:#59636e;fill:none}.k{stroke:#59636e;stroke-dasharray:2 3;fill:none}
.l{fill:none;stroke-width:2}.d{fill:none;stroke-width:3.5;stroke-linecap:round}.r{fill:none;stroke-width:9}
.c0{stroke:#0969da}.c1{stroke:#bc4c00}.c2{stroke:#1a7f37}.c3{stroke:#8250df}.c4{stroke:#848d97}
@media(prefers-color-scheme:dark){
text{fill:#e6edf3}.bg{fill:#0d1117}.g{stroke:#2a3038}.a,.k{stroke:#9198a1}
.c0{stroke:#58a6ff}.c1{stroke:#f0883e}.c2{stroke:#3fb950}.c3{stroke:#bc8cff}.c4{stroke:#7d8590}}
</style>
`

// SVG returns the picture as a document.
func (f Figure) SVG() []byte {
	var b bytes.Buffer
	y := 40.0
	for _, p := range f.Plots {
		y += above + p.height() + below
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" role="img">`+"\n", width, y)
	title := html.EscapeString(f.Title)
	fmt.Fprintf(&b, "<title>%s</title>\n%s", title, style)
	fmt.Fprintf(&b, `<rect class="bg" width="%g" height="%g"/>`+"\n", width, y)
	text(&b, "h", 16, 26, f.Title)
	y = 40
	for _, p := range f.Plots {
		p.draw(&b, y+above)
		y += above + p.height() + below
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func (p Plot) height() float64 {
	if p.Height == 0 {
		return 240
	}
	return p.Height
}

func text(b *bytes.Buffer, class string, x, y float64, s string) {
	fmt.Fprintf(b, `<text class="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, x, y, html.EscapeString(s))
}

// draw draws the plot with the upper edge of its area at top.
func (p Plot) draw(b *bytes.Buffer, top float64) {
	bottom := top + p.height()
	edge := p.edge()
	xs, ys := p.scales(edge, top, bottom)
	text(b, "b", edge, top-28, p.Title)
	for _, v := range ys.ticks() {
		y := ys.at(v)
		fmt.Fprintf(b, `<path class="g" d="M%.1f %.1fH%.1f"/>`, edge, y, right)
		text(b, "e", edge-6, y+4, p.Y.name(v))
	}
	for _, v := range xs.ticks() {
		x := xs.at(v)
		fmt.Fprintf(b, `<path class="g" d="M%.1f %.1fV%.1f"/>`, x, top, bottom)
		text(b, "m", x, bottom+17, p.X.name(v))
	}
	fmt.Fprintf(b, `<path class="a" d="M%.1f %.1fV%.1fH%.1f"/>`+"\n", edge, top, bottom, right)
	text(b, "m", (edge+right)/2, bottom+36, p.X.Label)
	text(b, "", 6, top-10, p.Y.Label)
	for _, m := range p.Marks {
		x := xs.at(m.X)
		fmt.Fprintf(b, `<path class="k" d="M%.1f %.1fV%.1f"/>`+"\n", x, top, bottom)
		if m.Name != "" {
			fmt.Fprintf(b, `<text class="s" transform="translate(%.1f %.1f) rotate(-90)">%s</text>`+"\n", x-3, bottom-4, html.EscapeString(m.Name))
		}
	}
	for _, s := range p.Series {
		s.draw(b, xs, ys)
	}
	p.legend(b, top)
}

// edge is where the area begins: names need more room than numbers.
func (p Plot) edge() float64 {
	edge := left
	for _, s := range p.Y.Names {
		edge = max(edge, 16+6.8*float64(len([]rune(s))))
	}
	return edge
}

// scales returns what places the plot's points.
func (p Plot) scales(edge, top, bottom float64) (xs, ys scale) {
	xs, ys = newScale(p.X, edge, right), newScale(p.Y, bottom, top)
	for _, s := range p.Series {
		for _, q := range s.Points {
			xs.include(q.X)
			ys.include(q.Y)
		}
	}
	return xs.done(), ys.done()
}

func (s Series) class() string {
	return fmt.Sprintf("%c c%d", "ldr"[s.Kind], s.Colour%colour)
}

func (s Series) draw(b *bytes.Buffer, xs, ys scale) {
	if len(s.Points) == 0 {
		return
	}
	fmt.Fprintf(b, `<path class="%s" d="`, s.class())
	for i, q := range s.Points {
		x, y := xs.at(q.X), ys.at(q.Y)
		switch {
		case s.Kind == Dots:
			fmt.Fprintf(b, "M%.1f %.1fh0", x, y)
		case i == 0, s.Kind == Bars && i%2 == 0:
			fmt.Fprintf(b, "M%.1f %.1f", x, y)
		default:
			fmt.Fprintf(b, "L%.1f %.1f", x, y)
		}
	}
	b.WriteString("\"/>\n")
	if s.Kind == Line && len(s.Points) <= 20 {
		s.Kind = Dots
		s.draw(b, xs, ys)
	}
}

// legend names the series above the area, from right to left.
func (p Plot) legend(b *bytes.Buffer, top float64) {
	x := right
	for i := len(p.Series) - 1; i >= 0; i-- {
		s := p.Series[i]
		if s.Name == "" {
			continue
		}
		text(b, "e", x, top-10, s.Name)
		x -= 7.2*float64(len([]rune(s.Name))) + 8
		fmt.Fprintf(b, `<path class="%s" d="M%.1f %.1fh%g"/>`+"\n", s.class(), x-14, top-14, map[Kind]float64{Line: 14, Bars: 14}[s.Kind])
		x -= 30
	}
}

// A scale places values between two edges.
type scale struct {
	Axis
	from, to float64 // edges
	fixed    bool
}

func newScale(a Axis, from, to float64) scale {
	if a.Names != nil {
		a.Min, a.Max = -0.5, float64(len(a.Names))-0.5
	}
	s := scale{Axis: a, from: from, to: to, fixed: a.Min != a.Max}
	if !s.fixed {
		s.Min, s.Max = math.Inf(1), math.Inf(-1)
	}
	return s
}

func (s *scale) include(v float64) {
	if !s.fixed {
		s.Min, s.Max = min(s.Min, v), max(s.Max, v)
	}
}

// done rounds to what is drawn: linear axes begin at zero.
func (s scale) done() scale {
	if s.fixed {
		return s
	}
	if s.Min > s.Max { // there are no points
		s.Min, s.Max = 1, 1
	}
	if s.Log {
		if s.Min == s.Max {
			s.Min, s.Max = s.Min/2, s.Max*2
		}
		return s
	}
	if s.Min = min(s.Min, 0); s.Min == s.Max {
		s.Max = s.Min + 1
	}
	return s
}

func (s scale) at(v float64) float64 {
	lo, hi := s.Min, s.Max
	if s.Log {
		lo, hi, v = math.Log(lo), math.Log(hi), math.Log(v)
	}
	v = min(max(v, lo), hi)
	return s.from + (v-lo)/(hi-lo)*(s.to-s.from)
}

// ticks returns round values within the scale.
func (s scale) ticks() (list []float64) {
	if s.Names != nil {
		for i := range s.Names {
			list = append(list, float64(i))
		}
		return list
	}
	add := func(v float64) {
		if v >= s.Min*(1-1e-9) && v <= s.Max*(1+1e-9) {
			list = append(list, v)
		}
	}
	if s.Log {
		steps := []float64{1}
		if s.Max/s.Min < 200 {
			steps = []float64{1, 2, 5}
		}
		for e := math.Floor(math.Log10(s.Min)); e <= math.Ceil(math.Log10(s.Max)); e++ {
			for _, m := range steps {
				add(m * math.Pow(10, e))
			}
		}
		return list
	}
	step := math.Pow(10, math.Floor(math.Log10((s.Max-s.Min)/4)))
	for _, m := range []float64{2, 5, 10} {
		if (s.Max-s.Min)/step > 8 {
			step *= m / map[float64]float64{2: 1, 5: 2, 10: 5}[m]
		}
	}
	if s.Whole {
		step = max(step, 1)
	}
	for i := math.Ceil(s.Min / step); i*step <= s.Max*(1+1e-9); i++ {
		add(i * step)
	}
	return list
}

// name returns the text of a tick.
func (a Axis) name(v float64) string {
	if a.Names != nil {
		return a.Names[int(v)]
	}
	return number(v)
}

// number writes a value as a reader expects it: 0.5, 20, 1,000.
func number(v float64) string {
	s := fmt.Sprintf("%.6g", v)
	if v >= 1000 && v < 1e6 {
		s = fmt.Sprintf("%.0f,%03.0f", math.Floor(v/1000), math.Mod(v, 1000))
	}
	return s
}
