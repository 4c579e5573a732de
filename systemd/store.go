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
	maxStore = 100 // no more than one call of ecdysis.WriteFiles takes
)

// A storedSocket is a socket in systemd's descriptor store.
type storedSocket struct {
	name string
	ino  uint64
}

// Restore takes the sockets that systemd has passed to this process, as [Adopt]
// does. A program that uses [Notifier.Store] calls Restore in the place of Adopt.
// Restore remembers the sockets, so that Store can remove those that are not
// wanted any more. It leaves out Unix sockets whose file has gone, so that Listen
// makes new ones.
//
// With a nil Notifier Restore does what Adopt does.
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

// Store makes systemd keep copies of these sockets under these names, and of no
// others. systemd drops a socket if its name is not among them, or if the name now
// stands for another socket. A program calls Store with all its sockets,
// when it listens on all of them and before Ready.
//
//	err := n.Store(map[string]any{"web": ln, "dns": pc})
//
// If the unit has FileDescriptorStoreMax=, the sockets survive this process, even
// if it is killed. Clients that connect meanwhile wait. The next start of the
// unit gets the sockets by Restore, and Listen finds them by address. They survive
// systemctl restart and Restart=. They survive systemctl stop only if the unit has
// FileDescriptorStorePreserve=yes. If the store has no room, systemd drops the
// sockets, and only its journal says so.
//
// An upgrade needs no store. A successor calls Store nevertheless, and its call
// takes effect when the successor has taken over.
//
// The values are the results of Upgrader.Listen and ListenPacket, or others that
// have a method SyscallConn. They stay the caller's. systemd drops a connection
// when its peer closes.
//
// Upgrader.Stop removes the file of a Unix socket. So the socket survives a kill,
// but not a restart. A socket unit makes sockets whose files stay, and needs no
// store.
//
// It is an error if a name is not 1 to 255 printable ASCII characters without a
// colon, or if there are more than 100 sockets. It is also an error if there are
// more than FileDescriptorStoreMax=, which systemd tells from version 254 on.
// These errors say what is wrong, and nothing was stored then.
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

// store makes the store hold the wanted sockets alone. n.mu is held.
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
			message += "\nFDPOLL=0" // the socket does not end by itself, and systemd must not drop it after an error
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
	return n.barrier() // the sockets are in the store then, even if this process is killed
}

// outdated returns the names under which the store has a socket that is not
// wanted under that name.
func (n *Notifier) outdated(want []storedSocket) []string {
	var names []string
	for _, s := range n.stored {
		if !slices.Contains(want, s) && !slices.Contains(names, s.name) {
			names = append(names, s.name)
		}
	}
	return names
}

// letGo closes the sockets that were restored under a name and not asked for.
// Otherwise they would listen as long as this process lives.
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

// formatStored returns ":123=name" for each socket. No name has a colon in it.
func formatStored(list []storedSocket) string {
	var b strings.Builder
	for _, s := range list {
		b.WriteString(":" + strconv.FormatUint(s.ino, 10) + "=" + s.name)
	}
	return b.String()
}

// parseStored parses the result of formatStored without the first colon.
func parseStored(text string) ([]storedSocket, error) {
	var list []storedSocket
	if text == "" {
		return nil, nil
	}
	for _, s := range strings.Split(text, ":") {
		number, name, ok := strings.Cut(s, "=")
		ino, err := strconv.ParseUint(number, 10, 64)
		if !ok || err != nil {
			return nil, fmt.Errorf("%q; want an inode and a name, such as 123=web", s)
		}
		list = append(list, storedSocket{name, ino})
	}
	return list, nil
}
