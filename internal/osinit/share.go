package osinit

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Mount mounts a share of the host's.
func (m *machine) Mount(s vmwire.Mount) error {
	if s.Tag == "" || len(s.Tag) > 36 || strings.ContainsAny(s.Tag, ",\x00/") {
		return fault.New(fault.Invalid, "cannot mount the share %q: this is no tag", s.Tag)
	}
	if !filepath.IsAbs(s.Target) || filepath.Clean(s.Target) != s.Target || s.Target == "/" || strings.ContainsRune(s.Target, 0) {
		return fault.New(fault.Invalid, "cannot mount a share at %q: this is no absolute path", s.Target)
	}
	top, _, _ := strings.Cut(s.Target[1:], "/")
	if slices.Contains([]string{"system", "proc", "sys", "dev", "run", "var", "bin", "sbin", "etc", "lib", "usr", "root"}, top) {
		return fault.New(fault.Conflict, "cannot mount a share at %s: /%s is the machine's own", s.Target, top)
	}
	m.shareMu.Lock()
	defer m.shareMu.Unlock()
	for _, have := range m.Mounts() {
		if have == s {
			return nil
		}
		if have.Target == s.Target {
			return fault.New(fault.Conflict, "cannot mount the share %s at %s: %s is there", s.Tag, s.Target, have.Tag)
		}
	}
	mount := m.mountVirtiofs
	if m.distribution {
		mount = m.bindDrive
	}
	if err := mount(s); err != nil {
		return err
	}
	m.mu.Lock()
	m.mounts = append(m.mounts, s)
	m.mu.Unlock()
	m.change()
	return nil
}

// mountVirtiofs mounts a share that the host has a virtiofs device for. shareMu is held.
func (m *machine) mountVirtiofs(s vmwire.Mount) error {
	if err := m.modules.LoadAll("virtiofs"); err != nil {
		return err
	}
	if err := os.MkdirAll(s.Target, 0o755); err != nil {
		return fault.New(fault.Conflict, "cannot mount a share at %s: %w", s.Target, err)
	}
	var flags uintptr = unix.MS_NODEV | unix.MS_NOSUID
	if s.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(s.Tag, s.Target, "virtiofs", flags, ""); err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
			return fault.New(fault.NotFound, "cannot mount the share %s: the machine has no virtiofs device with this tag", s.Tag)
		}
		return fault.New(fault.Internal, "cannot mount the share %s at %s: %w", s.Tag, s.Target, err)
	}
	return nil
}

// Unmount takes a share away.
func (m *machine) Unmount(target string) error {
	m.shareMu.Lock()
	defer m.shareMu.Unlock()
	i := slices.IndexFunc(m.Mounts(), func(s vmwire.Mount) bool { return s.Target == target })
	if i < 0 {
		return fault.New(fault.NotFound, "no share is mounted at %q", target)
	}
	if err := unix.Unmount(target, 0); err != nil {
		return fault.New(fault.Conflict, "cannot unmount %s: %w", target, err)
	}
	os.Remove(target) // the folder was made for it; others' stay
	m.mu.Lock()
	m.mounts = slices.Delete(m.mounts, i, i+1)
	m.mu.Unlock()
	m.change()
	return nil
}
