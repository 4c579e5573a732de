package interop

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// behaviours is what is seen in each scene of program behave: the lines of all
// generations, sorted. Where ours differs, the page for users of the other library
// has a row that says why.
var behaviours = []struct {
	scene  string
	theirs string
	ours   string // "" if it is the same
	row    string // the first cell of the row
}{
	{"what a listener is", `0: *net.TCPListener true, File true, SetDeadline true, SyscallConn true`, `0: *net.TCPListener false, File true, SetDeadline true, SyscallConn true`, `A listener's type`},
	{"what a packet conn is", `0: *net.UDPConn true, its methods true`, `0: *net.UDPConn false, its methods true`, `A packet conn's type`},
	{"what a connection is", `0: *net.TCPConn true`, ``, ``},
	{"a copy by File", `0: the same address true`, ``, ``},
	{"Accept before Ready", `0: accepts`, `0: accepts nothing`, `Accept and reads before Ready`},
	{"Accept after the upgrade", `0: accepts`, `0: accepts nothing`, `Accept and reads after the upgrade`},
	{"a read before Ready", `0: ok`, `0: error`, `Accept and reads before Ready`},
	{"a closed listener", `1: found`, ``, ``},
	{"Accept of a closed listener", `0: net.ErrClosed true, Close again: error`, ``, ``},
	{"a closed Unix listener", `0: its file is there | 1: found, its file is there`, ``, ``},
	{"a closed packet conn", `0: net.ErrClosed true, Close again: error | 1: found`, ``, ``},
	{"a closed Unix packet conn", `0: its file is there | 1: found, its file is there`, ``, ``},
	{"a packet conn closed during an upgrade that fails", `0: Upgrade: error, net.ErrClosed true | 1: found`, ``, ``},
	{"port 0", `1: the same port true`, ``, ``},
	{"port 0 twice", `1: both ports false`, `1: both ports true`, `Listening twice under one name`},
	{"an address in other words", `1: error`, `1: ok`, `The same address in other words`},
	{"several sockets of one address", `1: 1 of 2`, `1: 2 of 2`, `Listening twice under one name`},
	{"a stale Unix socket", `0: error`, `0: ok`, `A Unix socket's file that a killed process has left`},
	{"an abstract Unix socket", `1: found`, ``, ``},
	{"sockets of other kinds", `0: ok ok ok error`, ``, ``},
	{"ListenConfig.Control", `0: called with tcp4 127.0.0.1:0 | 0: called with udp4 127.0.0.1:0`, ``, ``},
	{"ListenConfig.KeepAlive", `0: keep-alive false | 1: keep-alive true`, `0: keep-alive false | 1: keep-alive false`, `Keep-alive of an inherited listener`},
	{"ListenWithCallback", `0: accepts | 0: called with tcp 127.0.0.1:0 | 1: not called`, ``, ``},
	{"ListenWithCallback with a type of the program's", `0: it is returned true, accepts | 1: found`, ``, ``},
	{"ListenWithCallback without a socket", `0: error`, ``, ``},
	{"ListenPacketWithCallback", `0: called with udp name | 1: found`, ``, ``},
	{"replacing a file", `1: the second, and 0 more`, ``, ``},
	{"replacing a file that was handed on", `2: the second, and 0 more`, ``, ``},
	{"replacing a file by a closed one", `0: error | 1: the first`, ``, ``},
	{"replacing a file while upgrades fail", `1: found 10 times`, ``, ``},
	{"replacing a listener", `1: the second true`, ``, ``},
	{"a listener that was replaced", `0: accepts | 1: the second true, one more none`, ``, ``},
	{"a listener added under its own name", `0: accepts | 1: found, its file is there`, ``, ``},
	{"a copy of a listener added under its name", `1: found, its file is there`, ``, ``},
	{"replacing a packet conn", `1: the second true`, ``, ``},
	{"a connected packet conn", `2: found`, ``, ``},
	{"a file in three generations", `2: the first`, ``, ``},
	{"all files in three generations", `1: none after Files | 2: first, no connection, second, unnamed`, ``, ``},
	{"a connection in three generations", `2: hello`, ``, ``},
	{"replacing a connection", `1: the second true`, ``, ``},
	{"names of different kinds", `1: a file, and the listener found`, ``, ``},
	{"looking up in the first process", `0: none none none none none`, ``, ``},
	{"looking up names that are no addresses", `0: none none`, ``, ``},
	{"looking up twice", `1: none none none`, ``, ``},
	{"looking up after Ready", `1: none none`, ``, ``},
	{"looking up what was added here", `0: none none none`, ``, ``},
	{"what Ready closes", `0: refused true`, ``, ``},
	{"a Unix socket that nobody asks for", `1: gone gone gone`, ``, ``},
	{"New twice", `0: error`, ``, ``},
	{"a negative time-out", `0: ok`, ``, ``},
	{"Listen during an upgrade", `0: ok`, `0: error`, `Adding during an upgrade`},
	{"Listen after an upgrade that fails", `0: Listen: ok | 0: Upgrade: error`, ``, ``},
	{"Upgrade before Ready", `0: error`, ``, ``},
	{"Upgrade twice at once", `0: error, and the first one: ok`, ``, ``},
	{"Upgrade after the upgrade", `0: error`, ``, ``},
	{"Upgrade while the parent is there", `1: error | 2: serves`, ``, ``},
	{"a successor that exits", `0: error, and then ok`, ``, ``},
	{"a successor that is late", `0: error`, ``, ``},
	{"a PID file that cannot be written", `0: Upgrade: error | 1: Ready: error`, ``, ``},
	{"a parent that is killed", `1: Ready: error`, `1: Ready: ok`, `A parent that dies before Ready`},
	{"Ready twice", `0: ok | 1: error`, `0: ok | 1: ok`, `A second Ready`},
	{"WaitForParent in the first process", `0: parent false, ok`, ``, ``},
	{"WaitForParent", `1: before Ready: the context's error true | 1: parent true | 1: then: ok ok | 1: while it is there: the context's error true`, ``, ``},
	{"the marker in the environment", `0: "" | 1: "yes"`, `0: "" | 1: ""`, `The variable of the protocol`},
	{"how a successor is started", `1: arguments true, variable new, directory of the start true`, ``, ``},
	{"the PID file", `0: after Stop it is there | 0: this process's true, a line's end false`, `0: after Stop it is gone | 0: this process's true, a line's end true`, `The PID file`},
	{"the files of Unix sockets after Stop", `0: gone gone gone gone`, ``, ``},
	{"the same after an upgrade", `1: after it gone gone | 1: before Stop there there`, ``, ``},
	{"another's file in a Unix socket's place", `0: gone`, `0: there`, `A Unix socket's file that another process has replaced`},
	{"Stop after the upgrade", `1: the file is there`, ``, ``},
	{"Stop while a successor starts", `0: Upgrade: error`, ``, ``},
	{"Upgrade after Stop", `0: error`, ``, ``},
	{"Stop before Ready", `0: its file is gone`, ``, ``},
	{"Stop twice", `0: ok`, ``, ``},
}

