// Demo takes a daemon through everything that can happen to it in an upgrade,
// under load, and counts what its clients noticed. From the module's directory:
//
//	go run ./examples/demo
//
// It builds examples/echod, runs it in a temporary directory, and keeps clients
// connecting to it while it is replaced five times, gets a successor that
// crashes, one that hangs and one that is missing, is killed in the middle of
// an upgrade, is taken over by a process that it has not started, and comes back
// when its last successor is killed during its probation. Then it replaces a web
// server, examples/httpd, under clients that keep their connections, and prints
// a table and a verdict. The exit status is 1 if a single request has failed. With
// -svg FILE it draws which generation answered which request.
//
// With -cost it measures what an upgrade costs on this machine, in under a
// minute, each figure beside what the system itself takes for it:
//
//	go run ./examples/demo -cost -svg DIR
//
// With -soak it upgrades a daemon for a time, with faults at random moments, and
// looks for requests that were lost and for growth. The seed repeats the same
// faults:
//
//	go run ./examples/demo -soak 10m -seed 1 -svg FILE
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	if socket := os.Getenv(standInVar); socket != "" {
		standIn(socket)
	}
	asJSON := flag.Bool("json", false, "print the result of the tour as one JSON document")
	costs := flag.Bool("cost", false, "measure what an upgrade costs, instead of the tour")
	soaks := flag.Duration("soak", 0, "upgrade with random faults for this `time`, instead of the tour")
	seed := flag.Uint64("seed", 0, "with -soak: the `number` that the faults follow from; 0: another one each time")
	svg := flag.String("svg", "", "draw a picture of the tour or the soak at this `path`; with -cost, two into this directory")
	page := flag.String("write", "", "with -cost: renew cost.md and its pictures in this `directory`, sizes by architecture included")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *costs || *soaks > 0 {
		run := func() error { return measure(ctx, *svg, *page) }
		if *soaks > 0 {
			run = func() error { return soakFor(ctx, *soaks, *seed, *svg) }
		}
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	r, p, err := tour(ctx)
	if err == nil && *svg != "" {
		err = os.WriteFile(*svg, p.figure().SVG(), 0o644)
	}
	switch {
	case ctx.Err() != nil:
		err = errors.New("interrupted")
		fallthrough
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	case *asJSON:
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		_ = e.Encode(r)
	default:
		r.print()
	}
	if !r.OK {
		os.Exit(1)
	}
}

// tour runs the whole demonstration. Whatever it started has ended, and its
// directory is gone, when it returns.
func tour(ctx context.Context) (*report, *picture, error) {
	began := time.Now()
	p := &picture{began: began}
	d, err := newDaemon(ctx)
	if err != nil {
		return nil, nil, err
	}
	clients := &load{d: d, stopped: make(chan struct{})}
	defer clients.end() // after cleanUp: a client may wait for an answer
	defer d.cleanUp()
	out := newProgress(os.Stderr)
	defer out.end()

	out.say("building examples/echod")
	if err := build(ctx, d.echod, echodPackage); err != nil {
		return nil, nil, err
	}
	if err := d.start(); err != nil {
		return nil, nil, err
	}
	out.say("generation 0 serves: process %d, %s and %s", d.serving.Load().PID, d.tcp, d.unix)
	clients.start()
	out.follow(func() string {
		answered, broken := clients.totals()
		g := d.serving.Load()
		return fmt.Sprintf("generation %d, process %d: %d answered, %d broken", g.Number, g.PID, answered, broken)
	})

	r := &report{Errors: []string{}}
	for _, step := range []string{upgrade, upgrade, crash, upgrade, hang, upgrade, missing, upgrade, killed, takenOver, probation, ""} {
		if err := clients.more(ctx, 500); err != nil {
			return nil, nil, err
		}
		old := d.serving.Load()
		if step != upgrade && step != "" {
			p.faults = append(p.faults, event{time.Now(), step})
		}
		switch step {
		case upgrade:
			err = d.upgrade()
		case killed:
			err = d.killParent(clients)
		case takenOver:
			err = d.takeOver()
		case probation:
			var reason string
			reason, err = d.failProbation(clients)
			r.FailedUpgrades = append(r.FailedUpgrades, failedUpgrade{step, reason, old.Number})
			step += "; " + reason
		case crash, hang, missing:
			var reason string
			reason, err = d.fail(step)
			r.FailedUpgrades = append(r.FailedUpgrades, failedUpgrade{step, reason, old.Number})
			step += "; " + reason
		default:
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", step, err)
		}
		g := d.serving.Load()
		out.say("%s: generation %d, process %d, serves", step, g.Number, g.PID)
	}
	clients.end()
	out.say("stopping generation %d", d.serving.Load().Number)
	if err := d.stop(); err != nil {
		return nil, nil, err
	}
	p.generations, p.answers = d.generations, clients.answers
	var web *load
	if r.Web, web, err = tourWeb(ctx, d.dir, out, p); err != nil {
		return nil, nil, fmt.Errorf("the web server: %w", err)
	}
	p.webAnswers = web.answers
	r.count(d.generations, clients)
	r.countWeb(web.failures)
	r.Seconds = ms(time.Since(began)) / 1000
	return r, p, nil
}

// What happens to the daemon, in the words of the report.
const (
	upgrade = "upgrade"
	crash   = "the successor crashes"
	hang    = "the successor hangs"
	missing = "the program is missing"
	killed  = "the old process is killed during the upgrade"

	takenOver = "a process that nobody forked takes over"
	probation = "the successor is killed within its probation"
)

// A report is the result of the tour.
type report struct {
	Generations    []*generation   `json:"generations"`
	FailedUpgrades []failedUpgrade `json:"failed_upgrades"`
	Answered       int             `json:"answered"`
	Failed         int             `json:"failed"`
	Killed         int             `json:"in_the_hands_of_the_killed"`
	Web            webReport       `json:"web"`
	Errors         []string        `json:"errors"` // of the failed requests, the first few
	Seconds        float64         `json:"seconds"`
	OK             bool            `json:"ok"`
	Verdict        string          `json:"verdict"`
}

type failedUpgrade struct {
	What   string `json:"what"`
	Reason string `json:"reason"`
	Serves int    `json:"serving_generation"`
}

// count enters what the clients saw.
func (r *report) count(list []*generation, l *load) {
	r.Generations = list
	for _, a := range l.answers {
		list[a.by].Answered++
	}
	for _, f := range l.failures {
		if g := killer(list, f); g != nil {
			g.InHands++
			continue
		}
		f.generation.Failed++
		if len(r.Errors) < 5 {
			r.Errors = append(r.Errors, f.err.Error())
		}
	}
	for _, g := range list {
		r.Answered += g.Answered
		r.Failed += g.Failed
		r.Killed += g.InHands
	}
	r.OK = r.Failed == 0
	r.Verdict = fmt.Sprintf("all %d requests were answered", r.Answered)
	if r.Killed > 0 {
		r.Verdict += fmt.Sprintf("; %d more ended with the two killed processes, which had accepted them", r.Killed)
	}
	if !r.OK {
		r.Verdict = fmt.Sprintf("%d of %d requests failed", r.Failed, r.Answered+r.Failed)
	}
}

// countWeb enters what the web server's clients saw. It comes last.
func (r *report) countWeb(failures []failure) {
	for _, f := range failures[:min(len(failures), 5)] {
		r.Errors = append(r.Errors, "web server: "+f.err.Error())
	}
	r.OK = r.OK && len(failures) == 0
	if len(failures) == 0 {
		r.Verdict += fmt.Sprintf("; the web server's %d, through %d upgrades, were all answered", r.Web.Answered, r.Web.Upgrades)
	} else {
		r.Verdict += fmt.Sprintf("; %d of %d requests to the web server failed", len(failures), r.Web.Answered+len(failures))
	}
}

// killer returns the killed process that had accepted the connection that has
// failed, if one may have: nobody can answer then. A client that has not been
// told who serves it, and has connected after the death, has no excuse. One that
// has connected while the process took over may have been accepted by it before
// this program read that it was ready.
func killer(list []*generation, f failure) *generation {
	for _, g := range list {
		before := g.Number - 1
		switch {
		case !g.Killed:
		case f.by != unknown:
			if f.by == g.Number {
				return g
			}
		case f.began.Before(g.died) && (f.generation == g || f.generation.Number == before && f.began.After(g.began)):
			return g
		}
	}
	return nil
}

func (r *report) print() {
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\ngeneration\tPID\tstart to ready\tanswered\tfailed\t")
	for _, g := range r.Generations {
		fmt.Fprintf(t, "%d\t%d\t%.1f ms\t%d\t%d\t\n", g.Number, g.PID, g.ReadyMS, g.Answered, g.Failed)
	}
	_ = t.Flush()
	fmt.Println()
	for _, f := range r.FailedUpgrades {
		fmt.Printf("%s: generation %d served on\n", f.What, f.Serves)
	}
	for _, g := range r.Generations {
		if g.Killed {
			fmt.Printf("generation %d was killed: requests that ended with it, which had accepted them: %d\n", g.Number, g.InHands)
		}
	}
	for _, e := range r.Errors {
		fmt.Println("failed:", e)
	}
	fmt.Printf("verdict after %.1f s: %s\n", r.Seconds, r.Verdict)
}

// ms returns d in milliseconds with one decimal.
func ms(d time.Duration) float64 { return float64(d.Round(100*time.Microsecond).Microseconds()) / 1000 }
