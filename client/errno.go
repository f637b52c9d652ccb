package client

import "syscall"

// errReset is what a read gives when the peer closed with data unread.
const errReset = syscall.ECONNRESET
