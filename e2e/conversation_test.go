package e2e

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	"github.com/ecdysis-go/ecdysis/internal/skewtest"
)

// Conversations that were recorded, which every later version must understand,
// and must be able to have. When the protocol gets something new, it is recorded
// into a file of its own, because those that are here do not change:
//
//	go test ./e2e -run TestRecordConversations -record testdata/conversations-2.txt

var recordTo = flag.String("record", "", "let TestRecordConversations write to this `file`")

const recorded = "testdata/conversations-1.txt"

// A spoken is a frame, as it was sent.
type spoken struct {
	Old   bool // by the process that is taken over
	Files int  // descriptors that came with its first byte
	Bytes []byte
}

func (s spoken) kind() byte { return s.Bytes[0] }

func (s spoken) records(t *testing.T) []proctest.Record {
	t.Helper()
	kind, records, err := proctest.ReadFrame(bytes.NewReader(s.Bytes))
	if err != nil || !bytes.Equal(proctest.Frame(kind, records...), s.Bytes) {
		t.Fatalf("%q is the frame %q with %q, %v, which are written as other bytes", s.Bytes, kind, records, err)
	}
	return records
}

// A scene is a conversation. The process that is taken over is the second one of
// its chain, and the first one is still there.
type scene struct {
	name     string
	old, new proctest.Spec
}

func scenes() []scene {
	spec := carrying()
	spec.Wait = true
	spec.Options.TakeoverSocket = "$DIR/take"
	return []scene{
		{"takeover", spec, spec},
		{"the taker fails", spec, spec.At(proctest.AtListened, proctest.Fail("no paper"))},
		{"the taker stops", spec.Probation(time.Hour), spec},
		{"stopped", spec, spec.At(proctest.AtNew, skewtest.Carries.Do(), proctest.Hold)},
	}
}

// start starts the process that is taken over.
func (s *scene) start(t *testing.T) (c *proctest.Chain, old *proctest.Proc) {
	t.Helper()
	first := s.old.Probation(0)
	c = proctest.New(t, first, s.old, s.new)
	p := c.Start()
	p.Dial(0) // keeps it
	return c, p.Upgrade()
}

// stops lets a process that is taken over end the attempt.
func (s *scene) stops(old *proctest.Proc) {
	old.T.Helper()
	old.Stop()
	old.Event(ecdysis.EventStopDeferred, 0)
	proctest.CallStop.Begin(old)
}

// receiveFrame reads a frame, and the descriptors, which must come with its first
// byte.
func receiveFrame(c *net.UnixConn) (b []byte, files []*os.File, err error) {
	b = make([]byte, 5)
	if _, files, err = ecdysis.ReadFiles(c, b[:1]); err != nil {
		return nil, nil, err
	}
	rest := func(p []byte) error {
		for len(p) > 0 {
			n, late, err := ecdysis.ReadFiles(c, p)
			for _, f := range late {
				f.Close()
			}
			if err == nil && len(late) > 0 {
				err = fmt.Errorf("%d descriptors come after the first byte of a frame %q", len(late), b[0])
			}
			if err != nil {
				return err
			}
			p = p[n:]
		}
		return nil
	}
	if err := rest(b[1:]); err != nil {
		return nil, files, err
	}
	size := int(b[1])<<24 | int(b[2])<<16 | int(b[3])<<8 | int(b[4])
	b = append(b, make([]byte, size)...)
	return b, files, rest(b[5:])
}

