package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What connections of packets do on Linux alone, or what only /proc tells.

// The largest packet goes through whole, and of one that is larger nothing.
func TestSeqpacketLargest(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	limited(t, near)
	limited(t, far)
	b := make([]byte, 1<<22)
	fits := func(size int) bool {
		t.Helper()
		p := patternOf(size, byte(size))
		err := near.Send(p)
		if err != nil {
			checkOp(t, fmt.Sprintf("Send of %d bytes", size), err, "write", syscall.EMSGSIZE)
			if n, err := near.Write(p); n != 0 || err == nil {
				t.Errorf("Write of %d bytes: %d, %v", size, n, err)
			}
			return false
		}
		if n, err := far.Recv(b); err != nil || !bytes.Equal(b[:n], p) {
			t.Fatalf("a packet of %d bytes: %d bytes, %v, or others", size, n, err)
		}
		return true
	}
	for _, size := range []int{100, 65535, 65536, 65537, 100000} {
		if !fits(size) {
			t.Errorf("%d bytes are too many", size)
		}
	}
	low, high := 1, len(b)
	for high-low > 1 {
		if middle := (low + high) / 2; fits(middle) {
			low = middle
		} else {
			high = middle
		}
	}
	t.Logf("the largest packet has %d bytes", low)
	if low < 100000 || high == len(b) {
		t.Errorf("the largest packet has %d bytes", low)
	}
	for range 3 {
		if fits(high) || !fits(low) {
			t.Fatal("it changes")
		}
	}
	// For a buffer that is smaller by one byte.
	if err := near.Send(patternOf(low, 1)); err != nil {
		t.Fatal(err)
	}
	n, err := far.Recv(b[: low-1 : low-1])
	checkOp(t, "Recv", err, "read", syscall.EMSGSIZE)
	if n != low-1 || !bytes.Equal(b[:n], patternOf(low, 1)[:n]) {
		t.Errorf("Recv: %d bytes, or others", n)
	}
	if err := near.Send([]byte("next")); err != nil {
		t.Fatal(err)
	}
	receives(t, far, "next")
}

// A peer may send a packet without a byte.
func TestSeqpacketEmptyPacket(t *testing.T) {
	t.Parallel()
	for _, packets := range [][]string{
		{"", "x"},
		{"a", "", "", "b"},
		{"", "", "", "x", "", "y"},
	} {
		for _, closed := range []string{"", "Close", "CloseWrite"} {
			c, far := proctest.AcceptSeqpacket(t, "")
			for _, p := range packets {
				sendRaw(t, far, []byte(p))
			}
			switch closed {
			case "Close":
				far.Close()
			case "CloseWrite":
				if err := far.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range packets {
				receives(t, c, p)
			}
			if closed != "" {
				receivesEnd(t, c)
				continue
			}
			// It ends a Recv that waits.
			recv := goCall(t, func() (int, error) { return c.Recv(make([]byte, 10)) })
			recv.waits()
			sendRaw(t, far, nil)
			if n, err := recv.result(); n != 0 || err != nil {
				t.Errorf("Recv of an empty packet: %d, %v", n, err)
			}
			sendRaw(t, far, []byte("z"))
			receives(t, c, "z")
			// Before the end, and with nothing behind it, it is the end.
			sendRaw(t, far, nil)
			if err := far.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			receivesEnd(t, c)
		}
	}
}

// ReadFiles tells an empty packet from the end as Recv does.
func TestReadFilesEmptyPacket(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	for _, p := range []string{"", "x", "", "y"} {
		sendRaw(t, far, []byte(p))
	}
	far.Close()
	for i, want := range []string{"", "x", "", "y"} {
		b := make([]byte, 10)
		n, files, err := ecdysis.ReadFiles(near, b)
		if err != nil || string(b[:n]) != want || files != nil {
			t.Errorf("packet %d: %q, %d files, %v; want %q", i, b[:n], len(files), err, want)
		}
	}
	if n, files, err := ecdysis.ReadFiles(near, make([]byte, 10)); n != 0 || files != nil || err != io.EOF {
		t.Errorf("at the end: %d, %d files, %v", n, len(files), err)
	}
}

// Whatever b is, n is not more than its length.
func TestReadFilesEmptyBuffer(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, a, b fileConn, packet bool) {
		if _, err := ecdysis.WriteFiles(a, []byte("x"), os.Stderr); err != nil {
			t.Fatal(err)
		}
		n, files, err := ecdysis.ReadFiles(b, nil)
		closeFiles(files)
		if n != 0 {
			t.Errorf("ReadFiles into nothing: %d bytes, %d files, %v", n, len(files), err)
		}
	})
}

