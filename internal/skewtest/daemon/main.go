// Daemon is what package skewtest builds with another version of package ecdysis.
package main

import (
	"github.com/ecdysis-go/ecdysis/internal/proctest"
	_ "github.com/ecdysis-go/ecdysis/internal/skewtest" // defines calls
)

func main() { proctest.Main(nil) }
