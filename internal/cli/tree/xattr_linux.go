package tree

import (
	"bytes"
	"errors"

	"golang.org/x/sys/unix"
)

// xattrs are a file's extended attributes, but those of security modules, whose
// meaning is the host's.
func xattrs(path string) (map[string]string, error) {
	list := make([]byte, 4096)
	n, err := unix.Llistxattr(path, list)
	for errors.Is(err, unix.ERANGE) {
		list = make([]byte, 2*len(list))
		n, err = unix.Llistxattr(path, list)
	}
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, name := range bytes.Split(bytes.TrimSuffix(list[:n], []byte{0}), []byte{0}) {
		key := string(name)
		if key == "security.selinux" || key == "security.apparmor" || key == "security.ima" || key == "security.evm" {
			continue
		}
		val := make([]byte, 1024)
		n, err := unix.Lgetxattr(path, key, val)
		for errors.Is(err, unix.ERANGE) {
			val = make([]byte, 8*len(val))
			n, err = unix.Lgetxattr(path, key, val)
		}
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[key] = string(val[:n])
	}
	return out, nil
}
