//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The predecessor as its successor sees it: how it is found, what it says
// after READY, and when it has no say any more.

// envName is the variable by which a successor finds its end of the stream
// and knows whose end the other one is: "fd=3 pid=1234 uid=0".
const envName = "ECDYSIS_PARENT"

// handoverTimeout bounds what a successor does between COMMIT and DONE, a
// rename and the caller's hook for EventReady, and the wait for FINAL.
const handoverTimeout = 5 * time.Second

// pollInterval is the longest that Upgrade and Ready wait for the other
// process without a look at everything else.
const pollInterval = 100 * time.Millisecond

// A predecessor is the older process. In the first process of a chain its
// stream is nil, and it has no say from the start.
type predecessor struct {
	s       *stream       // has locks of its own
	final   chan struct{} // closed when the older process has no say any more: it has sent FINAL or has ended
	once    sync.Once     // closes final
	standby atomic.Bool   // it stands by for its Probation, and FINAL comes after that
}

// newPredecessor returns the process at the other end of s. A nil s means that
// there is none.
func newPredecessor(s *stream) *predecessor {
	p := &predecessor{s: s, final: make(chan struct{})}
	if s == nil {
		p.once.Do(func() { close(p.final) })
	}
	return p
}

// inheritance is what a predecessor has set for this process. It is taken when
// the package is initialised, so that no program that this process starts takes
// it for its own: the variable is unset, and the descriptor close-on-exec.
var inheritance, isSuccessor = takeInheritance()

func takeInheritance() (value string, ok bool) {
	if value, ok = os.LookupEnv(envName); !ok {
		return "", false
	}
	_ = os.Unsetenv(envName) // fails only for names that it refuses
	if fd, ok := number(record(split(value, ' ')).get("fd")); ok && fd >= 3 {
		syscall.CloseOnExec(fd)
	}
	return strings.Clone(value), true
}

// Successor reports whether a predecessor has started this process by an
// upgrade. It can be called before New. A process that takes over at
// Options.TakeoverSocket is not a successor in this sense.
//
// What the predecessor hands on is taken when the package is initialised, and is
// lost to a program that executes itself anew before New.
func Successor() bool { return isSuccessor }

// openInheritance returns the stream to the process that has started this one,
// or nil if it was not started as a successor.
func openInheritance() (*stream, error) {
	if !isSuccessor {
		return nil, nil
	}
	s, err := openStream(inheritance)
	if err != nil {
		return nil, errorf("the environment variable %s is %q; want what an upgrading process sets for its successor: %w", envName, inheritance, err)
	}
	return s, nil
}

func openStream(value string) (*stream, error) {
	r := record(split(value, ' '))
	fd, ok := number(r.get("fd"))
	if !ok || fd < 3 {
		return nil, errors.New("it names no descriptor")
	}
	pid, ok := number(r.get("pid"))
	if !ok {
		return nil, errors.New("it names no process")
	}
	uid := r.get("uid")
	if uid == "" {
		return nil, errors.New("it names no user")
	}
	typ, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err != nil || typ != syscall.SOCK_STREAM {
		return nil, errorf("descriptor %d is not a stream socket", fd)
	}
	// Some systems do not tell who made a socket pair. There the variable is
	// believed.
	if peer, err := peerCred(fd); err == nil && (strconv.Itoa(peer.UID) != uid || peer.PID != 0 && peer.PID != pid) {
		return nil, errorf("descriptor %d leads to process %d of user %d", fd, peer.PID, peer.UID)
	}
	s, err := newStream(fd)
	if err == nil {
		s.inherits = true
	}
	return s, err
}

func checkVersion(f *frame) error {
	if v := f.first("version"); v != protocolVersion {
		return errorf("the other process uses version %q of the protocol, this one %s", v, protocolVersion)
	}
	return nil
}

// checkHello checks the first frame of a predecessor.
func checkHello(f *frame) error {
	if f.kind != frameHello {
		return errorf("the predecessor began with a frame %q; want %q: it does not use this protocol", f.kind, frameHello)
	}
	return checkVersion(f)
}

// hello returns the first frame of a predecessor that has started this
// process.
func (p *predecessor) hello() (*frame, error) {
	f, err := p.s.read(time.Time{})
	if err != nil {
		return f, errorf("the predecessor has sent nothing: %w", err)
	}
	return f, checkHello(f)
}

