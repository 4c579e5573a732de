module github.com/ecdysis-go/ecdysis/examples/quicd

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/quic-go/quic-go v0.61.0
	golang.org/x/net v0.56.0
)

require (
	golang.org/x/crypto v0.54.0 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../..
