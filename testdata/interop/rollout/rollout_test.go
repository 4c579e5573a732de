package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A host is a directory in which an echod runs.
type host struct {
	*proctest.Program
	name, dir, address string
}

// hosts starts an echod for each name, below one directory.
func hosts(t *testing.T, root string, names ...string) (list []*host) {
	t.Helper()
	program := build(t)
	for _, name := range names {
		h := &host{name: name, dir: filepath.Join(root, name)}
		for _, d := range []string{"bin", "run"} {
			if err := os.MkdirAll(filepath.Join(h.dir, d), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		install(t, h.program(), program)
		install(t, filepath.Join(h.dir, "ask"), program)
		h.Program = proctest.Run(t, exec.Command(h.program(), "-tcp", "127.0.0.1:0", "-control", filepath.Join(h.dir, "run")))
		h.address = h.Await(`listening on tcp (\S+)`)[1]
		h.Ready(0)
		list = append(list, h)
	}
	return list
}

func (h *host) program() string { return filepath.Join(h.dir, "bin/echod") }

func build(t *testing.T) (program []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "echod")
	cmd := exec.Command("go", "build", "-o", path, "github.com/ecdysis-go/ecdysis/examples/echod")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return program
}

func install(t *testing.T, path string, program []byte) {
	t.Helper()
	syscall.ForkLock.RLock() // or a process that another test starts has the file open for writing
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
}

// load asks a host over and over until the test calls end, which fails the test
// if one request was not answered.
func (h *host) load() (end func()) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	answered := 0
	var failed error
	wg.Go(func() {
		for ; failed == nil; answered++ {
			select {
			case <-stop:
				return
			default:
				failed = h.ask()
			}
		}
	})
	return func() {
		h.T.Helper()
		close(stop)
		if wg.Wait(); failed != nil || answered == 0 {
			h.T.Errorf("%s: %v after %d answers", h.name, failed, answered)
		}
	}
}

func (h *host) ask() error {
	c, err := net.DialTimeout("tcp", h.address, proctest.Patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(proctest.Patience))
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 5))
	return err
}

// testRollout rolls out a version that starts, and one that does not. run
// returns the command that does it.
func testRollout(t *testing.T, run func(root, program string, names []string) *exec.Cmd) {
	root := proctest.ShortDir(t)
	names := []string{"web1", "web2"}
	list := hosts(t, root, names...)
	rollOut := func(program []byte) (status int, out string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "echod")
		install(t, path, program)
		b, err := run(root, path, names).CombinedOutput()
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		} else if err != nil {
			status = exit.ExitCode()
		}
		return status, string(b)
	}
	var ends []func()
	for _, h := range list {
		ends = append(ends, h.load())
	}

	next := append(build(t), "another version"...) // which the system does not look at
	if status, out := rollOut(next); status != 0 {
		t.Fatalf("exit status %d\n%s", status, out)
	}
	for _, h := range list {
		h.Ready(1)
	}

	status, out := rollOut([]byte("#!/bin/sh\nexit 7\n"))
	if status == 0 || !strings.Contains(out, "exit status 7") {
		t.Errorf("of a version that does not start: exit status %d\n%s", status, out)
	}
	list[0].Await("upgrade failed .*exit status 7")
	for _, end := range ends {
		end()
	}
	for _, h := range list {
		if b, err := os.ReadFile(h.program()); err != nil || !bytes.Equal(b, next) {
			t.Errorf("%s: the version that does not start is in its place, %v", h.name, err)
		}
	}
	if said := strings.Join(list[1].Said(), "\n"); strings.Contains(said, "upgrade failed") {
		t.Errorf("the second host was not left alone:\n%s", said)
	}
}

func TestAnsible(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("ansible-playbook"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	testRollout(t, func(root, program string, names []string) *exec.Cmd {
		inventory := "[echod]\n"
		for _, name := range names {
			inventory += fmt.Sprintf("%s ansible_connection=local ansible_python_interpreter=auto_silent dir=%s\n", name, filepath.Join(root, name))
		}
		path := filepath.Join(root, "inventory")
		if err := os.WriteFile(path, []byte(inventory), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("ansible-playbook", "-i", path, "-e", "new="+program,
			"-e", `{"program": "{{ dir }}/bin/echod", "upgrade": "{{ dir }}/ask -control {{ dir }}/run -upgrade"}`, "rollout.yml")
		cmd.Env = append(os.Environ(), "ANSIBLE_HOME="+filepath.Join(root, "ansible"), "ANSIBLE_LOCAL_TEMP="+filepath.Join(root, "tmp"),
			"ANSIBLE_REMOTE_TEMP="+filepath.Join(root, "tmp"), "LC_ALL=C.UTF-8")
		return cmd
	})
}

// The hosts of the loop are directories here: the two commands by which it
// reaches them put those in the place of the paths on a host.
func TestLoop(t *testing.T) {
	t.Parallel()
	const paths = `s,/usr/local/bin,%[1]s/$host/bin,g;s,/run/echod,%[1]s/$host/run,g`
	testRollout(t, func(root, program string, names []string) *exec.Cmd {
		for name, script := range map[string]string{
			"ssh": "host=$1\nexec sh -c \"$(printf %%s \"$2\" | sed \"" + paths + "\")\"\n",
			"scp": "host=${3%%%%:*}\nexec cp \"$2\" \"$(printf %%s \"${3#*:}\" | sed \"" + paths + "\")\"\n",
		} {
			install(t, filepath.Join(root, name), []byte("#!/bin/sh\n"+fmt.Sprintf(script, root)))
		}
		cmd := exec.Command("./rollout.sh", append([]string{program}, names...)...)
		cmd.Env = append(os.Environ(), "PATH="+root+":"+os.Getenv("PATH"))
		return cmd
	})
}

// The metrics of a daemon tell its generation, and what has failed since.
func TestMetrics(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "rollout")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	p := proctest.Run(t, exec.Command(path))
	url := "http://" + p.Await(`listening on (\S+)`)[1]
	first := p.Ready(0)
	want := func(lines ...string) {
		t.Helper()
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		for _, line := range lines {
			if !regexp.MustCompile(`(?m)^`+line+`$`).Match(b) || err != nil {
				t.Fatalf("%v, no line %s in\n%s", err, line, b)
			}
		}
	}
	want(`ecdysis_generation 0`, `ecdysis_events_total\{event="ready"\} 1`)
	if err := first.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	second := p.Ready(1)
	p.Await("upgraded by signal")
	http.DefaultClient.CloseIdleConnections()
	want(`ecdysis_generation 1`, `ecdysis_events_total\{event="ready"\} 1`)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := second.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	p.Await("upgrade failed")
	want(`ecdysis_generation 1`, `ecdysis_events_total\{event="upgrade failed"\} 1`)
	http.DefaultClient.CloseIdleConnections()
}

// docs/rollout.md shows what is tested here.
func TestPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../../docs/rollout.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rollout.yml", "rollout.sh"} {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(page, b) {
			t.Errorf("the page does not have all of %s: %v", name, err)
		}
	}
	program, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	_, code, _ := strings.Cut(string(page), "\n```go\n")
	if code, _, _ = strings.Cut(code, "```"); code == "" || !bytes.Contains(program, []byte(code)) {
		t.Errorf("main.go does not have the lines\n%s", code)
	}
}
