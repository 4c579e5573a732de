package proctest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// A Spec describes a daemon. In addresses, and in the paths of Options, $DIR stands
// for the chain's directory.
type Spec struct {
	// Options are those of ecdysis.New. The hooks must be nil, because the daemon
	// has its own. A plan changes what they do.
	Options ecdysis.Options
	Listen  []Listen
	Plan    map[Point]Action

	NoAccept   bool // accept nothing
	LateAccept bool // start to accept after Ready, not before
	Wait       bool // call Upgrader.Wait, and exit when all clients are served
}

// A Listen describes a socket of a daemon. It is a socket for packets if the network
// is one of UDP or unixgram, and a listener otherwise.
type Listen struct {
	Network, Address string
	Config           ecdysis.ListenConfig // without Control
}

// TCP is a daemon with one TCP listener.
var TCP = Spec{Listen: []Listen{{Network: "tcp", Address: "127.0.0.1:0"}}}

// Both is a daemon with a TCP and a Unix listener, $DIR/sock, and the PID file
// $DIR/pid.
var Both = Spec{
	Listen:  []Listen{{Network: "tcp", Address: "127.0.0.1:0"}, {Network: "unix", Address: "$DIR/sock"}},
	Options: ecdysis.Options{PIDFile: "$DIR/pid"},
}

// Holding is a daemon that accepts nothing and holds at AtNew, so that the test can
// make calls that claim and add things.
var Holding = Spec{NoAccept: true}.Hold(AtNew)

// At returns s with these actions, one after the other, planned for the point.
func (s Spec) At(p Point, actions ...Action) Spec {
	s.Plan = maps.Clone(s.Plan)
	if s.Plan == nil {
		s.Plan = make(map[Point]Action)
	}
	s.Plan[p] = Seq(actions...)
	return s
}

// Hold returns s, which holds at each of the points.
func (s Spec) Hold(points ...Point) Spec {
	for _, p := range points {
		s = s.At(p, Hold)
	}
	return s
}

// And returns s with a further socket.
func (s Spec) And(network, address string) Spec {
	s.Listen = append(slices.Clone(s.Listen), Listen{Network: network, Address: address})
	return s
}

// Probation returns s with this Options.Probation.
func (s Spec) Probation(d time.Duration) Spec {
	s.Options.Probation = d
	return s
}

// UpgradeTimeout returns s with this Options.UpgradeTimeout.
func (s Spec) UpgradeTimeout(d time.Duration) Spec {
	s.Options.UpgradeTimeout = d
	return s
}

// check panics if s has a value that cannot be sent to a process.
func (s Spec) check() {
	mustBeData(reflect.ValueOf(s.Options))
	for _, l := range s.Listen {
		mustBeData(reflect.ValueOf(l.Config))
	}
}

func mustBeData(v reflect.Value) {
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Func && !f.IsNil() {
			panic(fmt.Sprintf("proctest: %s.%s is a function, which cannot be sent to another process", v.Type(), v.Type().Field(i).Name))
		}
	}
}

// expanded returns s with the directory in place of $DIR.
func (s Spec) expanded() Spec {
	o := reflect.ValueOf(&s.Options).Elem()
	for i := range o.NumField() {
		if f := o.Field(i); f.Kind() == reflect.String {
			f.SetString(expand(f.String()))
		}
	}
	s.Listen = slices.Clone(s.Listen)
	for i := range s.Listen {
		s.Listen[i].Address = expand(s.Listen[i].Address)
	}
	return s
}

func expand(s string) string { return strings.ReplaceAll(s, "$DIR", Dir()) }

// Dir is the chain's directory, as a daemon sees it.
func Dir() string { return filepath.Dir(os.Getenv(hubVar)) }
