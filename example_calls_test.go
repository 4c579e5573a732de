//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
