//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package cost

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// patience is how long one step of a generation may take.
const patience = 30 * time.Second

// A chain is generations of the measured program, which take orders.
type chain struct {
	hub *net.UnixListener
	cmd *exec.Cmd
	log bytes.Buffer
}

// A generation is one of them, connected to the hub.
type generation struct {
	c    net.Conn
	r    *bufio.Reader
	addr string // of its first listener

	open, started, inherited, listening int64 // moments, in nanoseconds
}

// startChain runs the first generation.
func startChain(ctx context.Context, program string, listeners int) (*chain, *generation, error) {
	hub, err := net.Listen("unix", filepath.Join(filepath.Dir(program), fmt.Sprint("hub", listeners)))
	if err != nil {
		return nil, nil, err
	}
	c := &chain{hub: hub.(*net.UnixListener)}
	c.cmd = exec.Command(program, "generation", hub.Addr().String(), fmt.Sprint(listeners))
	c.cmd.Stderr = &c.log // of all generations: Wait waits until they have ended
	c.cmd.WaitDelay = patience
	// Ctrl-C is for the caller. The generations end with their connections.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		hub.Close()
		return nil, nil, err
	}
	context.AfterFunc(ctx, func() { hub.Close() })
	g, err := c.next()
	if err != nil {
		c.end(nil)
		return nil, nil, err
	}
	return c, g, nil
}

// next returns the next generation when it is ready.
func (c *chain) next() (*generation, error) {
	if err := c.hub.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	conn, err := c.hub.Accept()
	if err != nil {
		return nil, err
	}
	g := &generation{c: conn, r: bufio.NewReader(conn)}
	if err := g.answer(&g.open, &g.started, &g.inherited, &g.listening, &g.addr); err != nil {
		conn.Close()
		return nil, err
	}
	return g, nil
}

// order has the generation do something, and scans its answer.
func (g *generation) order(what byte, answer ...any) error {
	if _, err := g.c.Write([]byte{what}); err != nil {
		return err
	}
	return g.answer(answer...)
}

func (g *generation) answer(into ...any) error {
	if err := g.c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	s, err := g.r.ReadString('\n')
	if err != nil {
		return fmt.Errorf("a generation has ended: %w", err)
	}
	_, err = fmt.Sscan(s, into...)
	return err
}

// end ends the generation, which may be nil, and waits for all of them. It
// returns what they have complained of.
func (c *chain) end(g *generation) error {
	c.hub.Close()
	if g != nil {
		g.c.Close()
	}
	err := c.cmd.Wait()
	if s := strings.TrimSpace(c.log.String()); s != "" {
		err = errors.Join(err, errors.New(s))
	}
	return err
}

// An Upgrade is what was measured with this number of listeners. Times are in
// nanoseconds, and medians of so many pairs.
type Upgrade struct {
	Listeners, Pairs int

	Took, ForkExec float64
	Ratio          float64 // median of the pairs' ratios
	Net            float64 // net alone, for all listeners
	Further        float64 // what each listener after the first adds, to an upgrade with one that was made at the same time
	Silent         float64 // nobody accepts
	Stages         [len(stages)]float64
	Observed       float64 // how long an upgrade takes with the hook that tells the stages
}

// stages are where an upgrade's time goes, one after the other.
var stages = [...]string{
	"prepare, fork, exec, start of the runtime",
	"New: what is handed on arrives",
	"Listen",
	"Ready, until all listeners of the predecessor are paused",
	"the handover, until Upgrade returns",
}

// Floor is what an upgrade cannot cost less than: the process and the sockets.
func (u Upgrade) Floor() float64 { return u.ForkExec + u.Net }

