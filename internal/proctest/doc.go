// Package proctest runs real daemons for tests. The test binary executes
// itself again as a daemon, which the test starts, commands, stops at any step
// of its life and loads with clients.
//
// Each test package that uses it needs
//
//	func TestMain(m *testing.M) { proctest.Main(m) }
//
// A [Spec] says what a daemon listens on, its [ecdysis.Options], and its plan:
// what it does at which [Point]. Start starts the first process of a [Chain];
// its successors get the specs that follow, and the last spec is for all
// others. So a successor that exits with status 3 before it is ready, while
// clients come and go, is
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
// A process that holds at a point goes on after Resume, and takes calls until
// then:
//
//	a := p.BeginUpgrade()
//	s := a.Successor()
//	s.At(proctest.AtNew)
//	s.Resume()
//	a.OK()
//
// A call that the methods of [Proc] do not have is defined where it is needed.
// Its function runs in the daemon; arguments and results are whatever
// encoding/gob takes. It can be called at once, or planned for a point:
//
//	var setMask = proctest.Define("set mask", func(d *proctest.Daemon, mask int) (int, error) {
//		return syscall.Umask(mask), nil
//	})
//
//	old := setMask.On(p, 0o22)
//	spec := proctest.TCP.At(proctest.AtStart, setMask.Do(0o77))
//
// Errors keep what they are: errors.Is finds the package's sentinels, errno
// values and the errors that KnownError has named, and errors.As finds an
// *ecdysis.UpgradeError. Its State stays nil, because no process state can be
// sent; [How] has its text.
//
// Each daemon answers a line with its process ID and generation, over TCP,
// Unix sockets and UDP. [Program] runs daemons that are programs of their own
// and tell by log lines what they do. [Peer] and [Raw] speak the protocol frame
// by frame.
//
// Nothing in this package waits for time to pass. A wait ends with the event
// that it is for, or fails the test after [Patience].
package proctest
