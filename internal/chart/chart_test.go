package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
)

func figure() Figure {
	return Figure{Title: `a & b <c> "d"`, Plots: []Plot{
		{Title: "lines", X: Axis{Label: "listeners", Log: true}, Y: Axis{Label: "ms", Log: true},
			Series: []Series{
				{Name: "one", Points: []Point{{1, 0.5}, {100, 2}, {10000, 100}}},
				{Name: "two", Colour: 7, Kind: Dots, Points: []Point{{1, 1}, {10000, 200}}},
			},
			Marks: []Mark{{X: 10, Name: "killed <9>"}, {X: 20}}},
		{Title: "bars", Y: Axis{Whole: true}, Height: 80, Series: []Series{{Kind: Bars, Points: []Point{{0, 0}, {3, 0}, {2, 1}, {9, 1}}}}},
		{Title: "names", Y: Axis{Names: []string{"first", "a rather long second"}}, Series: []Series{{Kind: Dots, Points: []Point{{1, 0}, {2, 1}}}}},
		{Title: "nothing at all"},
	}}
}

// The picture is well-formed, has every text, and no number that is none.
func TestSVG(t *testing.T) {
	t.Parallel()
	svg := string(figure().SVG())
	var texts []string
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, svg)
		}
		if s, ok := token.(xml.CharData); ok {
			texts = append(texts, strings.TrimSpace(string(s)))
		}
	}
	for _, want := range []string{`a & b <c> "d"`, "lines", "listeners", "one", "two", "killed <9>", "10,000", "bars", "first", "a rather long second", "nothing at all"} {
		if !slices.Contains(texts, want) {
			t.Errorf("no text %q in %q", want, texts)
		}
	}
	for _, bad := range []string{"NaN", "Inf"} {
		if strings.Contains(svg, bad) {
			t.Errorf("%s in\n%s", bad, svg)
		}
	}
	if !strings.Contains(svg, "prefers-color-scheme:dark") || !strings.Contains(svg, `class="d c2"`) {
		t.Errorf("no dark scheme, or no colour again:\n%s", svg)
	}
}

func TestScale(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		axis   Axis
		values []float64
		ticks  []float64
	}{
		{Axis{}, []float64{3, 10}, []float64{0, 2, 4, 6, 8, 10}},
		{Axis{}, []float64{0, 0.3}, []float64{0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3}},
		{Axis{Whole: true}, []float64{1, 2}, []float64{0, 1, 2}},
		{Axis{Log: true}, []float64{1, 10000}, []float64{1, 10, 100, 1000, 10000}},
		{Axis{Log: true}, []float64{3, 30}, []float64{5, 10, 20}},
		{Axis{Names: []string{"a", "b", "c"}}, nil, []float64{0, 1, 2}},
		{Axis{Min: 0, Max: 4}, []float64{100}, []float64{0, 1, 2, 3, 4}},
	} {
		s := newScale(c.axis, 0, 100)
		for _, v := range c.values {
			s.include(v)
		}
		s = s.done()
		got := s.ticks()
		if !slices.EqualFunc(got, c.ticks, func(a, b float64) bool { return math.Abs(a-b) < 1e-9 }) {
			t.Errorf("%+v over %v: ticks %v; want %v", c.axis, c.values, got, c.ticks)
		}
		if a, b := s.at(s.Min), s.at(s.Max); a != 0 || b != 100 {
			t.Errorf("%+v: from %v to %v; want 0 to 100", c.axis, a, b)
		}
	}
}
