package proctest

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// The environment tells a test binary which role it has and where the test
// listens.
const (
	roleVar = "ECDYSIS_PROCTEST_ROLE"
	hubVar  = "ECDYSIS_PROCTEST_HUB"
)

// Patience is how long a test waits for what must happen. It is 30 seconds, or
// the duration that the environment variable PROCTEST_PATIENCE has, for
// machines on which that is too short.
var Patience = patience()

func patience() time.Duration {
	const usual = 30 * time.Second
	value := os.Getenv("PROCTEST_PATIENCE")
	if value == "" {
		return usual
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < usual {
		panic("PROCTEST_PATIENCE: want a duration of at least " + usual.String() + ", not " + strconv.Quote(value))
	}
	return d
}

// Main is what TestMain calls. It runs the tests, or the role that the
// environment names, and exits.
func Main(m *testing.M) {
	name := os.Getenv(roleVar)
	if name == "" {
		// With the race detector a process takes a second to exit, which is
		// longer than a predecessor waits to learn how its successor ended.
		if _, ok := os.LookupEnv("GORACE"); !ok {
			os.Setenv("GORACE", "atexit_sleep_ms=0")
		}
		// More tests than usual run in parallel, because a test waits for its
		// processes most of the time. A flag on the command line is parsed later and
		// replaces this.
		if err := flag.Set("test.parallel", strconv.Itoa(max(8, 2*runtime.GOMAXPROCS(0)))); err != nil {
			panic(err)
		}
		os.Exit(m.Run())
	}
	becomeRoot()
	f, ok := roles[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "proctest: no role %q\n", name)
		os.Exit(2)
	}
	f()
	os.Exit(0)
}

var roles = make(map[string]func())

// A Role is a program that a process of the test binary can run.
type Role struct{ name string }

// DefineRole returns a role whose processes run f, and exit with status 0 when f
// returns. It is for package variables, because a process must know all roles
// before Main runs.
func DefineRole(name string, f func()) Role {
	if _, ok := roles[name]; ok {
		panic("proctest: two roles are called " + name)
	}
	roles[name] = f
	return Role{name}
}

// Env returns the variable that gives a process this role, as in os.Environ.
func (r Role) Env() string { return roleVar + "=" + r.name }

// Command returns the command that runs r. The role finds args in Args.
func (r Role) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(self(), append([]string{noTests}, args...)...)
	cmd.Env = append(os.Environ(), r.Env())
	return cmd
}

// Args returns the arguments of the Role's Command.
func Args() []string { return os.Args[2:] }

// noTests is the first argument of each process, so that a process which has lost
// its environment runs no test.
const noTests = "-test.run=^$"

// self is the path of the test binary.
func self() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}
