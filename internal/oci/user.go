package oci

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strconv"

	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// maxDatabase bounds /etc/passwd and /etc/group of an image.
const maxDatabase = 16 << 20

// LookupUser finds a user ("", "name", "uid", "name:group", "uid:gid") and
// additional groups in the image below root, an open directory or detached
// mount. The user's primary group comes first among the additional ones. home is
// "/" where the image knows no better. An image need not have the files: then
// only numbers are known. Errors carry fault.Invalid.
func LookupUser(root *os.File, name string, groupAdd []string) (u specs.User, home string, err error) {
	passwd, err := readInRoot(root, "etc/passwd")
	if err != nil {
		return u, "", err
	}
	group, err := readInRoot(root, "etc/group")
	if err != nil {
		return u, "", err
	}
	found, err := user.GetExecUser(name, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return u, "", fault.As(fault.Invalid, err)
	}
	u.UID, u.GID = uint32(found.Uid), uint32(found.Gid)
	u.AdditionalGids = []uint32{u.GID}
	more := found.Sgids
	if len(groupAdd) > 0 {
		add, err := user.GetAdditionalGroups(groupAdd, bytes.NewReader(group))
		if err != nil {
			return u, "", fault.As(fault.Invalid, err)
		}
		more = append(more, add...)
	}
	for _, g := range more {
		if g < 0 || int64(g) > 1<<32-2 {
			return u, "", fault.New(fault.Invalid, "cannot use group %s: no such group id", strconv.Itoa(g))
		}
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	home = found.Home
	if home == "" || home[0] != '/' {
		home = "/"
	}
	return u, home, nil
}

// readInRoot reads a file of a hostile tree: links stay inside the root, only a
// regular file is opened, and its size is bounded. A missing file is empty.
func readInRoot(root *os.File, name string) ([]byte, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := openat2(int(root.Fd()), name, &how)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, nil
	case err != nil:
		return nil, fault.New(fault.Invalid, "cannot open /%s of the image: %w", name, err)
	}
	defer unix.Close(fd)
	// The descriptor is a mere reference until its type is known: opening a fifo
	// would wait and opening a device could do anything.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fault.New(fault.Internal, "cannot read /%s of the image: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fault.New(fault.Invalid, "cannot read /%s of the image: it is no regular file", name)
	}
	if st.Size > maxDatabase {
		return nil, fault.New(fault.Invalid, "cannot read /%s of the image: larger than %d MiB", name, maxDatabase>>20)
	}
	f, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read /%s of the image: %w", name, err)
	}
	defer f.Close()
	data := make([]byte, 0, st.Size+1)
	buf := bytes.NewBuffer(data)
	if _, err := io.Copy(buf, io.LimitReader(f, maxDatabase+1)); err != nil {
		return nil, fault.New(fault.Internal, "cannot read /%s of the image: %w", name, err)
	}
	if buf.Len() > maxDatabase {
		return nil, fault.New(fault.Invalid, "cannot read /%s of the image: larger than %d MiB", name, maxDatabase>>20)
	}
	return buf.Bytes(), nil
}

// openat2 repeats a lookup that raced with a rename, a bounded number of times.
func openat2(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	for range 64 {
		fd, err = unix.Openat2(dir, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
	return -1, err
}
