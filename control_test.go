package ecdysis_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// controlled is a spec of a daemon with all control sockets, in dir.
func controlled(dir string) spec {
	s := tcp()
	s.Wait = true
	s.Options.UpgradeSocket = filepath.Join(dir, "upgrade")
	s.Options.StopSocket = filepath.Join(dir, "stop")
	s.Options.PartialStopSocket = filepath.Join(dir, "partial")
	s.Options.TakeoverSocket = filepath.Join(dir, "take")
	return s
}

// request asks a control socket, in the background, and returns what waits for
// the answer.
func request(t *testing.T, path string) func() (string, error) {
	t.Helper()
	type result struct {
		line string
		err  error
	}
	ch := make(chan result, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	go func() {
		defer cancel()
		line, err := ecdysis.Request(ctx, path)
		ch <- result{line, err}
	}()
	return func() (string, error) { r := <-ch; return r.line, r.err }
}

// asked asks a control socket and wants this answer.
func asked(t *testing.T, path, want string) {
	t.Helper()
	if line, err := request(t, path)(); err != nil || line != want {
		t.Fatalf("%s answers %q, %v; want %q", path, line, err, want)
	}
}

func (p *proc) line(generation int) string {
	return fmt.Sprintf("pid=%d generation=%d", p.pid, generation)
}

func TestControlSockets(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := controlled(dir)
	p := newHub(t, s).serving()
	network, address := p.addr(0)
	l := startLoad(t, 2, false, [2]string{network, address})
	for generation := 1; generation <= 3; generation++ {
		l.more(50)
		answer := request(t, s.Options.UpgradeSocket)
		n := p.h.proc()
		if line, err := answer(); err != nil || line != n.line(generation) {
			t.Fatalf("upgrade: %q, %v; want %q", line, err, n.line(generation))
		}
		if e := p.event(ecdysis.EventUpgraded, 0); e.Socket != s.Options.UpgradeSocket {
			t.Fatalf("event %+v; want socket %s", e, s.Options.UpgradeSocket)
		}
		p.ended()
		p = n
	}
	l.more(50)
	n := p.h.start()
	n.at("serving")
	p.ended()
	l.more(50)
	l.check()
	asked(t, s.Options.StopSocket, n.line(4))
	n.ended()
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Fatalf("left: %v, %v", list, err)
	}
}