// A peer closes with packets unread: what it has sent comes before the error,
// of which the kernel would tell first, and once.
func TestSeqpacketReset(t *testing.T) {
	t.Parallel()
	reset := func() *ecdysis.SeqpacketConn {
		near, far := proctest.SeqpacketPair(t)
		for _, s := range []string{"one", "two"} {
			if err := far.Send([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		if err := near.Send([]byte("unread")); err != nil {
			t.Fatal(err)
		}
		far.Close()
		limited(t, near)
		return near
	}
	readFiles := func(c *ecdysis.SeqpacketConn, b []byte) (int, error) {
		n, _, err := ecdysis.ReadFiles(c, b)
		return n, err
	}
	for name, recv := range map[string]func(*ecdysis.SeqpacketConn, []byte) (int, error){"Recv": (*ecdysis.SeqpacketConn).Recv, "ReadFiles": readFiles} {
		c := reset()
		b := make([]byte, 10)
		for _, s := range []string{"one", "two"} {
			if n, err := recv(c, b); err != nil || string(b[:n]) != s {
				t.Errorf("%s: %q, %v; want %q", name, b[:n], err, s)
			}
		}
		n, err := recv(c, b)
		if n != 0 || err == nil || err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s after the last packet: %d, %v", name, n, err)
		}
		receivesEnd(t, c)
		checkOp(t, "Send", c.Send([]byte("x")), "write", syscall.EPIPE)
	}
	// If Send is the first to hear of it, nothing else does.
	c := reset()
	hungUp(t, c)
	err := c.Send([]byte("x"))
	if !errors.Is(err, syscall.EPIPE) {
		checkOp(t, "Send", err, "write", syscall.ECONNRESET)
	}
	checkOp(t, "Send", c.Send([]byte("x")), "write", syscall.EPIPE)
	receives(t, c, "one")
	receives(t, c, "two")
	receivesEnd(t, c)
}

// hungUp returns when the peer has closed. A process that another test starts
// has a copy of the peer's descriptor until it runs its program.
func hungUp(t *testing.T, c syscall.Conn) {
	t.Helper()
	withFD(t, c, func(fd int) {
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(proctest.Patience/time.Millisecond))
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				t.Fatalf("the peer has not closed: %v", err)
			}
			return
		}
	})
}

// Packets that came before CloseRead.
func TestSeqpacketCloseReadUnread(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	if err := far.Send([]byte("early")); err != nil {
		t.Fatal(err)
	}
	if err := near.CloseRead(); err != nil {
		t.Fatal(err)
	}
	receives(t, near, "early")
	receivesEnd(t, near)
}

// No packet costs memory.
func TestSeqpacketAllocations(t *testing.T) { // not parallel: it counts what all goroutines allocate
	for _, local := range []string{"", filepath.Join(proctest.ShortDir(t), "client")} {
		near, far := proctest.AcceptSeqpacket(t, local)
		if got := near.RemoteAddr().String(); strings.Trim(got, "@") != local { // "@", as net has it, is no name
			t.Errorf("the peer is bound to %q; want %q", got, local)
		}
		withFD(t, far, func(fd int) {
			in, out := make([]byte, 1000), []byte("packet")
			check := func(err error) {
				if err != nil {
					t.Fatal(err)
				}
			}
			n := testing.AllocsPerRun(2000, func() {
				_, err := syscall.Write(fd, out)
				check(err)
				_, err = near.Recv(in)
				check(err)
				check(near.Send(out))
				_, err = syscall.Read(fd, in)
				check(err)
			})
			if n != 0 {
				t.Errorf("peer bound to %q: %v allocations for a Recv and a Send", local, n)
			}
		})
	}
}

// With room for a part of the descriptors there is an error, and nothing is
// left open.
func TestReadFilesLimit(t *testing.T) {
	t.Parallel()
	for _, typ := range []int{syscall.SOCK_STREAM, syscall.SOCK_SEQPACKET, syscall.SOCK_DGRAM} {
		if out, err := fewDescriptors.Command(strconv.Itoa(typ)).CombinedOutput(); err != nil || string(out) != "done\n" {
			t.Errorf("type %d: %v\n%s", typ, err, out)
		}
	}
}

