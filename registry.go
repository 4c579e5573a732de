//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// What this process holds and what it has inherited: finding it, registering
// it, withdrawing it, and whose file is whose.

// A registry is what this process holds and what it has inherited. Upgrader.mu
// guards it. Its methods are called with the lock held.
type registry struct {
	entries   []*entry // held, in the order in which they were added
	adopted   []*entry // the sockets among entries that AddFile has brought and nobody has asked for
	inherited []*entry // in the predecessor's order; those that were asked for are no longer unclaimed
	ancestors []*entry // the streams to the older processes that are alive, the predecessor's last
	dropped   []*entry // inherited and closed before their files were this process's own
	spare     spare    // for what is claimed before Ready

	// A successor nearly always asks in its predecessor's order. So next is
	// tried first, and the maps are made when that has failed once. Each list
	// is in order, and what was claimed by another way is skipped.
	next                  int // all before this index of inherited were claimed
	indexed               bool
	words, addrs, byNames map[string][]*entry
}

// index makes the maps of what was inherited.
func (r *registry) index() {
	if r.indexed {
		return
	}
	r.indexed = true
	n := len(r.inherited)
	r.words, r.addrs, r.byNames = make(map[string][]*entry, n), make(map[string][]*entry, n), make(map[string][]*entry)
	for _, e := range r.inherited {
		if e.name != "" {
			addTo(r.byNames, nameKey(e.kind, e.name), e)
		}
		if !e.isSocket() {
			continue
		}
		if e.path == "" {
			addTo(r.words, e.label(), e)
		}
		addTo(r.addrs, e.key(), e)
		if k, ok := portZeroKey(e); ok {
			addTo(r.addrs, k, e)
		}
	}
}

func addTo(m map[string][]*entry, key string, e *entry) { m[key] = append(m[key], e) }

func nameKey(kind, name string) string { return kind + " " + name }

// portZeroKey returns the key by which a request for port 0 finds e. It returns
// false if e was not requested with port 0.
func portZeroKey(e *entry) (string, bool) {
	_, port, err := net.SplitHostPort(e.address)
	if _, isUnix := socketType(e.network); err != nil || isUnix {
		return "", false
	}
	if n, ok := number(port); port != "" && (!ok || n != 0) {
		return "", false
	}
	i := strings.LastIndexByte(e.boundKey, ':')
	if i < 0 {
		return "", false
	}
	return e.boundKey[:i] + ":0", true
}

// findWords takes the first socket that was asked for with these words, or
// returns nil. It leaves Unix sockets alone, because the words of a path mean
// another file in another directory.
func (r *registry) findWords(network, address string) *entry {
	same := func(e *entry) bool {
		return e.isSocket() && e.path == "" && e.network == network && e.address == address
	}
	if e := r.takeNext(same); e != nil {
		return e
	}
	r.index()
	if e := takeFirst(r.words, network+" "+address); e != nil {
		return e
	}
	return r.takeAdopted(same)
}

// findAddr takes the first socket that is bound to a, or returns nil.
func (r *registry) findAddr(a *bindAddr) *entry {
	key := a.key()
	same := func(e *entry) bool { return e.isSocket() && e.key() == key }
	if e := r.takeNext(same); e != nil {
		return e
	}
	r.index()
	if e := takeFirst(r.addrs, key); e != nil {
		return e
	}
	if e := r.takeAdopted(same); e != nil || a.path == "" {
		return e
	}
	// The same file may be there by another path.
	var st syscall.Stat_t
	if stat(a.path, &st) != nil {
		return nil
	}
	same = func(e *entry) bool {
		return e.path != "" && e.network == a.network && e.dev == uint64(st.Dev) && e.ino == uint64(st.Ino)
	}
	for _, e := range r.inherited {
		if e.state == unclaimed && same(e) {
			e.state = held
			e.rename(a.path)
			return e
		}
	}
	return r.takeAdopted(same)
}

// findName takes the first thing of this kind and name, or returns nil.
func (r *registry) findName(kind, name string) *entry {
	same := func(e *entry) bool { return e.kind == kind && e.name == name }
	if e := r.takeNext(same); e != nil {
		return e
	}
	r.index()
	if e := takeFirst(r.byNames, nameKey(kind, name)); e != nil {
		return e
	}
	return r.takeAdopted(same)
}

