package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// The two import paths.
const (
	theirPath = "github.com/cloudflare/tableflip"
	ourPath   = "github.com/ecdysis-go/ecdysis/tableflip"
)

// A lib is one of the two libraries.
type lib string

const (
	theirs lib = "theirs"
	ours   lib = "ours"
)

var binDir string // made by TestMain

func TestMain(m *testing.M) {
	// The programs inherit what the tests give them, and nothing that these were
	// started with.
	for fd := 3; fd < 1024; fd++ {
		syscall.CloseOnExec(fd)
	}
	var err error
	if binDir, err = os.MkdirTemp("", "tableflip"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(binDir)
	os.Exit(status)
}

// flip returns the arguments by which the go command reads the module's files as
// if they imported our package in the place of theirs. There are none for
// theirs, which is what the files say.
func flip(l lib) ([]string, error) {
	if l == theirs {
		return nil, nil
	}
	name := filepath.Join(binDir, "overlay.json")
	overlay := map[string]map[string]string{"Replace": {}}
	files, err := filepath.Glob("programs/*/*.go")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		flipped := bytes.ReplaceAll(b, []byte(`"`+theirPath), []byte(`"`+ourPath))
		if bytes.Equal(b, flipped) {
			continue
		}
		abs, err := filepath.Abs(file)
		if err != nil {
			return nil, err
		}
		to := filepath.Join(binDir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(to, flipped, 0o600); err != nil {
			return nil, err
		}
		overlay["Replace"][abs] = to
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		return nil, err
	}
	return []string{"-overlay", name}, os.WriteFile(name, b, 0o600)
}

var builds = struct {
	sync.Mutex
	flip  map[lib][]string
	ready map[string]func() error
}{flip: make(map[lib][]string), ready: make(map[string]func() error)}

// goTool runs the go command on the files as they are for a library.
func goTool(l lib, command string, args ...string) ([]byte, error) {
	builds.Lock()
	flags, ok := builds.flip[l]
	if !ok {
		var err error
		if flags, err = flip(l); err != nil {
			builds.Unlock()
			return nil, err
		}
		builds.flip[l] = flags
	}
	builds.Unlock()
	return exec.Command("go", append(append([]string{command}, flags...), args...)...).CombinedOutput()
}

// build returns the executable of a program with a library.
func build(t *testing.T, l lib, program string) string {
	t.Helper()
	name := filepath.Join(binDir, program+"-"+string(l))
	builds.Lock()
	f := builds.ready[name]
	if f == nil {
		f = sync.OnceValue(func() error {
			out, err := goTool(l, "build", "-o", name, "./programs/"+program)
			if err != nil {
				return fmt.Errorf("go build %s with %s: %w\n%s", program, l, err, out)
			}
			return nil
		})
		builds.ready[name] = f
	}
	builds.Unlock()
	if err := f(); err != nil {
		t.Fatal(err)
	}
	return name
}
