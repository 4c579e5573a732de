//go:build linux

package systemd_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/systemd"
)

// A conf is the configuration that the daemon of these tests reads at its start.
// A test changes it to change what the next generation does.
//
//	listen=web tcp 127.0.0.1:7001   any number of these: name, network, address
//	name=web                        take this listener by its name
//	control=/run/mydaemon/upgrade   the control socket
//	do=crash                        or hang, fail, hold, die: see daemonMain
type conf map[string][]string

func (c conf) get(key string) string {
	if v := c[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

func (c conf) duration(key string) time.Duration {
	d, err := time.ParseDuration(cmp.Or(c.get(key), "0"))
	if err != nil {
		log.Fatal(err)
	}
	return d
}

func readConf() conf {
	b, err := os.ReadFile(os.Getenv("MYDAEMON_CONF"))
	if err != nil {
		log.Fatal(err)
	}
	c := make(conf)
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			c[k] = append(c[k], v)
		}
	}
	return c
}

// daemonMain is a service of systemd. It greets a client with its process ID
// and generation, and sends back what it gets.
func daemonMain() {
	log.SetFlags(0)
	c := readConf()
	if len(os.Args) == 2 && os.Args[1] == "-upgrade" {
		reply, err := ecdysis.Request(context.Background(), c.get("control"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("ok", reply)
		return
	}
	opts := ecdysis.Options{
		UpgradeTimeout: c.duration("timeout"),
		Probation:      c.duration("probation"),
		PIDFile:        c.get("pidfile"),
		UpgradeSignals: []os.Signal{syscall.SIGHUP},
		UpgradeSocket:  c.get("control"),
		TakeoverSocket: c.get("takeover"),
		StopSignals:    []os.Signal{syscall.SIGTERM},
		Notify:         func(e ecdysis.Event) { log.Print(e) },
	}
	n, err := systemd.Setup(&opts)
	if errors.Is(err, systemd.ErrNoSocket) { // Type=forking needs only the sibling
		opts.Prepare = func(c *ecdysis.Command) error {
			c.Sibling = true
			return nil
		}
	} else if err != nil {
		log.Fatal(err)
	}
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	if c.get("store") != "" {
		err = n.Restore(u)
	} else {
		err = systemd.Adopt(u)
	}
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	for _, env := range os.Environ() {
		for _, name := range []string{"NOTIFY_SOCKET", "LISTEN_", "WATCHDOG", "ECDYSIS"} {
			if strings.HasPrefix(env, name) {
				log.Fatal(u.Fail(errors.New("left in the environment: " + env)))
			}
		}
	}
	listeners := make(map[string]any)
	var serve []net.Listener
	for _, l := range c["listen"] {
		w := strings.Fields(l)
		ln, err := u.Listen(w[1], w[2])
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		listeners[w[0]] = ln
		serve = append(serve, ln)
	}
	for _, name := range c["name"] {
		ln, err := u.Listener(name)
		if err == nil && ln == nil {
			err = fmt.Errorf("no listener %q", name)
		}
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		serve = append(serve, ln)
	}
	if c.get("store") != "" {
		if err := n.Store(listeners); err != nil {
			log.Fatal(u.Fail(err))
		}
	}
	switch c.get("do") {
	case "crash":
		os.Exit(3)
	case "hang":
		select {}
	case "fail":
		log.Fatal(u.Fail(errors.New("bad\nMAINPID=1\nconfiguration")))
	case "hold": // wait until the test has opened the other end and closed it
		f, err := os.Open(c.get("fifo"))
		if err == nil {
			_, err = io.Copy(io.Discard, f)
			f.Close()
		}
		if err != nil {
			log.Fatal(u.Fail(err))
		}
	}
	_ = n.Status("starting as " + strconv.Itoa(u.Generation()))
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	if c.get("status") != "" {
		if err := n.Status(c.get("status") + " " + strconv.Itoa(u.Generation())); err != nil {
			log.Print(err)
		}
	}
	if interval, ping := n.Watchdog(); interval > 0 && c.get("do") != "sleep" {
		go func() {
			for range time.Tick(interval / 3) {
				if err := ping(); err != nil && err != ecdysis.ErrUpgraded {
					log.Print(err)
				}
			}
		}()
	}
	greet := func(conn net.Conn) {
		defer conn.Close()
		fmt.Fprintf(conn, "%d %d\n", os.Getpid(), u.Generation())
		_, _ = io.Copy(conn, conn)
	}
	if c.get("do") == "die" { // during probation, after one client and with no other
		conn, err := serve[0].Accept()
		if err != nil {
			log.Fatal(err)
		}
		greet(conn)
		log.Print("dies")
		os.Exit(7)
	}
	var accepting, clients sync.WaitGroup
	for _, ln := range serve {
		accepting.Go(func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				clients.Go(func() { greet(conn) })
			}
		})
	}
	u.Wait()
	for _, ln := range serve {
		ln.Close()
	}
	accepting.Wait()
	clients.Wait()
	log.Print("all clients are served")
}
