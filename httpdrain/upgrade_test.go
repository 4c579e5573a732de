package httpdrain_test

import (
	"strings"
	"testing"
	"time"
)

// testGrace is longer than any client of the load pauses, however busy the
// machine is: two seconds, and six where tests are to be patient.
var testGrace = min(patience/15, 6*time.Second)

const upgrades = 50

// No client of any kind notices fifty upgrades.
func TestUpgradesLoseNothing(t *testing.T) {
	s := startServer(t, byDrainer, testGrace)
	l := startLoad(s, testGrace)
	l.more(5)
	for range upgrades {
		l.quiet()
		s.upgrade()
		l.more(5)
	}
	l.end()
	l.report(t)
	if n, _ := l.failed(everyKind...); n > 0 {
		t.Errorf("%d requests have failed", n)
	}
	for _, kind := range staying {
		if n := l.done[kind]; n < upgrades {
			t.Errorf("%d connections of kind %s have ended well; want %d or more", n, kind, upgrades)
		}
	}
	drained := 0
	for _, line := range s.Said() {
		if strings.Contains(line, "] drained in ") && strings.HasSuffix(line, ": <nil>") {
			drained++
		}
		if strings.Contains(line, "panic") {
			t.Error(line)
		}
	}
	if drained != upgrades+1 {
		t.Errorf("%d servers have drained without an error; want %d; they said:\n%s", drained, upgrades+1, strings.Join(s.Said(), "\n"))
	}
}

// The same clients lose requests by http.Server.Shutdown, so that the Drainer is
// needed.
func TestPlainShutdownLoses(t *testing.T) {
	s := startServer(t, byShutdown, testGrace)
	l := startLoad(s, testGrace)
	l.more(5)
	done, failed := 0, 0
	for failed == 0 && done < upgrades || done < 5 {
		l.quiet()
		s.upgrade()
		l.more(5)
		done++
		failed, _ = l.failed(working...)
	}
	l.end()
	l.report(t)
	if failed == 0 {
		// TestLoadNotices shows that the load itself sees lost requests.
		t.Skipf("http.Server.Shutdown has lost no request in %d upgrades: this Go seems to have mended it", done)
	}
}

// Every kind of client notices a server that drops its connections. So it would
// also notice a Drainer that drops them.
func TestLoadNotices(t *testing.T) {
	s := startServer(t, byClose, testGrace)
	l := startLoad(s, testGrace)
	l.more(5)
	limit := time.Now().Add(patience)
	for {
		l.quiet()
		s.upgrade()
		l.more(5)
		_, spared := l.failed(everyKind...)
		if len(spared) == 0 {
			break
		}
		if time.Now().After(limit) {
			t.Errorf("http.Server.Close goes unnoticed by clients of kind %v", spared)
			break
		}
	}
	l.end()
	l.report(t)
}
