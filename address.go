//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"syscall"
)

// What an address means: the network's sockets, where they are to be bound, and
// which two addresses are the same one.

// socketType returns the type of a network's sockets, or 0 if there is no such
// network.
func socketType(network string) (typ int, isUnix bool) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		return syscall.SOCK_STREAM, false
	case "udp", "udp4", "udp6":
		return syscall.SOCK_DGRAM, false
	case "unix":
		return syscall.SOCK_STREAM, true
	case "unixpacket":
		return syscall.SOCK_SEQPACKET, true
	case "unixgram":
		return syscall.SOCK_DGRAM, true
	}
	return 0, false
}

// askedAddr is the net.Addr of an address that could not be resolved.
type askedAddr struct{ network, address string }

func (a askedAddr) Network() string { return a.network }

func (a askedAddr) String() string { return a.address }

// isAbstract reports whether address is a name without a file, which Linux has.
func isAbstract(address string) bool {
	return runtime.GOOS == "linux" && address != "" && (address[0] == '@' || address[0] == 0)
}

// A bindAddr is an address that a socket can be bound to.
type bindAddr struct {
	network string
	typ     int
	addr    net.Addr // *net.TCPAddr, *net.UDPAddr or *net.UnixAddr
	sa      syscall.Sockaddr
	family  int
	v6only  bool
	path    string // absolute path of a Unix socket's file; empty if it has none
}

// resolve returns what net.Listen would bind to.
func resolve(network, address string) (*bindAddr, error) {
	typ, isUnix := socketType(network)
	a := &bindAddr{network: network, typ: typ, family: syscall.AF_UNIX}
	if isUnix {
		return a, a.resolvePath(address)
	}
	if err := a.resolveIP(address); err != nil {
		if _, _, serr := net.SplitHostPort(address); serr != nil {
			err = errorf("%w (want host:port, as in :80, 127.0.0.1:80 or [::1]:80)", err)
		}
		return nil, err
	}
	return a, nil
}

func (a *bindAddr) resolvePath(address string) (err error) {
	abstract := isAbstract(address)
	if abstract {
		address = "@" + address[1:]
	}
	a.addr, a.sa = &net.UnixAddr{Net: a.network, Name: address}, &syscall.SockaddrUnix{Name: address}
	if !abstract {
		a.path, err = absolute(address)
	}
	return err
}

func (a *bindAddr) resolveIP(address string) error {
	var ip net.IP
	var port int
	var zone string
	if a.typ == syscall.SOCK_DGRAM {
		u, err := net.ResolveUDPAddr(a.network, address)
		if err != nil {
			return err
		}
		a.addr, ip, port, zone = u, u.IP, u.Port, u.Zone
	} else {
		t, err := net.ResolveTCPAddr(a.network, address)
		if err != nil {
			return err
		}
		a.addr, ip, port, zone = t, t.IP, t.Port, t.Zone
	}
	only4 := a.network[len(a.network)-1] == '4'
	only6 := a.network[len(a.network)-1] == '6'
	ip4 := ip.To4()
	wildcard := ip == nil || ip.IsUnspecified()
	if !only6 && (ip == nil || ip4 != nil) && (only4 || !wildcard || !dualStack || !haveIPv6()) {
		sa := &syscall.SockaddrInet4{Port: port}
		copy(sa.Addr[:], ip4)
		a.family, a.sa = syscall.AF_INET, sa
		return nil
	}
	sa := &syscall.SockaddrInet6{Port: port}
	if !wildcard {
		copy(sa.Addr[:], ip.To16())
	}
	if zone != "" {
		var err error
		if sa.ZoneId, err = zoneID(zone); err != nil {
			return err
		}
	}
	a.family, a.sa, a.v6only = syscall.AF_INET6, sa, only6 || !dualStack
	return nil
}

// haveIPv6 reports whether the system has IPv6 at all.
func haveIPv6() bool {
	fd, err := newSocket(syscall.AF_INET6, syscall.SOCK_STREAM)
	if err == nil {
		syscall.Close(fd)
	}
	return !errors.Is(err, syscall.EAFNOSUPPORT)
}

func zoneID(zone string) (uint32, error) {
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index), nil
	}
	n, ok := number64(zone)
	if !ok || n > math.MaxUint32 {
		return 0, errorf("no network interface is called %q", zone)
	}
	return uint32(n), nil
}

// key is equal for two addresses if a socket bound to one serves the other.
func (a *bindAddr) key() string {
	if a.path != "" {
		return a.network + " " + a.path
	}
	return boundKey(a.typ, a.sa, a.v6only)
}

// boundKey returns the key of a bound address. It is equal for two sockets of
// this type if each serves the clients of the other.
func boundKey(typ int, sa syscall.Sockaddr, v6only bool) string {
	network := networkOf(typ, sa)
	var ip netip.Addr
	var port int
	switch sa := sa.(type) {
	case *syscall.SockaddrUnix:
		return network + " " + sa.Name
	case *syscall.SockaddrInet4:
		ip, port = netip.AddrFrom4(sa.Addr), sa.Port
	case *syscall.SockaddrInet6:
		ip, port = netip.AddrFrom16(sa.Addr), sa.Port
		if v6only && ip.IsUnspecified() {
			network += "6"
		}
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
	default:
		return ""
	}
	return network + " " + netip.AddrPortFrom(ip, uint16(port)).String()
}

// networkOf returns what net calls the sockets of a type and address family, or
// "" if it has no name for them.
func networkOf(typ int, sa syscall.Sockaddr) string {
	_, isUnix := sa.(*syscall.SockaddrUnix)
	for _, network := range []string{"tcp", "udp", "unix", "unixpacket", "unixgram"} {
		if t, u := socketType(network); t == typ && u == isUnix {
			return network
		}
	}
	return ""
}

// boundTo returns the address that a socket is bound to, and its key. The key
// is empty if net has no name for the socket.
func boundTo(fd, typ int) (sa syscall.Sockaddr, key string, err error) {
	if sa, err = syscall.Getsockname(fd); err != nil {
		return nil, "", os.NewSyscallError("getsockname", err)
	}
	if networkOf(typ, sa) == "" {
		return sa, "", nil
	}
	v6only := false
	if sa6, ok := sa.(*syscall.SockaddrInet6); ok && sa6.Addr == [16]byte{} {
		n, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY)
		v6only = !dualStack || err != nil || n != 0
	}
	return sa, boundKey(typ, sa, v6only), nil
}
