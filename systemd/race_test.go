//go:build race

package systemd_test

func init() { raceDetector = true }
