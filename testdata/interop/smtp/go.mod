module github.com/ecdysis-go/ecdysis/testdata/interop/smtp

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/emersion/go-smtp v0.26.0
)

require (
	github.com/emersion/go-sasl v0.0.0-20241020182733-b788ff22d5a6 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
