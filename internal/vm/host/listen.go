package host

import (
	"fmt"
	"net"
	"os"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// listenPrivate binds a socket that only its user may use. Its folder is 0700, so
// it is nobody else's in the moment before its mode is set.
func listenPrivate(path string) (net.Listener, error) {
	if len(path) > 100 {
		return nil, fault.New(fault.Invalid, "the path %s is too long for a socket: set XDG_RUNTIME_DIR or SERVIN_VM_ROOT to a shorter one", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fault.New(fault.Conflict, "somebody serves %s already", path)
	}
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
