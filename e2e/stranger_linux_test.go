package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// A process of another user that can connect to every control socket.

// A stranger connects to the sockets of its arguments until its standard input
// ends. It says how often it was refused, or what else it got.
var stranger = proctest.DefineRole("stranger", func() {
	end := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(end)
	}()
	refused := 0
	for round := 0; ; round++ {
		for _, path := range proctest.Args() {
			var crowd []*net.UnixConn
			for i := range 100 {
				c, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
				if err != nil { // its queue is full
					continue
				}
				crowd = append(crowd, c)
				says := [][]byte{nil, []byte("GET / HTTP/1.1\r\n\r\n"), take, take[:3], proctest.Frame('R', proctest.Record{"pid=1"})}[i%5]
				if len(says) > 0 { // an error means that it was refused already
					_, _, _ = c.WriteMsgUnix(says, syscall.UnixRights(0), nil)
				}
			}
			for _, c := range crowd {
				ok, err := isRefused(c)
				if err != nil {
					fmt.Printf("at %s: %v\n", path, err)
					return
				}
				if ok {
					refused++
				}
				c.Close()
			}
		}
		if round == 0 {
			fmt.Println("floods")
		}
		select {
		case <-end:
			fmt.Println(refused)
			return
		default:
		}
	}
})

// isRefused reports whether all that comes is a refusal because of the user. It
// returns an error if anything else comes, and false if nothing does.
func isRefused(c *net.UnixConn) (bool, error) {
	if err := c.SetReadDeadline(time.Now().Add(proctest.Patience)); err != nil {
		return false, err
	}
	var all []byte
	for b, oob := make([]byte, 4<<10), make([]byte, 1<<10); ; {
		n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
		if oobn > 0 {
			return false, fmt.Errorf("control messages of %d bytes came with %q", oobn, b[:n])
		}
		all = append(all, b[:max(n, 0)]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false, err
		}
		if n <= 0 || err != nil { // the end, or a reset because of what was not read
			break
		}
	}
	const why = "permission denied: the peer is a process of user 65534, and this one runs as user 0; want the same user, or root"
	switch {
	case len(all) == 0:
		return false, nil
	case strings.HasPrefix(string(all), "error: ") && strings.HasSuffix(string(all), why+"\n"):
		return true, nil
	}
	kind, records, err := proctest.ReadFrame(strings.NewReader(string(all)))
	if err != nil || kind != 'F' || len(records) != 1 || len(records[0]) != 1 || !strings.HasSuffix(records[0][0], why) {
		return false, fmt.Errorf("%q came; want a refusal", all)
	}
	return true, nil
}

// Strangers that a socket's file or name lets in get a refusal and nothing else.
// They begin nothing, leave nothing, and the owner's requests and takeovers and
// the clients are served as ever.
func TestStranger(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"files", "names"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec, at := controlled(), ""
			if name == "names" {
				at = "@"
				o := &spec.Options
				for _, path := range []*string{&o.UpgradeSocket, &o.StopSocket, &o.PartialStopSocket, &o.TakeoverSocket} {
					*path = at + *path
				}
			}
			c := proctest.New(t, spec)
			as := c.Users()
			p := c.Start()
			sockets := []string{"upgrade", "stop", "partial", "take"}
			for i, s := range sockets {
				if at == "" {
					if err := os.Chmod(c.Path(s), 0o666); err != nil {
						t.Fatal(err)
					}
				}
				sockets[i] = at + c.Path(s)
			}
			unchanged := keeps(p)
			flood(t, as, sockets)()
			p.HasEvents()
			unchanged()

			l := p.Load(2)
			ended := flood(t, as, sockets)
			for generation := 1; generation <= 3; generation++ {
				began := time.Now()
				wait := proctest.BeginRequest(t, sockets[0])
				s := c.Next()
				if r, err := wait(); err != nil || r != s.Reply(generation) {
					t.Fatalf("upgrade: %v, %v; want %v", r, err, s.Reply(generation))
				}
				t.Logf("upgraded within %v", time.Since(began))
				p.Ended()
				p.HasEvents(ecdysis.EventUpgrading, ecdysis.EventHandover, ecdysis.EventUpgraded)
				s.At(proctest.AtServing)
				l.More(10)
				p = s
			}
			s := c.Start() // which takes over
			p.Ended()
			isGeneration(s, 4)
			l.More(10)
			l.Check()
			s.HasEvents()
			ended()
			proctest.Connect(t, sockets[1]).Wants(s.Reply(4))
			s.Ended()
			s.HasEvents(ecdysis.EventStopping)
			c.HasFiles()
		})
	}
}

// flood starts a stranger, and returns when it has been at each socket. The
// function that it returns ends the stranger, which must have been refused.
func flood(t *testing.T, as func(uid int) func(*exec.Cmd), sockets []string) (end func()) {
	t.Helper()
	cmd := stranger.Command(sockets...)
	as(65534)(cmd)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "floods\n" {
		t.Fatalf("the stranger says %q, %v", line, err)
	}
	return func() {
		t.Helper()
		in.Close()
		line, err := r.ReadString('\n')
		if n, nerr := strconv.Atoi(strings.TrimSpace(line)); nerr != nil || n < 100 {
			t.Fatalf("the stranger says %q, %v; want how often it was refused, which is often", line, err)
		}
		t.Logf("a stranger was refused %s times", strings.TrimSpace(line))
	}
}
