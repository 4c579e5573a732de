//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// Without Wait, a program calls Upgrade when it sees fit, and learns at once
// how that went. A failed attempt has no effect but its error.
func ExampleUpgrader_Upgrade() {
	u, err := ecdysis.New(ecdysis.Options{UpgradeTimeout: 30 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	switch err := u.Upgrade(); {
	case err == nil:
		log.Print("replaced: finish what is in flight and exit")
	case errors.Is(err, ecdysis.ErrInProgress):
		log.Print("another upgrade runs")
	default:
		log.Print("this process serves on: ", explain(err))
	}
}

// explain says in an operator's words why an attempt to upgrade failed.
func explain(err error) string {
	var failed *ecdysis.UpgradeError
	if !errors.As(err, &failed) {
		return "nothing was tried: " + err.Error()
	}
	switch {
	case failed.PID == 0:
		return "no new process was started: " + failed.Err.Error()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("process %d was not ready in time and was ended", failed.PID)
	case failed.State != nil && failed.State.Exited():
		return fmt.Sprintf("process %d ended by itself with status %d", failed.PID, failed.State.ExitCode())
	default:
		return failed.Error()
	}
}

// The client of a control socket, as a unit's ExecReload or a script would run
// it: it prints what the daemon says, when the upgrade is done.
func ExampleRequest() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	successor, err := ecdysis.Request(ctx, socketDir+"/upgrade")
	if err != nil {
		log.Fatal(err) // the daemon serves on
	}
	fmt.Println("replaced by", successor) // pid=4711 generation=1
}

// socketDir is where the examples have their control sockets.
var socketDir = "/run/echo"

// A daemon that is told by control sockets what to do. Started a second time, it
// takes everything over from the one that runs.
func ExampleUpgrader_Wait() {
	u, err := ecdysis.New(ecdysis.Options{
		UpgradeSocket:     socketDir + "/upgrade",
		StopSocket:        socketDir + "/stop",
		PartialStopSocket: socketDir + "/partial-stop",
		TakeoverSocket:    socketDir + "/takeover",
		MaxDraining:       2, // with the process that serves, three at most
		Notify:            func(e ecdysis.Event) { log.Print(e) },
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	switch e := u.Wait(); e.Kind {
	case ecdysis.EventUpgraded:
		log.Printf("process %d serves", e.PID)
	case ecdysis.EventPartialStop:
		log.Print("the last clients are served")
		u.Stop() // which a partial stop leaves to the program
	}
}

// An UpgradeError tells how far the attempt came and what ended it.
func ExampleUpgradeError() {
	// As Upgrade returns them.
	for _, err := range []error{
		&ecdysis.UpgradeError{Step: "start", Err: syscall.ENOENT},
		&ecdysis.UpgradeError{Step: "init", PID: 4711, Err: os.ErrDeadlineExceeded},
		ecdysis.ErrNotReady,
	} {
		fmt.Println(explain(err))
	}
	// Output:
	// no new process was started: no such file or directory
	// process 4711 was not ready in time and was ended
	// nothing was tried: ecdysis: this process is not ready yet
}

// A Unix socket for one group of users. The mode is set before the first
// client can connect, and needs no change of the process's umask.
func ExampleUpgrader_ListenWith() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.ListenWith(ecdysis.ListenConfig{Mode: 0o660}, "unix", "/run/echo/echo.sock")
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	log.Print("serving ", ln.Addr())
}

// Prepare decides what the successor is: here the release that a link names at
// that moment, without a variable that only the first process should see.
func ExampleOptions_prepare() {
	opts := ecdysis.Options{
		Prepare: func(c *ecdysis.Command) error {
			path, err := filepath.EvalSymlinks("/opt/echo/current/bin/echo")
			if err != nil {
				return err // the upgrade ends here, this process serves on
			}
			c.Path = path
			c.Env = slices.DeleteFunc(c.Env, func(s string) bool {
				return strings.HasPrefix(s, "FIRST_START=")
			})
			return nil
		},
	}
	if _, err := ecdysis.New(opts); err != nil {
		log.Fatal(err)
	}
}

// What only one process may do can wait until the older one has exited, or
// has had its time.
func ExampleUpgrader_WaitForParent() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	switch err := u.WaitForParent(ctx); {
	case err == nil:
		log.Print("the older process, if there was one, has exited")
	case errors.Is(err, context.DeadlineExceeded):
		log.Print("the older process still serves a client")
	default:
		log.Fatal(err)
	}
}

// A successor that finds its configuration wrong says so to the process that
// serves: the text is in that process's UpgradeError.
func ExampleUpgrader_Fail() {
	u, err := ecdysis.New(ecdysis.Options{})
	if err != nil {
		log.Fatal(err)
	}
	config, err := os.ReadFile("/etc/echo.conf")
	if err != nil {
		log.Fatal(u.Fail(fmt.Errorf("configuration: %w", err)))
	}
	if len(config) == 0 {
		log.Fatal(u.Fail(errors.New("configuration: the file is empty")))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
}

// onSignals are the options of the daemons below. Each hands on something else
// than a listener, and is replaced on SIGHUP.
var onSignals = ecdysis.Options{
	UpgradeSignals: []os.Signal{syscall.SIGHUP},
	StopSignals:    []os.Signal{syscall.SIGTERM, os.Interrupt},
	Notify:         func(e ecdysis.Event) { log.Print(e) },
}

// exampleDir is where the examples have their files.
var exampleDir = "/run/example"

// A server for datagrams. The old process reads no more when the new one
// begins to, so each datagram is answered once; what the old one has read, it
// still answers.
func ExampleUpgrader_ListenPacket() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	c, err := u.ListenPacket("udp", address)
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", c.LocalAddr())
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go u.Wait()
	defer c.Close() // after the last answer
	buf := make([]byte, 64<<10)
	for {
		n, client, err := c.ReadFrom(buf)
		if err != nil {
			return // replaced or stopped
		}
		_, _ = c.WriteTo(buf[:n], client)
	}
}

// A server for connections of packets, on which one Send is one Recv.
func ExampleUpgrader_ListenSeqpacket() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.ListenSeqpacket(filepath.Join(exampleDir, "packets.sock"))
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", ln.Addr())
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go u.Wait()
	var clients sync.WaitGroup
	for {
		c, err := ln.AcceptSeqpacket()
		if err != nil {
			break
		}
		clients.Go(func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Recv(buf)
				if err != nil {
					return // io.EOF, or a packet that is too long
				}
				if err := c.Send(buf[:n]); err != nil {
					return
				}
			}
		})
	}
	clients.Wait()
}

