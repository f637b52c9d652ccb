package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Bounds of a configuration.
const (
	minMemoryMiB = 512
	minDiskGiB   = 1
	maxDiskGiB   = 64 << 10
	maxCPUs      = 255
	maxShares    = 16
	maxIdle      = 30 * 24 * 3600
)

// Computer is what defaults depend on.
type Computer struct {
	CPUs      int
	MemoryMiB int
	Home      string
}

// Defaults are the settings of who chose none: all processors up to 8, half the
// memory up to 8 GiB, a sparse disk of 64 GiB, the home folder shared.
func Defaults(c Computer) api.VMConfig {
	d := api.VMConfig{Version: 1, CPUs: max(1, min(c.CPUs, 8)), MemoryMiB: max(1024, min(c.MemoryMiB/2, 8192)), DiskGiB: 64, IdleSeconds: 300, OffSeconds: 3600}
	if c.Home != "" && Shareable(c.Home) == nil {
		d.Shares = []api.VMShare{{Path: filepath.Clean(c.Home)}}
	}
	return d
}

// Validate checks a configuration against the computer.
func Validate(c api.VMConfig, host Computer) error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }
	switch {
	case c.Version != 1:
		return bad("the configuration is of version %d, this program knows 1", c.Version)
	case c.CPUs < 1 || c.CPUs > maxCPUs:
		return bad("%d processors are not between 1 and %d", c.CPUs, maxCPUs)
	case host.CPUs > 0 && c.CPUs > host.CPUs:
		return bad("%d processors are more than this computer's %d", c.CPUs, host.CPUs)
	case c.MemoryMiB < minMemoryMiB:
		return bad("%d MiB of memory are less than the %d that the machine needs", c.MemoryMiB, minMemoryMiB)
	case host.MemoryMiB > 0 && c.MemoryMiB > host.MemoryMiB:
		return bad("%d MiB of memory are more than this computer's %d", c.MemoryMiB, host.MemoryMiB)
	case c.DiskGiB < minDiskGiB || c.DiskGiB > maxDiskGiB:
		return bad("a disk of %d GiB is not between %d and %d", c.DiskGiB, minDiskGiB, maxDiskGiB)
	case c.IdleSeconds < 0 || c.IdleSeconds > maxIdle || c.OffSeconds < 0 || c.OffSeconds > maxIdle:
		return bad("an idle time is between 0 (never) and 30 days")
	case c.IdleSeconds > 0 && c.IdleSeconds < 5:
		return bad("an idle time of %d s is shorter than 5", c.IdleSeconds)
	case len(c.Shares) > maxShares:
		return bad("%d shared folders are more than %d: share a folder that holds several", len(c.Shares), maxShares)
	case c.Driver != "" && !slices.Contains([]string{"qemu", "vfkit", "hyperv", "wsl2"}, c.Driver):
		return bad("there is no driver %q: qemu, vfkit (macOS), hyperv or wsl2 (Windows)", c.Driver)
	case c.Image != "" && !filepath.IsAbs(c.Image):
		return bad("the image's folder %q is no absolute path", c.Image)
	}
	for i, s := range c.Shares {
		if err := Shareable(s.Path); err != nil {
			return err
		}
		for _, o := range c.Shares[:i] {
			if o.Path == s.Path {
				return bad("%s is shared twice", s.Path)
			}
			if within(s.Path, o.Path) || within(o.Path, s.Path) {
				return bad("%s and %s are inside each other: share the outer one alone", o.Path, s.Path)
			}
		}
	}
	return nil
}

// reserved are folders of the guest itself: a share there would cover them.
var reserved = []string{"/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr", "/var"}

