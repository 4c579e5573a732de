//go:build !plan9

package drain

import "syscall"

// passing has the errors of accept(2) after which the next call may succeed,
// although their Temporary methods return false.
var passing = []error{
	syscall.ECONNABORTED, syscall.ECONNRESET, syscall.ENOBUFS, syscall.ENOMEM, syscall.EPROTO,
}
