package e2e

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// What the tests of handing on share: calls by which a daemon makes, adds,
// claims and uses connections, files and sockets. It holds each by a key.

// A named is what a daemon holds by a key, and the name by which it hands that
// on.
type named struct{ Name, Key string }

// A socketAt is a socket with a key and an address.
type socketAt struct{ Key, Network, Address string }

// A copyOf is what a daemon makes of what it holds by another key.
type copyOf struct{ Key, Of string }

// A fileAt is a file with a key.
type fileAt struct{ Key, Path string }

// An input is what is written to what has the key.
type input struct{ Key, Text string }

// An output is how many bytes are read from what has the key.
type output struct {
	Key string
	N   int
}

// nothing is what a claim finds if it finds nothing.
const nothing = "nothing"

// A claim asks by a name, and returns the type of what it has found.
type claim = proctest.Call[named, string]

// claimed keeps what a claim has found.
func claimed[T comparable](d *proctest.Daemon, key string, x T, err error) (string, error) {
	var none T
	if errors.Is(err, fs.ErrNotExist) && x == none {
		return nothing, nil
	}
	if err != nil || x == none {
		return "", errors.Join(err, fmt.Errorf("the call has returned %v", x))
	}
	d.Set(key, x)
	return fmt.Sprintf("%T", x), nil
}

// The package's own calls.
var (
	addConn = proctest.Define("AddConn", func(d *proctest.Daemon, a named) (proctest.None, error) {
		return proctest.None{}, d.U.AddConn(a.Name, proctest.Get[net.Conn](d, a.Key))
	})
	addFile = proctest.Define("AddFile", func(d *proctest.Daemon, a named) (proctest.None, error) {
		return proctest.None{}, d.U.AddFile(a.Name, proctest.Get[*os.File](d, a.Key))
	})
	claimConn claim = proctest.Define("Conn", func(d *proctest.Daemon, a named) (string, error) {
		c, err := d.U.Conn(a.Name)
		return claimed(d, a.Key, c, err)
	})
	claimFile claim = proctest.Define("File", func(d *proctest.Daemon, a named) (string, error) {
		f, err := d.U.File(a.Name)
		return claimed(d, a.Key, f, err)
	})
	claimListener claim = proctest.Define("Listener", func(d *proctest.Daemon, a named) (string, error) {
		ln, err := d.U.Listener(a.Name)
		return claimed(d, a.Key, ln, err)
	})
	claimPacketConn claim = proctest.Define("PacketConn", func(d *proctest.Daemon, a named) (string, error) {
		c, err := d.U.PacketConn(a.Name)
		return claimed(d, a.Key, c, err)
	})
	// pair keeps the end to the predecessor with ".up" after the key, if there
	// is one, and the end to the successor with ".down".
	pair claim = proctest.Define("DatagramPair", func(d *proctest.Daemon, a named) (string, error) {
		up, down, err := d.U.DatagramPair(a.Name)
		if down != nil {
			d.Set(a.Key+".down", down)
		}
		return claimed(d, a.Key+".up", up, err)
	})
	ownListener = proctest.Define("Listen with a key", func(d *proctest.Daemon, a socketAt) (string, error) {
		ln, err := d.U.Listen(a.Network, a.Address)
		return claimed(d, a.Key, ln, err)
	})
	ownPacketConn = proctest.Define("ListenPacket with a key", func(d *proctest.Daemon, a socketAt) (string, error) {
		c, err := d.U.ListenPacket(a.Network, a.Address)
		return claimed(d, a.Key, c, err)
	})
)

