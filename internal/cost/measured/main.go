//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

// Command measured is the program that package cost measures. It is small, as
// the floor of an upgrade is to fork and exec the same program.
//
//	measured byte               writes a byte, and exits
//	measured generation HUB N   is a generation with N listeners
//	measured calls N            measures calls beside those of package net, in N pairs
package main

import (
	"bufio"
	"io"
	"log"
	"net"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// started is the moment at which this program's own code begins.
var started = time.Now()

func main() {
	n, err := strconv.Atoi(os.Args[len(os.Args)-1])
	switch {
	case len(os.Args) == 2 && os.Args[1] == "byte":
		_, err = os.Stdout.WriteString("x")
	case err != nil:
		log.Fatal("this program is started by package cost")
	case len(os.Args) == 3 && os.Args[1] == "calls":
		err = calls(n)
	case len(os.Args) == 4 && os.Args[1] == "generation":
		err = generation(os.Args[2], n)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// observe is the environment variable that gives a generation a hook unless it is
// empty. The hook tells when every listener was paused.
const observe = "MEASURED_OBSERVE"

// generation becomes ready with n listeners, of which the first is served, and
// connects to hub. It sends a line with the moments at which it was ready, had
// started, had what it inherits and had its listeners, and its address. For each
// order, a byte, it sends a line of numbers. It exits at the end of the
// connection.
func generation(hub string, n int) error {
	quiet := time.Unix(0, 0) // every listener was paused
	opts := ecdysis.Options{UpgradeTimeout: 20 * time.Second}
	if os.Getenv(observe) != "" {
		opts.Notify = func(e ecdysis.Event) {
			if e.Kind == ecdysis.EventHandover {
				quiet = time.Now()
			}
		}
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		return err
	}
	inherited := time.Now()
	var list []net.Listener
	for i := range n {
		ln, err := u.Listen("tcp", address(i))
		if err != nil {
			return u.Fail(err)
		}
		list = append(list, ln)
	}
	listening := time.Now()
	if err := u.Ready(); err != nil {
		return err
	}
	open := time.Now()
	go serve(list[0])
	c, err := net.Dial("unix", hub)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(c, line(open.UnixNano(), started.UnixNano(), inherited.UnixNano(), listening.UnixNano())+list[0].Addr().String()+"\n"); err != nil {
		return err
	}
	order := make([]byte, 1)
	for {
		if _, err := c.Read(order); err != nil {
			return nil // all is measured
		}
		var answer string
		switch order[0] {
		case 'x':
			d, err := forkExec()
			if err != nil {
				return err
			}
			answer = line(int64(d))
		case 'u', 'o': // o: the next generation has the hook
			hook := "" // none
			if order[0] == 'o' {
				hook = "1"
			}
			if err := os.Setenv(observe, hook); err != nil {
				return err
			}
			began := time.Now()
			if err := u.Upgrade(); err != nil {
				return err
			}
			answer = line(int64(time.Since(began)), quiet.UnixNano(), began.UnixNano())
		case 'n':
			d, err := netListeners(n)
			if err != nil {
				return err
			}
			answer = line(int64(d))
		}
		if _, err := io.WriteString(c, answer+"\n"); err != nil {
			return err
		}
	}
}

// address is where the listener of this number is, at any port. To find free
// ports for many at one address takes the system seconds. Only Linux has more
// than one loopback address from the start.
func address(i int) string {
	if runtime.GOOS == "linux" {
		return "127.0.0." + strconv.Itoa(1+i/100) + ":0"
	}
	return "127.0.0.1:0"
}

func line(numbers ...int64) string {
	var b []byte
	for _, n := range numbers {
		b = append(strconv.AppendInt(b, n, 10), ' ')
	}
	return string(b)
}

// serve sends each client's line back.
func serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if s, err := bufio.NewReader(c).ReadString('\n'); err == nil {
				_, _ = io.WriteString(c, s)
			}
		}()
	}
}

// forkExec starts this program once more, without what the package does, and
// returns the time until its byte has come.
func forkExec() (time.Duration, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	p, err := os.StartProcess(self, []string{self, "byte"}, &os.ProcAttr{Files: []*os.File{nil, w, os.Stderr}})
	w.Close()
	if err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		return 0, err
	}
	d := time.Since(began)
	_, err = p.Wait()
	return d, err
}

// netListeners returns what n listeners cost that are made of descriptors by
// package net alone: to get a copy, which stands for what is received, to give
// it to net, and to close the original, as a predecessor does.
func netListeners(n int) (time.Duration, error) {
	// A listener has two descriptors for a moment. What there is no room for
	// is reckoned from the rest.
	m := min(n, (room()-100)/2)
	var list, copies []net.Listener
	defer func() {
		for _, ln := range copies {
			ln.Close()
		}
	}()
	for i := range m {
		ln, err := net.Listen("tcp", address(i))
		if err != nil {
			return 0, err
		}
		list = append(list, ln)
	}
	began := time.Now()
	for _, ln := range list {
		c, err := copyOf(ln.(*net.TCPListener))
		if err != nil {
			return 0, err
		}
		copies = append(copies, c)
	}
	for _, ln := range list {
		ln.Close()
	}
	return time.Since(began) * time.Duration(n) / time.Duration(m), nil
}

// room is how many descriptors a process may have.
func room() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return 256
	}
	return int(min(uint64(r.Cur), 1<<20))
}

func copyOf(ln *net.TCPListener) (net.Listener, error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if e := raw.Control(func(s uintptr) { fd, err = syscall.Dup(int(s)) }); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	return net.FileListener(f)
}
