//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ecdysis

import (
	"context"
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
	conn   *net.UnixConn // its client, which waits for a line; nil if there is none
	taker  *stream       // its client, which takes over; nil if a successor is to be started

	passedOn bool // by the predecessor
}

// event returns an event that t has caused.
func (t trigger) event(kind EventKind) *Event {
	return &Event{Kind: kind, Signal: t.signal, Socket: t.socket, PassedOn: t.passedOn}
}

// byWait reports whether a call of Wait acts on t, on a goroutine of its own.
func (t trigger) byWait() bool { return t.signal != nil || t.socket != "" }

// isFromOutside reports whether a process takes over that this process's PID
// namespace does not hold.
func (t trigger) isFromOutside() bool {
	if t.taker == nil {
		return false
	}
	cred, err := PeerCred(t.taker.conn)
	return err == nil && cred.PID == 0
}

// refuse tells the client of a control socket that the upgrade has failed.
func (t trigger) refuse(err error) {
	if t.conn != nil {
		answer(t.conn, "error: "+err.Error())
	}
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
// of Upgrade or Stop. Of several calls of Wait one gets each trigger, and all
// return.
//
// After a takeover (Event.Takeover) this process is another unit's no more, and
// its supervisor may not know: it serves its clients to their end, and then calls
// Wait again, which returns at the next stop, also if that has come meanwhile.
//
// Wait also carries out a stop that the predecessor has passed on: one that came
// to it while this process was taking its place. Without a call of Wait, the next
// call of Upgrade or WaitForParent does.
func (u *Upgrader) Wait() Event {
	u.mu.Lock()
	retired := u.life.last != nil && u.life.last.Takeover
	u.mu.Unlock()
	if retired {
		return u.waitRetired()
	}
	u.catchStops()
	var running sync.WaitGroup // what was started here and has not ended
	ctx, cancel := context.WithCancel(context.Background())
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
			running.Go(func() { u.watch(ctx) })
		case s := <-upgrades:
			running.Go(func() {
				t := trigger{signal: s}
				if err := u.beginUpgrade(t); err != nil {
					u.notifyRefused(t, err)
					return
				}
				_ = u.attempt(t) // its events tell
			})
		case s := <-u.stops:
			u.stop(EventStopping, trigger{signal: s})
		case s := <-u.partialStops:
			u.stop(EventPartialStop, trigger{signal: s})
		case <-u.life.ended:
			cancel()
			running.Wait()
			u.mu.Lock()
			defer u.mu.Unlock()
			return *u.life.last
		}
	}
}

// waitRetired waits for a stop of a process that was taken over.
func (u *Upgrader) waitRetired() Event {
	t := trigger{}
	kind := EventStopping
	select {
	case t.signal = <-u.stops:
	case t.signal = <-u.partialStops:
		kind = EventPartialStop
	case <-u.life.stoppedAfter:
	}
	u.releaseStops()
	return *u.ownEvent(t, kind)
}

// catchStops keeps the signals that stop this process for Wait.
func (u *Upgrader) catchStops() {
	u.mu.Lock()
	ended := u.life.last != nil
	u.mu.Unlock()
	if ended {
		return
	}
	if len(u.opts.StopSignals) > 0 {
		signal.Notify(u.stops, u.opts.StopSignals...)
	}
	if len(u.opts.PartialStopSignals) > 0 {
		signal.Notify(u.partialStops, u.opts.PartialStopSignals...)
	}
}

// releaseStops lets these signals do what they do by default.
func (u *Upgrader) releaseStops() {
	signal.Stop(u.stops)
	signal.Stop(u.partialStops)
}

// takeSignals carries out stops that have come by signals and that no call of
// Wait has seen yet.
func (u *Upgrader) takeSignals() {
	for {
		select {
		case s := <-u.stops:
			u.stop(EventStopping, trigger{signal: s})
		case s := <-u.partialStops:
			u.stop(EventPartialStop, trigger{signal: s})
		default:
			return
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
