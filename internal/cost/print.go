//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// A table is rows below a head. The first column is text, the others numbers.
type table struct {
	name string // of its place in docs/cost.md
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// plain writes the table for a terminal.
func (t *table) plain(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	for _, row := range t.rows {
		fmt.Fprintln(tw, strings.Join(row, "\t")+"\t")
	}
	_ = tw.Flush()
	fmt.Fprintln(w)
}

// markdown returns the table for a page.
func (t *table) markdown() string {
	var b strings.Builder
	for i, row := range t.rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString("|---" + strings.Repeat("|--:", len(row)-1) + "|\n")
		}
	}
	return b.String()
}

const legend = `Times are medians of pairs measured in turn, and ratios the medians of the pairs' ratios.
upgrade: until Upgrade returns, without hooks. fork and exec: of the same program, until its first byte has come.
net's listeners: descriptors made listeners by package net, and closed. floor: the sum of both.
nobody accepts: from when the last listener is paused until Ready returns in the successor.

`

// Print writes the tables for a terminal.
func (r *Result) Print(w io.Writer) {
	fmt.Fprintf(w, "\n%s\n%s\n\n", r.Date.Format("2006-01-02"), r.Machine)
	for _, t := range r.tables() {
		t.plain(w)
	}
	fmt.Fprint(w, legend)
	for _, s := range r.Skipped {
		fmt.Fprintln(w, "not measured:", s)
	}
	if n := r.Failed(); n > 0 {
		fmt.Fprintf(w, "%d requests have failed\n", n)
	}
}

// tables returns what was measured, as it is printed.
func (r *Result) tables() []*table {
	upgrade := &table{name: "upgrade"}
	upgrade.add("listeners", "upgrade", "fork and exec", "ratio", "net's listeners", "floor", "upgrade/floor", "nobody accepts", "pairs")
	each := &table{name: "listener"}
	each.add("listeners", "each further one", "net alone", "ratio")
	for _, u := range r.Upgrades {
		upgrade.add(fmt.Sprint(u.Listeners), micros(u.Took), micros(u.ForkExec), ratio(u.Ratio), micros(u.Net), micros(u.Floor()),
			ratio(u.Took/u.Floor()), micros(u.Silent), fmt.Sprint(u.Pairs))
		if u.Listeners > 1 {
			alone := u.Net / float64(u.Listeners)
			each.add(fmt.Sprint(u.Listeners), micros(u.Further), micros(alone), ratio(u.Further/alone))
		}
	}
	stage := &table{name: "stage"}
	head := []string{"listeners"}
	for _, u := range r.Upgrades {
		head = append(head, fmt.Sprint(u.Listeners))
	}
	stage.add(head...)
	for i, what := range stages {
		row := []string{what}
		for _, u := range r.Upgrades {
			row = append(row, micros(u.Stages[i]))
		}
		stage.add(row...)
	}
	all := []string{"in all, with the hook that tells the stages"}
	for _, u := range r.Upgrades {
		all = append(all, micros(u.Observed))
	}
	stage.add(all...)
	calls := &table{name: "calls"}
	calls.add("call", "here", "net", "ratio", "pairs")
	for _, c := range r.Calls {
		calls.add(c.Name, fmt.Sprintf("%.0f ns", c.Took), fmt.Sprintf("%.0f ns", c.Net), fmt.Sprintf("%.3f", c.Ratio), fmt.Sprint(c.Pairs))
	}
	latency := &table{name: "latency"}
	latency.add("requests around", "p50", "p99", "p99.9", "slowest", "answered", "failed")
	quantiles := []float64{.5, .99, .999, 1}
	var values [2][]time.Duration
	for i, l := range []*Latency{&r.Upgraded, &r.Forked} {
		row := []string{fmt.Sprintf("%d upgrades", len(l.Events))}
		if i == 1 {
			row = []string{fmt.Sprintf("%d of fork and exec", len(l.Events))}
		}
		for _, q := range quantiles {
			d := l.quantile(q)
			values[i] = append(values[i], d)
			row = append(row, micros(float64(d)))
		}
		latency.add(append(row, fmt.Sprint(len(l.Requests)), fmt.Sprint(l.Failed))...)
	}
	row := []string{"ratio"}
	for i := range quantiles {
		row = append(row, ratio(float64(values[0][i])/float64(values[1][i])))
	}
	latency.add(append(row, "", "")...)
	list := []*table{upgrade, each, stage, calls, latency}
	if r.Sizes != nil {
		list = append(list, r.sizes())
	}
	return list
}

// micros writes nanoseconds as a reader compares them.
func micros(ns float64) string {
	switch {
	case ns == 0:
		return "-"
	case ns < 100e3:
		return fmt.Sprintf("%.1f µs", ns/1e3)
	case ns < 10e6:
		return fmt.Sprintf("%.2f ms", ns/1e6)
	}
	return fmt.Sprintf("%.1f ms", ns/1e6)
}

func ratio(r float64) string { return fmt.Sprintf("%.2f", r) }
