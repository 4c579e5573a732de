module github.com/ecdysis-go/ecdysis/testdata/interop/ssh

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/gliderlabs/ssh v0.3.8
	golang.org/x/crypto v0.55.0
)

require (
	github.com/anmitsu/go-shlex v0.0.0-20200514113438-38f4b401e2be // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
