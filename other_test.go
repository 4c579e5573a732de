//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package ecdysis

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"testing"
	"time"
)

// fresh returns a new Upgrader, although a process can have only one.
func fresh(t *testing.T, opts Options) *Upgrader {
	t.Helper()
	process.Store(nil)
	u, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestOther is the life of a process on a system that cannot hand sockets on.
func TestOther(t *testing.T) {
	var events []EventKind
	u := fresh(t, Options{Notify: func(e Event) { events = append(events, e.Kind) }})
	if _, err := New(Options{}); err == nil {
		t.Error("New has succeeded twice")
	}
	if Successor() || u.HasParent() || u.Generation() != 0 || u.WaitForParent(context.Background()) != nil {
		t.Error("there is a parent")
	}
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	go func() {
		if c, err := net.Dial("tcp", ln.Addr().String()); err == nil {
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	select {
	case err := <-accepted:
		t.Fatalf("Accept has not waited for Ready: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := u.Upgrade(); err != ErrNotReady {
		t.Errorf("Upgrade before Ready: %v; want ErrNotReady", err)
	}
	if err := errors.Join(u.Ready(), u.Ready()); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	if err := u.Upgrade(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Upgrade: %v; want errors.ErrUnsupported", err)
	}
	if _, err := u.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Errorf("Listen after Ready: %v", err)
	}

	waited := make(chan Event, 1)
	go func() { waited <- u.Wait() }()
	go func() {
		_, err := ln.Accept()
		accepted <- err
	}()
	u.Stop()
	u.Stop()
	<-u.Exit()
	if e := <-waited; e.Kind != EventStopping {
		t.Errorf("Wait returned %v; want EventStopping", e)
	}
	select {
	case err := <-accepted:
		t.Fatalf("Accept has ended by itself: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("after Stop a client connects")
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept of a closed listener: %v; want net.ErrClosed", err)
	}
	if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Close again: %v; want net.ErrClosed", err)
	}
	if err := u.Ready(); err != ErrStopped {
		t.Errorf("Ready after Stop: %v; want ErrStopped", err)
	}
	if err := u.Upgrade(); err != ErrStopped {
		t.Errorf("Upgrade after Stop: %v; want ErrStopped", err)
	}
	if _, err := u.Listen("tcp", "127.0.0.1:0"); err != ErrStopped {
		t.Errorf("Listen after Stop: %v; want ErrStopped", err)
	}
	if len(events) != 2 || events[0] != EventReady || events[1] != EventStopping {
		t.Errorf("the events are %v", events)
	}
}

func TestOtherDeadline(t *testing.T) {
	u := fresh(t, Options{})
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nl := ln.(interface{ SetDeadline(time.Time) error })
	expires := func(when string) {
		t.Helper()
		if err := nl.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := ln.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Accept %s: %v; want os.ErrDeadlineExceeded", when, err)
		}
	}
	expires("before Ready")
	if err := u.Ready(); err != nil {
		t.Fatal(err)
	}
	expires("after Ready")
	u.Stop()
	expires("after Stop")
}

func TestOtherPackets(t *testing.T) {
	u := fresh(t, Options{})
	c, err := u.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	uc := c.(*UDPConn)
	read := make(chan error, 1)
	go func() {
		b := make([]byte, 10)
		n, from, err := uc.ReadFrom(b)
		if err == nil {
			_, err = uc.WriteTo(b[:n], from)
		}
		read <- err
	}()
	client, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteTo([]byte("hello"), uc.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-read:
		t.Fatalf("the read has not waited for Ready: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := u.Ready(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, _, err := client.ReadFrom(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("the answer is %q, %v", b[:n], err)
	}
	go func() {
		_, err := uc.Read(b)
		read <- err
	}()
	u.Stop()
	select {
	case err := <-read:
		t.Fatalf("the read has ended by itself: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := uc.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the read of a closed socket: %v; want net.ErrClosed", err)
	}
}

func TestOtherUnsupported(t *testing.T) {
	process.Store(nil)
	if _, err := New(Options{UpgradeSocket: "control"}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("New with a control socket: %v; want errors.ErrUnsupported", err)
	}
	u := fresh(t, Options{}) // after an error the call may be made again
	for name, f := range map[string]func() error{
		"ListenSeqpacket": func() error { _, err := u.ListenSeqpacket("s"); return err },
		"DatagramPair":    func() error { _, _, err := u.DatagramPair("p"); return err },
		"Unregistered":    func() error { _, err := u.Unregistered(); return err },
		"Request":         func() error { _, err := Request(context.Background(), "s"); return err },
		"PeerCred":        func() error { _, err := PeerCred(nil); return err },
		"ReadFiles":       func() error { _, _, err := ReadFiles(nil, nil); return err },
		"WriteFiles":      func() error { _, err := WriteFiles(nil, nil); return err },
		"MemoryFile":      func() error { _, err := MemoryFile(); return err },
	} {
		if err := f(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v; want errors.ErrUnsupported", name, err)
		}
	}
	for name, f := range map[string]func() error{
		"Listener":   func() error { _, err := u.Listener("a"); return err },
		"PacketConn": func() error { _, err := u.PacketConn("a"); return err },
		"Conn":       func() error { _, err := u.Conn("a"); return err },
		"File":       func() error { _, err := u.File("a"); return err },
	} {
		if err := f(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v; want fs.ErrNotExist", name, err)
		}
	}
	if err := errors.Join(u.AddFile("a", os.Stdin), u.AddConn("a", nil)); err != nil || u.FileNames("") != nil {
		t.Errorf("adding: %v, %v", err, u.FileNames(""))
	}
	if b, err := io.ReadAll(u.State()); len(b) > 0 || err != nil {
		t.Errorf("the state is %q, %v", b, err)
	}
	if err := new(Upgrader).Ready(); err == nil {
		t.Error("Ready of a zero Upgrader has succeeded")
	}
	reason := errors.New("reason")
	if err := u.Fail(reason); err != reason {
		t.Errorf("Fail: %v", err)
	}
}

func TestOtherPIDFile(t *testing.T) {
	path := t.TempDir() + "/pid"
	u := fresh(t, Options{PIDFile: path})
	if err := u.Ready(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || len(b) < 2 {
		t.Errorf("the PID file: %q, %v", b, err)
	}
	u.Stop()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the PID file after Stop: %v; want that it has gone", err)
	}
}
