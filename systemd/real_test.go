//go:build linux

package systemd_test

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func init() { mains["mydaemon"] = daemonMain }

var raceDetector bool

// insideVar is set in the environment of the tests that run under the systemd
// that TestRealSystemd boots.
const insideVar = "ECDYSIS_TEST_INSIDE"

const script = `
ln -s /opt/test/inside /usr/local/bin/mydaemon
export ` + insideVar + `=1
exec ./inside -test.v -test.timeout 100s -test.run "^TestInside$/$1"
`

// TestRealSystemd boots a systemd in namespaces of its own, and runs TestInside
// there. All parts run at the same time, because each is little work and much
// waiting. The test program is built without cgo, so that it does not need this
// system's libraries. So it has no race detector.
func TestRealSystemd(t *testing.T) {
	if raceDetector {
		t.Skip("the processes under test are built without the race detector, so this would repeat the same test")
	}
	real := realSystemd(t)
	bin, units := t.TempDir(), t.TempDir()
	build(t, "test", "-c", "-o", filepath.Join(bin, "inside"), ".")
	for _, s := range services {
		s.write(t, units)
	}
	journal := filepath.Join(t.TempDir(), "journal")
	part := ""
	if _, sub, ok := strings.Cut(flagRun(), "/"); ok {
		part = sub
	}
	out, err := exec.Command(real, "-j", journal, bin, units, scriptFile(t, script), part).CombinedOutput()
	t.Logf("inside: %v\n%s", err, out)
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestInside")) {
		j, _ := os.ReadFile(journal)
		t.Errorf("the journal:\n%s", j)
		t.FailNow()
	}
}

// realSystemd returns the program that boots a systemd. If that does not work
// here, it skips the test with the reason, or fails it in CI.
func realSystemd(t *testing.T) string {
	t.Helper()
	real, err := filepath.Abs("testdata/real-systemd.sh")
	if err != nil {
		t.Fatal(err)
	}
	skip := t.Skip
	if os.Getenv("CI") != "" {
		skip = t.Fatal
	}
	if os.Geteuid() != 0 {
		skip("only root can boot a systemd")
	}
	root := cmp.Or(os.Getenv("SDROOT"), "/tmp/sdroot") // the default of real-systemd.sh
	if _, err := os.Stat(root + "/.realsd-ok"); err != nil {
		if _, err := exec.LookPath("debootstrap"); err != nil {
			skip("debootstrap, which makes the file system for a systemd, is not installed")
		}
	}
	var stderr bytes.Buffer
	cmd := exec.Command(real, "-", "-", scriptFile(t, "systemctl --version"))
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 125 {
		skip("no systemd can be booted here: " + stderr.String())
	}
	if err != nil {
		t.Fatalf("booting a systemd: %v, %s", err, stderr.String())
	}
	line, _, _ := strings.Cut(string(out), "\n")
	t.Log(line)
	return real
}

// docs/systemd.md has all units, as they are tested.
func TestUnits(t *testing.T) {
	page, err := os.ReadFile("../docs/systemd.md")
	if err != nil {
		t.Fatal(err)
	}
	quoted := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?ms)^```ini\n# (\\S+)\n(.*?)^```$").FindAllSubmatch(page, -1) {
		name := string(m[1])
		quoted[name] = true
		unit, err := os.ReadFile("testdata/units/" + name)
		if err != nil {
			t.Error(err)
		} else if !bytes.Equal(unit, m[2]) {
			t.Errorf("docs/systemd.md has another %s than testdata/units", name)
		}
	}
	list, err := os.ReadDir("testdata/units")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if !quoted[e.Name()] {
			t.Errorf("docs/systemd.md lacks %s", e.Name())
		}
	}
}

func scriptFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// write writes the unit, its drop-in and the daemon's configuration.
func (s *service) write(t *testing.T, dir string) {
	t.Helper()
	put := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{".service", ".socket"} {
		f, err := os.Open("testdata/units/" + s.base + kind)
		if errors.Is(err, os.ErrNotExist) || kind == ".socket" && s.socket == "" {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		unit, err := io.ReadAll(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		put(s.name+kind, string(unit))
		dropIn := "[Unit]\nStartLimitIntervalSec=0\n[Service]\nEnvironment=MYDAEMON_CONF=/run/" + s.name + ".conf\n" + s.dropIn
		if kind == ".socket" {
			dropIn = s.socket
		}
		put(s.name+kind+".d/test.conf", dropIn)
	}
}
