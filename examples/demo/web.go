package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const httpdPackage = "github.com/ecdysis-go/ecdysis/examples/httpd"

// A webReport is what the clients of examples/httpd saw.
type webReport struct {
	Upgrades int `json:"upgrades"`
	Answered int `json:"answered"`
	Failed   int `json:"failed"`
}

// tourWeb replaces a web server under clients that keep their connections, and
// try no request twice. Whatever it started has ended when it returns. It
// enters what happens in p, and returns its clients.
func tourWeb(ctx context.Context, dir string, out *progress, p *picture) (r webReport, l *load, err error) {
	path := func(name string) string { return filepath.Join(dir, name) }
	program := path("httpd")
	out.say("building examples/httpd")
	if err := build(ctx, program, httpdPackage); err != nil {
		return r, l, err
	}
	control := path("web")
	if err := os.Mkdir(control, 0o700); err != nil {
		return r, l, err
	}
	request := func(name string) (string, error) {
		out, err := exec.CommandContext(ctx, program, "-request", filepath.Join(control, name)).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("httpd -request: %w: %s", err, out)
		}
		return string(out), err
	}

	d := &daemon{ctx: ctx, log: make(chan string, 1000)}
	l = &load{stopped: make(chan struct{})}
	defer l.end()
	defer d.cleanUp()
	if err := d.launch(exec.Command(program, "-addr", "127.0.0.1:0", "-control", control)); err != nil {
		return r, l, err
	}
	d.stderr.Close() // so that it ends with the last process
	addr, err := d.await(`listening on (\S+)$`)
	if err != nil {
		return r, l, err
	}
	out.say("a web server at %s, process %d", addr, d.cmd.Process.Pid)
	for range 4 {
		l.webClient(addr, 0)
		l.webClient(addr, 20*time.Millisecond)
	}
	clients := l // a result must not be read while this function returns
	out.follow(func() string {
		answered, broken := clients.totals()
		return fmt.Sprintf("the web server: %d answered, %d broken", answered, broken)
	})
	for range 5 {
		if err := l.more(ctx, 500); err != nil {
			return r, l, err
		}
		p.web = append(p.web, event{time.Now(), ""})
		answer, err := request("upgrade")
		if err != nil {
			return r, l, err
		}
		r.Upgrades++
		out.say("upgrade of the web server: %s", answer[:len(answer)-1])
	}
	if err := l.more(ctx, 500); err != nil {
		return r, l, err
	}
	l.end()
	if _, err := request("stop"); err != nil {
		return r, l, err
	}
	if _, err := d.await(""); err != nil {
		return r, l, err
	}
	r.Answered, r.Failed = l.totals()
	return r, l, d.cmd.Wait()
}

// webClient makes requests on one connection until an answer says that it is
// the last, and then on another.
func (l *load) webClient(addr string, pause time.Duration) {
	g := new(generation)
	l.wg.Go(func() {
		for !l.over() {
			began := time.Now()
			c, err := dial("tcp", addr)
			if err != nil {
				l.fail(failure{g, unknown, began, err})
				continue
			}
			for last := false; !last && err == nil && !l.over(); time.Sleep(pause) {
				last, err = c.get(addr)
				l.count("http", c, g, began, err)
			}
			c.Close()
		}
	})
}

// get makes a request and reports whether the connection ends with its answer.
func (c *conn) get(host string) (last bool, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
		return false, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("status %s", resp.Status)
	}
	var pid int
	if _, err := fmt.Fscanf(resp.Body, "pid=%d generation=%d\n", &pid, &c.by); err != nil {
		return false, fmt.Errorf("the body of the answer: %w", err)
	}
	return resp.Close, nil
}