// TestRecordConversations lets real processes talk by way of the test.
func TestRecordConversations(t *testing.T) {
	if *recordTo == "" {
		t.Skip("-record names no file")
	}
	var out strings.Builder
	fmt.Fprintf(&out, "# Recorded by go test -run TestRecordConversations -record FILE (conversation_test.go).\n"+
		"# < is a frame of the process that takes over, > one of the other process,\n# with the number of descriptors that come with its first byte.\n")
	for _, s := range scenes() {
		c, p := s.start(t)
		// The taker finds the test at the path, and p finds its own file there
		// when it looks.
		take, aside := c.Path("take"), c.Path("aside")
		if err := os.Rename(take, aside); err != nil {
			t.Fatal(err)
		}
		ln := listenTake(c)
		ln.SetUnlinkOnClose(false)
		n := c.Launch()
		taker := proctest.AcceptPeer(t, ln).Conn
		unlisten(ln)
		if err := os.Rename(aside, take); err != nil {
			t.Fatal(err)
		}
		old := proctest.DialPeer(t, take).Conn
		var mu sync.Mutex
		var all []spoken
		forward := func(from, to *net.UnixConn) {
			for {
				b, files, err := receiveFrame(from)
				if err != nil {
					_ = to.CloseWrite()
					return
				}
				mu.Lock()
				if len(all) == 0 || all[len(all)-1].kind() != 'A' { // after which nobody listens
					all = append(all, spoken{from == old, len(files), b})
				}
				_, err = ecdysis.WriteFiles(to, b, files...)
				mu.Unlock()
				for _, f := range files {
					f.Close()
				}
				if err != nil {
					return
				}
			}
		}
		var both sync.WaitGroup
		both.Go(func() { forward(taker, old) })
		both.Go(func() { forward(old, taker) })
		switch s.name {
		case "takeover":
			n.At(proctest.AtServing)
			p.Event(ecdysis.EventUpgraded, 0)
			p.Ended()
			n.Kill()
		case "the taker fails":
			n.Ended()
			p.Event(ecdysis.EventUpgradeFailed, 0)
			p.Kill()
		case "the taker stops":
			n.At(proctest.AtServing)
			n.Stop()
			n.Ended()
			p.Ended()
		case "stopped":
			n.At(proctest.AtNew)
			s.stops(p)
			p.Ended()
			n.Resume()
			n.Ended()
		}
		both.Wait()
		fmt.Fprintf(&out, "\n= %s\n", s.name)
		for _, f := range all {
			if f.Old {
				fmt.Fprintf(&out, "> %d %+q\n", f.Files, f.Bytes)
			} else {
				fmt.Fprintf(&out, "< %+q\n", f.Bytes)
			}
		}
	}
	if err := os.WriteFile(*recordTo, []byte(out.String()), 0o666); err != nil {
		t.Fatal(err)
	}
}

// readConversations returns what was recorded, by the names of the scenes.
func readConversations(t *testing.T) map[string][]spoken {
	t.Helper()
	b, err := os.ReadFile(recorded)
	if err != nil {
		t.Fatal(err)
	}
	all, name := make(map[string][]spoken), ""
	for _, line := range strings.Split(string(b), "\n") {
		var f spoken
		var err error
		switch word, rest, _ := strings.Cut(line, " "); word {
		case "", "#":
			continue
		case "=":
			name = rest
			continue
		case ">":
			f.Old = true
			number, quoted, _ := strings.Cut(rest, " ")
			f.Files, err = strconv.Atoi(number)
			rest = quoted
			fallthrough
		default:
			var text string
			text, uerr := strconv.Unquote(rest)
			f.Bytes = []byte(text)
			err = errors.Join(err, uerr)
		}
		if err != nil || len(f.Bytes) < 5 || name == "" {
			t.Fatalf("%s: the line %q: %v", recorded, line, err)
		}
		f.records(t) // can be read, and written as the same bytes
		all[name] = append(all[name], f)
	}
	return all
}

var (
	recordedDir  = regexp.MustCompile(`(/[^/ ]+)*/ecd[0-9]+`)
	recordedPort = regexp.MustCompile(`127\.0\.0\.1:[1-9][0-9]*`)
	ofThisRun    = regexp.MustCompile(`^(pid|network|dev|ino)=[0-9]+$`)
)

// general is a field without what differs from one run to the next.
func general(field string) string {
	field = recordedDir.ReplaceAllString(field, "DIR")
	field = recordedPort.ReplaceAllString(field, "127.0.0.1:PORT")
	return ofThisRun.ReplaceAllString(field, "$1=NUMBER")
}

// means fails the test unless a frame says all that was recorded. It may say
// more.
func means(t *testing.T, got, want spoken) {
	t.Helper()
	if got.kind() != want.kind() || got.Files != want.Files {
		t.Fatalf("a frame %q with %d descriptors; want %q with %d", got.Bytes, got.Files, want.Bytes, want.Files)
	}
	g, w := got.records(t), want.records(t)
	if len(g) < len(w) || want.kind() == 'S' && len(g) != len(w) {
		t.Fatalf("a frame %q of %d records; want %d", want.kind(), len(g), len(w))
	}
	for i := range w {
		var has proctest.Record
		for _, field := range g[i] {
			has = append(has, general(field))
		}
		for _, field := range w[i] {
			if !slices.Contains(has, general(field)) {
				t.Errorf("record %d of a frame %q is %q; want %q in it", i, want.kind(), g[i], general(field))
			}
		}
	}
}

