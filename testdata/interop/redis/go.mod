module github.com/ecdysis-go/ecdysis/testdata/interop/redis

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/redis/go-redis/v9 v9.22.0
	github.com/tidwall/redcon v1.6.4
)

require (
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/tidwall/btree v1.1.0 // indirect
	github.com/tidwall/match v1.1.1 // indirect
	go.uber.org/atomic v1.11.0 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/ecdysis-go/ecdysis => ../../..
