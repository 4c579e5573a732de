package systemd

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/ecdysis-go/ecdysis"
	"golang.org/x/sys/unix"
)

const (
	maxName  = 255 // FDNAME_MAX of systemd
	maxStore = 100 // what ecdysis.WriteFiles takes, so far as there is a limit
)

// A storedSocket is one that systemd's descriptor store has.
type storedSocket struct {
	name string
	ino  uint64
}

// Restore takes the sockets that systemd has passed to this process, as [Adopt]
// does, whose place it takes in a program that uses [Notifier.Store]. It
// remembers what came, so that Store can give up what is not wanted any more,
// and leaves out Unix sockets whose file has gone: those are made anew.
//
// In a nil Notifier it is Adopt.
func (n *Notifier) Restore(u *ecdysis.Upgrader) error {
	if n == nil {
		return Adopt(u)
	}
	had, err := adopt(u, true)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.u = u
	n.stored = append(n.stored, had...)
	return nil
}

// Store lets systemd keep copies of these sockets under these names, and of no
// others: a socket that it had under a name that is not among them, or that now
// stands for another socket, is given up. A program calls it with all that it
// listens on, when it listens on all of it and before Ready.
//
//	err := n.Store(map[string]any{"web": ln, "dns": pc})
//
// If the unit has FileDescriptorStoreMax=, the sockets survive this process,
// even if it is killed: those who connect meanwhile wait, and the next start of
// the unit gets them by Restore, where Listen finds them by address. They live
// through systemctl restart, and Restart=, but not through systemctl stop,
// unless the unit has FileDescriptorStorePreserve=yes. Without room there
// systemd drops them, and says so in its journal alone. Over an upgrade they
// need no store, but a successor calls Store likewise: what it says counts when
// it has taken over.
//
// The values are what Upgrader.Listen and ListenPacket return, or whatever else
// has a method SyscallConn; they stay the caller's. A connection among them is
// dropped by systemd when its peer closes.
//
// The file of a Unix socket is removed by Upgrader.Stop, so that it survives a
// kill, but not a restart. A socket unit makes sockets whose files stay, and
// needs no store.
//
// A name is 1 to 255 printable characters of ASCII without a colon, and no other
// is taken; no more than 100 sockets are, nor more than FileDescriptorStoreMax=
// (as far as systemd tells, from version 254 on). These errors name what is
// wrong, and nothing was stored then.
func (n *Notifier) Store(sockets map[string]any) error {
	return n.say("store", func() error {
		names := slices.Sorted(maps.Keys(sockets))
		switch {
		case len(names) > maxStore:
			return fmt.Errorf("%d sockets; there can be %d", len(names), maxStore)
		case n.storeMax >= 0 && len(names) > n.storeMax:
			return fmt.Errorf("%d sockets; the unit has FileDescriptorStoreMax=%d", len(names), n.storeMax)
		}
		var files []*os.File
		defer func() {
			for _, f := range files {
				f.Close()
			}
		}()
		var want []storedSocket
		for _, name := range names {
			if err := checkName(name); err != nil {
				return err
			}
			f, err := copyOf(name, sockets[name])
			if err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
			files = append(files, f.File)
			want = append(want, storedSocket{name, f.ino})
		}
		return n.store(want, files)
	})
}

// store makes the store hold what is wanted. n.mu is held.
func (n *Notifier) store(want []storedSocket, files []*os.File) error {
	for _, name := range n.outdated(want) {
		if err := n.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
			return err
		}
		n.stored = slices.DeleteFunc(n.stored, func(s storedSocket) bool { return s.name == name })
		if err := n.letGo(name); err != nil {
			return err
		}
	}
	sent := false
	for i, s := range want {
		if slices.Contains(n.stored, s) {
			continue
		}
		message := "FDSTORE=1\nFDNAME=" + s.name
		if !hasPeer(files[i]) {
			message += "\nFDPOLL=0" // it does not end by itself, and an error on it is none of systemd's business
		}
		if err := n.send(message, files[i]); err != nil {
			return err
		}
		n.stored = append(n.stored, s)
		sent = true
	}
	if !sent || n.relay.open() {
		return nil
	}
	return n.barrier() // so that it is there whatever becomes of this process
}

// outdated returns the names under which the store has anything that is not
// wanted under it.
func (n *Notifier) outdated(want []storedSocket) []string {
	var names []string
	for _, s := range n.stored {
		if !slices.Contains(want, s) && !slices.Contains(names, s.name) {
			names = append(names, s.name)
		}
	}
	return names
}

// letGo closes what was restored under a name and nobody has asked for: else it
// would listen as long as this process lives.
func (n *Notifier) letGo(name string) error {
	if n.u == nil || name == "" {
		return nil
	}
	for {
		f, err := n.u.File(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		f.Close()
	}
}

func checkName(name string) error {
	bad := func(r rune) bool { return r < ' ' || r > '~' || r == ':' }
	switch {
	case name == "":
		return errors.New("a name is empty; want 1 to 255 characters")
	case len(name) > maxName:
		return fmt.Errorf("the name %q has %d characters; systemd takes %d", name, len(name), maxName)
	case strings.ContainsFunc(name, bad):
		return fmt.Errorf("the name %q has %q in it; systemd takes printable ASCII without a colon", name, name[strings.IndexFunc(name, bad):][:1])
	}
	return nil
}

type socketCopy struct {
	*os.File
	ino uint64
}

// copyOf returns a copy of a socket, which the caller closes.
func copyOf(name string, socket any) (socketCopy, error) {
	c, ok := socket.(syscall.Conn)
	if !ok {
		return socketCopy{}, fmt.Errorf("a %T has no descriptor; want a listener, or another socket, with a method SyscallConn", socket)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return socketCopy{}, err
	}
	var fd int
	var ino uint64
	cerr := raw.Control(func(s uintptr) {
		fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
		ino = inode(int(s))
	})
	if cerr != nil {
		return socketCopy{}, cerr
	}
	if err != nil {
		return socketCopy{}, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return socketCopy{os.NewFile(uintptr(fd), name), ino}, nil
}

func hasPeer(f *os.File) bool {
	peer := false
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		_, err := unix.Getpeername(int(fd))
		peer = err == nil
	})
	return peer
}

// formatStored is ":123=name" for each: no name has a colon in it.
func formatStored(list []storedSocket) string {
	var b strings.Builder
	for _, s := range list {
		b.WriteString(":" + strconv.FormatUint(s.ino, 10) + "=" + s.name)
	}
	return b.String()
}

// parseStored parses that, less the first colon.
func parseStored(text string) ([]storedSocket, error) {
	var list []storedSocket
	if text == "" {
		return nil, nil
	}
	for _, s := range strings.Split(text, ":") {
		number, name, ok := strings.Cut(s, "=")
		ino, err := strconv.ParseUint(number, 10, 64)
		if !ok || err != nil {
			return nil, fmt.Errorf("%q is no socket", s)
		}
		list = append(list, storedSocket{name, ino})
	}
	return list, nil
}
