//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// errNoBytes is what a call says that would send descriptors with nothing.
var errNoBytes = errors.New("descriptors travel with at least one byte, and there is none")

// tooManyFiles is the error of a call whose descriptors the system had to cut.
func tooManyFiles() error {
	return errorf("%w: the system delivered fewer descriptors than were sent (see RLIMIT_NOFILE)", os.NewSyscallError("recvmsg", syscall.EMFILE))
}

// ReadFiles reads from a Unix connection of any kind into b, and returns the
// descriptors that came with what it has read, close-on-exec, as files that
// the caller closes. It blocks like a Read of c, whose deadline and Close end
// it. At the end of the stream it returns io.EOF.
//
// If the system had to cut the descriptors (the process has as many open as it
// may), those that came are closed and the error is EMFILE. Some BSDs keep what
// came with them for the next call. If a packet was longer than b, the
// descriptors are closed and the error is EMSGSIZE. See recvmsg(2) and unix(7). A plain Read of such a connection drops descriptors. If b is empty,
// ReadFiles returns at once and takes nothing.
//
// c is a *net.UnixConn, a *SeqpacketConn or a *UnixgramConn.
func ReadFiles(c syscall.Conn, b []byte) (n int, files []*os.File, err error) {
	fail := func(err error) (int, []*os.File, error) {
		return 0, nil, errorf("ecdysis: read files: %w", err)
	}
	if len(b) == 0 {
		return 0, nil, nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	oob := make([]byte, syscall.CmsgSpace(4*maxFDs)+senderSpace)
	var oobn, flags int
	end := false
	rerr := raw.Read(func(fd uintptr) bool {
		n, oobn, flags, err = recvmsg(int(fd), b, oob)
		if err == syscall.ECONNRESET { // told once, and before what the peer has sent
			n, oobn, flags, err = recvmsg(int(fd), b, oob)
		}
		if err == nil && n == 0 {
			typ := socketTypeOf(int(fd))
			end = typ == syscall.SOCK_STREAM || typ == syscall.SOCK_SEQPACKET && atEnd(int(fd), flags)
		}
		if err == nil && n == len(b) && leftRest(int(fd), flags) {
			flags |= syscall.MSG_TRUNC
		}
		return err != syscall.EAGAIN
	})
	if rerr != nil {
		return fail(rerr)
	}
	if err != nil {
		if err == syscall.EMFILE {
			return fail(tooManyFiles())
		}
		return fail(os.NewSyscallError("recvmsg", err))
	}
	fds, _, err := parseControl(oob[:oobn])
	switch {
	case err != nil:
	case flags&syscall.MSG_CTRUNC != 0:
		err = tooManyFiles()
	case flags&syscall.MSG_TRUNC != 0:
		err = tooLong(len(b))
	case end && len(fds) == 0:
		return 0, nil, io.EOF
	}
	if err != nil {
		closeAll(fds)
		return fail(err)
	}
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "received"))
	}
	return n, files, nil
}

// WriteFiles writes b to a Unix connection of any kind, and with its first
// byte copies of the files' descriptors, at most 100, and 40 on DragonFly. The
// files stay the caller's. It blocks like a Write of c, whose deadline and Close end it. If
// it returns n > 0, the descriptors have been sent. b must not be empty.
//
// ETOOMANYREFS means that this user has too many descriptors under way that
// nobody has received yet; see sendmsg(2) and unix(7). NetBSD and DragonFly
// drop the descriptors and b, without an error, if the peer has so much unread
// that it has no room for them. The peer's answer to what was sent before tells
// that there is room.
//
// c is a *net.UnixConn, a *SeqpacketConn or, if it is connected, a
// *UnixgramConn.
func WriteFiles(c syscall.Conn, b []byte, files ...*os.File) (n int, err error) {
	fail := func(err error) (int, error) {
		return n, errorf("ecdysis: write files: %w", err)
	}
	switch {
	case len(files) > maxBatchFDs:
		return fail(errorf("%d files; a message takes at most %d", len(files), maxBatchFDs))
	case len(b) == 0:
		return fail(errNoBytes)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	err = withDescriptors(files, nil, func(fds []int) error {
		var oob []byte
		if len(fds) > 0 {
			oob = syscall.UnixRights(fds...)
		}
		var err error
		werr := raw.Write(func(fd uintptr) bool {
			flags, typ := 0, socketTypeOf(int(fd))
			if typ == syscall.SOCK_SEQPACKET {
				flags = syscall.MSG_EOR
			}
			for err = nil; err == nil && n < len(b); {
				part := b[n:]
				if oob != nil && typ == syscall.SOCK_STREAM && dropsDescriptors {
					part = part[:1] // the rest can wait for room without being lost
				}
				var m int
				if m, err = sendmsg(int(fd), part, oob, flags); err == nil {
					n += m
					oob = nil
				}
			}
			return err != syscall.EAGAIN
		})
		if werr != nil {
			return werr
		}
		return os.NewSyscallError("sendmsg", err)
	})
	if err != nil {
		return fail(err)
	}
	return n, nil
}

// withDescriptors calls f with the files' descriptors, which stay what they
// are meanwhile.
func withDescriptors(files []*os.File, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = withDescriptors(files[1:], append(fds, int(fd)), f) })
	if cerr != nil {
		return closedError(files[0], cerr)
	}
	return err
}

// A Cred says who is at the other end of a Unix connection.
type Cred struct {
	PID int // 0: the system does not tell, or the process is not visible from here
	UID int // the effective user ID
}

// PeerCred returns who made the other end of a Unix connection: who called
// connect, listen or socketpair, as the system has noted it then (SO_PEERCRED
// on Linux and OpenBSD, LOCAL_PEERCRED, LOCAL_PEEREID on NetBSD; see unix(7)
// and unix(4)). A connection that is none of Unix is an error. For a socket
// that is not connected, and on Linux for a datagram socket that is no
// socketpair's, the error is ENOTCONN.
//
// Every system tells the end that has accepted a connection who has connected.
// The end that has connected cannot rely on it on NetBSD, which returns the
// caller's own credentials, and on OpenBSD, which returns those of the process
// that bound the address, even if another process has inherited the socket
// since. FreeBSD and DragonFly do not tell the PID. macOS tells the PID of the
// process that has used the other end last, until that end is closed. On
// DragonFly a socketpair is ENOTCONN, too.
//
// c is a *net.UnixConn or a *SeqpacketConn.
func PeerCred(c syscall.Conn) (Cred, error) {
	fail := func(err error) (Cred, error) { return Cred{}, errorf("ecdysis: peer credentials: %w", err) }
	raw, err := c.SyscallConn()
	if err != nil {
		return fail(err)
	}
	var cred Cred
	cerr := raw.Control(func(fd uintptr) {
		sa, serr := syscall.Getsockname(int(fd))
		if _, isUnix := sa.(*syscall.SockaddrUnix); !isUnix {
			err = errorf("a %T is no Unix connection: %w", c, errors.ErrUnsupported)
			if serr != nil {
				err = os.NewSyscallError("getsockname", serr)
			}
			return
		}
		if cred, err = peerCred(int(fd)); err == syscall.EINVAL || err == syscall.EOPNOTSUPP {
			err = syscall.ENOTCONN // what some BSDs mean by these
		}
		if err != nil {
			err = os.NewSyscallError("getsockopt", err)
		} else if cred.UID == -1 || uint32(cred.UID) == 1<<32-1 {
			err = os.NewSyscallError("getsockopt", syscall.ENOTCONN)
		}
	})
	if cerr != nil {
		return fail(cerr)
	}
	if err != nil {
		return fail(err)
	}
	return cred, nil
}
