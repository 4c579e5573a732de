// Package udpflow keeps sessions over UDP alive across the upgrades of package
// ecdysis.
//
// QUIC, DTLS, CoAP, SIP and games hold their sessions in the memory of a
// process. After an upgrade only the new process reads the socket, and it knows
// none of these sessions. With this package the newest process forwards each
// packet of an older process's flow to that process, until the flow ends:
//
//	udpflow.Setup(&opts) // then u, err := ecdysis.New(opts)
//	conn, err := udpflow.ListenPacket(u, "udp", ":4433", udpflow.Config{})
//
// conn is read and written like a *net.UDPConn. When this process has been
// replaced, the read methods return the packets of its own flows. The program
// writes answers to the socket as before, because all generations have it. It
// reads until its sessions have ended or [Conn.Drained] returns. Then it calls
// Close and exits. Clients do not notice an upgrade.
//
// # Flows
//
// A flow is the packets that have one key. The default key is the remote
// address. A flow belongs to the process that read its first packet, or that has
// called [Conn.Claim]. It ends when no packet has come for Config.IdleTimeout, or
// when its process has ended. A later packet with its key begins a new flow of
// the newest process. All generations share one table of flows, in memory that
// the predecessor hands on.
//
// Each process has an inbox, which is a socket pair. All later processes inherit
// its other end. A packet goes to an inbox in one hop. Packets keep their order,
// and sending never blocks. If the inbox is full because the older process is slow,
// the packet is dropped and counted. The system treats the queue of a UDP socket in
// the same way.
//
// A packet is received, looked up and forwarded in one step. A handover waits for
// the end of this step, so that exactly one process decides on each packet. An
// upgrade loses no packet and answers none twice, whether it succeeds, fails or
// is taken back.
//
// # Limits
//
// When a process has ended, the sessions of its flows are lost. Older processes
// receive nothing if the newest process dies without a successor. When a process
// is killed, the packets in its inbox are lost. docs/udp.md has more, and recipes
// for several protocols.
//
// The package works without privileges, on Linux, macOS and the BSDs. It starts
// no goroutine.
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

// Config says what a flow is. With the zero Config all packets from one remote
// address are a flow, which ends when no packet has come for two minutes.
//
// Key and Generation are called by the goroutine that reads, while no other
// process can read. They must be quick, must not call methods of the Conn, and
// must not keep the packet. ListenPacket calls them with made-up packets, to
// compare them with the predecessor's functions.
type Config struct {
	// Key returns the key of a packet's flow. If Key is nil, the key is what
	// MarshalBinary returns for the remote address. A packet whose key is nil
	// belongs to no flow, and goes to the newest process. The address passed to
	// Key is never an IPv4 address mapped into IPv6. Key must be the same in all
	// versions of a program. An upgrade to a version with another Key fails.
	Key func(packet []byte, from netip.AddrPort) []byte

	// Generation, if not nil, is called before Key. It returns the generation
	// that a packet names, modulo 256. A QUIC connection ID, for example, can
	// name one. Such a packet goes to the process of that generation without a
	// look-up in the table, or to the newest process if that process has ended.
	// If Generation returns false, Key decides. Like Key it must be the same in
	// all versions.
	Generation func(packet []byte) (g byte, ok bool)

	// IdleTimeout is how long a flow lasts after its last packet. Zero means two
	// minutes.
	IdleTimeout time.Duration

	// MaxFlows is the number of flows that the table has room for. Flows
	// beyond it are served by the newest process and not tracked, so that
	// they move in an upgrade. The first process makes the table, so only its
	// MaxFlows counts. A flow takes 32 bytes, once for all generations. Zero
	// means 65,536.
	MaxFlows int

	// Buffer is how many bytes can wait in this process's inbox after it was
	// replaced, as the system counts the bytes in a socket buffer. The system
	// may limit it (net.core.wmem_max on Linux). Zero means 1 MiB.
	Buffer int

	// Listen configures the socket, as in Upgrader.ListenPacketWith.
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

// prints returns fingerprints of the functions. They are made from the functions'
// results for packets that are the same in every process.
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

// process is a variable of the package because a process has one Upgrader.
var process struct {
	setUp atomic.Bool

	mu     sync.Mutex
	groups map[string]*group // by the local address
}

// Setup adds the package's part in an upgrade to opts.Notify. Call it before
// [ecdysis.New]. A hook that is there is still called, after the package's own.
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

// ListenPacket returns a UDP socket that is bound to the address. If the
// predecessor hands such a socket on, ListenPacket returns that socket with its
// flows. Otherwise it makes a new one. Network and address are those of
// [ecdysis.Upgrader.ListenPacket]. If the predecessor used a plain ListenPacket
// for the socket, its flows move to this process.
//
// Several sockets may have one address (ecdysis.ListenConfig.ReusePort). Each
// needs a call of its own, and all have one table. Their number may grow in an
// upgrade, because each flow knows which socket of its process reads it. The
// number must not shrink while older processes live. They keep the sockets that
// the newest process has dropped, and nobody reads the packets that come there.
//
// The errors are those of ecdysis.Upgrader.ListenPacket. It is also an error if
// Setup was not called, or if a field of c is out of range. The inherited table of
// flows is an error if its layout is another, or if it was made with another Key or
// Generation. A program passes the error to [ecdysis.Upgrader.Fail], so that the
// predecessor goes on serving.
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
	// Sockets with one address are handed on in order. The lock makes sure that
	// the call that gets a socket also gets the socket's number.
	process.mu.Lock()
	defer process.mu.Unlock()
	pc, err := u.ListenPacketWith(config.Listen, network, address)
	if err != nil {
		return nil, err
	}
	core, ok := pc.(*ecdysis.UDPConn)
	if !ok {
		pc.Close()
		return nil, fmt.Errorf("the socket is a %T, whose reads a handover does not wait for; want UDP without ListenConfig.Raw", pc)
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
	Own       uint64 // packets of this process's flows that were read from the socket
	Forwarded uint64 // packets that were read from the socket and sent to an older process
	Dropped   uint64 // packets that were lost because an older process's inbox was full
	Received  uint64 // packets that came from a newer process
	TakenOver uint64 // flows that became this process's because their process had ended
	Untracked uint64 // packets whose flow is not in the table because the table was full
}
