package ecdysis

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A registry is what this process holds and what it has inherited. It is
// guarded by Upgrader.mu.
type registry struct {
	entries   []*entry // in the order in which they were added
	adopted   []*entry // of these, sockets from AddFile that nobody has asked for yet
	inherited []*entry // in the older process's order
	dropped   []*entry // inherited and closed before their files were this process's own
	// inherited by words, by place and by name. Each list is in order; what
	// was claimed by another way is skipped.
	words, places, names map[string][]*entry
}

// index makes what was inherited ready to be claimed.
func (r *registry) index() {
	n := len(r.inherited)
	r.words, r.places, r.names = make(map[string][]*entry, n), make(map[string][]*entry, n), make(map[string][]*entry)
	for _, e := range r.inherited {
		if e.name != "" {
			k := nameKey(e.kind, e.name)
			r.names[k] = append(r.names[k], e)
		}
		if e.kind != kindListener && e.kind != kindPacket {
			continue
		}
		if e.path == "" {
			r.words[e.label()] = append(r.words[e.label()], e)
		}
		r.places[e.key()] = append(r.places[e.key()], e)
		if k, ok := portZeroKey(e); ok {
			r.places[k] = append(r.places[k], e)
		}
	}
}

func nameKey(kind, name string) string { return kind + " " + name }

// portZeroKey returns the key that finds e for who asks for port 0, if it was
// asked for so.
func portZeroKey(e *entry) (string, bool) {
	_, port, err := net.SplitHostPort(e.address)
	if _, isUnix := socketType(e.network); err != nil || isUnix {
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

// claimWords takes the first socket that was asked for with these words; nil:
// there is none. A path's words mean something else in another directory:
// those of Unix sockets are not looked at.
func (r *registry) claimWords(network, address string) *entry {
	if e := claimFirst(r.words, network+" "+address); e != nil {
		return e
	}
	return r.claimAdopted(func(e *entry) bool {
		return e.path == "" && e.network == network && e.address == address
	})
}

// claimPlace takes the first socket that is bound to p.
func (r *registry) claimPlace(p *place) *entry {
	key := p.key()
	if e := claimFirst(r.places, key); e != nil {
		return e
	}
	if e := r.claimAdopted(func(e *entry) bool { return e.key() == key }); e != nil || p.path == "" {
		return e
	}
	var st unix.Stat_t
	if unix.Stat(p.path, &st) != nil {
		return nil
	}
	sameFile := func(e *entry) bool { // by another path
		return e.path != "" && e.network == p.network && e.dev == uint64(st.Dev) && e.ino == uint64(st.Ino)
	}
	for _, e := range r.inherited {
		if !e.claimed && sameFile(e) {
			e.claimed = true
			e.rename(p.path)
			return e
		}
	}
	return r.claimAdopted(sameFile)
}

// claimName takes the first thing of this kind and name.
func (r *registry) claimName(kind, name string) *entry {
	if e := claimFirst(r.names, nameKey(kind, name)); e != nil {
		return e
	}
	return r.claimAdopted(func(e *entry) bool { return e.kind == kind && e.name == name })
}

// claimAdopted takes a socket that AddFile has brought here. It stays in its
// place among the entries.
func (r *registry) claimAdopted(match func(*entry) bool) *entry {
	i := slices.IndexFunc(r.adopted, match)
	if i < 0 {
		return nil
	}
	e := r.adopted[i]
	r.adopted = slices.Delete(r.adopted, i, i+1)
	return e
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
	r.inherited, r.words, r.places, r.names = nil, nil, nil, nil
	return list
}

// forgetGone closes what tells of older generations that have exited.
func (r *registry) forgetGone() {
	r.entries = slices.DeleteFunc(r.entries, func(e *entry) bool {
		if e.kind != kindOlder || !e.hungUp() {
			return false
		}
		e.drop()
		return true
	})
}

// draining counts the older generations that have not exited.
func (r *registry) draining() (n int) {
	for _, e := range r.entries {
		if e.kind == kindOlder {
			n++
		}
	}
	return n
}

// remove takes an entry out of those that are handed on.
func (r *registry) remove(e *entry) {
	for _, list := range []*[]*entry{&r.entries, &r.adopted} {
		if i := slices.Index(*list, e); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
		}
	}
}

// mayAdd reports, as an error, why nothing can be added now. u.mu is held.
func (u *Upgrader) mayAdd() error {
	switch u.phase {
	case starting, serving, preparing:
		return nil
	}
	return u.phase.refusal()
}

// claim makes what find finds, if that is not nil, a socket that is handed on,
// and opens it if this process serves. Where it was not found by its name, its
// words become those it was asked for with.
func (u *Upgrader) claim(asked askedAddr, find func(*registry) *entry) (socket, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.mayAdd(); err != nil {
		return nil, err
	}
	e := find(&u.reg)
	if e == nil {
		return nil, nil
	}
	if asked != (askedAddr{}) {
		e.network, e.address = asked.network, asked.address
	}
	var s socket
	var err error
	if e.kind == kindPacket {
		s, err = newPacketConn(u, e)
	} else {
		s, err = newListener(u, e)
	}
	if err != nil {
		u.reg.remove(e)
		return nil, fmt.Errorf("ecdysis: %w", &net.OpError{Op: "listen", Net: e.network, Addr: askedAddr{e.network, e.address}, Err: err})
	}
	e.sock = s
	if e.inherited || e.name == "" { // what AddFile has brought is there already
		u.reg.entries = append(u.reg.entries, e)
	}
	if u.phase != starting {
		e.resume()
	}
	return s, nil
}

// withdraw takes an entry out again. It reports whether its socket's file is
// to be removed: whether no other process, now or after the upgrade that is
// running, has the socket.
func (u *Upgrader) withdraw(e *entry) bool {
	owner := e.path != "" && u.settle()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.reg.remove(e)
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
	for _, e := range list {
		if e.path != "" {
			u.reg.dropped = append(u.reg.dropped, e)
		}
	}
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
		names = append(names, e.label())
	}
	if u.state != nil && u.state.unread() > 0 {
		names = append(names, kindState)
	}
	return names
}
