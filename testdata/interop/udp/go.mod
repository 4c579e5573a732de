module github.com/ecdysis-go/ecdysis/testdata/interop/udp

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/pion/dtls/v3 v3.0.10
	github.com/plgd-dev/go-coap/v3 v3.4.1
	github.com/quic-go/quic-go v0.61.0
	golang.org/x/net v0.56.0
)

require (
	github.com/dsnet/golib/memfile v1.0.0 // indirect
	github.com/pion/logging v0.2.4 // indirect
	github.com/pion/transport/v4 v4.0.1 // indirect
	go.uber.org/atomic v1.11.0 // indirect
	golang.org/x/crypto v0.54.0 // indirect
	golang.org/x/exp v0.0.0-20240904232852-e7e105dedf7e // indirect
	golang.org/x/sync v0.22.0 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
