package upload

import (
	"os"

	"golang.org/x/sys/unix"
)

// nameless makes a file that goes with its descriptor.
func nameless(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return named(dir) // a file system without such files
	}
	return os.NewFile(uintptr(fd), "context"), nil
}

func freeSpace(f *os.File) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, os.NewSyscallError("fstatfs", err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}
