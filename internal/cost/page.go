//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// WritePage renews the tables of cost.md in the directory, and its pictures.
// The page has a place for each table, from a line "<!-- table NAME -->" to a
// line "<!-- end -->", and one for the date and the machine.
func (r *Result) WritePage(dir string) error {
	path := filepath.Join(dir, "cost.md")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	page := string(b)
	run := fmt.Sprintf("Measured on %s: %s.\n", r.Date.Format("2006-01-02"), r.Machine)
	for _, s := range r.Skipped {
		run += "Not measured: " + s + ".\n"
	}
	if page, err = replace(page, "run", run); err != nil {
		return err
	}
	for _, t := range r.tables() {
		if page, err = replace(page, t.name, t.markdown()); err != nil {
			return err
		}
	}
	return errors.Join(os.WriteFile(path, []byte(page), 0o644), r.Draw(dir))
}

// replace puts text in a place of the page.
func replace(page, name, text string) (string, error) {
	begin := "<!-- table " + name + " -->\n"
	before, rest, ok := strings.Cut(page, begin)
	_, after, closed := strings.Cut(rest, "<!-- end -->\n")
	if !ok || !closed {
		return "", fmt.Errorf("the page has no place for the table %q", name)
	}
	return before + begin + "\n" + text + "\n<!-- end -->\n" + after, nil
}