// awaitCommit sends READY, with what no call has asked for, and returns when the
// predecessor has sent COMMIT or has ended (orphan). It returns ErrStopped soon
// after mustStop reports true.
func (p *predecessor) awaitCommit(unclaimed record, mustStop func() bool) (orphan bool, err error) {
	r := append(record{"pid=" + strconv.Itoa(os.Getpid())}, unclaimed...)
	if err := p.s.send(frameReady, r...); err != nil && err != io.EOF {
		return false, errorf("ecdysis: ready: %w", err)
	}
	p.s.waitShortly()
	for {
		f, err := p.s.read(time.Now().Add(pollInterval))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if mustStop() {
				return false, ErrStopped
			}
		case err == io.EOF:
			return true, nil
		case err != nil:
			return false, errorf("ecdysis: ready: %w", err)
		case f.kind == frameAbort:
			return false, aborted(f)
		case f.kind == frameCommit:
			p.standby.Store(f.first("probation") != "0")
			return false, nil
		}
	}
}

// isFinal reports whether the predecessor is known to have no say any more.
func (p *predecessor) isFinal() bool {
	select {
	case <-p.final:
		return true
	default:
		return false
	}
}

// handleFinal takes a frame, or the end of the stream, that has come after
// READY was answered. It reports whether the predecessor has no say any more.
func (p *predecessor) handleFinal(f *frame, err error) bool {
	if err == nil && f.kind != frameFinal {
		return false
	}
	p.once.Do(func() {
		close(p.final)
		p.s.wakeReader()
	})
	return true
}

// WaitForParent waits until the predecessor has exited. It returns an error
// that wraps ctx's if ctx is done first. It returns nil at once in the first
// process of a chain, and ErrNotReady before Ready has succeeded.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.first() {
		return nil
	}
	if !u.life.isReady() {
		return ErrNotReady
	}
	err := u.pred.s.wait(ctx, nil, func(f *frame, err error) bool {
		u.handle(f, err)
		return err != nil
	})
	u.obey()
	if err != nil {
		return errorf("ecdysis: wait for parent: %w", err)
	}
	return nil
}

// watch returns when the predecessor has no say any more, or ctx is done. It
// carries out a stop that the predecessor has passed on.
func (u *Upgrader) watch(ctx context.Context) {
	if u.first() {
		return
	}
	_ = u.pred.s.wait(ctx, u.pred.final, u.handle)
	u.obey()
}

// obey carries out a stop that the predecessor has passed on.
func (u *Upgrader) obey() {
	u.mu.Lock()
	kind, t := u.life.takeOrder()
	u.mu.Unlock()
	if kind != "" {
		u.stop(kind, t)
	}
}

// stopRecord and stopOrder are how a stop is passed on.
func stopRecord(kind EventKind, t trigger) record {
	r := record{"kind=" + string(kind), "socket=" + t.socket}
	if s, ok := t.signal.(syscall.Signal); ok {
		r = append(r, "signal="+strconv.Itoa(int(s)))
	}
	return r
}

func stopOrder(f *frame) (kind EventKind, t trigger) {
	kind = EventStopping
	if f.first("kind") == string(EventPartialStop) {
		kind = EventPartialStop
	}
	t = trigger{socket: f.first("socket"), passedOn: true}
	if n, ok := number(f.first("signal")); ok {
		t.signal = syscall.Signal(n)
	}
	return kind, t
}

// handle takes what the predecessor sends after this process is ready. It
// reports whether the predecessor has no say any more.
func (u *Upgrader) handle(f *frame, err error) bool {
	if err == nil && f.kind == frameStop {
		u.mu.Lock()
		u.life.order, u.life.orderCause = stopOrder(f)
		u.mu.Unlock()
		return false
	}
	final := u.pred.handleFinal(f, err)
	if final {
		u.removeDropped()
	}
	return final
}

// independent reports whether the predecessor has no say any more. It looks at
// what has come, and does not wait.
func (u *Upgrader) independent() bool {
	if u.pred.isFinal() {
		return true
	}
	if !u.life.isReady() {
		return false // what comes now is for Ready
	}
	for {
		f, err := u.pred.s.next()
		if err == errAgain {
			return u.pred.isFinal()
		}
		if u.handle(f, err) {
			return true
		}
	}
}

// awaitIndependence is independent, except that it waits for FINAL if that is
// on its way: if the predecessor does not stand by.
func (u *Upgrader) awaitIndependence() bool {
	if u.independent() {
		return true
	}
	if !u.life.isReady() || u.pred.standby.Load() {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), handoverTimeout)
	defer cancel()
	_ = u.pred.s.wait(ctx, u.pred.final, u.handle)
	return u.pred.isFinal()
}
