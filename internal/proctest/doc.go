// Package proctest runs real daemons for tests. The test binary executes itself
// again as a daemon. The test starts the daemon, calls functions in it, holds it at
// any step of its life, and loads it with clients.
//
// Each test package that uses it needs
//
//	func TestMain(m *testing.M) { proctest.Main(m) }
//
// A [Spec] has a daemon's addresses, its [ecdysis.Options], and its plan, which
// says what the daemon does at which [Point]. Start starts the first process of a
// [Chain] with the first spec. Its successors get the specs that follow, and the
// last spec is for all later ones. This is a successor that exits with status 3
// before it is ready, while clients come and go:
//
//	p := proctest.Start(t, proctest.TCP, proctest.TCP.At(proctest.AtListened, proctest.Exit(3)), proctest.TCP)
//	l := p.Load(2)
//	f := p.FailUpgrade(ecdysis.StepInit, io.ErrUnexpectedEOF)
//	if f.How != "exit status 3" {
//		t.Errorf("the successor ended by %s", f.How)
//	}
//	s := p.Upgrade() // to the third spec
//	s.Serves()
//	l.More(10)
//	l.Check()
//
// A process that holds at a point takes calls, and goes on after Resume:
//
//	a := p.BeginUpgrade()
//	s := a.Successor()
//	s.At(proctest.AtNew)
//	s.Resume()
//	a.OK()
//
// A test defines a call that [Proc] does not have as a method. Its function runs in
// the daemon. Arguments and results are values that encoding/gob can encode. The
// call can be made at once, or planned for a point:
//
//	var setMask = proctest.Define("set mask", func(d *proctest.Daemon, mask int) (int, error) {
//		return syscall.Umask(mask), nil
//	})
//
//	old := setMask.On(p, 0o22)
//	spec := proctest.TCP.At(proctest.AtStart, setMask.Do(0o77))
//
// Errors from daemons keep their identity. errors.Is finds the sentinels of package
// ecdysis, errno values and the errors that KnownError has named. errors.As finds
// an *ecdysis.UpgradeError. Its State is nil, because no process state can be sent.
// [How] returns the text of the State.
//
// Each daemon answers a line with its process ID and generation, over TCP,
// Unix sockets and UDP. [Program] runs daemons that are programs of their own and
// log what they do. [Peer] and [Raw] send and receive single frames of the protocol.
//
// Nothing in this package waits for time to pass. Each wait ends with an event, or
// fails the test after [Patience].
package proctest
