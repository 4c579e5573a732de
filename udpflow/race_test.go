//go:build race

package udpflow

func raceEnabled() bool { return true }
