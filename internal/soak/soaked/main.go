//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

// Command soaked is the daemon that package soak replaces again and again. It
// answers over TCP, a Unix socket, UDP and HTTP, each time with its process
// number, and does what the file "plan" in its directory says.
//
//	soaked DIR
//	soaked DIR SOCKET    makes a request at a control socket
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/httpdrain"
)

// say writes a line that the soak reads.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%d %s\n", os.Getpid(), fmt.Sprintf(format, args...))
}

func main() {
	if len(os.Args) == 3 {
		if _, err := ecdysis.Request(context.Background(), filepath.Join(os.Args[1], os.Args[2])); err != nil {
			log.Fatal(err)
		}
		return
	}
	if len(os.Args) != 2 {
		log.Fatal("this program is started by package soak")
	}
	say("started")
	if err := run(os.Args[1]); err != nil {
		say("error: %v", err)
		os.Exit(1)
	}
}

// plan returns how this process is to fail, and its probation as a predecessor.
func plan(dir string) (fault string, probation time.Duration, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "plan"))
	if err != nil {
		return "", 0, err
	}
	var ms int
	_, err = fmt.Sscan(string(b), &fault, &ms)
	return fault, time.Duration(ms) * time.Millisecond, err
}

func run(dir string) error {
	path := func(name string) string { return filepath.Join(dir, name) }
	fault, probation, err := plan(dir)
	if err != nil {
		return err
	}
	switch fault {
	case "exit":
		os.Exit(3)
	case "panic":
		panic("as planned")
	}
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeTimeout: 5 * time.Second,
		Probation:      probation,
		PIDFile:        path("pid"),
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		StopSignals:    []os.Signal{syscall.SIGTERM},
		UpgradeSocket:  path("upgrade"),
		StopSocket:     path("stop"),
		TakeoverSocket: path("takeover"),
		Prepare: func(*ecdysis.Command) error {
			if fault, _, _ := plan(dir); fault == "veto" {
				return errors.New("as planned")
			}
			return nil
		},
		Notify: func(e ecdysis.Event) { say("%v", e) },
	})
	if err != nil {
		return err
	}
	switch fault {
	case "exit-late":
		os.Exit(4)
	case "fail":
		return u.Fail(errors.New("as planned"))
	case "hang":
		select {}
	}
	return serve(u, dir)
}

func serve(u *ecdysis.Upgrader, dir string) error {
	tcp, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	web, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	unix, err := u.Listen("unix", filepath.Join(dir, "echo"))
	if err != nil {
		return u.Fail(err)
	}
	udp, err := u.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}

	lines := &drain.Server{Handler: echo}
	for _, ln := range []net.Listener{tcp, unix} {
		go lines.Serve(ln)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d %s\n", os.Getpid(), r.URL.Path)
	})}
	d := httpdrain.New(srv)
	go srv.Serve(d.Listener(web))
	packets := make(chan struct{})
	go func() {
		defer close(packets)
		b := make([]byte, 100)
		for {
			n, a, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(fmt.Appendf(nil, "%d %s", os.Getpid(), b[:n]), a)
		}
	}()
	if err := u.Ready(); err != nil {
		return err
	}
	say("serves %d %v %v %v", u.Generation(), tcp.Addr(), web.Addr(), udp.LocalAddr())

	u.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_ = udp.(net.Conn).SetReadDeadline(time.Now()) // not Close: a packet that was read is still answered
	<-packets
	err = errors.Join(lines.Shutdown(ctx), d.Shutdown(ctx))
	say("ends")
	return err
}

// echo sends lines back.
func echo(c net.Conn) {
	r := bufio.NewReader(c)
	for {
		s, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "%d %s", os.Getpid(), s); err != nil {
			return
		}
	}
}
