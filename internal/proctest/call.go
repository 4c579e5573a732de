package proctest

import (
	"fmt"
	"time"
)

// None is the argument or the result of a call that has none.
type None = struct{}

// A Call is a function that runs in a daemon.
type Call[A, R any] struct{ name string }

var calls = make(map[string]func(d *Daemon, arg []byte) ([]byte, error))

// Define returns the call of f. It is for package variables, because a daemon
// must know all calls before Main runs. The name is for messages.
func Define[A, R any](name string, f func(*Daemon, A) (R, error)) Call[A, R] {
	if _, ok := calls[name]; ok {
		panic("proctest: two calls are named " + name)
	}
	calls[name] = func(d *Daemon, arg []byte) ([]byte, error) {
		a, err := unpack[A](arg)
		if err != nil {
			panic(fmt.Sprintf("proctest: the argument of %s: %v", name, err))
		}
		r, err := f(d, a)
		b, perr := pack(r)
		if perr != nil {
			panic(fmt.Sprintf("proctest: the result of %s: %v", name, perr))
		}
		return b, err
	}
	return Call[A, R]{name}
}

// String returns the name.
func (c Call[A, R]) String() string { return c.name }

// On calls c in p, where it must succeed, and returns its result. Without an
// argument c gets the zero value.
func (c Call[A, R]) On(p *Proc, arg ...A) R {
	p.T.Helper()
	r, err := c.Begin(p, arg...).Wait()
	if err != nil {
		p.T.Fatalf("process %d: %s: %v", p.PID, c.name, err)
	}
	return r
}

// Try calls c in p and returns what it returns.
func (c Call[A, R]) Try(p *Proc, arg ...A) (R, error) {
	p.T.Helper()
	return c.Begin(p, arg...).Wait()
}

// Err calls c in p and returns its error.
func (c Call[A, R]) Err(p *Proc, arg ...A) error {
	p.T.Helper()
	_, err := c.Begin(p, arg...).Wait()
	return err
}

// Begin begins the call.
func (c Call[A, R]) Begin(p *Proc, arg ...A) *Pending[R] {
	p.T.Helper()
	b, err := c.pack(arg)
	if err != nil {
		p.T.Fatalf("%s: %v", c.name, err)
	}
	return &Pending[R]{p: p, name: c.name, answer: p.begin(c.name, b)}
}

// Do is the action that calls c. At and ErrAt have the results.
func (c Call[A, R]) Do(arg ...A) Action {
	b, err := c.pack(arg)
	if err != nil {
		panic(err)
	}
	return Action{{Do: "call", Text: c.name, Arg: b}}
}

// At waits until p has made the call that is planned for the point, and
// returns what it returned. Of several such calls it is the first.
func (c Call[A, R]) At(p *Proc, point Point) (R, error) {
	p.T.Helper()
	m := p.message(fmt.Sprintf("%s at point %s", c.name, point), 0, func(m message) bool { return m.At == point && m.Call == c.name })
	r, err := unpack[R](m.Result)
	if err != nil {
		p.T.Fatalf("%s: %v", c.name, err)
	}
	return r, m.Err.error()
}

// ErrAt is At without the result.
func (c Call[A, R]) ErrAt(p *Proc, point Point) error {
	p.T.Helper()
	_, err := c.At(p, point)
	return err
}

func (c Call[A, R]) pack(arg []A) ([]byte, error) {
	if len(arg) > 1 {
		panic("proctest: a call has one argument")
	}
	var a A
	if len(arg) > 0 {
		a = arg[0]
	}
	return pack(a)
}

// A Pending is a call that has begun.
type Pending[R any] struct {
	p      *Proc
	name   string
	answer chan message
	m      message
	done   bool
}

// Wait returns what the call returned.
func (c *Pending[R]) Wait() (R, error) {
	p := c.p
	p.T.Helper()
	if !c.done {
		select {
		case c.m = <-c.answer:
		case <-p.gone:
			select {
			case c.m = <-c.answer:
			default:
				p.T.Fatalf("process %d ended without an answer to %s; %v", p.PID, c.name, p.history())
			}
		case <-time.After(Patience):
			p.T.Fatalf("process %d does not answer to %s; %v", p.PID, c.name, p.history())
		}
		c.done = true
	}
	r, err := unpack[R](c.m.Result)
	if err != nil {
		p.T.Fatalf("%s: %v", c.name, err)
	}
	return r, c.m.Err.error()
}

// Err returns the call's error.
func (c *Pending[R]) Err() error {
	c.p.T.Helper()
	_, err := c.Wait()
	return err
}
