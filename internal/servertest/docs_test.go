package servertest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The lines of code in docs/servers.md are those of the programs which are
// tested, whose names stand above them.
func TestDocs(t *testing.T) {
	t.Parallel()
	const root = "../.."
	page, err := os.ReadFile(root + "/docs/servers.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(page), "\n```go\n")
	if len(blocks) < 2 {
		t.Fatal("the page has no code")
	}
	named := map[string]bool{}
	for i, block := range blocks[1:] {
		before := blocks[i] // ends with the line above
		name := strings.TrimSuffix(strings.TrimPrefix(before[strings.LastIndex(before, "\n")+1:], "<!-- "), " -->")
		named[filepath.Base(filepath.Dir(name))] = true
		program, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		lines, _, _ := strings.Cut(block, "\n```")
		indented := strings.ReplaceAll("\n"+lines, "\n", "\n\t")
		if !strings.Contains(string(program), strings.ReplaceAll(indented, "\n\t\n", "\n\n")+"\n") {
			t.Errorf("%s does not have these lines:\n%s", name, lines)
		}
	}
	for _, module := range []string{"redis", "dns", "ssh", "smtp", "grpc", "fasthttp", "websocket"} {
		if !named[module] {
			t.Errorf("the page has no code of %s", module)
		}
	}
}
