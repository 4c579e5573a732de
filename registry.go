package ecdysis

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// An entry is one socket that this process holds, or has inherited and not
// yet been asked for.
type entry struct {
	network, address string // the words it was asked for with
	at               string // boundKey of its address
	keep             bool   // ListenConfig.KeepOnStop
	path             string // absolute, of a Unix socket's file; "": none
	dev, ino         uint64 // of that file when it was bound

	fd        int       // until l has it; -1: closed or with l
	inherited bool      // not made by this process
	l         *listener // once it was asked for

	// Guarded by Upgrader.mu.
	claimed bool // taken from the inheritance
	handed  bool // the successor of the running upgrade has a copy
	closed  bool // withdrawn while handed
}

// name returns the words of e for an event.
func (e *entry) name() string { return e.network + " " + e.address }

// key returns the key of the place where e is.
func (e *entry) key() string {
	if e.path != "" {
		return "unix " + e.path
	}
	return e.at
}

// drop closes a descriptor that was never asked for.
func (e *entry) drop() {
	if e.fd >= 0 {
		unix.Close(e.fd)
		e.fd = -1
	}
}

// removeFile removes a Unix socket's file if it is still the one that was
// bound.
func (e *entry) removeFile() {
	var st unix.Stat_t
	if e.path == "" || unix.Lstat(e.path, &st) != nil {
		return
	}
	if uint64(st.Dev) == e.dev && uint64(st.Ino) == e.ino {
		_ = os.Remove(e.path)
	}
}

// A registry is what this process holds and what it has inherited. It is
// guarded by Upgrader.mu.
type registry struct {
	entries   []*entry // in the order in which they were added
	inherited []*entry // in the older process's order
	dropped   []*entry // inherited and closed before their files were this process's own
	// inherited by words and by place. Each list is in order; what was
	// claimed by another way is skipped.
	words, places map[string][]*entry
}

// index makes what was inherited ready to be claimed.
func (r *registry) index() {
	r.words = make(map[string][]*entry, len(r.inherited))
	r.places = make(map[string][]*entry, len(r.inherited))
	for _, e := range r.inherited {
		if e.path == "" {
			r.words[e.name()] = append(r.words[e.name()], e)
		}
		r.places[e.key()] = append(r.places[e.key()], e)
		if k, ok := portZeroKey(e); ok {
			r.places[k] = append(r.places[k], e)
		}
	}
}

// portZeroKey returns the key that finds e for who asks for port 0, if it was
// asked for so.
func portZeroKey(e *entry) (string, bool) {
	_, port, err := net.SplitHostPort(e.address)
	if err != nil || e.network == "unix" {
		return "", false
	}
	if n, err := strconv.Atoi(port); port != "" && (err != nil || n != 0) {
		return "", false
	}
	i := strings.LastIndexByte(e.at, ':')
	if i < 0 {
		return "", false
	}
	return e.at[:i] + ":0", true
}

// claimWords takes the first inherited socket that was asked for with these
// words; nil: there is none. A path's words mean something else in another
// directory: those of Unix sockets are not looked at.
func (r *registry) claimWords(network, address string) *entry {
	return claimFirst(r.words, network+" "+address)
}

// claimPlace takes the first inherited socket that is bound to p.
func (r *registry) claimPlace(p *place) *entry {
	if e := claimFirst(r.places, p.key()); e != nil || p.path == "" {
		return e
	}
	var st unix.Stat_t
	if unix.Stat(p.path, &st) != nil {
		return nil
	}
	for _, e := range r.inherited { // the same file by another path
		if !e.claimed && e.path != "" && e.dev == uint64(st.Dev) && e.ino == uint64(st.Ino) {
			e.claimed = true
			return e
		}
	}
	return nil
}

func claimFirst(m map[string][]*entry, key string) *entry {
	list := m[key]
	for len(list) > 0 && list[0].claimed {
		list = list[1:]
	}
	if len(list) == 0 {
		delete(m, key)
		return nil
	}
	list[0].claimed = true
	m[key] = list[1:]
	return list[0]
}

// unclaimed returns the inherited entries that nobody has asked for.
func (r *registry) unclaimed() []*entry {
	var list []*entry
	for _, e := range r.inherited {
		if !e.claimed {
			list = append(list, e)
		}
	}
	return list
}

// takeInherited ends claiming: it returns what nobody has asked for.
func (r *registry) takeInherited() []*entry {
	list := r.unclaimed()
	r.inherited, r.words, r.places = nil, nil, nil
	return list
}

// mayAdd reports, as an error, why nothing can be added now. u.mu is held.
func (u *Upgrader) mayAdd() error {
	switch u.phase {
	case starting, serving, preparing:
		return nil
	}
	return u.phase.refusal()
}

// claim takes an entry of the inheritance, if find finds one.
func (u *Upgrader) claim(find func(*registry) *entry) (*entry, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		return nil, err
	}
	return find(&u.reg), nil
}

// add enters a listener that is to be handed on, and lets it accept if this
// process serves.
func (u *Upgrader) add(l *listener) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		return err
	}
	u.reg.entries = append(u.reg.entries, l.e)
	if u.phase != starting {
		l.resume()
	}
	return nil
}

// withdraw takes an entry out again. It reports whether its socket's file is
// to be removed: whether no other process, now or after the upgrade that is
// running, has the socket.
func (u *Upgrader) withdraw(e *entry) bool {
	owner := e.path != "" && u.settle()
	u.mu.Lock()
	defer u.mu.Unlock()
	if i := slices.Index(u.reg.entries, e); i >= 0 {
		u.reg.entries = slices.Delete(u.reg.entries, i, i+1)
	}
	if e.handed {
		e.closed = true // its file goes if the upgrade fails
		return false
	}
	switch {
	case u.phase == upgraded:
		return false
	case !e.inherited || owner && u.phase != refused:
		return true
	}
	select {
	case <-u.settled: // since settle looked
		return u.phase != refused
	default:
	}
	if e.path != "" {
		u.reg.dropped = append(u.reg.dropped, e)
	}
	return false
}

// drop closes what was never asked for, and sees to it that the file of each
// of these goes when this process owns it.
func (u *Upgrader) drop(list []*entry) {
	for _, e := range list {
		e.drop()
	}
	u.mu.Lock()
	u.reg.dropped = append(u.reg.dropped, list...)
	u.mu.Unlock()
	select {
	case <-u.settled:
		u.removeDropped()
	default:
	}
}

// removeDropped removes the files that had to wait until they were this
// process's own.
func (u *Upgrader) removeDropped() {
	u.mu.Lock()
	list := u.reg.dropped
	u.reg.dropped = nil
	u.mu.Unlock()
	for _, e := range list {
		e.removeFile()
	}
}

// unclaimed names what the older process hands on and nobody has asked for.
func (u *Upgrader) unclaimed() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var names []string
	for _, e := range u.reg.unclaimed() {
		names = append(names, e.name())
	}
	return names
}

// boundKey returns the key of a bound address: equal for two sockets if each
// serves the clients of the other.
func boundKey(sa unix.Sockaddr, v6only bool) string {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return "tcp " + netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		network := "tcp "
		ip := netip.AddrFrom16(sa.Addr)
		if v6only && ip.IsUnspecified() {
			network = "tcp6 "
		}
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return network + netip.AddrPortFrom(ip, uint16(sa.Port)).String()
	case *unix.SockaddrUnix:
		return "unix " + sa.Name
	}
	return ""
}
