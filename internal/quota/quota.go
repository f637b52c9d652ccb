// Package quota limits the size of directories by project ids: the file system
// (xfs, or ext4 with the project feature, mounted with prjquota) counts what
// carries an id and refuses more than its limit. Packages that keep layers and
// volumes import it, each with a range of ids of its own.
package quota

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrUnsupported says that the file system cannot do it.
var ErrUnsupported = errors.New("the file system has no project quotas: it must be xfs or ext4, mounted with prjquota")

// First ids of the ranges, clear of ids that administrators give by hand.
const (
	Layers  = 0x53560000
	Volumes = 0x53570000
	span    = 1 << 16
)

// IDs hands out the ids of a range.
type IDs struct {
	first uint32
	mu    sync.Mutex
	used  map[uint32]bool
	next  uint32
}

// NewIDs makes a range that begins at first.
func NewIDs(first uint32) *IDs { return &IDs{first: first, used: map[uint32]bool{}} }

// Taken notes an id in use.
func (q *IDs) Taken(id uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used[id] = true
	if id >= q.first && id-q.first >= q.next {
		q.next = id - q.first + 1
	}
}

// Allot gives an id that is free, the longest unused first: what a removed
// directory leaves behind is counted to its id until it is deleted.
func (q *IDs) Allot() (uint32, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for range span {
		id := q.first + q.next%span
		q.next = (q.next + 1) % span
		if !q.used[id] {
			q.used[id] = true
			return id, nil
		}
	}
	return 0, errors.New("all project ids are taken")
}

// Free gives an id back.
func (q *IDs) Free(id uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.used, id)
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	pad                                           [8]byte
}

// dqblk is struct if_dqblk of linux/quota.h.
type dqblk struct {
	bhardlimit, bsoftlimit, curspace  uint64
	ihardlimit, isoftlimit, curinodes uint64
	btime, itime                      uint64
	valid                             uint32
	_                                 uint32
}

const (
	fsIocFsgetxattr = 0x801c581f
	fsIocFssetxattr = 0x401c5820
	projInherit     = 0x200
	prjQuota        = 2
	qSetQuota       = 0x800008
	qGetQuota       = 0x800007
	qXGetQStat      = 'X'<<8 | 5
	projectEnforced = 1 << 5 // FS_QUOTA_PDQ_ENFD
	qifBLimits      = 1
)

// Assign gives an empty directory, and what will be made in it, to a project.
func Assign(dir *os.File, id uint32) error {
	var x fsxattr
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), fsIocFsgetxattr, uintptr(unsafe.Pointer(&x))); e != 0 {
		return wrap("get project id", e)
	}
	x.projid = id
	x.xflags |= projInherit
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), fsIocFssetxattr, uintptr(unsafe.Pointer(&x))); e != 0 {
		return wrap("set project id", e)
	}
	return nil
}

// Limit bounds a project of the file system that f is on to so many bytes; 0
// lifts the bound. A file system that would only count is refused.
func Limit(f *os.File, id uint32, bytes int64) error {
	// struct fs_quota_stat of linux/dqblk_xfs.h begins with a version and, at its
	// third byte, the flags.
	var stat [128]byte
	cmd := uintptr(qXGetQStat<<8 | prjQuota)
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), cmd, 0, uintptr(unsafe.Pointer(&stat)), 0, 0); e != 0 {
		return wrap("quotactl", e)
	}
	if binary.NativeEndian.Uint16(stat[2:])&projectEnforced == 0 {
		return ErrUnsupported
	}
	d := dqblk{bhardlimit: uint64(bytes+1023) / 1024, valid: qifBLimits} // units of 1 KiB (QIF_DQBLKSIZE)
	d.bsoftlimit = d.bhardlimit
	return ctl(f, qSetQuota, id, &d)
}

// Used tells how many bytes a project takes.
func Used(f *os.File, id uint32) (int64, error) {
	var d dqblk
	err := ctl(f, qGetQuota, id, &d)
	return int64(d.curspace), err
}

func ctl(f *os.File, op uint32, id uint32, d *dqblk) error {
	cmd := uintptr(op<<8 | prjQuota)
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), cmd, uintptr(id), uintptr(unsafe.Pointer(d)), 0, 0); e != 0 {
		return wrap("quotactl", e)
	}
	return nil
}

func wrap(what string, e unix.Errno) error {
	switch e {
	case unix.ENOTTY, unix.EOPNOTSUPP, unix.ENOSYS, unix.ESRCH, unix.EINVAL, unix.EPERM:
		return ErrUnsupported
	}
	return os.NewSyscallError(what, e)
}
