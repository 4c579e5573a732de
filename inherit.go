//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The successor's side of handing on: receiving what comes, and checking each
// descriptor against what is said of it.

// receiveInheritance receives what the predecessor hands on after its HELLO.
// The zero deadline is none.
func (u *Upgrader) receiveInheritance(hello *frame, deadline time.Time) error {
	generation, ok := number(hello.first("generation"))
	if !ok {
		return errorf("the predecessor says that its generation is %q; want a number", hello.first("generation"))
	}
	u.generation = generation + 1
	u.inheritRetired(hello)
	err := u.receiveEntries(deadline)
	if err == nil {
		err = u.checkNetwork(hello.first("network"))
	}
	if err != nil {
		u.disinherit()
		return err
	}
	u.reg.ancestors = append(u.reg.ancestors, &entry{
		wire:      wire{kind: kindAncestor, name: strconv.Itoa(generation)},
		inherited: true,
		raw:       u.pred.s.raw,
	})
	return nil
}

// receiveEntries returns when all has come. That is also the case if the
// predecessor has died: what it could not hand on is bound anew.
func (u *Upgrader) receiveEntries(deadline time.Time) error {
	for {
		f, err := u.pred.s.read(deadline)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch f.kind {
		case frameEnd:
			return nil
		case frameAbort:
			return aborted(f)
		case frameSockets:
			if err := u.receiveBatch(f); err != nil {
				return err
			}
		default: // a frame of a later version
		}
	}
}

func (u *Upgrader) receiveBatch(f *frame) error {
	entries := make([]entry, len(f.records))
	for i, r := range f.records {
		e := &entries[i]
		if err := e.inherit(r, f.fds[i]); err != nil {
			closeAll(f.fds[i:])
			return err
		}
		switch e.kind {
		case kindState:
			u.state.close() // there is one at most
			u.state = newStateReader(e)
		case kindAncestor:
			u.reg.ancestors = append(u.reg.ancestors, e)
		default:
			u.reg.inherited = append(u.reg.inherited, e)
		}
	}
	if err := checkListening(entries); err != nil {
		return err
	}
	_ = u.pred.s.send(frameAck) // fails only if the predecessor is gone
	return nil
}

// checkNetwork returns an error if clients of this process's network namespace
// cannot reach an inherited socket, because it is of the predecessor's. That one
// is told with HELLO.
func (u *Upgrader) checkNetwork(predecessors string) error {
	if u.opts.AcrossNetworks || predecessors == "" || predecessors == "0" {
		return nil
	}
	own := strconv.FormatUint(u.reg.spare.open(), 10) // which a call of Listen needs as well
	if own == "0" || own == predecessors {
		return nil
	}
	for _, e := range u.reg.inherited {
		if _, isUnix := socketType(e.network); !e.isSocket() || isUnix {
			continue
		}
		var network uint64
		if err := e.control(func(fd uintptr) { network = networkOfSocket(int(fd)) }); err != nil {
			return err
		}
		if strconv.FormatUint(network, 10) == predecessors {
			return errorf("inherited socket %s is of the predecessor's network namespace, where no client of this process's own reaches it; run both in one, or set Options.AcrossNetworks", e.label())
		}
	}
	return nil
}

// disinherit closes what has come.
func (u *Upgrader) disinherit() {
	u.state.close()
	for _, e := range slices.Concat(u.reg.inherited, u.reg.ancestors) {
		e.closeBare()
	}
	u.reg.inherited, u.reg.ancestors = nil, nil
	u.reg.spare.close()
}

// inherit makes an entry of a descriptor and of what is said of it. One of a kind
// that only a later version knows is kept, and closed by Ready like everything
// that nobody asks for.
func (e *entry) inherit(r record, fd int) error {
	e.inherited, e.state = true, unclaimed
	e.setBare(fd)
	err := e.decode(r)
	if err == nil {
		err = e.check(fd)
	}
	if err != nil {
		return e.mismatch(err)
	}
	return nil
}

// mismatch says of which entry err is, whose descriptor is not what e says.
func (e *entry) mismatch(err error) error {
	return errorf("inherited descriptor for %s: %w", e.label(), err)
}

// check returns an error if fd is not what e says. The rest is checked later: by
// checkListening whether a listener listens, for a whole batch at once, and by
// checkFound a socket's type and address, when it is claimed.
func (e *entry) check(fd int) error {
	switch e.kind {
	case kindPacket, kindPair, kindConn:
		if _, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil {
			return errorf("it is no socket: %w", os.NewSyscallError("getsockopt", err))
		}
	case kindState:
		var st syscall.Stat_t
		if err := syscall.Fstat(fd, &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		if st.Size < e.size {
			return errorf("%d bytes were announced and it has %d", e.size, st.Size)
		}
	}
	return nil
}

// checkListening returns an error if one of these should listen and does not.
func checkListening(entries []entry) error {
	list := make([]unix.PollFd, len(entries))
	for i := range entries {
		list[i].Fd = -1 // poll(2) passes it over
		if e := &entries[i]; e.kind == kindListener {
			list[i].Fd = int32(e.bare)
		}
	}
	findDoubtful(list)
	for i, p := range list {
		if p.Fd < 0 || p.Revents == 0 {
			continue
		}
		ok, err := isListening(int(p.Fd))
		if ok || errors.Is(err, errors.ErrUnsupported) {
			continue
		}
		if err != nil {
			return entries[i].mismatch(errorf("it is no socket: %w", os.NewSyscallError("getsockopt", err)))
		}
		return entries[i].mismatch(errors.New("it does not listen"))
	}
	return nil
}

// checkFound returns an error if an inherited socket, whose address net has
// found to be a, is not the one that clients find at e's address.
func (e *entry) checkFound(a net.Addr) error {
	if !e.inherited {
		return nil
	}
	_, at, _ := cut(e.boundKey, ' ')
	same := false
	switch a := a.(type) {
	case *net.TCPAddr:
		same = sameAddrPort(a.AddrPort(), at)
	case *net.UDPAddr:
		same = sameAddrPort(a.AddrPort(), at)
	case *net.UnixAddr:
		same = a.Name == at
	}
	typ, isUnix := socketType(a.Network())
	want, wantUnix := socketType(e.network)
	if !same || typ != want || isUnix != wantUnix {
		return errorf("the inherited descriptor is a socket that is bound to %q; want %q", a.Network()+" "+a.String(), e.boundKey)
	}
	return nil
}

// sameAddrPort reports whether text is a. The zones have numbers in one and
// names in the other, and are not compared.
func sameAddrPort(a netip.AddrPort, text string) bool {
	host, service, err := net.SplitHostPort(text)
	if err != nil {
		return false
	}
	if port, ok := number(service); !ok || port != int(a.Port()) {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.WithZone("") == a.Addr().WithZone("")
}