var fewDescriptors = proctest.DefineRole("few descriptors", func() {
	typ, err := strconv.Atoi(proctest.Args()[0])
	check := func(err error) {
		if err != nil {
			log.Fatal(err)
		}
	}
	check(err)
	a, b, err := proctest.NewSocketPair(typ)
	check(err)
	var old syscall.Rlimit
	check(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old))
	const sent = 10
	b2 := make([]byte, 100)
	// Both ends and the poller are in use.
	_, err = a.Write([]byte("x"))
	check(err)
	_, err = b.Read(b2)
	check(err)
	for _, room := range []int{0, 1, 3, sent - 1, sent} {
		r, w, err := os.Pipe()
		check(err)
		files := slices.Repeat([]*os.File{w}, sent)
		_, err = ecdysis.WriteFiles(a, []byte("many"), files...)
		check(err)
		_, err = ecdysis.WriteFiles(a, []byte("next"), w)
		check(err)
		check(w.Close())
		before := proctest.OpenFDs()
		limited := old
		limited.Cur = limitFor(before, room)
		check(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limited))
		n, got, rerr := ecdysis.ReadFiles(b, b2)
		check(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old))
		after := proctest.OpenFDs()
		switch {
		case room >= sent:
			if n != 4 || len(got) != sent || rerr != nil {
				fmt.Printf("room for %d: %d, %d files, %v\n", room, n, len(got), rerr)
			}
		case n != 0 || got != nil || !errors.Is(rerr, syscall.EMFILE):
			fmt.Printf("room for %d: %d, %d files, %v; want EMFILE\n", room, n, len(got), rerr)
		case !slices.Equal(before, after):
			fmt.Printf("room for %d: descriptors %q; want %q\n", room, after, before)
		}
		closeFiles(got)
		// The connection goes on.
		n, got, err = ecdysis.ReadFiles(b, b2)
		if string(b2[:n]) != "next" || len(got) != 1 || err != nil {
			fmt.Printf("after room for %d: %q, %d files, %v\n", room, b2[:n], len(got), err)
		}
		closeFiles(got)
		check(r.SetReadDeadline(time.Now().Add(proctest.Patience)))
		if rest, err := io.ReadAll(r); len(rest) != 0 || err != nil {
			fmt.Printf("the pipe: %q, %v\n", rest, err)
		}
		check(r.Close())
	}
	fmt.Println("done")
})

// limitFor returns a limit of descriptors that leaves room for so many more
// than those that are open.
func limitFor(open []string, room int) uint64 {
	used := make(map[string]bool)
	for _, s := range open {
		used[strings.Fields(s)[0]] = true
	}
	for n := 0; ; n++ {
		if !used[strconv.Itoa(n)] {
			if room == 0 {
				return uint64(n)
			}
			room--
		}
	}
}

// The user is that of the process at the other end.
func TestPeerCredOtherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	const nobody = 65534
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	for _, ln := range listenConnections(t) {
		seesPeer(t, ln, nobody, func(cmd *exec.Cmd) {
			cmd.SysProcAttr = attr
			// By this path the user needs no permission for the binary's directory.
			cmd.Path = "/proc/self/exe"
		})
	}
}

// SCM_CREDENTIALS and the like between the descriptors harm nobody.
func TestReadFilesWithCredentials(t *testing.T) {
	t.Parallel()
	near, far := proctest.SeqpacketPair(t)
	withFD(t, near, func(fd int) {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
			t.Fatal(err)
		}
	})
	limited(t, near)
	for _, count := range []int{0, 1, 100} {
		if _, err := ecdysis.WriteFiles(far, []byte("x"), slices.Repeat([]*os.File{os.Stderr}, count)...); err != nil {
			t.Fatal(err)
		}
		closeFiles(receivesFiles(t, near, "x", count))
	}
	if err := far.Send([]byte("plain")); err != nil {
		t.Fatal(err)
	}
	receives(t, near, "plain")
	// As many as the system takes in one message.
	sendRaw(t, far, []byte("x"), slices.Repeat([]*os.File{os.Stderr}, 253)...)
	closeFiles(receivesFiles(t, near, "x", 253))
}

// The system names a sender, nobody, with the end of a stream, too.
func TestReadFilesEndWithCredentials(t *testing.T) {
	t.Parallel()
	for _, typ := range []int{syscall.SOCK_STREAM, syscall.SOCK_SEQPACKET} {
		a, b := proctest.SocketPair(t, typ)
		withFD(t, b, func(fd int) {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
				t.Fatal(err)
			}
		})
		limited(t, b)
		if _, err := ecdysis.WriteFiles(a, []byte("last"), os.Stderr); err != nil {
			t.Fatal(err)
		}
		a.Close()
		closeFiles(receivesFiles(t, b, "last", 1))
		if n, files, err := ecdysis.ReadFiles(b, make([]byte, 10)); n != 0 || files != nil || err != io.EOF {
			t.Errorf("type %d: ReadFiles at the end: %d, %d files, %v; want io.EOF", typ, n, len(files), err)
		}
	}
}
