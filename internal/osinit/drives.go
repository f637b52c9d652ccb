package osinit

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// bindDrive mounts a folder of a drive of Windows, which WSL has mounted, where WSL has it: a share of a
// distribution is one by its target, below /mnt. shareMu is held.
func (m *machine) bindDrive(s vmwire.Mount) error {
	name, ok := strings.CutPrefix(s.Target, vmwire.DistributionDrives+"/")
	if drive, _, _ := strings.Cut(name, "/"); !ok || len(drive) != 1 || drive < "a" || drive > "z" {
		return fault.New(fault.Invalid, "cannot mount a share at %s: in a distribution it is below %s/c, or another drive", s.Target, vmwire.DistributionDrives)
	}
	from, err := unix.Openat2(m.drives, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fault.New(fault.NotFound, "cannot mount the share %s: there is no such folder on Windows' drives, or WSL does not mount the drive (automount in /etc/wsl.conf)", s.Target)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot reach the share %s: %w", s.Target, err)
	}
	defer unix.Close(from)
	if err := os.MkdirAll(s.Target, 0o755); err != nil {
		return fault.New(fault.Conflict, "cannot mount a share at %s: %w", s.Target, err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", from), s.Target, "", unix.MS_BIND, ""); err != nil {
		return fault.New(fault.Internal, "cannot mount the share %s: %w", s.Target, err)
	}
	var flags uintptr = unix.MS_NODEV | unix.MS_NOSUID
	if s.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", s.Target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		return errors.Join(fault.New(fault.Internal, "cannot protect the share %s: %w", s.Target, err), unix.Unmount(s.Target, unix.MNT_DETACH))
	}
	return nil
}
