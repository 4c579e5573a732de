//go:build linux

package systemd

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzListenFDS sets systemd's variables. They are accepted, or refused by an error
// that names the variable, and are removed in both cases.
func FuzzListenFDS(f *testing.F) {
	for _, v := range [][3]string{
		{"PID", "1", "web"}, {"PID", "2", "web.socket:"}, {"PID", "2", "a:b:c"}, {"PID", "0", ""}, {"PID", "0", "a"}, {"PID", "1", ""}, {"1", "1", "web"},
		{"0", "1", "web"}, {"-1", "1", "web"}, {"x", "1", ""}, {"PID", "-1", ""}, {"PID", "x", ""}, {"PID", "9223372036854775807", "a"}, {"PID", "9223372036854775808", "a"}, {"", "", ""},
	} {
		f.Add(v[0], v[1], v[2], true)
		f.Add(v[0], v[1], v[2], false)
	}
	// No descriptors were passed to this process. The fuzzer's own descriptors,
	// from 3 on, must look like descriptors that the process has opened itself.
	unix.CloseOnExec(firstPassed)
	f.Fuzz(func(t *testing.T, pid, fds, names string, named bool) {
		count, label, err := parseListen(fds, names, named)
		switch n, nerr := strconv.Atoi(fds); {
		case (nerr != nil || n < 0) && (err == nil || count != 0):
			t.Fatalf("LISTEN_FDS=%q is %d descriptors, %v", fds, count, err)
		case nerr == nil && n >= 0 && count != n:
			t.Fatalf("LISTEN_FDS=%q is %d descriptors", fds, count)
		case err == nil && named && count > 0 && (len(label) != count || strings.Join(label, ":") != names):
			t.Fatalf("LISTEN_FDNAMES=%q is %q for %d descriptors", names, label, count)
		case err == nil && !named && label != nil:
			t.Fatalf("without LISTEN_FDNAMES the names are %q", label)
		}

		pid = strings.ReplaceAll(pid, "PID", strconv.Itoa(os.Getpid()))
		vars := []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
		for i, value := range []string{pid, fds, names} {
			if os.Setenv(vars[i], value) != nil { // it has a NUL
				return
			}
		}
		if !named {
			os.Unsetenv("LISTEN_FDNAMES")
		}
		list, perr := passedHere()
		for _, name := range vars {
			if value, ok := os.LookupEnv(name); ok {
				t.Fatalf("%s=%q is still there", name, value)
			}
		}
		own := false
		if n, err := strconv.Atoi(pid); err == nil {
			own = n == os.Getpid()
		}
		namesOne := func(err error) bool {
			return slices.ContainsFunc(vars, func(v string) bool { return strings.HasPrefix(err.Error(), v+" is ") })
		}
		if len(list) > 0 || own && (perr == nil) != (err == nil && count == 0) || perr != nil && !namesOne(perr) {
			t.Fatalf("%q, %q, %q: %v, %v; this process was passed nothing", pid, fds, names, list, perr)
		}
	})
}

// FuzzStored parses a list of stored sockets. A list that was parsed, formatted and
// parsed again is the same.
func FuzzStored(f *testing.F) {
	for _, s := range []string{"", "123=web", "123=web:124=", "1=a=b", "x=a", "1", ":", "-1=a", "18446744073709551616=a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseStored(text)
		if err != nil {
			return
		}
		again, err := parseStored(strings.TrimPrefix(formatStored(list), ":"))
		if err != nil || !slices.Equal(again, list) {
			t.Fatalf("%q is %v, and then %v, %v", text, list, again, err)
		}
	})
}
