//go:build !windows

package cli

import "syscall"

// apart lets a program outlive this one and its terminal.
func apart() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }
