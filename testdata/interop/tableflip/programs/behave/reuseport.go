package main

// soReusePort is SO_REUSEPORT of Linux, which package syscall has not on every
// architecture.
const soReusePort = 15
