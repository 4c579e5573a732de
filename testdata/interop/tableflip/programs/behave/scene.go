// Command behave shows how a library behaves: its argument names a scene, in
// which each generation plays its part, and tells what it sees on standard
// output.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/ecdysis-go/ecdysis/testdata/interop/tableflip/programs/internal/line"
)

// patience is how long a generation waits for what must happen, and shortly how
// long for what must not.
const (
	patience = 20 * time.Second
	shortly  = 200 * time.Millisecond
)

// A scene is one generation's part in it.
type scene struct {
	*tableflip.Upgrader
	gen     int
	dir     string // for files
	isReady bool
}

func main() {
	act, ok := scenes[os.Args[1]]
	if !ok {
		log.Fatalf("no scene is called %q", os.Args[1])
	}
	s := &scene{gen: line.Generation, dir: os.Args[2]}
	act(s)
	if s.isReady {
		// One that exits at once looks to its parent like one that has failed.
		must(s.WaitForParent(ctx()))
	}
}

// generations returns a scene of which each generation plays one of the parts,
// between New and Ready, unless it calls ready itself.
func generations(parts ...func(*scene)) func(*scene) {
	return func(s *scene) {
		s.new()
		parts[s.gen](s)
		s.ready()
		must(s.WaitForParent(ctx()))
		if s.gen < len(parts)-1 {
			must(s.upgrade())
			<-s.Exit()
		}
	}
}

// upgrade is Upgrade when Ready, and the end of the parent, have come to the
// library's notice: theirs has a goroutine for that.
func (s *scene) upgrade() error {
	for {
		err := s.upgradeReady()
		if err == nil || err.Error() != "parent hasn't exited" {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// upgradeReady is Upgrade when Ready has come to the library's notice.
func (s *scene) upgradeReady() error {
	for {
		err := s.Upgrade()
		if err == nil || err.Error() != "process is not ready yet" {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// new makes the Upgrader.
func (s *scene) new(opts ...tableflip.Options) {
	s.Upgrader = get(tableflip.New(append(opts, tableflip.Options{})[0]))
}

// ready calls Ready once.
func (s *scene) ready() {
	if !s.isReady {
		s.isReady = true
		must(s.Ready())
	}
}

// say tells what a generation sees.
func (s *scene) say(format string, args ...any) {
	fmt.Printf("%d: %s\n", s.gen, fmt.Sprintf(format, args...))
}

// must ends a scene that does not get so far.
func must(err error) {
	if err != nil {
		log.Panicf("generation %d: %v", line.Generation, err)
	}
}

// get is must for a call with a result.
func get[T any](v T, err error) T {
	must(err)
	return v
}

// outcome is what is said of an error.
func outcome(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

// found is what is said of the result of a look-up.
func found(is bool, err error) string {
	switch {
	case err != nil:
		return "error"
	case is:
		return "found"
	}
	return "none"
}

// ctx ends when a scene has lasted too long.
func ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	time.AfterFunc(2*patience, cancel)
	return ctx
}

// shortCtx ends when a wait has lasted long enough to be one.
func shortCtx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), shortly)
	time.AfterFunc(patience, cancel)
	return ctx
}

// path returns the path of a file of the scene.
func (s *scene) path(name string) string { return filepath.Join(s.dir, name) }

// mark lets await return in another generation.
func (s *scene) mark(name string) { must(os.WriteFile(s.path(name+".mark"), nil, 0o600)) }

func (s *scene) await(name string) {
	for end := time.Now().Add(patience); s.exists(name+".mark") != "there"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			log.Panicf("generation %d: %s has not come", s.gen, name)
		}
	}
}

// exists reports whether a file is there.
func (s *scene) exists(name string) string {
	if _, err := os.Lstat(s.path(name)); err != nil {
		return "gone"
	}
	return "there"
}

// file writes a file and opens it.
func (s *scene) file(name, text string) *os.File {
	must(os.WriteFile(s.path(name), []byte(text), 0o600))
	return get(os.Open(s.path(name)))
}

// text reads a file from its beginning.
func text(f *os.File) string {
	get(f.Seek(0, io.SeekStart))
	return string(get(io.ReadAll(f)))
}

// note keeps a value for a later generation.
func note(name, value string) { must(os.Setenv("TEST_"+name, value)) }

// noted returns it.
func noted(name string) string { return os.Getenv("TEST_" + name) }

func port(a net.Addr) string {
	_, port, err := net.SplitHostPort(a.String())
	must(err)
	return port
}

// accepts says whether a listener accepts a connection that is there.
func accepts(ln net.Listener) string {
	c, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
	if err != nil {
		return "refuses"
	}
	defer c.Close()
	// An error of SetDeadline is one of Accept, too.
	_ = ln.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(shortly))
	a, err := ln.Accept()
	if err != nil {
		return "accepts nothing"
	}
	a.Close()
	return "accepts"
}
