package ecdysis

import "golang.org/x/sys/unix"

const reusePort = unix.SO_REUSEPORT_LB

func peerCred(fd int) (Cred, error) {
	const solLocal = 0 // unix(4)
	x, err := unix.GetsockoptXucred(fd, solLocal, unix.LOCAL_PEERCRED)
	if err != nil {
		return Cred{}, err
	}
	return Cred{UID: int(x.Uid)}, nil
}
