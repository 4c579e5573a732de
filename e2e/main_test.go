// Package e2e tests the promises of ecdysis on real processes. Each file is
// about one concern; what the tests share is package proctest.
package e2e

import (
	"testing"

	"github.com/ecdysis-go/ecdysis/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }
