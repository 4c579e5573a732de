// Package keeper gives a daemon one process that stays for the daemon's whole
// life. PID 1 of a container must be such a process. So must the foreground
// process of a terminal, and the child of a supervisor that watches only this
// child. An upgrade replaces the process that serves. The keeper stays, and
// forwards signals to the process that serves.
//
// The package is for Linux. Under systemd it is not needed. It is needed under
// an init process, as with docker run --init. The init process ends with its
// first child, and the container ends with the init process.
//
// docs/containers.md, docs/supervisors.md and docs/embedded.md show how to use it.
package keeper

import "fmt"

// Stay makes the first process of a daemon its keeper. Call it at the start of
// main, when the flags are parsed and before anything else. The keeper starts
// the program again as its child, with the same arguments. Stay returns nil in
// that child and in every later generation. In the keeper it returns only if
// there is an error.
//
// pidFile is the path that every generation sets in ecdysis.Options.PIDFile. Its
// directory must exist. The file tells the keeper which process serves. A file
// that is left from an earlier run is ignored until the first generation
// replaces it. The keeper reads the file after each replacement. It does not
// learn of a generation that is replaced or stopped before the keeper has read
// the file.
//
// Every generation should be a child of the keeper, so set
// ecdysis.Command.Sibling in Options.Prepare. Without it a generation is a child
// of its predecessor. The keeper then learns of its end and of its status only
// if the predecessor has ended first.
//
// The keeper
//
//   - forwards signals to the generation that serves, and to no other process.
//     If the serving generation has ended and older generations still serve
//     their clients, signals go to the youngest of these. SIGCHLD, SIGIO,
//     SIGPIPE, SIGTTIN, SIGTTOU, SIGURG and signals that cannot be caught are
//     not forwarded.
//   - holds signals back until the first generation is ready, because that
//     generation may not catch them yet. SIGTERM, SIGINT and SIGQUIT are
//     forwarded at once.
//   - stops itself and all generations on a terminal's Ctrl-Z (SIGTSTP), and
//     continues the generations when it is continued. They are a process group
//     of their own, so that only the serving generation gets a Ctrl-C, and gets
//     it once. They must not leave this group, and must not read from the
//     terminal.
//   - adopts and reaps every process that the generations leave behind
//     (PR_SET_CHILD_SUBREAPER(2const)).
//   - exits when no generation is left, with the status of the youngest
//     generation. If a signal has killed that generation, the keeper ends by the
//     same signal. As PID 1, which its own signals do not kill, it exits with 128
//     plus the signal's number, as shells do. Other processes that the
//     generations have started do not keep it running.
//   - replaces its own program by execve(2), and keeps its process ID, when the
//     only generation left runs a new program. No signal is lost by that. So
//     every later version must call Stay, and must accept the arguments of the
//     first version. The keeper needs /proc for this, and permission to see
//     there what the generation runs.
//
// The keeper has the standard descriptors, a descriptor of the PID file's
// directory and a signalfd(2). It has nothing of the service. Descriptors that
// it was started with are handed to the child alone. A filter (seccomp(2)) keeps
// all signals blocked in the keeper, and it cannot get new privileges
// (PR_SET_NO_NEW_PRIVS(2const)). The generations are not restricted in either
// way. If SIGKILL ends the keeper, the generations go on, unless the keeper was
// PID 1.
//
// The program is os.Args[0], looked up in $PATH if it has no slash. It is an error
// if the program cannot be started, if pidFile is empty or its directory cannot be
// opened, or if the kernel has no filters. The error wraps the system's error, if
// there is one, and no process is left running. Stay returns an error in the child if the keeper has
// ended before it let the child go on. It returns one in the keeper if no generation
// is left and the keeper has not seen how the youngest ended. On systems other than
// Linux the error wraps errors.ErrUnsupported.
func Stay(pidFile string) error {
	if err := stay(pidFile); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	return nil
}
