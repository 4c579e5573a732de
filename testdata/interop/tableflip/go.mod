module github.com/ecdysis-go/ecdysis/testdata/interop/tableflip

go 1.25.0

require (
	github.com/cloudflare/tableflip v1.2.3
	github.com/ecdysis-go/ecdysis v0.0.0
)

require golang.org/x/sys v0.47.0 // indirect

replace github.com/ecdysis-go/ecdysis => ../../..
