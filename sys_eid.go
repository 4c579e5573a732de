//go:build dragonfly || netbsd || openbsd

package ecdysis

import (
	"encoding/binary"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

const reusePort = unix.SO_REUSEPORT

// peerCred reads a structure for which x/sys/unix has no call by one that
// reads any twenty bytes.
func peerCred(fd int) (Cred, error) {
	var level, option int
	uidAt, pidAt := 0, -1
	switch runtime.GOOS {
	case "openbsd": // SO_PEERCRED, getsockopt(2): uid, gid, pid
		level, option, pidAt = syscall.SOL_SOCKET, 0x1022, 8
	case "netbsd": // LOCAL_PEEREID, unix(4): pid, uid, gid
		level, option, uidAt, pidAt = 0, 3, 4, 0
	case "dragonfly": // LOCAL_PEERCRED, unix(4): version, uid
		level, option, uidAt = 0, 1, 4
	}
	m, err := syscall.GetsockoptIPv6Mreq(fd, level, option)
	if err != nil {
		return Cred{}, err
	}
	b := binary.NativeEndian.AppendUint32(m.Multiaddr[:], m.Interface)
	c := Cred{UID: int(binary.NativeEndian.Uint32(b[uidAt:]))}
	if pidAt >= 0 {
		c.PID = int(binary.NativeEndian.Uint32(b[pidAt:]))
	}
	return c, nil
}

// The process ID of a message's sender is not to be had.
const senderSpace = 0

func wantSender(int) {}

func nameSender() []byte { return nil }

func senderOf(*unix.SocketControlMessage) int { return 0 }
