// Package udpflow keeps sessions over UDP alive across the upgrades of package
// ecdysis.
//
// QUIC, DTLS, CoAP, SIP and games hold their sessions in the memory of a
// process. After an upgrade the new process alone reads the socket, and knows
// none of them. With this package the newest process hands every packet of an
// older process's flow to that process, until the flow ends:
//
//	udpflow.Setup(&opts) // then u, err := ecdysis.New(opts)
//	conn, err := udpflow.ListenPacket(u, "udp", ":4433", udpflow.Config{})
//
// conn is read and written like a *net.UDPConn. When this process is replaced,
// its read methods go on and return the packets of its own flows. Answers are
// written to the socket as before, since all generations have it. The program
// reads until its sessions have ended, or until [Conn.Drained] returns, then
// calls Close and exits. An upgrade changes nothing for a client.
//
// # Flows
//
// A flow is the packets that have one key, by default one remote address. It
// belongs to the process that read its first packet, or that has called
// [Conn.Claim], until no packet has come for Config.IdleTimeout or that process
// has ended. Then it is a new flow of the newest process. All generations share
// one table of flows, in memory that the predecessor hands on.
//
// Each process has an inbox, a socket pair whose other end all later ones
// inherit. Packets go there in one hop, in the order in which they came, and
// without blocking: what does not fit because the older process is slow is
// dropped and counted, as the system does with a UDP socket's own queue.
//
// A packet is received, looked up and handed on in one step that a handover
// waits for, so that exactly one process decides on it. No packet is lost or
// answered twice by an upgrade, whether it succeeds, fails or is taken back.
//
// # Limits
//
// The flows of a process that has ended have lost their sessions. Older
// processes receive nothing if the newest dies without a successor. What waits
// in the inbox of a process that is killed is lost. docs/udp.md has more, and
// recipes for several protocols.
//
// Everything here works without privileges, on Linux, macOS and the BSDs. The
// package starts no goroutine.
package udpflow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ecdysis-go/ecdysis"
)

const (
	defaultIdle   = 2 * time.Minute
	maxIdle       = 365 * 24 * time.Hour
	defaultFlows  = 1 << 16
	maxFlows      = 1 << 24
	defaultBuffer = 1 << 20
)

// Config says what a flow is. The zero Config makes one of all packets from
// one remote address, until none has come for two minutes.
//
// Key and Generation are called by the goroutine that reads, while no other
// process can read: they must be quick, must not call methods of the Conn, and
// must not keep the packet. ListenPacket calls them with made-up packets, to
// compare them with those of the predecessor.
type Config struct {
	// Key returns what identifies a packet's flow. If Key is nil, the remote
	// address does, in the form of its MarshalBinary method. A packet whose
	// key is nil belongs to no flow and goes to the newest process. The
	// address is an IPv4 one or an IPv6 one, never an IPv4 one mapped into
	// IPv6. Key must be the same in all versions of a program: an upgrade to
	// one with another Key fails.
	Key func(packet []byte, from netip.AddrPort) []byte

	// Generation is asked before Key, if it is not nil. A packet can name the
	// generation of its process, modulo 256, as a QUIC connection ID can. Such
	// a packet goes to that process without a look at the table, or to the
	// newest one if that process has ended. If Generation returns false, Key
	// decides. Like Key it must be the same in all versions.
	Generation func(packet []byte) (g byte, ok bool)

	// IdleTimeout is how long a flow lasts after its last packet. 0: two
	// minutes.
	IdleTimeout time.Duration

	// MaxFlows is the number of flows that the table has room for. Flows
	// beyond it are served by the newest process and not tracked, so that
	// they move in an upgrade. The table is made by the first process, whose
	// MaxFlows counts. A flow takes 32 bytes, once for all generations. 0:
	// 65,536.
	MaxFlows int

	// Buffer is how many bytes of packets can wait in this process's inbox
	// after it was replaced, counted as the system counts what a socket
	// buffer holds. The system may limit it (net.core.wmem_max on Linux). 0:
	// 1 MiB.
	Buffer int

	// Listen is how the socket is made, as for Upgrader.ListenPacketWith.
	Listen ecdysis.ListenConfig
}

// check returns c with its defaults filled in.
func (c Config) check() (Config, error) {
	switch {
	case c.IdleTimeout < 0 || c.IdleTimeout > maxIdle:
		return c, fmt.Errorf("IdleTimeout is %v; want 0 (for %v) to %v", c.IdleTimeout, defaultIdle, maxIdle)
	case c.MaxFlows < 0 || c.MaxFlows > maxFlows:
		return c, fmt.Errorf("MaxFlows is %d; want 0 (for %d) to %d", c.MaxFlows, defaultFlows, maxFlows)
	case c.Buffer < 0:
		return c, fmt.Errorf("the Buffer is %d; want 0 (for %d) or more", c.Buffer, defaultBuffer)
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = defaultIdle
	}
	if c.MaxFlows == 0 {
		c.MaxFlows = defaultFlows
	}
	if c.Buffer == 0 {
		c.Buffer = defaultBuffer
	}
	return c, nil
}

