package e2e

import (
	"errors"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What a call leaves behind in a process, and a process in the system.

// No goroutine outlives a call.
func TestNoGoroutines(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("true") // ends without a word
	if err != nil {
		t.Fatal(err)
	}
	spec := proctest.TCP
	spec.NoAccept = true
	p := proctest.Start(t, spec)
	before, keeps := p.Goroutines(), p.Keeps()
	p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF, proctest.Successor{Path: program})
	keeps()
	p.Upgrade()
	// The goroutine that has answered the last call may be about to end.
	n := p.Goroutines()
	for end := time.Now().Add(proctest.Patience); n != before && time.Now().Before(end); n = p.Goroutines() {
		time.Sleep(time.Millisecond)
	}
	if n != before {
		t.Errorf("%d goroutines after an upgrade, %d before", n, before)
	}
}

// smallest is the smallest daemon, as in the README. It exits as soon as its
// accept loop has ended and its clients are served, whatever goroutine still
// runs. Its argument is a directory.
var smallest = proctest.DefineRole("smallest", func() {
	log.SetFlags(0)
	dir, vetoed := proctest.Args()[0], false
	u, err := ecdysis.New(ecdysis.Options{
		PIDFile:        filepath.Join(dir, "pid"),
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Prepare: func(*ecdysis.Command) error {
			if vetoed {
				return nil
			}
			vetoed = true
			return errors.New("the first attempt shows the test that Wait runs")
		},
		Notify: func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, name := range []string{"b", "c"} {
		if _, err := u.Listen("unix", filepath.Join(dir, name)); err != nil {
			log.Fatal(u.Fail(err))
		}
	}
	ln, err := u.Listen("unix", filepath.Join(dir, "a"))
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	go func() { u.Wait(); ln.Close() }()
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	var clients sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		clients.Go(func() { _, _ = io.Copy(c, c); c.Close() })
	}
	clients.Wait()
})

// A program that ends with its accept loop leaves nothing undone: the files
// are gone, and the last event was delivered.
func TestNothingUndone(t *testing.T) {
	t.Parallel()
	for range 10 {
		dir := proctest.ShortDir(t)
		p := proctest.Run(t, smallest.Command(dir))
		signal := func(process *os.Process, s os.Signal) {
			t.Helper()
			if err := process.Signal(s); err != nil {
				t.Fatal(err)
			}
		}
		first := p.Ready(0)
		signal(first, syscall.SIGHUP)
		p.Await("^upgrade failed")
		signal(first, syscall.SIGHUP)
		second := p.Ready(1)
		p.Await("^upgraded by signal hangup")
		if state := p.Wait(); !state.Success() {
			t.Errorf("the replaced process ended by %v", state)
		}
		signal(second, syscall.SIGHUP)
		p.Await("^upgrade failed")
		signal(second, syscall.SIGTERM)
		p.Await("^stopping by signal terminated")
		p.End()
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}