var rawFrame = proctest.Define("raw frame", func(d *proctest.Daemon, _ proctest.None) (spoken, error) {
	b, files, err := receiveFrame(d.Stream.(*net.UnixConn))
	for _, f := range files {
		f.Close()
	}
	return spoken{true, len(files), b}, err
})

// The present version is taken over by the taker of a recorded conversation, and
// says what was recorded.
func TestRecordedTaker(t *testing.T) {
	t.Parallel()
	all := readConversations(t)
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			talk := all[s.name]
			if len(talk) == 0 {
				t.Fatal("this scene was not recorded")
			}
			c, p := s.start(t)
			c.Specs(proctest.Spec{})
			n := rawTaker(c)
			for _, f := range talk {
				if !f.Old {
					if err := n.RawWrite(f.Bytes); err != nil {
						t.Fatalf("after a frame %q: %v", f.kind(), err)
					}
					continue
				}
				if f.kind() == 'A' && s.name == "stopped" {
					s.stops(p)
				}
				means(t, rawFrame.On(n), f)
			}
			switch s.name {
			case "takeover", "the taker stops":
				if e := p.Event(ecdysis.EventUpgraded, 0); e.PID != n.PID || e.Generation != 2 {
					t.Errorf("event %v; want that process %d has taken over", e, n.PID)
				}
				p.Ended()
			case "the taker fails":
				takeoverFailed(p, 0, ecdysis.StepInit, "it says: no paper")
				p.Serves()
				c.Specs(s.old)
				takenOver(p, c.Start(), 2)
			case "stopped":
				takeoverFailed(p, 0, ecdysis.StepInit, "stopped")
				p.Ended()
			}
		})
	}
}

// A standIn makes what stands in for recorded things.
type standIn struct {
	t   *testing.T
	dir string
	far *os.File // the other end of the connection that was made last
}

// entry returns a record with what differs for the thing that stands in for it,
// and that thing.
func (s *standIn) entry(r proctest.Record) (proctest.Record, *os.File) {
	s.t.Helper()
	r = slices.Clone(r)
	get := func(key string) string {
		for _, f := range r {
			if k, v, _ := strings.Cut(f, "="); k == key {
				return v
			}
		}
		return ""
	}
	set := func(key, value string) {
		for i, f := range r {
			if strings.HasPrefix(f, key+"=") {
				r[i] = key + "=" + value
			}
		}
	}
	for i := range r {
		r[i] = recordedDir.ReplaceAllString(r[i], s.dir)
	}
	path := get("path")
	file, at, err := s.thing(get("kind"), get("network"), get("name"), path)
	if err != nil {
		s.t.Fatalf("%q: %v", r, err)
	}
	s.t.Cleanup(func() { file.Close() })
	if path == "" {
		set("at", get("network")+" "+at)
		return r, file
	}
	fi, err := os.Lstat(path)
	if err != nil {
		s.t.Fatal(err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	set("dev", strconv.FormatUint(uint64(st.Dev), 10))
	set("ino", strconv.FormatUint(uint64(st.Ino), 10))
	return r, file
}

// thing makes a thing, and returns where it is bound if it has an address of IP.
func (s *standIn) thing(kind, network, name, path string) (f *os.File, at string, err error) {
	switch kind + " " + network {
	case "listener tcp":
		ln, err := net.ListenTCP(network, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, "", err
		}
		defer ln.Close()
		f, err = ln.File()
		return f, ln.Addr().String(), err
	case "packet udp":
		c, err := net.ListenUDP(network, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, "", err
		}
		defer c.Close()
		f, err = c.File()
		return f, c.LocalAddr().String(), err
	case "listener unix":
		ln, err := net.ListenUnix(network, &net.UnixAddr{Net: network, Name: path})
		if err != nil {
			return nil, "", err
		}
		ln.SetUnlinkOnClose(false)
		defer ln.Close()
		f, err = ln.File()
		return f, "", err
	case "packet unixgram":
		c, err := net.ListenUnixgram(network, &net.UnixAddr{Net: network, Name: path})
		if err != nil {
			return nil, "", err
		}
		defer c.Close()
		f, err = c.File()
		return f, "", err
	case "conn ":
		if name == "far" {
			return s.far, "", nil
		}
		f, s.far, err = filePair(syscall.SOCK_STREAM)
		return f, "", err
	case "pair ":
		var peer *os.File
		if f, peer, err = filePair(syscall.SOCK_DGRAM); err == nil {
			s.t.Cleanup(func() { peer.Close() })
		}
		return f, "", err
	case "generation ": // a process that drains
		var peer *os.File
		if f, peer, err = filePair(syscall.SOCK_STREAM); err == nil {
			s.t.Cleanup(func() { peer.Close() })
		}
		return f, "", err
	case "file ", "state ":
		f, err = ecdysis.MemoryFile()
		if err == nil {
			_, err = f.WriteString(skewtest.Text)
		}
		if err == nil {
			_, err = f.Seek(0, 0)
		}
		return f, "", err
	}
	return nil, "", errors.New("nothing stands in for it")
}

func filePair(typ int) (a, b *os.File, err error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	syscall.CloseOnExec(fds[0])
	syscall.CloseOnExec(fds[1])
	return os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), ""), nil
}

