package ecdysis

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// errorf says what fmt.Errorf says, and wraps what it wraps.
func TestErrorf(t *testing.T) {
	t.Parallel()
	closed := fmt.Errorf("it is closed: %w", os.ErrClosed)
	for _, c := range []struct {
		format string
		args   []any
	}{
		{"no verb", nil},
		{"%s", []any{"a % b"}},
		{"%s %s", []any{StepInit, os.Interrupt}},
		{"%d of %d, %d, %d", []any{-1, int64(1) << 40, uint32(1) << 31, uint64(7)}},
		{"within %v: %v", []any{5 * time.Second, io.EOF}},
		{"%q %q", []any{"a\n\"b\"", EventReady}},
		{"a frame %q; want %q", []any{byte('H'), 'T'}},
		{"a %T and a %T", []any{os.Stdin, 1}},
		{"a %T, %v", []any{nil, nil}},
		{"%v", []any{(*os.PathError)(nil)}},
		{"%s %q: %w", []any{"file", "x", closed}},
		{"%w (then %w)", []any{closed, io.EOF}},
		{"%w: %s", []any{closed, ""}},
	} {
		got, want := errorf(c.format, c.args...), fmt.Errorf(c.format, c.args...)
		if got.Error() != want.Error() {
			t.Errorf("errorf(%q) is %q; want %q", c.format, got, want)
		}
		for _, target := range []error{os.ErrClosed, io.EOF} {
			if errors.Is(got, target) != errors.Is(want, target) {
				t.Errorf("errorf(%q): errors.Is(%v) is %v", c.format, target, errors.Is(got, target))
			}
		}
		if got, want := errors.Unwrap(got), errors.Unwrap(want); got != want {
			t.Errorf("errorf(%q) unwraps to %v; want %v", c.format, got, want)
		}
	}
}

// Every call of errorf has an argument for each verb, and no other verbs than
// errorf knows. For fmt.Errorf, go vet would check it.
func TestErrorfCalls(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(files, "errorf.go") {
		t.Skip("the source is not here: the test's binary runs alone, in an emulated machine for example")
	}
	verbs := regexp.MustCompile(`%.`)
	calls := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if id, ok := call.Fun.(*ast.Ident); !ok || id.Name != "errorf" {
				return true
			}
			calls++
			at := fset.Position(call.Pos())
			lit, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Errorf("%s: the format is no literal", at)
				return true
			}
			format, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			found := verbs.FindAllString(format, -1)
			if len(found) != len(call.Args)-1 {
				t.Errorf("%s: %d verbs and %d arguments", at, len(found), len(call.Args)-1)
			}
			for _, v := range found {
				if !strings.Contains("%s%d%v%q%T%w", v) {
					t.Errorf("%s: errorf does not know %s", at, v)
				}
			}
			return true
		})
	}
	if calls < 100 {
		t.Errorf("%d calls were found; there are more", calls)
	}
}
