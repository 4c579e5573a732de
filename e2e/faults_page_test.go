package e2e

import (
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ecdysis-go/ecdysis"
)

// docs/faults.md is written from the rules of the matrix.

const faultsPage = "../docs/faults.md"

var writeFaults = flag.Bool("faults.write", false, "write docs/faults.md")

// TestFaultsPage fails if the page is not what the rules say.
func TestFaultsPage(t *testing.T) {
	t.Parallel()
	want := page()
	if *writeFaults {
		if err := os.WriteFile(faultsPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(faultsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) == want {
		return
	}
	is, wants := strings.Split(string(got), "\n"), strings.Split(want, "\n")
	n := 0
	for n < min(len(is), len(wants)) && is[n] == wants[n] {
		n++
	}
	t.Errorf("docs/faults.md is not what the rules say from line %d on; write it by: go test ./e2e -run TestFaultsPage -faults.write", n+1)
}

// page is docs/faults.md.
func page() string {
	var b strings.Builder
	b.WriteString(guide)
	list, left := cells()
	fmt.Fprintf(&b, "The matrix has %d cells: %d steps, %d faults and %d ways to start the successor. %d further combinations make no sense, and each step says why.\n\n",
		len(list), len(moments), len(faults), len(modes), len(left))
	b.WriteString("| Fault | What happens |\n|---|---|\n")
	for _, f := range faults {
		fmt.Fprintf(&b, "| %s | %s |\n", f.name, f.what)
	}
	for at, m := range moments {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", m.name, m.what)
		b.WriteString("| Fault | Successor | Serves | Error of the upgrade | Clients |\n|---|---|---|---|---|\n")
		for _, g := range groups(moment(at), left) {
			for _, r := range g.rows {
				fmt.Fprintf(&b, "| %s | %s | %s |\n", g.names, r.modes, r.text)
			}
		}
		b.WriteString(leftOutAt(moment(at), left))
	}
	return b.String()
}

// A row is what some modes have in common.
type row struct{ modes, text string }

func rows(at moment, f *fault, left map[cell]string) (list []row) {
	for _, m := range modes {
		c := cell{at, f, m}
		if left[c] != "" {
			continue
		}
		text := f.want(c).describe()
		if i := slices.IndexFunc(list, func(r row) bool { return r.text == text }); i >= 0 {
			list[i].modes += ", " + string(m)
		} else {
			list = append(list, row{string(m), text})
		}
	}
	return list
}

// A group is faults after which the same follows.
type group struct {
	names string
	rows  []row
}

func groups(at moment, left map[cell]string) (list []group) {
	for _, f := range faults {
		r := rows(at, f, left)
		if i := slices.IndexFunc(list, func(g group) bool { return slices.Equal(g.rows, r) }); i >= 0 {
			list[i].names += "; " + f.name
		} else {
			list = append(list, group{f.name, r})
		}
	}
	return list
}

// leftOutAt lists what is left out at a step, by its reason.
func leftOutAt(at moment, left map[cell]string) string {
	var reasons []string
	of := make(map[string][]string)
	for _, f := range faults {
		in := make(map[string][]string) // modes, by reason
		for _, m := range modes {
			r := left[cell{at, f, m}]
			if r == "" {
				continue
			}
			if !slices.Contains(reasons, r) {
				reasons = append(reasons, r)
			}
			in[r] = append(in[r], string(m))
		}
		for r, list := range in {
			name := f.name
			if len(list) < len(modes) {
				name += " (" + strings.Join(list, ", ") + ")"
			}
			of[r] = append(of[r], name)
		}
	}
	if len(reasons) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\nLeft out:\n\n")
	for _, r := range reasons {
		names := strings.Join(of[r], "; ")
		if len(of[r]) == len(faults) {
			names = "all faults (" + string(takeover) + ")"
		}
		fmt.Fprintf(&b, "- %s %s\n", r, "("+names+")")
	}
	return b.String()
}

// describe returns the last columns of a row.
func (o outcome) describe() string {
	serves := string(o.serves)
	if o.wait == waitHook {
		serves = "predecessor, until the hook returns or longer"
		if o.serves != byPredecessor {
			serves = "predecessor until the hook returns, then " + string(o.serves)
		}
	}
	return strings.Join([]string{serves, o.describeError(), o.describeClients()}, " | ")
}

func (o outcome) describeError() string {
	var parts []string
	if len(o.steps) > 0 {
		var names []string
		for _, s := range o.steps {
			names = append(names, "`"+string(s)+"`")
		}
		text := strings.Join(names, " or ")
		switch {
		case o.is != nil:
			text += ": `" + errorName(o.is) + "`"
		case o.says != "":
			text += ": “" + strings.TrimPrefix(o.says, "ecdysis: ") + "”"
		}
		if o.maybe {
			text += ", or none if COMMIT was first"
		}
		parts = append(parts, text)
	}
	if o.told != nil {
		parts = append(parts, "the successor gets `"+errorName(o.told)+"`")
	}
	if len(parts) == 0 && o.says != "" {
		return "the hook's panic"
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, "; ")
}

func (o outcome) describeClients() string {
	switch {
	case o.gone:
		return "are refused until the taker listens"
	case o.serves == byNobody && o.killed == 0:
		return "the service has ended"
	case o.serves == byBoth:
		return "get answers of either process"
	case o.killed > 0:
		return "those of the killed process are cut off"
	case o.lost:
		return "of the Unix socket cannot connect, until the next upgrade (`Event.Lost`)"
	case o.wait == waitHook, o.wait == "":
		return "none fails"
	case o.wait != "`UpgradeTimeout`":
		return "wait for at most " + o.wait
	}
	return "none fails"
}

func errorName(err error) string {
	for name, e := range map[string]error{
		"io.ErrUnexpectedEOF": io.ErrUnexpectedEOF, "os.ErrDeadlineExceeded": os.ErrDeadlineExceeded, "EMFILE": syscall.EMFILE, "ENOSPC": syscall.ENOSPC,
		"ErrStopped": ecdysis.ErrStopped, "ErrAborted": ecdysis.ErrAborted, "ErrInProgress": ecdysis.ErrInProgress,
	} {
		if err == e {
			return name
		}
	}
	return err.Error()
}

// guide is the first part of the page.
const guide = `# What can go wrong

Either process of an upgrade can be killed, hang, panic, run out of something or be stopped, at any moment. This page says what you do then, and what
follows in each case. ` + "`TestFaults`" + ` in e2e makes each case happen to real processes under load, and the tables below are written from
its rules.

## What to do

An upgrade that fails leaves the old process serving. Nothing has to be cleared away, and the next upgrade can begin at once. The
reason is in the error of ` + "`Upgrade`" + `, in ` + "`EventUpgradeFailed`" + ` and in the answer of a control socket. ` + "`UpgradeError.Step`" + ` says how far it came.

| What you see | What has happened | What you do |
|---|---|---|
| ` + "`prepare`, `start`" + ` | Nothing was started: a hook has said no, or the program cannot be run. | Repair what the error names, and upgrade again. |
| ` + "`init`" + `, “it says: …” | The new version has given its reason by ` + "`Fail`" + ` or a failed ` + "`Ready`" + `. | The same. |
| ` + "`init`, `io.ErrUnexpectedEOF`" + ` | The new version has ended. ` + "`UpgradeError.State`" + ` says how, and its standard error why. | Repair the new version. |
| ` + "`init`, `os.ErrDeadlineExceeded`" + ` | The new version was not ready within ` + "`UpgradeTimeout`" + `. It was killed, unless it was taking over. | Find what its start waits for, or allow more time. |
| ` + "`init`" + `, “no space left on device” or “permission denied” | The PID file, or the file of a socket, could not be made. | Make room or give permission, and upgrade again. |
| ` + "`init`, `start`" + `, “RLIMIT_NOFILE” or “too many open files” | One of the two may not open as many files as are handed on. | Raise the limit of the process that the error is about. |
| ` + "`handover`" + ` | One of the two has failed between READY and DONE. Clients have waited for some seconds at most, and none has failed. | Look at the hooks for ` + "`EventHandover` and `EventReady`" + `. |
| ` + "`handover`" + `, “Options.Notify has not returned” | A hook hangs, often because the log that it writes to is stalled. Clients have waited for 10 s at most. | Repair the log. Write to it so that a reader that stands still holds up nobody. |
| ` + "`probation`" + ` | The new version has ended after it had served. Connections that it had accepted were cut off. | Repair the new version. The old one serves. |
| ` + "`ErrStopped`" + ` | A stop came first, and the service has ended. | Start it anew if the stop was not meant. |
| ` + "`Upgrade`" + ` does not return, and others get ` + "`ErrInProgress`" + ` | ` + "`Prepare`, `SendState` or `Unclaimed`" + ` hangs. The old process serves meanwhile. | Let the hook return. |
| The new process serves, and the old one has told nothing of it | The old process was killed, or a hook has panicked. | Look for the reason. The service needs nothing. |
| ` + "`Event.Lost`" + ` in the new process's ` + "`EventReady`" + ` | The deleted file of a Unix socket could not be put in its place again. | Give permission for the directory, and upgrade again. |
| Clients wait, and nobody answers | The process that serves is paused: by SIGSTOP, a debugger or a frozen cgroup. | Let it continue. No request is lost. |
| Nobody serves | The process that was killed was alone, or both were. | Let the supervisor start the service. Files that are left do not hinder the start. |

The new process may be killed at any time until it serves: the old one goes on. Killed after its probation, it takes the service with
it. If the old process is killed after the new one was started, the new one serves as soon as its start is complete.

Two things are not made good:

- A program that shuts down or closes the stream between the two, by a descriptor that is not its own, makes the new process take the
  old one for dead. A successor that the old process has started is ended within a second. A process that is taking over is not, and
  both serve then. End the one that you do not want.
- A signal to stop that the old process gets when the upgrade is just over is for the old process alone. Send such signals to the
  process that the PID file names, and look whether that has ended.

## An hour of faults

![What was done in an hour, and the processes, descriptors and memory meanwhile](soak.svg)

` + "```" + `
go run ./examples/demo -soak 10m -seed 1 -svg soak.svg
` + "```" + `

The command upgrades a small daemon under load, with faults at random moments that follow from the seed. It fails, and prints the
seed and its last steps, when a request fails that must not, or when descriptors or memory grow. The picture is of the hour with
` + "`-soak 60m -seed 20261130`" + `, on 2026-11-30, on two busy cores of a virtual machine: 7,044 rounds, 4,405 upgrades, 2,652,059 requests
answered, and no request lost but the 4,299 in the hands of a killed process and those that came while the daemon was stopped. In
the ten gaps of 20 to 30 s, another program with thousands of listeners had taken the port of the stopped daemon, and left the soak's clients waiting.

## What follows in each case

In each case the test looks at more than the tables say:

- The process that serves answers at each address, the PID file names it, and the files of its sockets are there.
- Its next upgrade works.
- No request fails, except those in the hands of a process that was killed. They are one connection of each client at most.
- After a failed upgrade the old process has the descriptors, goroutines and children that it had before.
- If nobody serves because of a stop, no file is left.

“Successor” says how the new process is started: ` + "`fork`" + ` as a child of the old one, ` + "`sibling`" + ` by ` + "`Command.Sibling`" + `, ` + "`takeover`" + ` by somebody else.
The error is at the step of the ` + "`UpgradeError`" + `. Without an error the upgrade has succeeded, or the process that could return one has ended.

`
