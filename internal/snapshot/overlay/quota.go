package overlay

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// quotas hands out project ids for size-limited layers. The file system counts
// what carries the id and refuses more than the limit.
type quotas struct {
	mu   sync.Mutex
	used map[uint32]struct{}
}

// firstProject keeps clear of ids that administrators give by hand.
const firstProject = 0x53560000

func (q *quotas) taken(id uint32) {
	if id == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used == nil {
		q.used = map[uint32]struct{}{}
	}
	q.used[id] = struct{}{}
}

func (q *quotas) allot() uint32 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used == nil {
		q.used = map[uint32]struct{}{}
	}
	for id := uint32(firstProject); ; id++ {
		if _, ok := q.used[id]; !ok {
			q.used[id] = struct{}{}
			return id
		}
	}
}

func (q *quotas) free(id uint32) {
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
	qifBLimits      = 1
)

// set limits upper and work of the layer in dir to limit bytes together.
func (q *quotas) set(dir string, limit int64) (uint32, error) {
	id := q.allot()
	err := setProject(filepath.Join(dir, upperName), id)
	if err == nil {
		err = setProject(filepath.Join(dir, workName), id)
	}
	if err == nil {
		err = setLimit(dir, id, limit)
	}
	if err == nil {
		return id, nil
	}
	q.free(id)
	for _, errno := range []error{unix.ENOTTY, unix.EOPNOTSUPP, unix.ENOSYS, unix.ESRCH, unix.EINVAL, unix.ENOTSUP, unix.EPERM} {
		if errors.Is(err, errno) {
			return 0, fault.New(fault.Unsupported, "cannot limit the size of a container's layer: %w (the engine's root must be on xfs or ext4 mounted with prjquota)", err)
		}
	}
	return 0, err
}

func (q *quotas) drop(dir string, id uint32) {
	_ = setLimit(dir, id, 0)
	q.free(id)
}

func setProject(dir string, id uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	var x fsxattr
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFsgetxattr, uintptr(unsafe.Pointer(&x))); e != 0 {
		return os.NewSyscallError("get project id", e)
	}
	x.projid = id
	x.xflags |= projInherit
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFssetxattr, uintptr(unsafe.Pointer(&x))); e != 0 {
		return os.NewSyscallError("set project id", e)
	}
	return nil
}

func setLimit(dir string, id uint32, limit int64) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	// Units of 1 KiB (QIF_DQBLKSIZE).
	d := dqblk{bhardlimit: uint64(limit+1023) / 1024, valid: qifBLimits}
	d.bsoftlimit = d.bhardlimit
	cmd := uintptr(uint32(qSetQuota)<<8 | prjQuota)
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), cmd, uintptr(id), uintptr(unsafe.Pointer(&d)), 0, 0); e != 0 {
		return os.NewSyscallError("quotactl", e)
	}
	return nil
}
