package udpflow

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ecdysis-go/ecdysis"
)

// A group has what the sockets of one address share in this process. That is their
// table and the inboxes of older processes. process.mu guards a group, except where
// a field says otherwise.
type group struct {
	u      *ecdysis.Upgrader
	prefix string // of the names under which files are handed on
	clock  clock
	print  prints
	opened int // how many Conns there have been
	conns  []*Conn
	peers  atomic.Pointer[peers]

	// life is held for reading by methods that use the table outside of a read,
	// and for writing by close, which unmaps it. A read needs no lock, because
	// closing the socket waits for the read.
	life  sync.RWMutex
	table *table // nil after close
}

// A peer is a socket of this process or of an older one. Flows belong to peers.
type peer struct {
	owner      uint32
	generation int
	member     int    // its number among the sockets with this address
	name       string // the name under which its inbox is handed on
	own        bool   // it is a socket of this process
	inbox      *os.File
	raw        syscall.RawConn
	gone       atomic.Bool // the process has ended, or has closed the socket
}

// peers is not changed after it is made. A new one replaces it.
type peers struct {
	list   []*peer
	owners map[uint32]*peer
}

func newPeers(list []*peer) *peers {
	p := &peers{list: list, owners: make(map[uint32]*peer, len(list))}
	for _, x := range list {
		p.owners[x.owner] = x
	}
	return p
}

// find returns the peer of a flow, or nil if the peer has gone.
func (p *peers) find(owner uint32) *peer {
	if x := p.owners[owner]; x != nil && !x.gone.Load() {
		return x
	}
	return nil
}

// named returns this socket's counterpart in a generation, or nil if that process
// has ended.
func (p *peers) named(generation, member int) *peer {
	n := 0
	for _, x := range p.list {
		if x.generation == generation && !x.own {
			n = max(n, x.member+1)
		}
	}
	if n == 0 {
		return nil
	}
	for _, x := range p.list {
		if x.generation == generation && x.member == member%n && !x.own && !x.gone.Load() {
			return x
		}
	}
	return nil
}

// findGroup returns the group of an address. For the first socket of an address it
// makes the group, from the files that the predecessor has handed on. These are
// handed on again.
func findGroup(u *ecdysis.Upgrader, address string, config Config) (*group, error) {
	print := config.prints()
	if g := process.groups[address]; g != nil {
		switch {
		case g.print.key != print.key:
			return nil, errors.New("Config.Key is another function than for the other socket with this address")
		case g.print.generation != print.generation:
			return nil, errors.New("Config.Generation is another function than for the other socket with this address")
		}
		return g, nil
	}
	clock, err := newClock()
	if err != nil {
		return nil, err
	}
	g := &group{u: u, prefix: "udpflow " + address + " ", clock: clock, print: print}
	g.peers.Store(newPeers(nil))
	if err := g.inherit(); err != nil {
		g.close()
		return nil, err
	}
	if g.table == nil {
		f, err := ecdysis.MemoryFile()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if g.table, err = createTable(f, config.MaxFlows, print); err != nil {
			return nil, err
		}
		if err := u.AddFile(g.prefix+"table", f); err != nil {
			g.close()
			return nil, err
		}
	}
	if process.groups == nil {
		process.groups = map[string]*group{}
	}
	process.groups[address] = g
	return g, nil
}

// inherit takes the files that the predecessor has handed on for this address.
func (g *group) inherit() error {
	var list []*peer
	defer func() { g.peers.Store(newPeers(list)) }()
	for _, name := range g.u.FileNames(g.prefix) {
		f, err := g.u.File(name)
		if err != nil {
			return err
		}
		var keep bool
		if rest := name[len(g.prefix):]; rest == "table" {
			if g.table == nil {
				g.table, err = openTable(f, g.print)
			}
			defer f.Close()
			keep = true
		} else if p := parseInbox(rest); p != nil && !peerGone(f) {
			p.name, p.inbox = name, f
			if p.raw, err = f.SyscallConn(); err == nil {
				list = append(list, p)
				keep = true
			}
		}
		if err != nil {
			f.Close()
			return err
		}
		if !keep { // the file is of a process that has ended, or of a later version of this package
			f.Close()
			continue
		}
		if err := g.u.AddFile(name, f); err != nil {
			return err
		}
	}
	return nil
}