// Shareable says whether the machine can have the host's folder under its path.
func Shareable(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsAny(path, "\x00\n,") || len(path) > 400 {
		return fault.New(fault.Invalid, "cannot share %q: a shared folder is a clean absolute path without commas", path)
	}
	if runtime.GOOS == "windows" {
		return nil
	}
	for _, r := range reserved {
		if path == r || (r != "/" && within(path, r)) {
			return fault.New(fault.Invalid, "cannot share %s: the machine has a %s of its own", path, r)
		}
	}
	return nil
}

// within reports whether path is below dir.
func within(path, dir string) bool {
	return strings.HasPrefix(path, strings.TrimSuffix(dir, string(filepath.Separator))+string(filepath.Separator))
}

// Shared finds the share that a host path is in.
func Shared(shares []api.VMShare, path string) (api.VMShare, bool) {
	for _, s := range shares {
		if path == s.Path || within(path, s.Path) {
			return s, true
		}
	}
	return api.VMShare{}, false
}

// Change applies ch to c. The disk never shrinks.
func Change(c api.VMConfig, ch api.VMChange, host Computer) (api.VMConfig, error) {
	c.Shares = slices.Clone(c.Shares)
	if ch.CPUs != nil {
		c.CPUs = *ch.CPUs
	}
	if ch.MemoryMiB != nil {
		c.MemoryMiB = *ch.MemoryMiB
	}
	if ch.DiskGiB != nil {
		if *ch.DiskGiB < c.DiskGiB {
			return c, fault.New(fault.Invalid, "cannot shrink the disk from %d to %d GiB: it takes of the host's disk only what is used; to begin anew with a smaller one, use 'servin vm reset'", c.DiskGiB, *ch.DiskGiB)
		}
		c.DiskGiB = *ch.DiskGiB
	}
	if ch.IdleSeconds != nil {
		c.IdleSeconds = *ch.IdleSeconds
	}
	if ch.OffSeconds != nil {
		c.OffSeconds = *ch.OffSeconds
	}
	if ch.Image != nil {
		c.Image = *ch.Image
	}
	if ch.Driver != nil {
		c.Driver = *ch.Driver
	}
	for _, p := range ch.Unshare {
		i := slices.IndexFunc(c.Shares, func(s api.VMShare) bool { return s.Path == p })
		if i < 0 {
			return c, fault.New(fault.NotFound, "%s is not shared", p)
		}
		c.Shares = slices.Delete(c.Shares, i, i+1)
	}
	for _, s := range ch.Shares {
		if fi, err := os.Stat(s.Path); err != nil || !fi.IsDir() {
			return c, fault.New(fault.Invalid, "cannot share %s: it is no folder", s.Path)
		}
		if i := slices.IndexFunc(c.Shares, func(o api.VMShare) bool { return o.Path == s.Path }); i >= 0 {
			c.Shares[i] = s
		} else {
			c.Shares = append(c.Shares, s)
		}
	}
	return c, Validate(c, host)
}

// LoadConfig reads dir/config.json; without one the defaults hold.
func LoadConfig(dir string, host Computer) (api.VMConfig, error) {
	path := filepath.Join(dir, "config.json")
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Defaults(host), nil
	}
	if err != nil {
		return api.VMConfig{}, fmt.Errorf("cannot read the machine's configuration: %w", err)
	}
	c, err := ParseConfig(raw)
	if err == nil {
		err = Validate(c, Computer{}) // a computer may have lost memory since
	}
	if err != nil {
		return api.VMConfig{}, fault.New(fault.Invalid, "cannot use %s: %w; mend or remove it", path, err)
	}
	c.CPUs = min(c.CPUs, max(1, host.CPUs))
	return c, nil
}

// ParseConfig decodes a configuration strictly.
func ParseConfig(raw []byte) (api.VMConfig, error) {
	var c api.VMConfig
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, err
	}
	if d.More() {
		return c, errors.New("more than one document")
	}
	return c, nil
}

// SaveConfig writes it, whole or not at all.
func SaveConfig(dir string, c api.VMConfig) error {
	return WriteJSON(filepath.Join(dir, "config.json"), c)
}
