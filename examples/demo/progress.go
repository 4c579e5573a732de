package main

import (
	"fmt"
	"os"
	"sync"
	"time"
)

// A progress tells what happens: a line for each step and, on a terminal, one
// that changes below them.
type progress struct {
	w    *os.File
	live bool // w is a terminal
	done chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex
	status func() string // the line that changes; nil: none yet
}

func newProgress(w *os.File) *progress {
	fi, err := w.Stat()
	p := &progress{w: w, live: err == nil && fi.Mode()&os.ModeCharDevice != 0, done: make(chan struct{})}
	if p.live {
		p.wg.Go(p.run)
	}
	return p
}

func (p *progress) run() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-tick.C:
			p.print("")
		}
	}
}

// follow says what the line is that changes.
func (p *progress) follow(status func() string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = status
}

func (p *progress) say(format string, args ...any) { p.print(fmt.Sprintf(format+"\n", args...)) }

// print writes the text, and the line that changes after it.
func (p *progress) print(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live {
		text = "\r\x1b[K" + text
		if p.status != nil {
			text += p.status()
		}
	}
	fmt.Fprint(p.w, text)
}

func (p *progress) end() {
	close(p.done)
	p.wg.Wait()
	p.follow(nil)
	p.print("")
}
