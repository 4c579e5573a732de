package ecdysis

import (
	"os"
	"os/signal"
)

// Wait acts on signals until this process is to end: it upgrades on one of
// Options.UpgradeSignals, stops on one of StopSignals, and ends accepting on
// one of PartialStopSignals. It returns the event that ended it: EventUpgraded,
// EventStopping or EventPartialStop, also if another goroutine's call of
// Upgrade or Stop was the cause. The caller then finishes what is in flight
// and exits; after EventPartialStop it calls Stop first.
//
// A failed upgrade goes to Options.Notify, and Wait goes on. So does a signal
// to upgrade that comes during an upgrade, with ErrInProgress. One that comes
// before Ready waits for it. Without signals in Options, Wait waits for a call
// of Upgrade or Stop. Of several calls of Wait each gets the signals to stop,
// and one of them each signal to upgrade.
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
	var upgrades chan os.Signal // nil until there is something to upgrade
	ready := u.ready
	running := 0
	done := make(chan struct{})
	for {
		select {
		case <-ready:
			ready, upgrades = nil, u.signals
		case s := <-upgrades:
			running++
			go func() {
				defer func() { done <- struct{}{} }()
				err := u.upgrade(Event{Signal: s})
				switch _, attempted := err.(*UpgradeError); {
				case err == nil, attempted, err == ErrUpgraded, err == ErrStopped:
				default:
					u.notify(Event{Kind: EventUpgradeFailed, Signal: s, Err: err})
				}
			}()
		case <-done:
			running--
		case s := <-stops:
			u.stop(Event{Signal: s})
		case s := <-partials:
			u.partialStop(Event{Signal: s})
		case <-u.over:
			for ; running > 0; running-- {
				<-done
			}
			u.mu.Lock()
			defer u.mu.Unlock()
			return u.last
		}
	}
}
