package proctest_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

// fails returns an error of the kind that its argument names.
var fails = proctest.Define("fails", func(_ *proctest.Daemon, how string) (string, error) {
	switch how {
	case "sentinel":
		return "result", fmt.Errorf("wrapped: %w", ecdysis.ErrInProgress)
	case "errno":
		_, err := os.Open("/nonexistent")
		return "result", err
	case "joined":
		return "result", errors.Join(errOwn, syscall.EMFILE)
	}
	return "result", nil
})

var errOwn = proctest.KnownError(errors.New("an error of these tests"))

func TestErrors(t *testing.T) {
	t.Parallel()
	p := proctest.Start(t, proctest.TCP.At(proctest.AtListened, fails.Do("joined")), proctest.TCP.At(proctest.AtListened, proctest.Exit(3)))
	for how, is := range map[string][]error{
		"sentinel": {ecdysis.ErrInProgress},
		"errno":    {syscall.ENOENT, os.ErrNotExist},
		"joined":   {errOwn, syscall.EMFILE},
	} {
		r, err := fails.Try(p, how)
		if r != "result" {
			t.Errorf("%s: result %q", how, r)
		}
		for _, e := range []error{ecdysis.ErrInProgress, ecdysis.ErrStopped, syscall.ENOENT, os.ErrNotExist, os.ErrExist, syscall.EMFILE, errOwn} {
			if errors.Is(err, e) != slices.Contains(is, e) {
				t.Errorf("%s: errors.Is(%v, %v) is %v", how, err, e, errors.Is(err, e))
			}
		}
	}
	if r, err := fails.Try(p); r != "result" || err != nil {
		t.Errorf("%q, %v; want no error", r, err)
	}
	if r, err := fails.At(p, proctest.AtListened); r != "result" || !errors.Is(err, errOwn) {
		t.Errorf("the planned call returned %q, %v", r, err)
	}

	a := p.BeginUpgrade()
	s := a.Successor()
	f := a.Fails(ecdysis.StepInit, io.ErrUnexpectedEOF)
	var ue *ecdysis.UpgradeError
	if !errors.As(f, &ue) || ue.Step != ecdysis.StepInit || ue.PID != s.PID || !errors.Is(ue.Err, io.ErrUnexpectedEOF) {
		t.Errorf("%+v", ue)
	}
	if f.How != "exit status 3" || !strings.Contains(f.Error(), "(exit status 3)") {
		t.Errorf("it ended by %q: %v", f.How, f)
	}
	if e := p.Event(ecdysis.EventUpgradeFailed, 0); e.PID != s.PID || e.Generation != 1 || e.Err.Error() != f.Error() || !errors.As(e.Err, &ue) {
		t.Errorf("event %v", e)
	}
}

func TestPlan(t *testing.T) {
	t.Parallel()
	p := proctest.New(t, proctest.TCP.
		At(proctest.AtNew, proctest.Hold, fails.Do("errno"), proctest.Hold).
		At(proctest.On(ecdysis.EventUpgrading), proctest.Once(proctest.Hold)), proctest.TCP).Launch()
	p.At(proctest.AtNew)
	if args := p.Args(); len(args) != 2 {
		t.Errorf("arguments %q", args)
	}
	p.Resume()
	if err := fails.ErrAt(p, proctest.AtNew); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%v", err)
	}
	if slices.Contains(p.Points(), proctest.AtListened) {
		t.Error("it does not hold")
	}
	p.Resume()
	p.At(proctest.AtServing)
	for i := range 2 {
		a := p.BeginUpgrade(proctest.Successor{Path: "/nonexistent"})
		p.AtAgain(proctest.On(ecdysis.EventUpgrading), i)
		if i == 0 {
			p.Resume()
		}
		a.Fails(ecdysis.StepStart, os.ErrNotExist)
	}
	s := p.Upgrade()
	if s.Generation() != 1 || !s.HasPredecessor() {
		t.Errorf("generation %d", s.Generation())
	}
	s.Inherits(p)
	p.Exit(4)
	if got := p.ExitStatus(); got != "exit status 4" {
		t.Error(got)
	}
}

func TestFrames(t *testing.T) {
	t.Parallel()
	want := []proctest.Record{{"a=1", "b=" + strings.Repeat("x", 300)}, {}, {"="}}
	b := bytes.NewBuffer(slices.Concat(proctest.Frame('x'), proctest.Frame('y', want...)))
	got, err := proctest.ReadUntil(b, 'y')
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if _, err := proctest.ReadUntil(b, 'y'); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// A recorder is a test that is expected to fail.
type recorder struct {
	testing.TB
	errors []string
}

func (r *recorder) Helper()        {}
func (r *recorder) Cleanup(func()) {}
func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

// A Load notices everything that clients must not see.
func TestLoadNotices(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		serve   func(n int64, c net.Conn) // the n-th connection
		clients proctest.Clients
		want    string
	}{
		"nothing":              {serve: func(n int64, c net.Conn) { fmt.Fprintln(c, 1, n) }},
		"a cut":                {serve: func(n int64, c net.Conn) { answerUnless(n == 7, c, 1) }, want: "requests failed"},
		"too many cuts":        {serve: func(n int64, c net.Conn) { answerUnless(n > 7 && n < 10, c, 1) }, clients: proctest.Clients{Killed: 1}, want: "2 connections were cut; want 1 at most"},
		"a permitted cut":      {serve: func(n int64, c net.Conn) { answerUnless(n == 7, c, 1) }, clients: proctest.Clients{Killed: 1}},
		"an older generation":  {serve: func(n int64, c net.Conn) { fmt.Fprintln(c, 1, map[bool]int{true: 0, false: 1}[n == 7]) }, want: "1 moments two generations accepted"},
		"a permitted resuming": {serve: func(n int64, c net.Conn) { fmt.Fprintln(c, 1, map[bool]int{true: 0, false: 1}[n == 7]) }, clients: proctest.Clients{Resumes: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				var n atomic.Int64
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					if _, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
						c.serve(n.Add(1), conn)
					}
					conn.Close()
				}
			}()
			r := &recorder{TB: t}
			l := proctest.StartLoad(r, c.clients, proctest.Addr{Network: "tcp", Address: ln.Addr().String()})
			l.More(20)
			l.Check()
			if got := strings.Join(r.errors, "\n"); c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("the load says %q; want %q", got, c.want)
			}
		})
	}
}

func answerUnless(silent bool, c net.Conn, generation int) {
	if !silent {
		fmt.Fprintln(c, 1, generation)
	}
}
