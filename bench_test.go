//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis_test

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/ecdysis-go/ecdysis"
	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// Each benchmark measures its floor in the same run, in turn with what it
// measures, and prints the ratio of the medians.

// How many listeners a generation has, and where it tells what it measures.
const (
	benchVar    = "ECDYSIS_TEST_LISTENERS"
	benchHubVar = "ECDYSIS_TEST_BENCH"
)

var (
	byteRole  = proctest.DefineRole("byte", func() { os.Stdout.WriteString("x") })
	benchRole = proctest.DefineRole("bench", func() {
		if err := benchMain(); err != nil {
			log.Fatal(err)
		}
	})
)

// A sample is what a generation has measured, in nanoseconds.
type sample struct {
	Floor   int64 // fork, exec and one byte back from the same binary
	Net     int64 // what one listener costs with net alone
	Upgrade int64
	Quiet   int64 // moment at which every listener was quiet, by the wall clock
	Open    int64 // moment at which this generation's Ready returned, likewise
}

// benchMain is a generation: it becomes ready, measures the floor and its own
// upgrade when it is told to, and exits.
func benchMain() error {
	var s sample
	u, err := ecdysis.New(ecdysis.Options{Notify: func(e ecdysis.Event) {
		if e.Kind == ecdysis.EventHandover {
			s.Quiet = time.Now().UnixNano()
		}
	}})
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(os.Getenv(benchVar))
	if err != nil {
		return err
	}
	for range n {
		if _, err := u.Listen("tcp", "127.0.0.1:0"); err != nil {
			return u.Fail(err)
		}
	}
	if err := u.Ready(); err != nil {
		return err
	}
	s.Open = time.Now().UnixNano()
	hub, err := net.Dial("unix", os.Getenv(benchHubVar))
	if err != nil {
		return err
	}
	if _, err := hub.Read(make([]byte, 1)); err != nil {
		return nil // the benchmark is over
	}
	if s.Floor, err = floor(); err != nil {
		return err
	}
	if s.Net, err = floorListeners(min(n, 1000)); err != nil {
		return err
	}
	start := time.Now()
	if err := u.Upgrade(); err != nil {
		return err
	}
	s.Upgrade = time.Since(start).Nanoseconds()
	return json.NewEncoder(hub).Encode(s)
}

// floor starts this program once more, without the package, and returns the
// time until its first byte has come.
func floor() (int64, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	cmd := byteRole.Command()
	start := time.Now()
	p, err := os.StartProcess(cmd.Path, cmd.Args, &os.ProcAttr{Env: cmd.Environ(), Files: []*os.File{nil, w, os.Stderr}})
	w.Close()
	if err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		return 0, err
	}
	d := time.Since(start).Nanoseconds()
	_, err = p.Wait()
	return d, err
}

// floorListeners returns what one of n listeners costs apart from the package: to
// get a copy of a descriptor, which stands for what is received, and to give it
// to net, and to close both. The old process closes its own.
func floorListeners(n int) (int64, error) {
	address := "127.0.0.1:0"
	if runtime.GOOS == "linux" {
		address = "127.0.0.2:0" // free ports take long to find at an address with thousands of listeners
	}
	var list, copies []net.Listener
	for range n {
		ln, err := net.Listen("tcp", address)
		if err != nil {
			return 0, err
		}
		list = append(list, ln)
	}
	start := time.Now()
	for _, ln := range list {
		raw, err := ln.(*net.TCPListener).SyscallConn()
		if err != nil {
			return 0, err
		}
		fd := -1
		_ = raw.Control(func(s uintptr) { fd, err = syscall.Dup(int(s)) })
		if err != nil {
			return 0, err
		}
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileListener(f)
		f.Close()
		if err != nil {
			return 0, err
		}
		copies = append(copies, c)
	}
	for _, ln := range list {
		ln.Close()
	}
	d := time.Since(start)
	for _, ln := range copies {
		ln.Close()
	}
	return d.Nanoseconds() / int64(n), nil
}

