package ecdysis

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// inherit takes what the older process hands on, after its first frame. The
// zero deadline is none.
func (u *Upgrader) inherit(f frame, deadline time.Time) error {
	generation, err := strconv.Atoi(f.first("generation"))
	if err != nil || generation < 0 {
		return fmt.Errorf("the older process says that its generation is %q; want a number", f.first("generation"))
	}
	u.generation = generation + 1
	for {
		f, err := u.parent.read(deadline)
		if err == io.EOF {
			break // it has died; what it could not hand on is bound anew
		}
		if err != nil {
			return u.disinherit(err)
		}
		switch f.kind {
		case frameSockets:
			for i, r := range f.records {
				e, err := inheritedEntry(r, f.fds[i])
				if err != nil {
					closeAll(f.fds[i:])
					return u.disinherit(err)
				}
				switch e.kind {
				case kindState:
					u.state.close() // there is one at most
					u.state = newStateReader(e)
				case kindOlder:
					u.reg.entries = append(u.reg.entries, e)
				default:
					u.reg.inherited = append(u.reg.inherited, e)
				}
			}
			_ = u.parent.send(frameAck, nil, nil) // fails only if nobody waits for it
			continue
		case frameAbort:
			return u.disinherit(ErrAborted)
		case frameEnd:
		default:
			continue // of a later version
		}
		break
	}
	u.reg.entries = append(u.reg.entries, &entry{kind: kindOlder, name: strconv.Itoa(generation), fd: -1, sock: u.parent, inherited: true})
	u.reg.index()
	return nil
}

func (u *Upgrader) disinherit(err error) error {
	u.state.close()
	for _, e := range slices.Concat(u.reg.inherited, u.reg.entries) {
		e.drop()
	}
	u.reg.inherited, u.reg.entries = nil, nil
	return err
}

// inheritedEntry checks a descriptor against what is said of it. One of a kind
// that a later version knows is there for nobody to ask for.
func inheritedEntry(r record, fd int) (*entry, error) {
	e := &entry{inherited: true, fd: fd, kind: r.get("kind"), name: r.get("name"), network: r.get("network"), address: r.get("address"), at: r.get("at"), keep: r.get("keep") == "1", foreign: r.get("foreign") == "1", path: r.get("path")}
	wrong := func(format string, args ...any) (*entry, error) {
		return nil, fmt.Errorf("inherited descriptor for %s: %s", e.label(), fmt.Sprintf(format, args...))
	}
	switch e.kind {
	case kindListener, kindPacket, kindPair, kindConn:
		typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil {
			return wrong("it is no socket: %v", os.NewSyscallError("getsockopt", err))
		}
		if e.kind == kindListener || e.kind == kindPacket {
			if err := e.checkBound(typ); err != nil {
				return wrong("%v", err)
			}
		}
	case kindState:
		var st unix.Stat_t
		var err error
		e.size, err = strconv.ParseInt(r.get("size"), 10, 64)
		if err != nil || unix.Fstat(fd, &st) != nil || e.size < 0 || int64(st.Size) < e.size {
			return wrong("%q bytes were announced and it has %d", r.get("size"), st.Size)
		}
	}
	if e.path != "" {
		var err1, err2 error
		e.dev, err1 = strconv.ParseUint(r.get("dev"), 10, 64)
		e.ino, err2 = strconv.ParseUint(r.get("ino"), 10, 64)
		if err1 != nil || err2 != nil {
			return wrong("its file is device %q, inode %q; want numbers", r.get("dev"), r.get("ino"))
		}
	}
	return e, nil
}

// checkBound reports, as an error, that a descriptor is not the socket that
// clients find at e's address.
func (e *entry) checkBound(typ int) error {
	want, isUnix := socketType(e.network)
	if typ != want {
		return fmt.Errorf("it is a socket of type %d; want %d", typ, want)
	}
	if e.kind == kindListener {
		if ok, err := isListening(e.fd); err == nil && !ok {
			return errors.New("it does not listen")
		}
	}
	sa, at, err := boundTo(e.fd, typ)
	if err != nil {
		return err
	}
	if _, ok := sa.(*unix.SockaddrUnix); ok != isUnix || at != e.at {
		return fmt.Errorf("it is bound to %q; want %q", at, e.at)
	}
	return nil
}
