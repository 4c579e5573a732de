package ecdysis

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const reusePort = unix.SO_REUSEPORT_LB

func peerCred(fd int) (Cred, error) {
	const solLocal = 0 // unix(4)
	x, err := unix.GetsockoptXucred(fd, solLocal, unix.LOCAL_PEERCRED)
	if err != nil {
		return Cred{}, err
	}
	return Cred{UID: int(x.Uid)}, nil
}

// A message names its sender's process if that asks for it: the system fills in
// a structure whose first field is the process ID (struct cmsgcred, unix(4)).
const sizeofCmsgcred = 84

var senderSpace = syscall.CmsgSpace(sizeofCmsgcred)

func wantSender(int) {}

// nameSender returns the control data by which a message names its sender.
func nameSender() []byte {
	b := make([]byte, syscall.CmsgSpace(sizeofCmsgcred))
	h := (*syscall.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = syscall.SOL_SOCKET, unix.SCM_CREDS
	h.SetLen(syscall.CmsgLen(sizeofCmsgcred))
	return b
}

func senderOf(m *unix.SocketControlMessage) int {
	if m.Header.Level != syscall.SOL_SOCKET || m.Header.Type != unix.SCM_CREDS || len(m.Data) < sizeofCmsgcred {
		return 0
	}
	return int(*(*int32)(unsafe.Pointer(&m.Data[0])))
}
