//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A frame that is larger than the system's buffer arrives while its sender
// waits for the answer. No other process can make the buffer of a predecessor
// small.
func TestRestIsSent(t *testing.T) {
	t.Parallel()
	ends, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	var s [2]*stream
	for i, fd := range ends {
		if s[i], err = newStream(fd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s[i].close)
	}
	old, successor := s[0], s[1]
	successor.inherits = true
	_ = old.raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096) })
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var records []record
	var fds []int
	for range 15 {
		records = append(records, record{"kind=file", "name=" + strings.Repeat("x", maxName)})
		fds = append(fds, int(null.Fd()))
	}
	if err := old.send(frameSockets, records, fds); err != nil {
		t.Fatal(err)
	}
	if len(old.out) == 0 {
		t.Skip("the system has taken the whole frame")
	}
	patience := time.Now().Add(30 * time.Second)
	answer := make(chan error, 1)
	go func() {
		_, err := old.read(patience)
		answer <- err
	}()
	f, err := successor.read(patience)
	if err != nil {
		t.Fatal(err)
	}
	closeAll(f.fds)
	if f.kind != frameSockets || len(f.records) != len(records) || len(f.fds) != len(fds) {
		t.Errorf("a frame %q with %d records and %d descriptors; want %d of each", f.kind, len(f.records), len(f.fds), len(fds))
	}
	if err := successor.send(frameAck, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Error(err)
	}
}
