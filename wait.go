package ecdysis

import (
	"net"
	"os"
	"os/signal"
	"sync"
)

// Wait: acting on signals and on control sockets.

// A trigger is what causes an upgrade or a stop. The zero trigger is a call.
type trigger struct {
	signal os.Signal
	socket string        // the path of a control socket
	conn   *net.UnixConn // its client, which waits for a line; nil if there is none, or if it is among lifecycle.stopClients
	taker  *stream       // its client, which takes over; nil if a successor is to be started
}

// event returns an event that t has caused.
func (t trigger) event(kind EventKind) Event {
	return Event{Kind: kind, Signal: t.signal, Socket: t.socket}
}

// refuse tells the client of a control socket that the upgrade has failed.
func (t trigger) refuse(err error) {
	answer(t.conn, "error: "+err.Error())
	if t.taker != nil {
		t.taker.sendFail(err)
		t.taker.close()
	}
}

// Wait acts on signals and on control sockets until this process is to end. It
// upgrades on one of Options.UpgradeSignals or a client of UpgradeSocket,
// stops on one of StopSignals or a client of StopSocket, ends accepting on one
// of PartialStopSignals or a client of PartialStopSocket, and is taken over by
// a client of TakeoverSocket. It returns the event that ended it, with its
// cause: EventUpgraded, EventStopping or EventPartialStop. It also returns when
// another goroutine's call of Upgrade or Stop has ended this process. The caller
// then finishes what is in flight and exits. After EventPartialStop it calls
// Stop first.
//
// A failed upgrade is reported to Options.Notify, and Wait goes on. A trigger
// that comes during an upgrade is reported with ErrInProgress. One that comes
// before Ready waits for it. If Options names no triggers, Wait waits for a call
// of Upgrade or Stop. Of several calls of Wait each gets the signals to stop,
// and one of them each other trigger.
func (u *Upgrader) Wait() Event {
	stops := make(chan os.Signal, 1)
	partials := make(chan os.Signal, 1)
	if len(u.opts.StopSignals) > 0 {
		signal.Notify(stops, u.opts.StopSignals...)
		defer signal.Stop(stops)
	}
	if len(u.opts.PartialStopSignals) > 0 {
		signal.Notify(partials, u.opts.PartialStopSignals...)
		defer signal.Stop(partials)
	}
	var running sync.WaitGroup // what was started here and has not ended
	for _, c := range u.controls {
		if c.serving.TryLock() {
			running.Go(func() {
				defer c.serving.Unlock()
				c.serve(&running)
			})
		}
	}
	var upgrades chan os.Signal // nil until there is something to upgrade
	ready := u.life.ready
	for {
		select {
		case <-ready:
			ready, upgrades = nil, u.signals
		case s := <-upgrades:
			running.Go(func() {
				t := trigger{signal: s}
				if err := u.beginUpgrade(t); err != nil {
					u.notifyRefused(t, err)
					return
				}
				_ = u.attempt(t) // its events tell
			})
		case s := <-stops:
			u.stop(EventStopping, trigger{signal: s})
		case s := <-partials:
			u.stop(EventPartialStop, trigger{signal: s})
		case <-u.life.ended:
			running.Wait()
			u.mu.Lock()
			defer u.mu.Unlock()
			return u.life.last
		}
	}
}

// notifyRefused tells of a trigger that came at the wrong time. Other events
// tell that this process has ended.
func (u *Upgrader) notifyRefused(t trigger, err error) {
	if err == ErrUpgraded || err == ErrStopped {
		return
	}
	e := t.event(EventUpgradeFailed)
	e.Err = err
	u.notify(e)
}
