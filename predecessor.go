package ecdysis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// envName is the variable by which a successor finds its end of the stream
// and knows whose end the other one is: "fd=3 pid=1234 uid=0".
const envName = "ECDYSIS_PARENT"

// openInheritance returns the stream to the older process; nil: there is
// none. The variable is taken out of the environment.
func openInheritance() (*stream, error) {
	value, ok := os.LookupEnv(envName)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(envName); err != nil {
		return nil, err
	}
	s, err := openStream(value)
	if err != nil {
		return nil, fmt.Errorf("the environment variable %s is %q; want what an upgrading process sets for its successor: %w", envName, value, err)
	}
	return s, nil
}

func openStream(value string) (*stream, error) {
	r := record(strings.Split(value, " "))
	fd, err := strconv.Atoi(r.get("fd"))
	if err != nil || fd < 3 {
		return nil, errors.New("it names no descriptor")
	}
	pid, err := strconv.Atoi(r.get("pid"))
	if err != nil {
		return nil, errors.New("it names no process")
	}
	uid, err := strconv.Atoi(r.get("uid"))
	if err != nil {
		return nil, errors.New("it names no user")
	}
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_STREAM {
		return nil, fmt.Errorf("descriptor %d is not a stream socket", fd)
	}
	// Systems that do not tell for a socket pair are taken at their word.
	if peer, err := peerCred(fd); err == nil && (peer.UID != uid || peer.PID != 0 && peer.PID != pid) {
		return nil, fmt.Errorf("descriptor %d leads to process %d of user %d", fd, peer.PID, peer.UID)
	}
	s, err := newStream(fd)
	if err == nil {
		s.inherits = true
	}
	return s, err
}

func checkVersion(f frame) error {
	if v := f.first("version"); v != protocolVersion {
		return fmt.Errorf("the other process speaks version %q of the protocol, this one %s", v, protocolVersion)
	}
	return nil
}

// checkHello checks the first frame of an older process.
func checkHello(f frame) error {
	if f.kind != frameHello {
		return fmt.Errorf("the older process began with a frame %q; want %q: it does not speak this protocol", f.kind, frameHello)
	}
	return checkVersion(f)
}

// WaitForParent waits until the older process has exited, or until ctx is
// done, with an error that wraps ctx's. In the first process it returns nil at
// once; before Ready has succeeded it returns ErrNotReady.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.parent == nil {
		return nil
	}
	select {
	case <-u.ready:
	default:
		return ErrNotReady
	}
	err := u.parent.wait(ctx, nil, func(f frame, err error) bool {
		u.hear(f, err)
		return err != nil
	})
	if err != nil {
		return fmt.Errorf("ecdysis: wait for parent: %w", err)
	}
	return nil
}

// hear takes a frame, or the end of the stream, that came from the old
// process after this one was ready. It reports whether the old process has no
// say any more.
func (u *Upgrader) hear(f frame, err error) bool {
	if err == nil && f.kind != frameFinal {
		return false
	}
	u.mu.Lock()
	select {
	case <-u.settled:
		u.mu.Unlock()
		return true
	default:
	}
	close(u.settled)
	u.mu.Unlock()
	u.parent.wakeReader()
	u.removeDropped()
	return true
}

// settle reports whether this process is on its own: whether the old one has
// made the upgrade final or has died. If the old one does not stand by, its
// word is on its way, and settle waits for it.
func (u *Upgrader) settle() bool {
	select {
	case <-u.settled:
		return true
	default:
	}
	u.mu.Lock()
	p, standby := u.phase, u.standby
	u.mu.Unlock()
	if p == starting || p == readying || p == refused {
		return false // what the stream says now is for Ready to hear
	}
	if f, err := u.parent.next(); err != errAgain && u.hear(f, err) {
		return true
	}
	if standby {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), handoverTimeout)
	defer cancel()
	_ = u.parent.wait(ctx, u.settled, u.hear)
	select {
	case <-u.settled:
		return true
	default:
		return false
	}
}