// takeBare takes the first thing of this kind and name that is a bare
// descriptor, also from what is held. It returns nil if there is none.
func (r *registry) takeBare(kind, name string) *entry {
	same := func(e *entry) bool { return e.kind == kind && e.name == name }
	e := r.takeNext(same)
	if e == nil {
		r.index()
		e = takeFirst(r.byNames, nameKey(kind, name))
	}
	if e == nil {
		if i := slices.IndexFunc(r.entries, func(e *entry) bool { return same(e) && e.isBare() }); i >= 0 {
			e = r.entries[i]
			r.remove(e)
		}
	}
	return e
}

// takeNext takes what comes after all that was claimed so far, if it matches.
func (r *registry) takeNext(match func(*entry) bool) *entry {
	if r.indexed || r.next == len(r.inherited) || !match(r.inherited[r.next]) {
		return nil
	}
	e := r.inherited[r.next]
	e.state = held
	r.next++
	return e
}

// takeAdopted takes a socket that AddFile has brought into this process. It
// stays in its place among the entries.
func (r *registry) takeAdopted(match func(*entry) bool) *entry {
	i := slices.IndexFunc(r.adopted, match)
	if i < 0 {
		return nil
	}
	e := r.adopted[i]
	r.adopted = slices.Delete(r.adopted, i, i+1)
	return e
}

func takeFirst(m map[string][]*entry, key string) *entry {
	list := m[key]
	for len(list) > 0 && list[0].state != unclaimed {
		list = list[1:]
	}
	if len(list) == 0 {
		delete(m, key)
		return nil
	}
	list[0].state = held
	m[key] = list[1:]
	return list[0]
}

// unclaimed returns the inherited entries that no call has asked for.
func (r *registry) unclaimed() []*entry {
	var list []*entry
	for _, e := range r.inherited {
		if e.state == unclaimed {
			list = append(list, e)
		}
	}
	return list
}

// endClaiming returns what no call has asked for. It is no longer inherited.
func (r *registry) endClaiming() []*entry {
	list := r.unclaimed()
	r.inherited, r.words, r.addrs, r.byNames = nil, nil, nil, nil
	r.next, r.indexed = 0, false
	r.spare.close()
	return list
}

// takeForStop returns all that is given up on a stop.
func (r *registry) takeForStop() []*entry {
	taken := r.ancestors
	var kept []*entry
	for _, e := range r.entries {
		if e.keep && e.sock != nil {
			kept = append(kept, e)
		} else {
			taken = append(taken, e)
		}
	}
	r.entries, r.ancestors, r.adopted = kept, nil, nil
	return taken
}

// takeForUpgrade returns all that a successor gets.
func (r *registry) takeForUpgrade() []*entry {
	list := slices.Concat(r.entries, r.ancestors)
	for _, e := range list {
		e.state = inTransit
	}
	return list
}

// forgetGone closes the streams to older processes that have exited, and
// returns how many processes are left.
func (r *registry) forgetGone() int {
	alive := r.ancestors[:0]
	for _, e := range r.ancestors {
		if e.hungUp() {
			e.closeBare()
		} else {
			alive = append(alive, e)
		}
	}
	r.ancestors = alive
	return len(alive)
}

// remove takes an entry out of those that are handed on.
func (r *registry) remove(e *entry) {
	for _, list := range []*[]*entry{&r.entries, &r.adopted} {
		if i := slices.Index(*list, e); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
		}
	}
}

// An opener makes an entry's descriptor a socket: newListener, newPacketConn or
// newRawUDP. A program that has no sockets for packets does not contain the
// code for them, because only the calls for packets name it.
type opener func(*Upgrader, *entry) error

// claim registers what find finds in the inheritance, and returns its socket.
// It returns nil if find finds nothing. A nil asked is a request by name.
func (u *Upgrader) claim(asked *socketRequest, open opener, find func(*registry) *entry) (pausable, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.life.mayAdd(); err != nil {
		return nil, err
	}
	e := find(&u.reg)
	if e == nil {
		return nil, nil
	}
	if asked != nil && e.inherited && e.fileIsGone() {
		// What follows looks at files, and may wait.
		u.mu.Unlock()
		fresh, err := renew(asked, e)
		u.mu.Lock()
		if err == nil {
			err = u.life.mayAdd()
		}
		if err != nil {
			e.closeBare()
			return nil, errorf("ecdysis: the file %s is gone, and a new socket cannot take its place: %w", e.path, err)
		}
		e = fresh
	}
	return u.register(asked, open, e)
}

// A socketRequest is what a call of Listen or ListenPacket asks for.
type socketRequest struct {
	askedAddr
	lc ListenConfig
}

