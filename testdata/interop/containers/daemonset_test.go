package containers

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

// pod starts echod as docs/containers.md does.
func pod(t *testing.T, dir, unit string, flags ...string) *kept {
	t.Helper()
	args := []string{"-tcp", "127.0.0.1:0", "-control", "/ctl", "-pidfile", "/run/echod.pid", "-drain", "30s", "-unit", unit}
	k := &kept{c: newContainer(t, program(t, "echod"), append(args, flags...)...)}
	k.c.bind(dir, "/ctl")
	hardened(k.c)
	k.start()
	return k
}

// ready returns when the pod's readiness probe succeeds.
func (k *kept) ready(generation int) {
	k.T.Helper()
	k.address = k.Await(`listening on tcp (\S+)`)[1]
	k.Await(fmt.Sprintf(`ready: .*generation=%d$`, generation))
	if !k.probe() {
		k.T.Fatal("the pod is not ready, although it serves")
	}
}

// probe is the readiness probe of docs/containers.md.
func (k *kept) probe() bool {
	return exists(fmt.Sprintf("/proc/%d/root/run/echod.pid", k.c.pid()))
}

// restarted is what a restart policy does to a container that was killed.
func (k *kept) restarted() {
	k.T.Helper()
	k.c.kill("KILL")
	ended(k.T, k.Program, 137)
	k.start()
}

// deleted is what kubelet does to a pod whose processes end in time.
func (k *kept) deleted() {
	k.T.Helper()
	k.c.kill("TERM")
	ended(k.T, k.Program, 0)
}

// What kubelet does in rolling updates of a DaemonSet with maxSurge: 1, step by
// step, and what a restart policy does to the containers of both pods.
func TestDaemonSet(t *testing.T) {
	t.Parallel()
	dir := proctest.ShortDir(t)
	a := pod(t, dir, "a")
	a.ready(0)
	e := startEchoes(t, a.dial, 2)
	e.more(20)

	// A version that cannot start is restarted again and again. It never
	// becomes ready, so that the old pod stays.
	bad := pod(t, dir, "bad", "-drain", "-1s")
	for range 3 {
		bad.Await("that is not negative")
		ended(t, bad.Program, 1)
		a.Await("upgrade failed by socket")
		e.more(5)
		bad.start()
	}
	ended(t, bad.Program, 1)

	// The mended version takes over. The old pod serves its clients to their
	// end, and is no longer ready.
	client := a.client()
	b := pod(t, dir, "b")
	b.ready(1)
	a.Await("upgraded by socket")
	e.more(20)
	a.answers(client)

	// It is deleted while it drains, which cuts nobody.
	a.c.kill("TERM")
	a.answers(client)
	e.more(20)
	client.Close()
	a.Await("all clients are served")
	ended(t, a.Program, 0)

	// In the next update the old pod's container ends before it is deleted.
	// Restarted, it neither takes back nor serves.
	c := pod(t, dir, "c")
	c.ready(2)
	b.Await("all clients are served")
	for range 3 {
		b.restarted()
		b.Await("this unit has been replaced")
		e.more(20)
		if b.probe() {
			t.Error("a retired pod is ready")
		}
	}
	b.deleted()

	// In another one it is killed while it drains. The one client that it had
	// is cut.
	client = c.client()
	d := pod(t, dir, "d")
	d.ready(3)
	e.more(20)
	c.Await("upgraded by socket")
	c.restarted()
	c.cut(client)
	c.Await("this unit has been replaced")
	c.deleted()
	e.more(20)
	e.check()
	for _, k := range []*kept{a, b, c, bad} {
		if n := strings.Count(strings.Join(k.Said(), "\n"), "ready: "); n > 1 {
			t.Errorf("a unit became ready %d times", n)
		}
	}

	// Nobody serves: a retired unit starts as a first process.
	d.c.kill("KILL")
	ended(t, d.Program, 137)
	again := pod(t, dir, "a")
	again.ready(0)
	if err := echo(again.dial); err != nil {
		t.Error(err)
	}
	again.deleted()
}
