package servertest

import (
	"debug/elf"
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

const root = "../.."

// pages returns the documentation, by its paths in the repository.
func pages(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	list := map[string]string{}
	for _, p := range append(paths, root+"/README.md", root+"/CHANGELOG.md") {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		list[strings.TrimPrefix(p, root+"/")] = string(text)
	}
	return list
}

// guides are the pages that one works from, and the packages whose documentation
// names them.
var guides = map[string][]string{
	"control.md":        {"."},
	"handing-on.md":     {"."},
	"servers.md":        {"drain"},
	"web.md":            {"httpdrain"},
	"udp.md":            {"udpflow"},
	"systemd.md":        {"systemd"},
	"containers.md":     {"keeper"},
	"supervisors.md":    {"keeper"},
	"embedded.md":       {"keeper"},
	"from-tableflip.md": {"tableflip"},
}

// A guide begins with code, and the packages that it is about name it.
func TestGuides(t *testing.T) {
	t.Parallel()
	all := pages(t)
	for name, packages := range guides {
		page, ok := all["docs/"+name]
		if !ok {
			t.Errorf("there is no docs/%s", name)
		}
		begin, _, _ := strings.Cut(page, "\n## ")
		if !strings.Contains(begin, "\n```") && !strings.HasPrefix(name, "from-") {
			t.Errorf("docs/%s has no code before its first section", name)
		}
		for _, p := range packages {
			if !strings.Contains(packageDoc(t, p), "docs/"+name) {
				t.Errorf("the documentation of package %s does not name docs/%s", p, name)
			}
		}
	}
}

// packageDoc returns the package comments of a directory.
func packageDoc(t *testing.T, dir string) (doc string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatal(dir, files, err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		doc += file.Doc.Text()
	}
	return doc
}

// Go code in the documentation is that of programs which are compiled and run.
// The line above names the file.
func TestCode(t *testing.T) {
	t.Parallel()
	named := map[string]bool{}
	for page, text := range pages(t) {
		blocks := strings.Split(text, "\n```go\n")
		for i, block := range blocks[1:] {
			if page == "README.md" && i == 0 {
				continue // the package example, see TestReadme of package ecdysis
			}
			above := blocks[i][strings.LastIndex(blocks[i], "\n")+1:]
			name := strings.TrimSuffix(strings.TrimPrefix(above, "<!-- "), " -->")
			program, err := os.ReadFile(filepath.Join(root, name))
			if err != nil {
				t.Errorf("%s: the line above a block of code names no file: %v", page, err)
				continue
			}
			named[filepath.Base(filepath.Dir(name))] = true
			lines, _, _ := strings.Cut(block, "\n```")
			if !contains(string(program), lines) {
				t.Errorf("%s: %s does not have these lines:\n%s", page, name, lines)
			}
		}
	}
	for _, module := range []string{"redis", "dns", "ssh", "smtp", "grpc", "fasthttp", "websocket"} {
		if !named[module] {
			t.Errorf("no page has code of %s", module)
		}
	}
}

// contains reports whether a program has these lines, at any indentation.
func contains(program, lines string) bool {
	for indent := "\n"; len(indent) < 5; indent += "\t" {
		indented := strings.ReplaceAll("\n"+lines+"\n", "\n", indent)
		indented = strings.TrimRight(strings.ReplaceAll(indented, indent+"\n", "\n\n"), "\t")
		if strings.Contains(program, indented) {
			return true
		}
	}
	return false
}

var (
	fences    = regexp.MustCompile("(?ms)^```.*?^```$")
	spans     = regexp.MustCompile("`[^`\n]+`")
	links     = regexp.MustCompile(`\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"`)
	headings  = regexp.MustCompile(`(?m)^#+ (.*)$`)
	linkTexts = regexp.MustCompile(`\[([^]]*)\]\([^)]*\)`)
)

// anchors returns the names by which GitHub finds the headings of a page.
func anchors(text string) (list []string) {
	for _, m := range headings.FindAllStringSubmatch(fences.ReplaceAllString(text, ""), -1) {
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, linkTexts.ReplaceAllString(m[1], "$1"))
		unique := name
		for n := 1; slices.Contains(list, unique); n++ {
			unique = fmt.Sprintf("%s-%d", name, n)
		}
		list = append(list, unique)
	}
	return list
}

// Links within the repository lead to files and headings that exist.
func TestLinks(t *testing.T) {
	t.Parallel()
	all := pages(t)
	found := 0
	for page, text := range all {
		text = spans.ReplaceAllString(fences.ReplaceAllString(text, ""), "")
		for _, m := range links.FindAllStringSubmatch(text, -1) {
			link := m[1] + m[2]
			if strings.Contains(link, "://") {
				continue
			}
			found++
			path, anchor, hasAnchor := strings.Cut(link, "#")
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s: the link %s leads nowhere", page, link)
			} else if hasAnchor && !slices.Contains(anchors(all[target]), anchor) {
				t.Errorf("%s: %s has no heading for the link %s", page, target, link)
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d links were found", found)
	}
}

// filesNamed are paths in the repository, within code.
var filesNamed = regexp.MustCompile(`(?:^|[\s(` + "`" + `"'])(?:\./)?((?:\.ci|docs|e2e|examples|internal|testdata|drain|httpdrain|keeper|systemd|tableflip|udpflow)/[\w./-]*\w)`)

// Commands and names of files in the documentation name files that exist. So do
// the comments of packages.
func TestFiles(t *testing.T) {
	t.Parallel()
	check := func(where, text string) (found int) {
		for _, m := range filesNamed.FindAllStringSubmatch(text, -1) {
			found++
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("%s: there is no %s", where, m[1])
			}
		}
		return found
	}
	found := 0
	for page, text := range pages(t) {
		for _, code := range append(fences.FindAllString(text, -1), spans.FindAllString(text, -1)...) {
			found += check(page, code)
		}
	}
	if found < 5 {
		t.Errorf("only %d names were found", found)
	}
	for _, dir := range []string{".", "drain", "httpdrain", "keeper", "systemd", "tableflip", "udpflow"} {
		check("package "+dir, packageDoc(t, dir))
	}
}

// The commands of docs/embedded.md compile the README's daemon for another
// processor, without a network.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	all := pages(t)
	_, commands, _ := strings.Cut(all["docs/embedded.md"], "\n```sh\n")
	commands, _, _ = strings.Cut(commands, "\n```")
	_, program, _ := strings.Cut(all["README.md"], "\n```go\n")
	program, _, _ = strings.Cut(program, "\n```")
	here, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	module, err := os.ReadFile(root + "/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(root + "/go.sum")
	if err != nil {
		t.Fatal(err)
	}
	const path = "github.com/ecdysis-go/ecdysis"
	mod := strings.Replace(string(module), "module "+path, "module mydaemon", 1) +
		fmt.Sprintf("\nrequire %s v0.0.0\nreplace %[1]s => %s\n", path, here)
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": mod, "go.sum": string(sums), "main.go": program + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "-e", "-c", commands)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOPROXY=off", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s\n%v\n%s", commands, err, out)
	}
	f, err := elf.Open(filepath.Join(dir, "mydaemon"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != elf.EM_ARM || f.Section(".interp") != nil {
		t.Errorf("it is for %v and has the sections %v; want a static program for ARM", f.Machine, f.Sections)
	}
}
