// Package skewtest builds daemons of package proctest with other versions of
// package ecdysis, which do not exist yet: the sources are copied, changed and
// built while a test runs. It also has the calls that such a daemon and a test
// share.
package skewtest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A Change replaces a text, which must be in the file exactly once.
type Change struct{ File, Old, New string }

// ThisVersion is the version that a daemon says it is unless a Change says
// otherwise.
const ThisVersion = "this version"

const version = ThisVersion

// Newer are the changes to a later minor version: what it sends has more fields,
// more records and more frames than this version knows, and it hands on something
// of an unknown kind. Its variable and its answers have more fields, too.
func Newer() []Change {
	return []Change{
		is("newer"),
		{"frame.go", "func endRecord(b []byte) []byte { return append(b, 0) }", `
// Every record has a field that is unknown, and one that is no field.
func endRecord(b []byte) []byte {
	b = appendField(b, "colour", "mauve")
	return append(append(appendLength(b, 8), "nonsense"...), 0)
}`},
		{"frame.go", "func endFrame(b []byte) []byte {", `
func endFrame(b []byte) []byte {
	if b[0] != frameSockets { // one in addition to what may be there
		b = endRecord(appendField(b, "another", "record"))
	}`},
		{"stream.go", "func (s *stream) sendFrames(b []byte, fds []int) error {", `
// sendFrames sends frames of an unknown kind wherever an older peer has to ignore
// them. FINAL stays the last one of a predecessor.
func (s *stream) sendFrames(b []byte, fds []int) error {
	err := s.sendKnown(b, fds)
	if err == nil && (!s.inherits && b[0] != frameFinal || s.inherits && b[0] == frameDone) {
		_ = s.sendKnown(makeFrame('z', []record{{"later=1"}, {"x"}}), nil)
		_ = s.sendKnown(makeFrame('y', nil), nil)
	}
	return err
}

func (s *stream) sendKnown(b []byte, fds []int) error {`},
		{"upgrade.go", "a.rest = append(a.rest, a.handed...)", `a.rest = append(append(a.rest, hologram()), a.handed...)`},
		{"upgrade.go", "// A stage is how far an attempt has come.", `
var null *os.File

// hologram is something of an unknown kind.
func hologram() *entry {
	if null == nil {
		var err error
		if null, err = os.Open(os.DevNull); err != nil {
			panic(err)
		}
	}
	e := &entry{wire: wire{kind: "hologram", name: "later"}}
	e.setBare(int(null.Fd()))
	return e
}

// A stage is how far an attempt has come.`},
		{"control.go", "func okLine(e *Event) string {", `
func okLine(e *Event) string { return olderLine(e) + " colour=mauve" }

func olderLine(e *Event) string {`},
		{"exec_unix.go", `envName+"=fd=3 "+peer`, `envName+"=later=1 fd=3 "+peer+" colour=mauve"`},
	}
}

// Hologram is what a successor finds unclaimed if its predecessor is Newer.
const Hologram = "hologram later"

// OtherMajor are the changes to a version of the protocol with which this one
// cannot work together.
func OtherMajor() []Change {
	return []Change{
		is("other major"),
		{"frame.go", `protocolVersion = "1"`, `protocolVersion = "2"`},
	}
}

// is lets a daemon say what it is.
func is(name string) Change {
	return Change{"internal/skewtest/skewtest.go", "\nconst version = ThisVersion\n", fmt.Sprintf("\nconst version = %q\n", name)}
}

// Build builds the daemon with these changes, and returns the program's path.
func Build(t *testing.T, changes []Change) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("the go command builds another version: ", err)
	}
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	from, to := filepath.Dir(strings.TrimSpace(string(out))), filepath.Join(t.TempDir(), "module")
	files := []string{filepath.Join(from, "go.mod"), filepath.Join(from, "go.sum")}
	for _, dir := range []string{".", "internal/proctest", "internal/skewtest", "internal/skewtest/daemon"} {
		list, err := filepath.Glob(filepath.Join(from, dir, "*.go"))
		if err != nil || len(list) == 0 {
			t.Fatalf("no sources in %s, %v", filepath.Join(from, dir), err)
		}
		files = append(files, list...)
	}
	for _, file := range files {
		name, err := filepath.Rel(from, file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, c := range changes {
			if c.File != filepath.ToSlash(name) {
				continue
			}
			if n := strings.Count(text, c.Old); n != 1 {
				t.Fatalf("%s has %d times %q, which package skewtest changes to make another version; want it once. Let the Change name what is there now", name, n, c.Old)
			}
			text = strings.Replace(text, c.Old, c.New, 1)
		}
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "daemon")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "./internal/skewtest/daemon")
	cmd.Dir = to
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "PWD="+to)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build of another version: %v\n%s", err, out)
	}
	return path
}

// Version tells which version a daemon is.
var Version = proctest.Define("version", func(*proctest.Daemon, proctest.None) (string, error) { return version, nil })

const text = "what is handed on"

// Sends, planned AtStart, lets a process send a state.
var Sends = proctest.Define("sends", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	d.Options.SendState = func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	}
	return proctest.None{}, nil
})

// kept is what must not be closed by the garbage collector.
var kept struct{ toChild *net.UnixConn }

// Carries, planned AtNew, makes a file, two ends of a connection and a pair, and
// hands them on. A successor claims what the predecessor has handed on so, the
// state too, and tries all of it.
var Carries = proctest.Define("carries", func(d *proctest.Daemon, _ proctest.None) (proctest.None, error) {
	return proctest.None{}, carry(d)
})

func carry(d *proctest.Daemon) error {
	u := d.U
	toParent, toChild, err := u.DatagramPair("pair")
	if kept.toChild = toChild; toChild == nil || errors.Is(err, fs.ErrNotExist) == u.HasParent() {
		return fmt.Errorf("pair: %w", err)
	}
	var file *os.File
	var near, far net.Conn
	if !u.HasParent() {
		if file, err = os.CreateTemp("", "skew"); err != nil {
			return err
		}
		os.Remove(file.Name())
		if _, err := file.WriteString(text); err != nil {
			return err
		}
		if near, far, err = proctest.NewSocketPair(syscall.SOCK_STREAM); err != nil {
			return err
		}
	} else {
		defer toParent.Close()
		if _, err := toParent.Write([]byte(text)); err != nil {
			return fmt.Errorf("pair: %w", err)
		}
		if err := has("state", u.State()); err != nil {
			return err
		}
		if file, err = u.File("file"); err != nil {
			return err
		}
		if near, err = u.Conn("near"); err != nil {
			return err
		}
		if far, err = u.Conn("far"); err != nil {
			return err
		}
	}
	defer file.Close()
	defer near.Close()
	defer far.Close()
	if err := has("file", io.NewSectionReader(file, 0, 1<<10)); err != nil {
		return err
	}
	if _, err := near.Write([]byte(text)); err != nil {
		return err
	}
	if err := has("connection", io.LimitReader(far, int64(len(text)))); err != nil {
		return err
	}
	return errors.Join(u.AddFile("file", file), u.AddConn("near", near), u.AddConn("far", far))
}

func has(what string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil || string(b) != text {
		return fmt.Errorf("%s: %q, %w; want %q", what, b, err, text)
	}
	return nil
}

// Hears returns what a successor has sent to this process by the pair.
var Hears = proctest.Define("hears", func(*proctest.Daemon, proctest.None) (string, error) {
	b := make([]byte, 1<<10)
	n, err := kept.toChild.Read(b)
	return string(b[:n]), err
})

// Text is what Hears returns.
const Text = text