// prints returns what the functions make of packets that are the same in every
// process.
func (c Config) prints() (p prints) {
	r := rand.New(rand.NewPCG(1, 2))
	var b [1500]byte
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	for i := range 1024 {
		packet := b[:]
		switch r.IntN(4) {
		case 0:
			packet = b[:r.IntN(20)]
		case 1:
			packet = b[:r.IntN(100)]
		}
		if len(packet) > 0 {
			packet[0] = byte(i)
			packet[r.IntN(len(packet))] = byte(r.Uint32())
		}
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), uint16(i)+1)
		if i%3 == 0 {
			from = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 1, 2: 0x0d, 3: 0xb8, 15: byte(i)}), uint16(i)+1)
		}
		if c.Key != nil {
			key := c.Key(packet[:len(packet):len(packet)], from)
			none := byte(0)
			if key == nil {
				none = 1
			}
			p.key = sipHash(p.key, 1, append([]byte{none}, key...))
		}
		if c.Generation != nil {
			g, ok := c.Generation(packet[:len(packet):len(packet)])
			if !ok {
				g = 0
			}
			p.generation = sipHash(p.generation, 2, []byte{g, map[bool]byte{true: 1}[ok]})
		}
	}
	return p
}

// process is this process's part: it has one Upgrader.
var process struct {
	setUp atomic.Bool

	mu     sync.Mutex
	groups map[string]*group // by the local address
}

// Setup adds to opts.Notify what the package does in an upgrade. It is called
// before [ecdysis.New]. A hook that is there goes on being called, after the
// package's own.
func Setup(opts *ecdysis.Options) {
	next := opts.Notify
	opts.Notify = func(e ecdysis.Event) {
		notify(e)
		if next != nil {
			next(e)
		}
	}
	process.setUp.Store(true)
}

func notify(e ecdysis.Event) {
	var f func(*group)
	switch e.Kind {
	case ecdysis.EventUpgrading:
		f = (*group).forgetGone
	case ecdysis.EventHandover:
		f = (*group).handOver
	case ecdysis.EventResumed:
		f = (*group).resume
	case ecdysis.EventUpgraded:
		f = (*group).replaced
	default:
		return
	}
	process.mu.Lock()
	defer process.mu.Unlock()
	for _, g := range process.groups {
		f(g)
	}
}

// ListenPacket returns a socket that is bound to the address: the inherited
// one if the predecessor hands it on, with its flows, otherwise a new one.
// Network and address are those of [ecdysis.Upgrader.ListenPacket], for UDP. If
// the predecessor used a plain ListenPacket for the socket, its flows move to
// this process.
//
// Several sockets may have one address (ecdysis.ListenConfig.ReusePort). Each
// is asked for by a call of its own, and all have one table. Their number may
// grow in an upgrade, because each flow knows which socket of its process reads
// it. It must not shrink while older processes live: they keep the sockets that
// the newest one has dropped, and nobody reads what comes there.
//
// The errors are those of ListenPacket. A table of flows that this program
// cannot use, because its layout, Key or Generation is another, is an error,
// too: the program passes it to [ecdysis.Upgrader.Fail], and the predecessor
// goes on serving.
func ListenPacket(u *ecdysis.Upgrader, network, address string, c Config) (*Conn, error) {
	conn, err := listenPacket(u, network, address, c)
	if err != nil {
		return nil, fmt.Errorf("udpflow: listen %s %s: %w", network, address, err)
	}
	return conn, nil
}

func listenPacket(u *ecdysis.Upgrader, network, address string, config Config) (*Conn, error) {
	if !process.setUp.Load() {
		return nil, errors.New("udpflow.Setup was not called; it comes before ecdysis.New")
	}
	config, err := config.check()
	if err != nil {
		return nil, err
	}
	// Sockets with one address are handed on in order: who gets the socket
	// must also be the one who gets its number.
	process.mu.Lock()
	defer process.mu.Unlock()
	pc, err := u.ListenPacketWith(config.Listen, network, address)
	if err != nil {
		return nil, err
	}
	core, ok := pc.(*ecdysis.UDPConn)
	if !ok {
		pc.Close()
		return nil, fmt.Errorf("a %T cannot be waited for; want UDP without ListenConfig.Raw", pc)
	}
	conn, err := newConn(u, core, config)
	if err != nil {
		core.Close()
		return nil, err
	}
	return conn, nil
}

// Stats counts what a Conn has done since ListenPacket.
type Stats struct {
	Own       uint64 // packets read from the socket and returned by this Conn
	Forwarded uint64 // packets read from the socket and handed to an older process
	Dropped   uint64 // packets lost because an older process's inbox was full
	Received  uint64 // packets returned by this Conn that a newer process has handed to it
	TakenOver uint64 // flows that became this process's because the one they belonged to has ended
	Untracked uint64 // packets whose flow is not in the table, which was full
}
