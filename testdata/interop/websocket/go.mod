module github.com/ecdysis-go/ecdysis/testdata/interop/websocket

go 1.25.0

require github.com/ecdysis-go/ecdysis v0.0.0

require (
	github.com/coder/websocket v1.8.15
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
