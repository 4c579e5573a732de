package ecdysis

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// socketType returns the type of a network's sockets; 0: there is no such
// network.
func socketType(network string) (typ int, isUnix bool) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		return unix.SOCK_STREAM, false
	case "udp", "udp4", "udp6":
		return unix.SOCK_DGRAM, false
	case "unix":
		return unix.SOCK_STREAM, true
	case "unixpacket":
		return unix.SOCK_SEQPACKET, true
	case "unixgram":
		return unix.SOCK_DGRAM, true
	}
	return 0, false
}

// askedAddr is the net.Addr of an address that could not be resolved.
type askedAddr struct{ network, address string }

func (a askedAddr) Network() string { return a.network }

func (a askedAddr) String() string { return a.address }

// isAbstract tells a Linux name without a file from a path.
func isAbstract(address string) bool {
	return runtime.GOOS == "linux" && address != "" && (address[0] == '@' || address[0] == 0)
}

// A place is where a socket is to be bound.
type place struct {
	network string
	typ     int
	addr    net.Addr // *net.TCPAddr, *net.UDPAddr or *net.UnixAddr
	sa      unix.Sockaddr
	family  int
	v6only  bool
	path    string // absolute, of a Unix socket's file
}

// resolve finds the place that an address stands for, as net.Listen would.
func resolve(network, address string) (*place, error) {
	typ, isUnix := socketType(network)
	if isUnix {
		if address[0] == 0 && isAbstract(address) {
			address = "@" + address[1:]
		}
		p := &place{network: network, typ: typ, addr: &net.UnixAddr{Net: network, Name: address}, family: unix.AF_UNIX, sa: &unix.SockaddrUnix{Name: address}}
		if isAbstract(address) {
			return p, nil
		}
		path, err := absolute(address)
		if err != nil {
			return nil, err
		}
		p.path = path
		return p, nil
	}
	p := &place{network: network, typ: typ, family: unix.AF_INET}
	var ip net.IP
	var port int
	var zone string
	var err error
	if typ == unix.SOCK_DGRAM {
		var a *net.UDPAddr
		if a, err = net.ResolveUDPAddr(network, address); err == nil {
			p.addr, ip, port, zone = a, a.IP, a.Port, a.Zone
		}
	} else {
		var a *net.TCPAddr
		if a, err = net.ResolveTCPAddr(network, address); err == nil {
			p.addr, ip, port, zone = a, a.IP, a.Port, a.Zone
		}
	}
	if err != nil {
		if _, _, serr := net.SplitHostPort(address); serr != nil {
			err = fmt.Errorf("%w (want host:port, as in :80, 127.0.0.1:80 or [::1]:80)", err)
		}
		return nil, err
	}
	only4, only6 := network[len(network)-1] == '4', network[len(network)-1] == '6'
	ip4 := ip.To4()
	wildcard := ip == nil || ip.IsUnspecified()
	if only6 || ip != nil && ip4 == nil || !only4 && wildcard && dualStack && haveIPv6() {
		p.family = unix.AF_INET6
	}
	if p.family == unix.AF_INET6 {
		p.v6only = only6 || !dualStack
		sa := &unix.SockaddrInet6{Port: port}
		if !wildcard {
			copy(sa.Addr[:], ip.To16())
		}
		if zone != "" {
			if sa.ZoneId, err = zoneID(zone); err != nil {
				return nil, err
			}
		}
		p.sa = sa
		return p, nil
	}
	sa := &unix.SockaddrInet4{Port: port}
	copy(sa.Addr[:], ip4)
	p.sa = sa
	return p, nil
}

// haveIPv6 reports whether the system has IPv6 at all.
func haveIPv6() bool {
	fd, err := newSocket(unix.AF_INET6, unix.SOCK_STREAM)
	if err == nil {
		unix.Close(fd)
	}
	return !errors.Is(err, unix.EAFNOSUPPORT)
}

func zoneID(zone string) (uint32, error) {
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index), nil
	}
	n, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("no network interface is called %q", zone)
	}
	return uint32(n), nil
}

// key is equal for two places if a socket bound to one serves the other.
func (p *place) key() string {
	if p.path != "" {
		return p.network + " " + p.path
	}
	return boundKey(p.typ, p.sa, p.v6only)
}

// boundKey returns the key of a bound address: equal for two sockets of this
// type if each serves the clients of the other.
func boundKey(typ int, sa unix.Sockaddr, v6only bool) string {
	network := networkOf(typ, sa)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return network + " " + netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(sa.Addr)
		if v6only && ip.IsUnspecified() {
			network += "6"
		}
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return network + " " + netip.AddrPortFrom(ip, uint16(sa.Port)).String()
	case *unix.SockaddrUnix:
		return network + " " + sa.Name
	}
	return ""
}

// networkOf returns what net calls the sockets of a type and address family;
// "": it has no name for them.
func networkOf(typ int, sa unix.Sockaddr) string {
	_, isUnix := sa.(*unix.SockaddrUnix)
	for _, network := range []string{"tcp", "udp", "unix", "unixpacket", "unixgram"} {
		if t, u := socketType(network); t == typ && u == isUnix {
			return network
		}
	}
	return ""
}

// boundTo returns where a socket is bound; "": somewhere that net has no name
// for.
func boundTo(fd, typ int) (sa unix.Sockaddr, at string, err error) {
	if sa, err = unix.Getsockname(fd); err != nil {
		return nil, "", os.NewSyscallError("getsockname", err)
	}
	if networkOf(typ, sa) == "" {
		return sa, "", nil
	}
	v6only := false
	if sa6, ok := sa.(*unix.SockaddrInet6); ok && sa6.Addr == [16]byte{} {
		n, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		v6only = !dualStack || err != nil || n != 0
	}
	return sa, boundKey(typ, sa, v6only), nil
}
