package tableflip

import (
	"strings"
	"testing"
)

// TestNames fixes the names in package ecdysis, because the next version of a
// program finds things by these names.
func TestNames(t *testing.T) {
	seen := make(map[string]key)
	for _, c := range []struct {
		key  key
		name string
	}{
		{key{kindListener, "tcp", ":80"}, "listener tcp :80"},
		{key{kindListener, "unix", "/a path/s"}, "listener unix /a path/s"},
		{key{kindListener, "tcp", ""}, "listener tcp "},
		{key{kindPacket, "udp", "[::]:53"}, "packet udp [::]:53"},
		{key{kindConn, "tcp", "192.0.2.1:80"}, "conn tcp 192.0.2.1:80"},
		{key{kindFile, "lock", ""}, "lock"},
		{key{kindFile, "a file", ""}, "a file"},
		{key{kindFile, "listener", ""}, "listener"},
		{key{kindFile, "listener tcp :80", ""}, "fd listener tcp :80"},
		{key{kindFile, "fd a", ""}, "fd fd a"},
		{key{kindFile, "fd", ""}, "fd"},
		{key{kindFile, "", ""}, "fd "},
	} {
		if got := c.key.name(); got != c.name {
			t.Errorf("the name of %q is %q; want %q", c.key, got, c.name)
		}
		if got := keyOf(c.name); got != c.key {
			t.Errorf("%q is the name of %q; want %q", c.name, got, c.key)
		}
		if k, ok := seen[c.name]; ok {
			t.Errorf("%q is the name of %q and of %q", c.name, k, c.key)
		}
		seen[c.name] = c.key
	}
}

func FuzzNames(f *testing.F) {
	f.Add("lock")
	f.Add("fd ")
	f.Add("conn tcp :80")
	f.Fuzz(func(t *testing.T, name string) {
		k := key{kindFile, name, ""}
		if got := keyOf(k.name()); got != k {
			t.Errorf("%q is the name of %q; want %q", k.name(), got, k)
		}
	})
}

// FuzzKeys checks that keyOf returns the key from its name. Only an address or a
// file's name may have spaces.
func FuzzKeys(f *testing.F) {
	f.Add(uint8(0), "tcp", ":80")
	f.Add(uint8(1), "unixgram", "/a path/s")
	f.Add(uint8(2), "", "")
	f.Add(uint8(3), "fd listener tcp :80", "")
	f.Fuzz(func(t *testing.T, kind uint8, network, address string) {
		k := key{[]string{kindListener, kindPacket, kindConn, kindFile}[kind%4], network, address}
		switch {
		case k.kind == kindFile:
			k.address = ""
		case strings.Contains(network, " "):
			return
		}
		if got := keyOf(k.name()); got != k {
			t.Errorf("%q is the name of %q; want %q", k.name(), got, k)
		}
	})
}