// Subscribers, which only listen, stay connected over every upgrade: their
// connections are added just before the successor starts.
func ExampleUpgrader_AddConn() {
	var mu sync.Mutex // guards what follows; what holds it may write to subscribers
	var subscribers []net.Conn
	var moving int // how many of them, from the first on, the successor gets
	var u *ecdysis.Upgrader
	opts := onSignals
	opts.Prepare = func(*ecdysis.Command) error {
		mu.Lock()
		defer mu.Unlock()
		for { // what an attempt that failed has left
			c, err := u.Conn("subscriber")
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return err
			}
			c.Close()
		}
		for _, c := range subscribers {
			if err := u.AddConn("subscriber", c); err != nil {
				return err
			}
		}
		moving = len(subscribers)
		return nil
	}
	opts.Notify = func(e ecdysis.Event) {
		log.Print(e)
		mu.Lock()
		defer mu.Unlock()
		if e.Kind == ecdysis.EventUpgraded { // they are the successor's, but for who came since
			for _, c := range subscribers[:moving] {
				c.Close()
			}
			subscribers = subscribers[moving:]
		}
	}

	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	for {
		c, err := u.Conn("subscriber")
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		subscribers = append(subscribers, c)
	}
	ln, err := u.Listen("tcp", address)
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", ln.Addr())
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	mu.Lock()
	for _, c := range subscribers {
		fmt.Fprintf(c, "generation %d\n", u.Generation())
	}
	mu.Unlock()
	go u.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		mu.Lock()
		fmt.Fprintln(c, "welcome")
		subscribers = append(subscribers, c)
		mu.Unlock()
	}
	for _, c := range subscribers { // until they leave
		_, _ = io.Copy(io.Discard, c)
	}
}

