package systemd_test

import (
	"os"
	"path/filepath"
	"testing"
)

// mains are what this test binary is by other names.
var mains = map[string]func(){}

func TestMain(m *testing.M) {
	if f, ok := mains[filepath.Base(os.Args[0])]; ok {
		f()
		return
	}
	os.Exit(m.Run())
}
