module github.com/ecdysis-go/ecdysis/testdata/interop/compare

go 1.25.0

require (
	github.com/cloudflare/tableflip v1.2.3
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/fvbock/endless v0.0.0-20170109170031-447134032cb6
	github.com/jpillora/overseer v1.1.6
)

require (
	github.com/StackExchange/wmi v0.0.0-20190523213315-cbe66965904d // indirect
	github.com/go-ole/go-ole v1.2.4 // indirect
	github.com/jpillora/s3 v1.1.4 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