// page is the page for users of the other library.
const page = "../../../docs/from-tableflip.md"

func TestBehaviour(t *testing.T) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range behaviours {
		if (b.ours == "") != (b.row == "") {
			t.Errorf("%s: it has a row if, and only if, it differs", b.scene)
		}
		if b.row != "" && !strings.Contains(string(text), "\n| "+b.row+" |") {
			t.Errorf("%s: %s has no row that begins with %q", b.scene, page, b.row)
		}
		for _, l := range []lib{theirs, ours} {
			want := b.theirs
			if l == ours && b.ours != "" {
				want = b.ours
			}
			t.Run(b.scene+"/"+string(l), func(t *testing.T) {
				t.Parallel()
				cmd := exec.Command(build(t, l, "behave"), b.scene, proctest.ShortDir(t))
				var stderr strings.Builder
				cmd.Stderr = &stderr
				out, err := cmd.Output() // which waits for all generations
				var exit *exec.ExitError
				if killed := errors.As(err, &exit) && exit.String() == "signal: killed"; err != nil && !killed || stderr.Len() > 0 {
					t.Fatalf("%v\n%s%s", err, out, stderr.String())
				}
				lines := strings.Split(strings.TrimSpace(string(out)), "\n")
				slices.Sort(lines)
				if all := len(lines); all >= 10 && len(slices.Compact(slices.Clone(lines))) == 1 {
					lines = []string{fmt.Sprintf("%s %d times", lines[0], all)}
				}
				if got := strings.Join(lines, " | "); got != want {
					t.Errorf("%s; want %s", got, want)
				}
			})
		}
	}
}
