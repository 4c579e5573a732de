package proctest

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
)

// A Point is a moment in a daemon's life.
type Point string

const (
	AtStart    Point = "start"    // before New
	AtNew      Point = "new"      // between New and the calls of Listen
	AtListened Point = "listened" // between the calls of Listen and Ready
	AtServing  Point = "serving"  // after Ready
	AtPrepare  Point = "prepare"  // in Options.Prepare

	// At these points a daemon does what is planned, and exits with status 1.
	AtNewFailed    Point = "new failed"
	AtListenFailed Point = "listen failed"
	AtReadyFailed  Point = "ready failed"

	// AtWaitReturned comes when Upgrader.Wait has returned, if Spec.Wait is
	// set.
	AtWaitReturned Point = "wait returned"
)

// On is the point in Options.Notify at which it is called with an event of
// this kind.
func On(kind ecdysis.EventKind) Point { return Point("event " + kind) }

// An Action is what a daemon does at a point.
type Action []step

type step struct {
	Do   string
	Text string
	Code int
	Arg  []byte
	Then Action
}

var (
	// Hold waits for Proc.Resume. Calls are taken while it waits.
	Hold = Action{{Do: "hold"}}
	// Panic panics.
	Panic = Action{{Do: "panic"}}
	// Kill kills the process by SIGKILL.
	Kill = Action{{Do: "kill"}}
	// Hang waits forever, and takes no calls meanwhile.
	Hang = Action{{Do: "hang"}}
	// LeaveHelper starts a process that lives as long as the test. It has a copy of
	// each descriptor, also of the stream to the predecessor, but not of the
	// clients' connections.
	LeaveHelper = Action{{Do: "leave helper"}}
)

// Exit exits with this status.
func Exit(status int) Action { return Action{{Do: "exit", Code: status}} }

// Fail calls Upgrader.Fail with an error of this text, and exits.
func Fail(text string) Action { return Action{{Do: "fail", Text: text}} }

// Seq does one action after the other.
func Seq(actions ...Action) (all Action) {
	for _, a := range actions {
		all = append(all, a...)
	}
	return all
}

// Once does the action only the first time that the process comes to the point.
func Once(actions ...Action) Action { return Action{{Do: "once", Then: Seq(actions...)}} }

// Point tells the test that d has come to the point, and does what is planned for
// the point. Functions that tests define may have points of their own.
func (d *Daemon) Point(p Point) { d.point(message{At: p}) }

func (d *Daemon) point(m message) {
	d.send(m)
	d.do(m.At, string(m.At), d.Spec.Plan[m.At])
}

func (d *Daemon) do(p Point, key string, a Action) {
	for i, s := range a {
		key := key + " " + strconv.Itoa(i)
		switch s.Do {
		case "hold":
			d.hold()
		case "panic":
			panic("planned")
		case "kill":
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		case "hang":
			select {}
		case "leave helper":
			leaveHelper()
		case "exit":
			os.Exit(s.Code)
		case "fail":
			d.Fatal(d.U.Fail(errors.New(s.Text)))
		case "once":
			if _, done := d.once.LoadOrStore(key, true); !done {
				d.do(p, key, s.Then)
			}
		case "call":
			m := d.call(s.Text, s.Arg)
			m.At, m.Call = p, s.Text
			d.send(m)
		default:
			panic("proctest: no such action: " + s.Do)
		}
	}
}

// leaveHelper copies descriptors by number, because the standard library
// hides some of them.
func leaveHelper() {
	var files []*os.File
	for _, s := range openFDs() {
		n, _ := strconv.Atoi(strings.Fields(s)[0])
		if n > 2 && !strings.Contains(s, "anon_inode") && !isClient(n) {
			if fd, err := syscall.Dup(n); err == nil {
				files = append(files, os.NewFile(uintptr(fd), ""))
			}
		}
	}
	cmd := exec.Command(self(), noTests)
	cmd.Env = append(os.Environ(), helper.Env())
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	for _, f := range files {
		f.Close()
	}
}

// isClient reports whether a descriptor is an accepted connection. No helper may
// have it, because the client must see its end.
func isClient(fd int) bool {
	peer, err := syscall.Getpeername(fd)
	if err != nil {
		return false
	}
	_, isTCP := peer.(*syscall.SockaddrInet4)
	local, err := syscall.Getsockname(fd)
	name, isUnix := local.(*syscall.SockaddrUnix)
	return isTCP || err == nil && isUnix && name.Name != "" && name.Name != "@"
}

var helper = DefineRole("helper", func() {
	c, err := net.Dial("unix", os.Getenv(hubVar))
	if err != nil {
		os.Exit(1)
	}
	newConn(c).greet(hello{PID: os.Getpid(), Helper: true})
	_, _ = c.Read(make([]byte, 1)) // until the test is over
})
