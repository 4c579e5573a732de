package proctest

import (
	"flag"
	"testing"
)

var failAtTwice = flag.Bool("bounds", false, "benchmarks fail at twice the bound of a ratio")

// Ratio reports what a benchmark has measured, as a multiple of its floor in the
// same run. On a machine with nothing else to do it is at most bound. With
// the flag -bounds the benchmark fails at twice that.
func Ratio(b *testing.B, ratio, bound float64, unit string) {
	b.Helper()
	b.ReportMetric(ratio, unit)
	if *failAtTwice && ratio > 2*bound {
		b.Errorf("%.3g %s; the bound is %g, and this fails at twice that", ratio, unit, bound)
	}
}
