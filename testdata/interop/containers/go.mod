module github.com/ecdysis-go/ecdysis/testdata/interop/containers

go 1.25.0

require (
	github.com/ecdysis-go/ecdysis v0.0.0
	github.com/moby/profiles/seccomp v0.3.0
	github.com/opencontainers/runtime-spec v1.2.1
)

require golang.org/x/sys v0.47.0

replace github.com/ecdysis-go/ecdysis => ../../..
