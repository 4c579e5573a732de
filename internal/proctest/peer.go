package proctest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

// A Record is the fields, "key=value", of one record of a frame.
type Record = []string

// Frame encodes a frame of the protocol, which docs/protocol.md describes.
func Frame(kind byte, records ...Record) []byte {
	var b []byte
	for _, r := range records {
		for _, f := range r {
			b = binary.AppendUvarint(b, uint64(len(f)))
			b = append(b, f...)
		}
		b = append(b, 0)
	}
	return slices.Concat([]byte{kind}, binary.BigEndian.AppendUint32(nil, uint32(len(b))), b)
}

// ReadFrame reads a frame. Descriptors that come with it are lost.
func ReadFrame(r io.Reader) (kind byte, records []Record, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(h[1:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, nil, err
	}
	record := Record{}
	for len(b) > 0 {
		n, w := binary.Uvarint(b)
		if w <= 0 || n > uint64(len(b)-w) {
			return 0, nil, fmt.Errorf("frame %q: a field of %d bytes, and %d are left", h[0], n, len(b))
		}
		if n == 0 {
			records, record = append(records, record), Record{}
		} else {
			record = append(record, string(b[w:w+int(n)]))
		}
		b = b[w+int(n):]
	}
	return h[0], records, nil
}

// ReadUntil reads frames up to the first one of this kind, and returns that frame's
// records.
func ReadUntil(r io.Reader, kind byte) ([]Record, error) {
	for seen := ""; ; {
		k, records, err := ReadFrame(r)
		if err != nil {
			return nil, fmt.Errorf("frames %q, and then: %w; want one of kind %q", seen, err, kind)
		}
		if k == kind {
			return records, nil
		}
		seen += string(k)
	}
}

// A Peer is the test's own end of a conversation with a process, frame by
// frame.
type Peer struct {
	T    testing.TB
	Conn *net.UnixConn

	r *bufio.Reader
}

// DialPeer connects to a takeover socket.
func DialPeer(t testing.TB, path string) *Peer {
	t.Helper()
	c, err := net.DialTimeout("unix", path, Patience)
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, c)
}

// AcceptPeer accepts a connection, in the place of a process that serves a
// takeover socket.
func AcceptPeer(t testing.TB, ln *net.UnixListener) *Peer {
	t.Helper()
	if err := ln.SetDeadline(time.Now().Add(Patience)); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, c)
}

func newPeer(t testing.TB, c net.Conn) *Peer {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		t.Fatal(err)
	}
	return &Peer{T: t, Conn: c.(*net.UnixConn), r: bufio.NewReader(c)}
}

// LaunchUnder starts a process whose predecessor is the test.
func (c *Chain) LaunchUnder() (*Proc, *Peer) {
	c.T.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		c.T.Fatal(err)
	}
	syscall.CloseOnExec(fds[0])
	syscall.CloseOnExec(fds[1])
	mine, theirs := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
	defer mine.Close()
	defer theirs.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		c.T.Fatal(err)
	}
	peer := newPeer(c.T, conn)
	p := c.Launch(func(cmd *exec.Cmd) {
		cmd.ExtraFiles = []*os.File{theirs}
		cmd.Env = append(cmd.Env, fmt.Sprintf("ECDYSIS_PARENT=fd=3 pid=%d uid=%d", os.Getpid(), os.Geteuid()))
	})
	return p, peer
}

// Send sends bytes, with descriptors.
func (p *Peer) Send(b []byte, fds ...int) {
	p.T.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = syscall.UnixRights(fds...)
	}
	if _, _, err := p.Conn.WriteMsgUnix(b, oob, nil); err != nil {
		p.T.Fatal(err)
	}
}

// Expect returns the records of the next frame, which must be of this kind.
func (p *Peer) Expect(kind byte) []Record {
	p.T.Helper()
	k, records, err := ReadFrame(p.r)
	if err != nil {
		p.T.Fatalf("want a frame %q: %v", kind, err)
	}
	if k != kind {
		p.T.Fatalf("a frame %q: %q; want %q", k, records, kind)
	}
	return records
}

// ReadUntil returns the records of the next frame of this kind.
func (p *Peer) ReadUntil(kind byte) []Record {
	p.T.Helper()
	records, err := ReadUntil(p.r, kind)
	if err != nil {
		p.T.Fatal(err)
	}
	return records
}

// Refused fails the test unless the next and last frame is a FAIL whose reason
// contains this text.
func (p *Peer) Refused(says string) {
	p.T.Helper()
	r := p.Expect('F')
	if len(r) != 1 || len(r[0]) != 1 || !strings.HasPrefix(r[0][0], "reason=") || !strings.Contains(r[0][0], says) {
		p.T.Fatalf("a FAIL with %q; want a reason that says %q", r, says)
	}
	p.HungUp()
}

// HungUp fails the test unless the other end sends no more.
func (p *Peer) HungUp() {
	p.T.Helper()
	k, records, err := ReadFrame(p.r)
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		p.T.Fatalf("a frame %q with %q, %v; want the end of the stream", k, records, err)
	}
}

// inheritedStream is a Raw process's stream to its predecessor.
func inheritedStream() net.Conn {
	if ecdysis.Successor() {
		f := os.NewFile(3, "") // package ecdysis has taken the variable, but has not opened the descriptor
		c, err := net.FileConn(f)
		if err != nil {
			exit(err)
		}
		f.Close()
		return c
	}
	return nil
}

// CallWrite makes a Raw process write to its Stream.
var CallWrite = Define("write", func(d *Daemon, b []byte) (None, error) {
	_, err := d.Stream.Write(b)
	return None{}, err
})

var (
	callDial = Define("dial", func(d *Daemon, path string) (_ None, err error) {
		d.Stream, err = net.Dial("unix", expand(path))
		return None{}, err
	})
	callReadUntil = Define("read until", func(d *Daemon, kind byte) ([]Record, error) { return ReadUntil(d.Stream, kind) })
)

// RawDial makes a Raw process connect to a takeover socket. The connection is its
// Stream from then on.
func (p *Proc) RawDial(path string) { p.T.Helper(); callDial.On(p, path) }

// RawWrite makes a Raw process write to its Stream.
func (p *Proc) RawWrite(b []byte) error { p.T.Helper(); return CallWrite.Err(p, b) }

// RawReadUntil makes a Raw process read frames from its Stream up to the first one
// of this kind. It returns that frame's records.
func (p *Proc) RawReadUntil(kind byte) []Record { p.T.Helper(); return callReadUntil.On(p, kind) }