// frame returns the frame for what stands in for the things in it, and those.
func (s *standIn) frame(f spoken) (b []byte, files []*os.File) {
	s.t.Helper()
	if f.kind() != 'S' {
		return f.Bytes, nil
	}
	var records []proctest.Record
	for _, r := range f.records(s.t) {
		r, file := s.entry(r)
		records, files = append(records, r), append(files, file)
	}
	if len(files) != f.Files {
		s.t.Fatalf("a frame %q has %d records and %d descriptors", f.kind(), len(files), f.Files)
	}
	return proctest.Frame(f.kind(), records...), files
}

// The present version takes over from the predecessor of a recorded
// conversation, and says what was recorded. As a successor that such a process
// has started it says the same, TAKE aside.
func TestRecordedPredecessor(t *testing.T) {
	t.Parallel()
	all := readConversations(t)
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) { t.Parallel(); replay(t, s, all[s.name], false) })
		t.Run(s.name+", started", func(t *testing.T) { t.Parallel(); replay(t, s, all[s.name], true) })
	}
}

// replay takes the part of the predecessor, which starts the present version or
// is taken over by it.
func replay(t *testing.T, s scene, talk []spoken, starts bool) {
	if len(talk) == 0 {
		t.Fatal("this scene was not recorded")
	}
	c := proctest.New(t, s.new)
	var n *proctest.Proc
	var conn *net.UnixConn
	if starts {
		p, peer := c.LaunchUnder()
		n, conn, talk = p, peer.Conn, talk[1:]
	} else {
		ln := listenTake(c)
		ln.SetUnlinkOnClose(false)
		n = c.Launch()
		conn = proctest.AcceptPeer(t, ln).Conn
		unlisten(ln)
		if err := os.Remove(c.Path("take")); err != nil { // the recorded one is at its path
			t.Fatal(err)
		}
	}
	in := &standIn{t: t, dir: c.Dir}
	ends := false // n may have ended, and what is sent to it may be lost
	for _, f := range talk {
		if f.Old {
			b, files := in.frame(f)
			if _, err := ecdysis.WriteFiles(conn, b, files...); err != nil && !ends {
				t.Fatalf("a frame %q: %v", f.kind(), err)
			}
			for _, file := range files {
				file.Close()
			}
			continue
		}
		if f.kind() == 'B' {
			n.At(proctest.AtServing)
			proctest.CallStop.Begin(n)
		}
		b, files, err := receiveFrame(conn)
		if err != nil {
			t.Fatalf("want a frame %q: %v", f.kind(), err)
		}
		means(t, spoken{false, len(files), b}, f)
		ends = f.kind() == 'F' || f.kind() == 'B'
	}
	if err := skewtest.Carries.ErrAt(n, proctest.AtNew); err != nil {
		t.Error(err)
	}
	switch s.name {
	case "takeover":
		n.At(proctest.AtServing)
		isGeneration(n, 2)
		n.HasUnclaimed()
		n.HasPIDFile()
		n.Serves()
		conn.Close()
		next := c.Start()
		takenOver(n, next, 3)
		next.Serves()
	case "the taker fails":
		n.Ended()
	case "the taker stops":
		n.Ended()
		c.HasFiles()
	case "stopped":
		n.Resume()
		proctest.Want(t, n.ErrAt(proctest.AtReadyFailed), ecdysis.ErrAborted)
		n.Ended()
	}
}
