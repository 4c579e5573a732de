package systemd_test

import (
	"os"
	"path/filepath"
	"testing"
)

// mains are the programs that this test binary runs, by the name it is run under.
var mains = map[string]func(){}

func TestMain(m *testing.M) {
	if f, ok := mains[filepath.Base(os.Args[0])]; ok {
		f()
		return
	}
	os.Exit(m.Run())
}