// failed returns the error of a call that asks for this and has failed.
func (asked *socketRequest) failed(a net.Addr, err error) error {
	return errorf("ecdysis: %w", &net.OpError{Op: "listen", Net: asked.network, Addr: a, Err: err})
}

// register makes e a socket that is handed on, and opens it if this process
// serves. What asked says, if it is not nil, replaces what came with e. u.mu is
// held.
func (u *Upgrader) register(asked *socketRequest, open opener, e *entry) (pausable, error) {
	if asked != nil {
		e.network, e.address, e.keep = asked.network, asked.address, asked.lc.KeepOnStop
	}
	if err := open(u, e); err != nil {
		u.reg.remove(e)
		return nil, errorf("ecdysis: %w", &net.OpError{Op: "listen", Net: e.network, Addr: askedAddr{e.network, e.address}, Err: err})
	}
	if e.inherited || e.name == "" { // what AddFile has brought is there already
		u.reg.entries = append(u.reg.entries, e)
	}
	if u.life.phase != starting {
		e.unpause()
	}
	return e.sock, nil
}

// withdraw takes an entry out again when the caller closes it. It reports
// whether the socket's file is to be removed: whether no other process has the
// socket now or after the running upgrade. If that cannot be known yet, the
// file is removed by the call that learns it.
func (u *Upgrader) withdraw(e *entry) bool {
	independent := e.path != "" && u.independent()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.reg.remove(e)
	u.reg.spare.close() // it may refer to this socket
	if e.state == inTransit {
		e.state = closedInTransit
		return false
	}
	switch {
	case u.life.phase == upgraded:
		return false
	case !e.inherited:
		return true
	case e.path == "" || u.life.phase == refused:
		return false
	case independent || u.pred.isFinal(): // the second since independent looked
		return true
	}
	u.reg.dropped = append(u.reg.dropped, e)
	return false
}

// drop closes what was never asked for. It sees to it that the file of each
// goes when this process owns it.
func (u *Upgrader) drop(list []*entry) {
	u.mu.Lock()
	for _, e := range list {
		e.closeBare()
		if e.path != "" {
			u.reg.dropped = append(u.reg.dropped, e)
		}
	}
	u.mu.Unlock()
	if u.pred.isFinal() {
		u.removeDropped()
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

// unclaimed names what was inherited and no call has asked for, and lists the
// files of the sockets among it.
func (u *Upgrader) unclaimed() (names, paths []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range u.reg.unclaimed() {
		names = append(names, e.label())
		if e.path != "" {
			paths = append(paths, e.path)
		}
	}
	if u.state != nil && u.state.unread() > 0 {
		names = append(names, kindState)
	}
	return names, paths
}

// unclaimedRecord tells the predecessor what no call has asked for: the files of
// sockets, which it removes, and the names of all of it, as many as there is
// room for.
func (u *Upgrader) unclaimedRecord() (r record) {
	names, paths := u.unclaimed()
	size := 0
	for i, value := range slices.Concat(paths, names) {
		field := "label=" + value
		if i < len(paths) {
			field = "unclaimed=" + value
		}
		if size += len(field) + 3; size < maxFrame/2 { // 3 is the most that its length takes
			r = append(r, field)
		}
	}
	return r
}

// placeFiles moves the files of the sockets that renew has made into their
// places. It returns the paths at which clients find this process again, and
// those at which they find another one.
func (u *Upgrader) placeFiles() (rebound, lost []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range u.reg.entries {
		switch {
		case e.beside != "":
			if e.place() {
				rebound = append(rebound, e.path)
			} else {
				lost = append(lost, e.path)
			}
		case e.gone && !e.hasFile(e.path):
			lost = append(lost, e.path)
		}
	}
	return rebound, lost
}

// removeBeside removes the files that renew has made, if they are not in their
// places.
func (u *Upgrader) removeBeside() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range u.reg.entries {
		if e.beside != "" {
			_ = os.Remove(e.beside)
		}
	}
}

// acceptErrorInterval is how often EventAcceptError may be told.
const acceptErrorInterval = time.Minute

// notifyAcceptError tells of an error that Accept waits out, unless one was
// told a moment ago.
func (u *Upgrader) notifyAcceptError(err error) {
	u.mu.Lock()
	now := time.Now()
	silent := !u.acceptError.IsZero() && now.Sub(u.acceptError) < acceptErrorInterval
	if !silent {
		u.acceptError = now
	}
	u.mu.Unlock()
	if !silent {
		e := u.ownEvent(trigger{}, EventAcceptError)
		e.Err = err
		u.notify(e)
	}
}