// measureUpgrade measures pairs. In each, one generation forks and execs the
// program, and another is upgraded: both do it for the first time, when code
// and heap are not in the cache yet. A hook observes the upgrade of a third one,
// which tells the stages and how long nobody accepts. A daemon with one listener
// is upgraded in turn with one that has more.
func measureUpgrade(ctx context.Context, program string, listeners, pairs int) (u Upgrade, err error) {
	m, err := startMeasured(ctx, program, listeners)
	if err != nil {
		return u, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	var one *measured
	if listeners > 1 {
		if one, err = startMeasured(ctx, program, 1); err != nil {
			return u, err
		}
		defer func() { err = errors.Join(err, one.end()) }()
	}
	var took, forkExec, ratios, further, alone, silent, observed []float64
	var times [len(stages)][]float64
	for range pairs {
		var bare int64
		if err := m.g.order('x', &bare); err != nil {
			return u, err
		}
		if err := m.upgrade('o'); err != nil { // its second start of a process
			return u, err
		}
		if err := m.upgrade('u'); err != nil {
			return u, err
		}
		observed = append(observed, float64(m.took))
		silent = append(silent, float64(m.g.open-m.quiet))
		moments := [...]int64{m.began, m.g.started, m.g.inherited, m.g.listening, m.quiet, m.began + m.took}
		for i := range stages {
			times[i] = append(times[i], float64(moments[i+1]-moments[i]))
		}
		if err := m.upgrade('u'); err != nil {
			return u, err
		}
		took, forkExec = append(took, float64(m.took)), append(forkExec, float64(bare))
		ratios = append(ratios, float64(m.took)/float64(bare))
		if one == nil {
			continue
		}
		alone = append(alone, float64(m.alone))
		if err := one.upgrade('u'); err != nil {
			return u, err
		}
		further = append(further, float64(m.took-one.took)/float64(listeners-1))
	}
	u = Upgrade{Listeners: listeners, Pairs: pairs, Took: median(took), ForkExec: median(forkExec), Ratio: median(ratios),
		Net: median(alone), Further: median(further), Silent: median(silent), Observed: median(observed)}
	for i := range stages {
		u.Stages[i] = median(times[i])
	}
	return u, nil
}

// A measured chain is upgraded again and again.
type measured struct {
	ctx       context.Context
	c         *chain
	g         *generation // the youngest
	listeners int

	// Of the last upgrade.
	began, quiet int64 // moments, in nanoseconds; quiet is 0 if it was not observed
	took         int64
	alone        int64 // what net took for as many listeners, in the replaced generation
}

// startMeasured starts a chain and upgrades it once, because its first
// generation has inherited nothing.
func startMeasured(ctx context.Context, program string, listeners int) (*measured, error) {
	c, g, err := startChain(ctx, program, listeners)
	if err != nil {
		return nil, err
	}
	m := &measured{ctx: ctx, c: c, g: g, listeners: listeners}
	if err := m.upgrade('u'); err != nil {
		return nil, errors.Join(err, m.end())
	}
	return m, nil
}

// upgrade lets the youngest generation upgrade. The order is 'u', or 'o' if its
// successor is to have the hook.
func (m *measured) upgrade(order byte) error {
	if err := m.ctx.Err(); err != nil {
		return err
	}
	if err := m.g.order(order, &m.took, &m.quiet, &m.began); err != nil {
		return err
	}
	s, err := m.c.next()
	if err != nil {
		return err
	}
	old := m.g
	m.g = s
	defer old.c.Close()
	if m.listeners > 1 {
		return old.order('n', &m.alone)
	}
	return nil
}

func (m *measured) end() error { return m.c.end(m.g) }

// A Call is a call beside that of package net, in nanoseconds.
type Call struct {
	Name             string
	Pairs            int
	Took, Net, Ratio float64
}

func measureCalls(ctx context.Context, program string, pairs int) ([]Call, error) {
	cmd := exec.CommandContext(ctx, program, "calls", fmt.Sprint(pairs))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	took, alone, ratios := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for line := range strings.Lines(string(out)) {
		var name string
		var a, b float64
		if _, err := fmt.Sscan(line, &name, &a, &b); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		took[name], alone[name], ratios[name] = append(took[name], a), append(alone[name], b), append(ratios[name], a/b)
	}
	var list []Call
	for _, c := range []Call{{Name: "accept"}, {Name: "read"}} {
		n := c.Name
		c.Pairs, c.Took, c.Net, c.Ratio = len(ratios[n]), median(took[n]), median(alone[n]), median(ratios[n])
		list = append(list, c)
	}
	list[0].Name, list[1].Name = "Accept", "a packet read through UDPConn"
	return list, nil
}
