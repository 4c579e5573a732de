//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What a daemon of these tests holds has a key there, by which the test's
// commands name it.
var things = struct {
	sync.Mutex
	m map[string]any
}{m: make(map[string]any)}

func thing[T any](key string) T {
	things.Lock()
	defer things.Unlock()
	x, ok := things.m[key].(T)
	if !ok {
		panic(fmt.Sprintf("%q is a %T", key, things.m[key]))
	}
	return x
}

func setThing(key string, x any) {
	things.Lock()
	defer things.Unlock()
	things.m[key] = x
}

// keep stores what a call has returned, and says of what type it is; "nil":
// the interface or pointer that it returned is nil.
func keep[T comparable](key string, x T, err error) ([]string, error) {
	var none T
	if err != nil || x == none {
		return []string{"nil"}, err
	}
	setThing(key, x)
	return []string{fmt.Sprintf("%T", x)}, nil
}

// thing gives p a command that must succeed, and returns its answer.
func (p *proc) thing(verb string, args ...string) []string {
	p.t.Helper()
	m := p.call("thing "+verb, args...)
	if m.Err != nil {
		p.t.Fatalf("process %d: %s %q: %+v", p.pid, verb, args, m.Err)
	}
	return m.Text
}

// gives asserts what a command answers.
func (p *proc) gives(want, verb string, args ...string) {
	p.t.Helper()
	if got := strings.Join(p.thing(verb, args...), "|"); got != want {
		p.t.Fatalf("process %d: %s %q: %q; want %q", p.pid, verb, args, got, want)
	}
}

// holding is a daemon that waits after New for what the test wants of it.
func holding() spec {
	return spec{NoAccept: true, Do: map[string]string{"new": "hold"}}
}

// succeed upgrades p to a process that does f between New and Ready.
func (p *proc) succeed(f func(s *proc)) *proc {
	p.t.Helper()
	answer := p.begin(command{Verb: "upgrade"})
	s := p.h.proc()
	s.at("new")
	f(s)
	s.resume()
	if m := answer(); m.Err != nil {
		p.t.Fatalf("upgrade: %+v", m.Err)
	}
	s.at("serving")
	return s
}

// perish upgrades p to a process that does f after New and is killed then.
func (p *proc) perish(f func(s *proc)) {
	p.t.Helper()
	answer := p.begin(command{Verb: "upgrade"})
	s := p.h.proc()
	s.at("new")
	f(s)
	s.kill()
	checkErr(p.t, answer().Err, "init", "unexpected EOF")
}

// unclaimed asserts what p has named so.
func (p *proc) unclaimed(want ...string) {
	p.t.Helper()
	if got := p.event(ecdysis.EventReady, 0).Unclaimed; !slices.Equal(got, want) {
		p.t.Errorf("unclaimed: %q; want %q", got, want)
	}
}

func init() {
	knownErrors["os.ErrClosed"] = os.ErrClosed
	knownErrors["EOF"] = io.EOF
	knownErrors["closed peer"] = proctest.ClosedPeer()
	knownErrors["EFBIG"] = syscall.EFBIG
	for name, f := range thingVerbs {
		verbs["thing "+name] = func(d *daemon, c command) message {
			text, err := f(d, c.Args)
			return message{Text: text, Err: toErrMsg(err)}
		}
	}
}

var thingVerbs = map[string]func(d *daemon, a []string) ([]string, error){
	// The package's calls.
	"AddFile": func(d *daemon, a []string) ([]string, error) {
		return nil, d.u.AddFile(a[0], thing[*os.File](a[1]))
	},
	"File": func(d *daemon, a []string) ([]string, error) {
		f, err := d.u.File(a[0])
		if notThere(err) {
			err = nil
		}
		return keep(a[1], f, err)
	},
}

// notThere reports whether a call has found nothing under a name.
func notThere(err error) bool { return errors.Is(err, fs.ErrNotExist) }