// Calls that make something behind the package's back.
var (
	// dial returns the address of the daemon's end.
	dial = proctest.Define("net.Dial", func(d *proctest.Daemon, a socketAt) (string, error) {
		c, err := net.Dial(a.Network, a.Address)
		if err != nil {
			return "", err
		}
		d.Set(a.Key, c)
		return c.LocalAddr().String(), nil
	})
	// listenElsewhere returns the address. Nothing removes the file of a Unix
	// socket.
	listenElsewhere = proctest.Define("net.Listen", func(d *proctest.Daemon, a socketAt) (string, error) {
		if a.Network == "udp" || a.Network == "unixgram" {
			c, err := net.ListenPacket(a.Network, a.Address)
			if err != nil {
				return "", err
			}
			d.Set(a.Key, c)
			return c.LocalAddr().String(), nil
		}
		ln, err := net.Listen(a.Network, a.Address)
		if err != nil {
			return "", err
		}
		if ul, ok := ln.(*net.UnixListener); ok {
			ul.SetUnlinkOnClose(false)
		}
		d.Set(a.Key, ln)
		return ln.Addr().String(), nil
	})
	// fileOf makes an *os.File of a socket, as its method File does.
	fileOf = proctest.Define("File of", func(d *proctest.Daemon, a copyOf) (_ proctest.None, err error) {
		var f *os.File
		if c, ok := proctest.Get[any](d, a.Of).(interface{ File() (*os.File, error) }); ok {
			f, err = c.File()
		} else {
			cerr := onFD(d, a.Of, func(fd uintptr) {
				if fd, e := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); e != nil {
					err = e
				} else {
					f = os.NewFile(uintptr(fd), "")
				}
			})
			err = errors.Join(cerr, err)
		}
		d.Set(a.Key, f)
		return proctest.None{}, err
	})
	connOf = proctest.Define("net.FileConn", func(d *proctest.Daemon, a copyOf) (proctest.None, error) {
		c, err := net.FileConn(proctest.Get[*os.File](d, a.Of))
		d.Set(a.Key, c)
		return proctest.None{}, err
	})
	// openFile opens a file for reading and writing, which it may make, or a
	// directory.
	openFile = proctest.Define("os.OpenFile", func(d *proctest.Daemon, a fileAt) (proctest.None, error) {
		flags := os.O_RDWR | os.O_CREATE
		if fi, err := os.Stat(a.Path); err == nil && fi.IsDir() {
			flags = os.O_RDONLY
		}
		f, err := os.OpenFile(a.Path, flags, 0o600)
		d.Set(a.Key, f)
		return proctest.None{}, err
	})
	// openPipe keeps the ends with ".r" and ".w" after the key. Its ends block,
	// as those of os.Pipe do not.
	openPipe = proctest.Define("pipe", func(d *proctest.Daemon, key string) (proctest.None, error) {
		return proctest.None{}, makePipe(d, key, false)
	})
	openPollablePipe = proctest.Define("pipe that does not block", func(d *proctest.Daemon, key string) (proctest.None, error) {
		return proctest.None{}, makePipe(d, key, true)
	})
	// streamPair and datagramPair keep files of the ends of a socketpair(2)
	// with ".a" and ".b" after the key.
	streamPair = proctest.Define("socketpair of streams", func(d *proctest.Daemon, key string) (proctest.None, error) {
		return proctest.None{}, makeSocketPair(d, key, syscall.SOCK_STREAM)
	})
	datagramPair = proctest.Define("socketpair of datagrams", func(d *proctest.Daemon, key string) (proctest.None, error) {
		return proctest.None{}, makeSocketPair(d, key, syscall.SOCK_DGRAM)
	})
	// bindTCP makes a TCP socket that does not listen.
	bindTCP = proctest.Define("bind", func(d *proctest.Daemon, key string) (proctest.None, error) {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			return proctest.None{}, err
		}
		syscall.CloseOnExec(fd)
		d.Set(key, os.NewFile(uintptr(fd), ""))
		return proctest.None{}, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	})
)

func makePipe(d *proctest.Daemon, key string, nonblocking bool) error {
	var fds [2]int
	if err := syscall.Pipe(fds[:]); err != nil {
		return err
	}
	for i, end := range []string{".r", ".w"} {
		syscall.CloseOnExec(fds[i])
		if err := syscall.SetNonblock(fds[i], nonblocking); err != nil {
			return err
		}
		d.Set(key+end, os.NewFile(uintptr(fds[i]), end))
	}
	return nil
}

func makeSocketPair(d *proctest.Daemon, key string, typ int) error {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, typ, 0)
	if err != nil {
		return err
	}
	for i, end := range []string{".a", ".b"} {
		syscall.CloseOnExec(fds[i])
		d.Set(key+end, os.NewFile(uintptr(fds[i]), end))
	}
	return nil
}

// onFD calls f with a descriptor that the daemon holds.
func onFD(d *proctest.Daemon, key string, f func(fd uintptr)) error {
	raw, err := proctest.Get[syscall.Conn](d, key).SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(f)
}

// Calls that use what the daemon holds.
var (
	closeKeys = proctest.Define("close keys", func(d *proctest.Daemon, keys []string) (proctest.None, error) {
		for _, key := range keys {
			if err := proctest.Get[io.Closer](d, key).Close(); err != nil {
				return proctest.None{}, err
			}
		}
		return proctest.None{}, nil
	})
	writeTo = proctest.Define("write to", func(d *proctest.Daemon, a input) (proctest.None, error) {
		_, err := io.WriteString(proctest.Get[io.Writer](d, a.Key), a.Text)
		return proctest.None{}, err
	})
	// readFrom reads so many bytes.
	readFrom = proctest.Define("read from", func(d *proctest.Daemon, a output) (string, error) {
		r := proctest.Get[io.Reader](d, a.Key)
		if c, ok := r.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = c.SetReadDeadline(time.Now().Add(proctest.Patience)) // files may have none
		}
		b := make([]byte, a.N)
		n, err := io.ReadFull(r, b)
		return string(b[:n]), err
	})
	localAddr = proctest.Define("LocalAddr", func(d *proctest.Daemon, key string) (string, error) {
		return proctest.Get[interface{ LocalAddr() net.Addr }](d, key).LocalAddr().String(), nil
	})
	serveKey = proctest.Define("serve key", func(d *proctest.Daemon, key string) (proctest.None, error) {
		d.Accept(proctest.Get[io.Closer](d, key))
		return proctest.None{}, nil
	})
)

