package vm

import (
	"net"
	"path/filepath"
	"time"
)

// LockHeld tells whether a machine lives: its monitor's socket, beside the lock,
// answers. Files are not inherited here.
func LockHeld(path string) (bool, error) {
	c, err := net.DialTimeout("unix", filepath.Join(filepath.Dir(path), "monitor.sock"), time.Second)
	if err != nil {
		return false, nil
	}
	c.Close()
	return true, nil
}
