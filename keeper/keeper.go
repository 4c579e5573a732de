// Package keeper stays where a daemon has to have one process for all of its
// life: as PID 1 of a container, as the foreground process of a terminal, or as
// the child of a supervisor that knows no other process than the one it has
// started. An upgrade changes the process that serves; the keeper stays, and
// passes on what is meant for it.
//
// It is for Linux. Under systemd it is not needed. Under an init process, as
// with docker run --init, it is: that ends with its first child, and the
// container with it.
package keeper

import "fmt"

// Stay is called first thing in main, after nothing but the parsing of flags.
// The first process of a daemon becomes its keeper there: it starts the program
// again, with the same arguments, as its child, and Stay returns nil in that
// child and in every generation after it. In the keeper it does not return,
// unless there is an error.
//
// pidFile is the path that every generation has in ecdysis.Options.PIDFile, in
// a directory that exists. It tells the keeper which process serves; what is
// in the file before the first generation has written it counts for nothing. It
// is read as soon as it is replaced: a generation that is itself replaced, or
// stopped, before the keeper has come to that is not known to it.
//
// Every generation is to be a child of the keeper: set ecdysis.Command.Sibling
// in Options.Prepare. Without it a generation is the child of the one before,
// and the keeper learns of its end, and gets its status, only if that has ended
// first.
//
// The keeper
//
//   - forwards signals to the generation that serves, and to nobody else. If
//     that one has ended while older ones still serve their clients, they go to
//     the youngest of those. Not forwarded are SIGCHLD, SIGIO, SIGPIPE, SIGTTIN,
//     SIGTTOU, SIGURG and what cannot be caught.
//   - holds signals back until the first generation is ready, because that may
//     not catch them yet. SIGTERM, SIGINT and SIGQUIT are forwarded at once.
//   - stops all generations with itself on a terminal's Ctrl-Z (SIGTSTP), and
//     continues them when it is continued. They are a process group of their
//     own, so that a Ctrl-C comes once, to the one that serves; they must not
//     leave it, and must not read from the terminal.
//   - adopts and reaps every process that the generations leave behind
//     (PR_SET_CHILD_SUBREAPER(2const)).
//   - exits when no generation is left, as the youngest one has ended: with its
//     status, or by the signal that has killed it. PID 1, whom no signal of its
//     own kills, exits with 128 and the signal's number, as shells do. What
//     else the generations have started does not keep it.
//   - replaces its own program, and keeps its process ID, once a generation that
//     runs a new one is alone (execve(2)). No signal is lost by that. So every
//     later version has to call Stay, and to accept the arguments of the first.
//     It needs /proc for that, and the rights to see there what the generation
//     runs.
//
// The keeper has the standard descriptors, one of the PID file's directory, a
// signalfd(2), and nothing of the service; descriptors that it was started with
// are the child's alone. A filter (seccomp(2)) keeps all signals blocked in it,
// and it has no new privileges (PR_SET_NO_NEW_PRIVS(2const)); the generations
// have neither. SIGKILL ends the keeper without a word: the generations then go
// on, unless it was PID 1.
//
// The error wraps the system's, if the program (os.Args[0], looked up in $PATH
// if it has no slash) cannot be started, the directory of the PID file not be
// opened, or the kernel has no filters; then nothing is left running. On other
// systems than Linux it wraps errors.ErrUnsupported.
func Stay(pidFile string) error {
	if err := stay(pidFile); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	return nil
}