// A lock that is held over every upgrade without a gap: the file moves, and
// its lock with it.
func ExampleUpgrader_AddFile() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	f, err := u.File("lock")
	if errors.Is(err, fs.ErrNotExist) { // the first process
		f, err = os.OpenFile(filepath.Join(exampleDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil {
			err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		}
	}
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	if err := u.AddFile("lock", f); err != nil { // for the next one
		log.Fatal(u.Fail(err))
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait() // the lock ends with the last process that has the file
}

// A socket made elsewhere, here by another package, comes in as a file. The
// successor finds it by its name; it could also Listen on its address.
func ExampleUpgrader_Listener() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := u.Listener("web")
	if errors.Is(err, fs.ErrNotExist) { // the first process
		ln, err = adopt(u, "web")
	}
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	log.Print("listening on ", ln.Addr())
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	go u.Wait()
	var clients sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		clients.Go(func() { echo(c) })
	}
	clients.Wait()
}

// adopt makes a listener of the standard library one that is handed on.
func adopt(u *ecdysis.Upgrader, name string) (net.Listener, error) {
	made, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	defer made.Close() // what u has is a copy
	f, err := made.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := u.AddFile(name, f); err != nil {
		return nil, err
	}
	return u.Listener(name)
}

// Two generations that talk: the new process asks the old one for something
// that only that one knows, while it still serves its last clients.
func ExampleUpgrader_DatagramPair() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	toParent, toChild, err := u.DatagramPair("questions")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // toParent is nil in the first process
		log.Fatal(u.Fail(err))
	}
	go func() { // answer the next generation
		buf := make([]byte, 1024)
		for {
			n, err := toChild.Read(buf)
			if err != nil {
				return
			}
			fmt.Fprintf(toChild, "generation %d was asked %q", u.Generation(), buf[:n])
		}
	}()
	if toParent != nil {
		buf := make([]byte, 1024)
		fmt.Fprint(toParent, "who are you?")
		n, err := toParent.Read(buf)
		if err != nil {
			log.Fatal(u.Fail(err))
		}
		log.Printf("%s", buf[:n])
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}

// What a process has in memory goes to the next one as a stream of bytes, in
// whatever encoding the program likes. Both versions must understand it.
func ExampleUpgrader_State() {
	var state struct{ Upgrades int }
	opts := onSignals
	opts.SendState = func(w io.Writer) error { return json.NewEncoder(w).Encode(state) }
	u, err := ecdysis.New(opts)
	if err != nil {
		log.Fatal(err)
	}
	if u.HasParent() {
		if err := json.NewDecoder(u.State()).Decode(&state); err != nil {
			log.Fatal(u.Fail(fmt.Errorf("state: %w", err)))
		}
		state.Upgrades++
	}
	log.Printf("upgrades so far: %d", state.Upgrades)
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}

// Sockets that some other package has bound are named before they are in a
// successor's way.
func ExampleUpgrader_Unregistered() {
	u, err := ecdysis.New(onSignals)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := net.Listen("tcp", address) // should have been u.Listen
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	defer ln.Close()
	left, err := u.Unregistered()
	if err != nil {
		log.Fatal(u.Fail(err))
	}
	for _, s := range left {
		log.Print("not handed on: ", s)
	}
	if err := u.Ready(); err != nil {
		log.Fatal(err)
	}
	u.Wait()
}

// Descriptors travel over any Unix connection, and who is at its other end is
// for the system to say.
func ExampleWriteFiles() {
	ours, theirs, err := unixConnection()
	if err != nil {
		log.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	r, w, err := os.Pipe()
	if err != nil {
		log.Fatal(err)
	}
	if _, err := ecdysis.WriteFiles(ours, []byte("a pipe"), w); err != nil {
		log.Fatal(err)
	}
	w.Close() // what was sent is a copy

	cred, err := ecdysis.PeerCred(theirs)
	if err != nil {
		log.Fatal(err)
	}
	if cred.UID != os.Geteuid() {
		log.Fatal("this peer is somebody else")
	}
	buf := make([]byte, 100)
	n, files, err := ecdysis.ReadFiles(theirs, buf)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d file with %q\n", len(files), buf[:n])
	fmt.Fprint(files[0], "through the copy")
	files[0].Close()
	text, err := io.ReadAll(r)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", text)
	// Output:
	// 1 file with "a pipe"
	// through the copy
}

// unixConnection returns both ends of a connection.
func unixConnection() (a, b *net.UnixConn, err error) {
	tmp, err := os.MkdirTemp("", "")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(tmp)
	at := &net.UnixAddr{Net: "unix", Name: filepath.Join(tmp, "s")}
	ln, err := net.ListenUnix("unix", at)
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if a, err = net.DialUnix("unix", nil, at); err != nil {
		return nil, nil, err
	}
	b, err = ln.AcceptUnix()
	return a, b, err
}