// finds fails the test unless p finds something of this type by the name. It
// keeps that by the key.
func finds(p *proctest.Proc, c claim, name, key, typ string) {
	p.T.Helper()
	if got := c.On(p, named{name, key}); got != typ {
		p.T.Fatalf("process %d: %v of %q has found %s; want %s", p.PID, c, name, got, typ)
	}
}

// findsNothing fails the test if p finds something by the name.
func findsNothing(p *proctest.Proc, c claim, name string) {
	p.T.Helper()
	finds(p, c, name, "found", nothing)
}

// closes lets p close what it holds by the keys.
func closes(p *proctest.Proc, keys ...string) {
	p.T.Helper()
	closeKeys.On(p, keys)
}

func writes(p *proctest.Proc, key, text string) {
	p.T.Helper()
	writeTo.On(p, input{key, text})
}

// reads fails the test unless p reads this text.
func reads(p *proctest.Proc, key, text string) {
	p.T.Helper()
	if got, err := tryRead(p, key, len(text)); err != nil || got != text {
		p.T.Fatalf("process %d: a read of %s: %q, %v; want %q", p.PID, key, got, err, text)
	}
}

// readsEnd fails the test unless p reads the end.
func readsEnd(p *proctest.Proc, key string) {
	p.T.Helper()
	if got, err := tryRead(p, key, 1); !errors.Is(err, io.EOF) {
		p.T.Errorf("process %d: a read of %s: %q, %v; want the end", p.PID, key, got, err)
	}
}

func tryRead(p *proctest.Proc, key string, n int) (string, error) {
	p.T.Helper()
	return readFrom.Try(p, output{key, n})
}

// cannotWrite fails the test unless a write fails with this error.
func cannotWrite(p *proctest.Proc, key string, target error) {
	p.T.Helper()
	proctest.Want(p.T, writeTo.Err(p, input{key, "x"}), target)
}

func opens(p *proctest.Proc, key, path string) {
	p.T.Helper()
	openFile.On(p, fileAt{key, path})
}

// The test's side of a connection.

func say(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func hear(t testing.TB, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	_ = c.SetReadDeadline(time.Now().Add(proctest.Patience))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("got %q, %v; want %q", b[:n], err, text)
	}
}

// dialled lets p dial the test, and returns the test's end.
func dialled(p *proctest.Proc, key, network string) net.Conn {
	p.T.Helper()
	address := "127.0.0.1:0"
	if strings.HasPrefix(network, "unix") {
		address = filepath.Join(proctest.ShortDir(p.T), "peer")
	}
	if network == "udp" {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			p.T.Fatal(err)
		}
		p.T.Cleanup(func() { c.Close() })
		local := dial.On(p, socketAt{key, network, c.LocalAddr().String()})
		to, err := net.ResolveUDPAddr("udp", local)
		if err != nil {
			p.T.Fatal(err)
		}
		// Connected, so that it hears when the other end has gone.
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) {
				err = syscall.Connect(int(fd), &syscall.SockaddrInet4{Addr: [4]byte(to.IP.To4()), Port: to.Port})
			})
			err = errors.Join(cerr, err)
		}
		if err != nil {
			p.T.Fatal(err)
		}
		return c.(*net.UDPConn)
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		p.T.Fatal(err)
	}
	defer ln.Close()
	dial.On(p, socketAt{key, network, ln.Addr().String()})
	c, err := ln.Accept()
	if err != nil {
		p.T.Fatal(err)
	}
	p.T.Cleanup(func() { c.Close() })
	return c
}

// talk lets p, and the test at the other end, each say something.
func talk(p *proctest.Proc, key string, c net.Conn) {
	p.T.Helper()
	writes(p, key, "question")
	hear(p.T, c, "question")
	say(p.T, c, "answer")
	reads(p, key, "answer")
}

// ends asserts that no process has the other end of c any more.
func ends(t testing.TB, c net.Conn) {
	t.Helper()
	if _, ok := c.(*net.UDPConn); ok && runtime.GOOS == "linux" {
		_, _ = c.Write([]byte("anybody?")) // the answer comes to the read
	}
	_ = c.SetReadDeadline(time.Now().Add(proctest.Patience))
	_, err := c.Read(make([]byte, 1))
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the other end is still open: %v", err)
	}
}

// connNetworks are the networks whose connections move, and what they are then.
func connNetworks() map[string]string {
	m := map[string]string{"tcp": "*net.TCPConn", "unix": "*net.UnixConn", "udp": "*net.UDPConn"}
	if runtime.GOOS != "darwin" {
		m["unixpacket"] = "*ecdysis.SeqpacketConn"
	}
	return m
}
