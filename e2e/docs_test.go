package e2e

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// docs/security.md names what keeps each statement true: a test, or a function
// or variable and its file. All of them must be there.
func TestSecurityPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/security.md")
	if errors.Is(err, os.ErrNotExist) && os.Getenv("CI") == "" {
		t.Skip("the sources are not here: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	tests := make(map[string]bool)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func ((Test|Fuzz)\w+)\(`).FindAllSubmatch(b, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`((Test|Fuzz)[A-Z]\\w*)`").FindAllSubmatch(page, -1)
	for _, m := range names {
		if !tests[string(m[1])] {
			t.Errorf("there is no %s", m[1])
		}
	}
	places := regexp.MustCompile("`(\\w+)`\\s+(?:\\(|in )([\\w/]+\\.go)").FindAllSubmatch(page, -1)
	for _, m := range places {
		b, err := os.ReadFile(filepath.Join("..", string(m[2])))
		if err != nil {
			t.Error(err)
			continue
		}
		if !regexp.MustCompile(`(?m)^(func (\([^)]*\) )?|\s+)` + string(m[1]) + `\b`).Match(b) {
			t.Errorf("there is no %s in %s", m[1], m[2])
		}
	}
	if len(names) < 50 || len(places) < 30 {
		t.Errorf("%d tests and %d places were looked up; want more", len(names), len(places))
	}
}
