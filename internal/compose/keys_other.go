//go:build !linux

package compose

import (
	"errors"
	"os"
)

// singleKeys needs the terminal of Linux.
func singleKeys(*os.File) (restore func(), err error) { return nil, errors.ErrUnsupported }
