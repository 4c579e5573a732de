package servertest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/drain"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

func TestMain(m *testing.M) { Main(m, func() { Run(serve) }) }

// serve sends each line back, as a good server does. A line that begins with a word
// of bad is treated as the word says.
func serve(u *ecdysis.Upgrader) error {
	ln, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return u.Fail(err)
	}
	Listening(ln.Addr())
	srv := &drain.Server{Handler: func(c net.Conn) {
		for lines := bufio.NewScanner(c); lines.Scan(); {
			line := lines.Text()
			switch {
			case strings.HasPrefix(line, "lost"):
				Processed(line)
				return
			case strings.HasPrefix(line, "twice"):
				Processed(line)
			}
			Processed(line)
			fmt.Fprintln(c, line)
		}
	}}
	go func() { _ = srv.Serve(ln) }()
	if err := u.Ready(); err != nil {
		return err
	}
	u.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	return srv.Shutdown(ctx)
}

// ask makes a request on c.
func ask(c *Client, conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(proctest.Patience))
	token := c.Token()
	if _, err := fmt.Fprintln(conn, token); err != nil {
		return err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || got != token+"\n" {
		return fmt.Errorf("%q, %v; want %q", got, err, token)
	}
	c.Answered()
	return nil
}

func short(s *Server) func(c *Client) error {
	return func(c *Client) error {
		conn, err := net.Dial("tcp", s.Addrs[0])
		if err != nil {
			return err
		}
		defer conn.Close()
		return ask(c, conn)
	}
}

func TestUpgrades(t *testing.T) {
	t.Parallel()
	s := Start(t, 1)
	s.Clients("short", 2, short(s))
	s.Clients("long", 2, func(c *Client) error {
		conn, err := net.Dial("tcp", s.Addrs[0])
		if err != nil {
			return err
		}
		defer conn.Close()
		for !c.Over() {
			if err := ask(c, conn); err != nil {
				return err
			}
		}
		return nil
	})
	s.Upgrades()
}

// A recorder is a test that is expected to fail.
type recorder struct {
	testing.TB
	failed []string
}

func (r *recorder) Helper()                      {}
func (r *recorder) Logf(format string, a ...any) {}
func (r *recorder) Errorf(format string, a ...any) {
	r.failed = append(r.failed, fmt.Sprintf(format, a...))
}

func TestNotices(t *testing.T) {
	t.Parallel()
	for kind, want := range map[string][]string{
		"short": nil,
		"lost":  {io.EOF.Error()},
		"twice": {"processed 2 times"},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s := Start(t, 1)
			r := &recorder{TB: t}
			s.T = r
			once := make(chan struct{}, 1)
			once <- struct{}{}
			done := make(chan struct{})
			s.Clients(kind, 1, func(c *Client) error {
				select {
				case <-once:
					defer close(done)
					return short(s)(c)
				case <-s.stop:
					return nil
				}
			})
			<-done
			s.End()
			if len(r.failed) != len(want) || len(want) > 0 && !strings.Contains(r.failed[0], want[0]) {
				t.Errorf("the test fails with %q; want %q", r.failed, want)
			}
		})
	}
}
