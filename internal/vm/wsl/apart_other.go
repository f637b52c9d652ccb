//go:build !windows

package wsl

import (
	"os/exec"
	"syscall"
)

// apart keeps a command from signals that are typed at ours: it outlives us.
func apart(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

// program is found on Windows alone.
func program() string { return "wsl.exe" }