// chain runs n upgrades in a row and returns what each has measured.
func chain(b *testing.B, n, listeners int) []sample {
	dir := proctest.ShortDir(b)
	hub, err := net.Listen("unix", filepath.Join(dir, "hub"))
	if err != nil {
		b.Fatal(err)
	}
	defer hub.Close()
	cmd := benchRole.Command()
	cmd.Env = append(cmd.Env, benchHubVar+"="+hub.Addr().String(), benchVar+"="+strconv.Itoa(listeners))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	var list []sample
	for i := 0; ; i++ {
		c, err := hub.Accept()
		if err != nil {
			b.Fatal(err)
		}
		if i == n {
			c.Close() // ends the last generation
			return list
		}
		if _, err := c.Write([]byte("!")); err != nil {
			b.Fatal(err)
		}
		var s sample
		if err := json.NewDecoder(c).Decode(&s); err != nil {
			b.Fatal("a generation has ended: ", err)
		}
		c.Close()
		list = append(list, s)
	}
}

func median(list []sample, f func(sample) int64) float64 {
	var v []int64
	for _, s := range list {
		v = append(v, f(s))
	}
	slices.Sort(v)
	return float64(v[len(v)/2])
}

func BenchmarkUpgrade(b *testing.B) {
	one := 0.0
	for _, n := range []int{1, 100, 1000, 10000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			times := b.N
			if n <= 100 {
				times *= 5 // they are quick, and a disturbed one must not be the median
			}
			list := chain(b, times, n)
			floor := median(list, func(s sample) int64 { return s.Floor })
			upgrade := median(list, func(s sample) int64 { return s.Upgrade })
			b.ReportMetric(0, "ns/op") // the chain's own work would be in it
			b.ReportMetric(floor/1e3, "floor-µs")
			b.ReportMetric(upgrade/1e3, "upgrade-µs")
			if n == 1 {
				one = median(list, func(s sample) int64 { return s.Upgrade - s.Floor })
				proctest.Ratio(b, upgrade/floor, 1.2, "×floor")
			} else if one != 0 {
				more := median(list, func(s sample) int64 { return s.Upgrade - s.Floor }) - one
				each, alone := more/float64(n-1), median(list, func(s sample) int64 { return s.Net })
				b.ReportMetric(each/1e3, "µs/listener")
				b.ReportMetric(alone/1e3, "net-µs/listener")
				proctest.Ratio(b, each/alone, 1.2, "×net/listener")
			}
			if len(list) > 1 {
				var quiet []sample
				for i := range list[1:] {
					quiet = append(quiet, sample{Quiet: list[i+1].Open - list[i].Quiet})
				}
				b.ReportMetric(median(quiet, func(s sample) int64 { return s.Quiet })/1e3, "quiet-µs")
			}
		})
	}
}

// BenchmarkAccept compares Accept with net's. Connections wait in the backlog
// before the clock starts: it measures Accept alone.
func BenchmarkAccept(b *testing.B) {
	u := proctest.Ours(b)
	a, err := u.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer a.Close()
	c, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	const batch = 200
	var ratios []float64
	var sums [2]time.Duration
	const pairs = 20 // in a turn: a disturbed one must not be the median
	for i := 0; i < b.N*pairs; i++ {
		var took [2]time.Duration
		for j := range 2 {
			j = (j + i) % 2
			d, err := acceptBatch([]net.Listener{a, c}[j], batch)
			if err != nil {
				b.Fatal(err)
			}
			took[j] = d
			sums[j] += d
		}
		ratios = append(ratios, float64(took[1])/float64(took[0]))
	}
	slices.Sort(ratios)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(sums[1].Nanoseconds())/float64(b.N*pairs*batch), "net-ns")
	b.ReportMetric(float64(sums[0].Nanoseconds())/float64(b.N*pairs*batch), "accept-ns")
	proctest.Ratio(b, 1/ratios[len(ratios)/2], 1.02, "×net")
}

func acceptBatch(ln net.Listener, n int) (time.Duration, error) {
	var clients []net.Conn
	defer func() {
		for _, c := range clients {
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	for range n {
		c, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
		if err != nil {
			return 0, err
		}
		clients = append(clients, c)
	}
	accepted := make([]net.Conn, 0, n)
	start := time.Now()
	for range n {
		c, err := ln.Accept()
		if err != nil {
			return 0, err
		}
		accepted = append(accepted, c)
	}
	d := time.Since(start)
	for _, c := range accepted {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	return d, nil
}

// BenchmarkListener measures what a listener costs beside net's: descriptors
// and bytes of memory.
func BenchmarkListener(b *testing.B) {
	u := proctest.Ours(b)
	measure := func(listen func(network, address string) (net.Listener, error)) (fds, bytes float64) {
		const n = 1000
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		f := len(proctest.OpenFDs())
		var list []net.Listener
		for range n {
			ln, err := listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			list = append(list, ln)
		}
		fds = float64(len(proctest.OpenFDs())-f) / n
		runtime.GC()
		runtime.ReadMemStats(&after)
		for _, ln := range list {
			ln.Close()
		}
		return fds, float64(after.HeapAlloc-before.HeapAlloc) / n
	}
	for range b.N {
		fds, bytes := measure(u.Listen)
		netFDs, netBytes := measure(net.Listen)
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(fds, "fds")
		b.ReportMetric(netFDs, "net-fds")
		b.ReportMetric(bytes, "B")
		b.ReportMetric(netBytes, "net-B")
	}
}

// BenchmarkSize compares the smallest echo daemon with one that cannot be
// upgraded, both stripped.
func BenchmarkSize(b *testing.B) {
	size := func(name string) float64 {
		out := filepath.Join(b.TempDir(), name)
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/size/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, msg)
		}
		fi, err := os.Stat(out)
		if err != nil {
			b.Fatal(err)
		}
		return float64(fi.Size())
	}
	plain, with := size("plain"), size("ecdysis")
	for range b.N {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(plain/1e3, "plain-kB")
	b.ReportMetric((with-plain)/1e3, "added-kB")
	proctest.Ratio(b, (with-plain)/500e3, 1, "×500kB")
}

// BenchmarkSeqpacket compares a packet's way there and back over a
// *SeqpacketConn with that over net's connection. One goroutine has both ends,
// so that no call waits: it measures the calls alone.
func BenchmarkSeqpacket(b *testing.B) {
	for _, size := range []int{64, 4096} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			near, far := proctest.SeqpacketPair(b)
			netNear, netFar := proctest.SocketPair(b, syscall.SOCK_SEQPACKET)
			conns := [2][2]net.Conn{{near, far}, {netNear, netFar}}
			const batch = 1000
			msg, buf := make([]byte, size), make([]byte, size)
			pingPong := func(c [2]net.Conn) time.Duration {
				start := time.Now()
				for range batch {
					for i := range c {
						if _, err := c[i].Write(msg); err != nil {
							b.Fatal(err)
						}
						if n, err := c[1-i].Read(buf); n != size || err != nil {
							b.Fatal(n, err)
						}
					}
				}
				return time.Since(start)
			}
			var allocs [2]float64
			for i, c := range conns {
				allocs[i] = testing.AllocsPerRun(2, func() { pingPong(c) }) / (2 * batch)
			}
			var took [2][]time.Duration
			for b.Loop() {
				for i := range 20 {
					for j := range conns {
						j = (j + i) % 2
						took[j] = append(took[j], pingPong(conns[j]))
					}
				}
			}
			var ns [2]float64 // for a packet's Write and Read
			for j := range took {
				slices.Sort(took[j])
				ns[j] = float64(took[j][len(took[j])/2].Nanoseconds()) / (2 * batch)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ns[1], "net-ns")
			b.ReportMetric(ns[0], "seqpacket-ns")
			proctest.Ratio(b, ns[0]/ns[1], 1.02, "×net")
			b.ReportMetric(allocs[0], "allocs/packet")
			b.ReportMetric(allocs[1], "net-allocs/packet")
		})
	}
}
