package proctest

import (
	"bytes"
	"encoding/gob"
	"net"
	"sync"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
)

// Between a test and its processes, values of these types travel as gobs.

// A hello is the first value that a process sends.
type hello struct {
	PID    int
	Helper bool // it gets no spec and takes no calls
}

// A message is a value that a process sends after its hello.
type message struct {
	At     Point // the point to which the process has come, or for which an answered call was planned
	ID     int   // of the command that this message answers
	Call   string
	Err    *wireError
	Result []byte
	Event  *ecdysis.Event // without Err, which is the message's
	Addrs  []Addr
}

// A command is what a test sends after the spec.
type command struct {
	ID     int
	Call   string
	Arg    []byte
	Resume bool
}

// A conn sends and receives gobs.
type conn struct {
	net.Conn
	mu  sync.Mutex // serializes enc
	enc *gob.Encoder
	dec *gob.Decoder
}

func newConn(c net.Conn) *conn {
	return &conn{Conn: c, enc: gob.NewEncoder(c), dec: gob.NewDecoder(c)}
}

func (c *conn) send(x any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.enc.Encode(x)
}

func (c *conn) greet(h hello) {
	if err := c.send(h); err != nil {
		exit(err)
	}
}

func init() { gob.Register(syscall.Signal(0)) }

// A box holds a value of any type, interfaces included.
type box[T any] struct{ V T }

func pack[T any](v T) ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(box[T]{v})
	return b.Bytes(), err
}

func unpack[T any](b []byte) (T, error) {
	var x box[T]
	err := gob.NewDecoder(bytes.NewReader(b)).Decode(&x)
	return x.V, err
}