// inboxName returns the name under which the inbox of p is handed on, without the
// group's prefix. parseInbox is its inverse.
func inboxName(p *peer) string {
	return fmt.Sprintf("inbox %d %d %d", p.owner, p.generation, p.member)
}

func parseInbox(s string) *peer {
	fields := strings.Fields(s)
	if len(fields) != 4 || fields[0] != "inbox" {
		return nil
	}
	var n [3]int
	for i := range n {
		var err error
		if n[i], err = strconv.Atoi(fields[i+1]); err != nil || n[i] < 0 {
			return nil
		}
	}
	if n[0] > maxOwner {
		return nil
	}
	return &peer{owner: uint32(n[0]), generation: n[1], member: n[2]}
}

// join makes c one of the group's sockets, with an inbox to which later processes
// write.
func (g *group) join(c *Conn, buffer int) error {
	owner, err := g.table.newOwner()
	if err != nil {
		return err
	}
	p := &peer{owner: owner, generation: g.u.Generation(), member: g.opened, own: true}
	p.name = g.prefix + inboxName(p)
	fds, err := inboxPair(buffer)
	if err != nil {
		return err
	}
	r, w := os.NewFile(uintptr(fds[0]), "inbox"), os.NewFile(uintptr(fds[1]), "inbox")
	defer w.Close()
	c.inboxRaw, err = r.SyscallConn()
	if err == nil {
		err = g.u.AddFile(p.name, w)
	}
	if err != nil {
		r.Close()
		return err
	}
	c.inbox, c.self = r, p
	g.opened++
	g.conns = append(g.conns, c)
	g.peers.Store(newPeers(append(slices.Clone(g.peers.Load().list), p)))
	return nil
}

// leave removes a closed socket from the group, and ends the group if it was the
// last one.
func (g *group) leave(c *Conn) {
	withdraw(g.u, c.self.name)
	g.conns = slices.DeleteFunc(g.conns, func(x *Conn) bool { return x == c })
	g.peers.Store(newPeers(slices.DeleteFunc(slices.Clone(g.peers.Load().list), func(p *peer) bool { return p == c.self })))
	g.endUnused()
}

// endUnused ends the group if it has no socket.
func (g *group) endUnused() {
	if len(g.conns) > 0 {
		return
	}
	for _, name := range g.u.FileNames(g.prefix) {
		withdraw(g.u, name)
	}
	g.close()
	for address, x := range process.groups {
		if x == g {
			delete(process.groups, address)
		}
	}
}

// withdraw makes the package hand a file on no more. This fails while an upgrade
// runs. The successor then finds out by itself that the other end is closed.
func withdraw(u *ecdysis.Upgrader, name string) {
	if f, err := u.File(name); err == nil && f != nil {
		f.Close()
	}
}

// close closes the group's inboxes and unmaps its table.
func (g *group) close() {
	g.closePeers()
	g.life.Lock()
	defer g.life.Unlock()
	if g.table != nil {
		_ = unix.Munmap(g.table.mem)
		g.table = nil
	}
}

func (g *group) closePeers() {
	list := g.peers.Load().list
	g.peers.Store(newPeers(slices.DeleteFunc(slices.Clone(list), func(p *peer) bool { return !p.own })))
	for _, p := range list {
		if !p.own {
			p.inbox.Close()
		}
	}
}

// forgetGone withdraws the inboxes of processes that have ended.
func (g *group) forgetGone() {
	var list []*peer
	for _, p := range g.peers.Load().list {
		if !p.own && (p.gone.Load() || peerGone(p.inbox)) {
			withdraw(g.u, p.name)
			p.gone.Store(true)
			p.inbox.Close()
			continue
		}
		list = append(list, p)
	}
	g.peers.Store(newPeers(list))
}

// handOver makes all readers read from their inboxes and no more from the
// sockets.
func (g *group) handOver() {
	for _, c := range g.conns {
		c.handOver()
	}
}

// resume makes all readers read from the sockets again, after the successor has
// ended.
func (g *group) resume() {
	for _, c := range g.conns {
		c.resume()
	}
}

// replaced closes the inboxes of older processes, which only the newest process
// needs.
func (g *group) replaced() { g.closePeers() }
