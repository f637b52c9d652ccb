package volume

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Point is a place in a container where something is to be mounted, as the
// request asked for it. It is kept in the container's record.
type Point struct {
	Type mount.Type
	// Name of a volume, "" for an anonymous one until it is created.
	Name string `json:",omitempty"`
	// Source is the host path of a bind, or the reference of an image. For a
	// volume it is where its data lies, once known.
	Source string `json:",omitempty"`
	Target string
	// ImageID is the image that Source meant when the container was made; it is kept
	// for the container.
	ImageID string `json:",omitempty"`
	// Mode is the option list as it was given, for inspect.
	Mode     string `json:",omitempty"`
	ReadOnly bool   `json:",omitempty"`

	Propagation                                                mount.Propagation `json:",omitempty"`
	NonRecursive, ReadOnlyNonRecursive, ReadOnlyForceRecursive bool              `json:",omitempty"`
	// CreateSource makes a missing source directory of a bind.
	CreateSource bool `json:",omitempty"`
	// NoCopy leaves an empty volume empty instead of copying what the image has there.
	NoCopy bool `json:",omitempty"`
	// Subpath mounts that part of a volume or image; it is resolved beneath it.
	Subpath    string            `json:",omitempty"`
	Driver     string            `json:",omitempty"`
	DriverOpts map[string]string `json:",omitempty"`
	Labels     map[string]string `json:",omitempty"`
	// Options of a tmpfs.
	Options []string `json:",omitempty"`
	// Relabel is "z" (shared) or "Z" (private) SELinux relabelling.
	Relabel string `json:",omitempty"`
	// Chown gives the source to the container's user; IDMap maps its owners.
	Chown, IDMap bool `json:",omitempty"`
	// FromImage marks an anonymous volume of Config.Volumes; Inherited one of
	// VolumesFrom, whose content is never filled from the image.
	FromImage, Inherited bool `json:",omitempty"`
}

// MountPoint describes the point for inspect.
func (p Point) MountPoint() container.MountPoint {
	m := container.MountPoint{
		Type: p.Type, Name: p.Name, Source: p.Source, Destination: p.Target,
		Driver: p.Driver, Mode: p.Mode, RW: !p.ReadOnly, Propagation: p.Propagation,
	}
	if p.Type == mount.TypeVolume && m.Mode == "" {
		m.Mode = "z"
	}
	return m
}

func invalid(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

// modes are the parsed options of "source:target:options".
type modes struct {
	readOnly, noCopy, noCopySet, chown, idmap bool
	relabel                                   string
	propagation                               mount.Propagation
	nonRecursive                              bool
}

// parseModes refuses unknown options and two of one kind.
func parseModes(s string) (m modes, ok bool) {
	if s == "" {
		return m, true
	}
	seen := map[string]bool{}
	for o := range strings.SplitSeq(s, ",") {
		kind := o
		switch o {
		case "ro", "rw":
			kind, m.readOnly = "rw", o == "ro"
		case "z", "Z":
			kind, m.relabel = "label", o
		case "private", "rprivate", "slave", "rslave", "shared", "rshared":
			kind, m.propagation = "propagation", mount.Propagation(o)
		case "nocopy":
			m.noCopy, m.noCopySet = true, true
		case "consistent", "cached", "delegated":
			kind = "consistency" // meant for other platforms, accepted and without effect
		case "U":
			m.chown = true
		case "idmap":
			m.idmap = true
		case "bind", "rbind":
			kind, m.nonRecursive = "bind", o == "bind"
		default:
			return modes{}, false
		}
		if seen[kind] {
			return modes{}, false
		}
		seen[kind] = true
	}
	return m, true
}

// ParseBind reads an entry of HostConfig.Binds: "target", "source:target" or
// "source:target:options". An absolute source is a path of the host, anything
// else a volume's name.
func ParseBind(spec, driver string) (Point, error) {
	f := strings.SplitN(spec, ":", 4)
	var mode string
	p := Point{Type: mount.TypeVolume}
	var src string
	switch {
	case f[0] == "" || len(f) > 3:
		return p, invalid("invalid volume specification: '%s'", spec)
	case len(f) == 1:
		p.Target = f[0]
	case len(f) == 2:
		if _, ok := parseModes(f[1]); ok {
			return p, invalid("invalid volume specification: '%s'", spec)
		}
		src, p.Target = f[0], f[1]
	default:
		src, p.Target, mode = f[0], f[1], f[2]
	}
	m, ok := parseModes(mode)
	if !ok {
		return p, invalid("invalid mode: %s", mode)
	}
	target, err := cleanTarget(p.Target)
	if err != nil {
		return p, invalid("invalid volume specification: '%s': %w", spec, err)
	}
	p.Target, p.Mode, p.ReadOnly = target, mode, m.readOnly
	p.Relabel, p.Chown, p.IDMap = m.relabel, m.chown, m.idmap
	if path.IsAbs(src) {
		if m.noCopySet {
			return p, invalid("invalid volume specification: '%s': nocopy is for volumes", spec)
		}
		p.Type, p.Source, p.CreateSource = mount.TypeBind, path.Clean(src), true
		p.NonRecursive = m.nonRecursive
		if p.Propagation = m.propagation; p.Propagation == "" {
			p.Propagation = mount.PropagationRPrivate
		}
		return p, nil
	}
	if m.propagation != "" {
		return p, invalid("invalid mount config for type \"volume\": '%s': propagation is for bind mounts", spec)
	}
	if src != "" {
		if err := validName(src); err != nil {
			return p, err
		}
	}
	p.Name, p.NoCopy, p.Driver = src, m.noCopy, driver
	return p, nil
}

func cleanTarget(t string) (string, error) {
	switch {
	case t == "":
		return "", errors.New("field Target must not be empty")
	case strings.ContainsRune(t, 0):
		return "", errors.New("invalid mount path: it contains a NUL byte")
	case !path.IsAbs(t):
		return "", fmt.Errorf("invalid mount path: '%s' mount path must be absolute", t)
	case path.Clean(t) == "/":
		return "", errors.New("invalid specification: destination can't be '/'")
	}
	return path.Clean(t), nil
}

// FromMount reads an entry of HostConfig.Mounts.
func FromMount(m mount.Mount) (Point, error) {
	p, err := fromMount(m)
	if err != nil {
		return Point{}, invalid("invalid mount config for type %q: %w", m.Type, err)
	}
	return p, nil
}

func fromMount(m mount.Mount) (Point, error) {
	for _, o := range []struct {
		name string
		set  bool
		of   mount.Type
	}{
		{"BindOptions", m.BindOptions != nil, mount.TypeBind},
		{"VolumeOptions", m.VolumeOptions != nil, mount.TypeVolume},
		{"ImageOptions", m.ImageOptions != nil, mount.TypeImage},
		{"TmpfsOptions", m.TmpfsOptions != nil, mount.TypeTmpfs},
		{"ClusterOptions", m.ClusterOptions != nil, mount.TypeCluster},
	} {
		if o.set && m.Type != o.of {
			return Point{}, fmt.Errorf("field %s must not be specified", o.name)
		}
	}
	target, err := cleanTarget(m.Target)
	if err != nil {
		return Point{}, err
	}
	if strings.ContainsRune(m.Source, 0) {
		return Point{}, errors.New("invalid source: it contains a NUL byte")
	}
	p := Point{Type: m.Type, Target: target, ReadOnly: m.ReadOnly}
	switch m.Type {
	case mount.TypeBind:
		return bindPoint(p, m)
	case mount.TypeVolume:
		return volumePoint(p, m)
	case mount.TypeTmpfs:
		if m.Source != "" {
			return p, errors.New("field Source must not be specified")
		}
		p.Options, err = tmpfsOptions(m.TmpfsOptions)
		return p, err
	case mount.TypeImage:
		if m.Source == "" {
			return p, errors.New("field Source must not be empty")
		}
		p.Source, p.Propagation = m.Source, mount.PropagationRPrivate
		if o := m.ImageOptions; o != nil && o.Subpath != "" {
			if p.Subpath = o.Subpath; !filepath.IsLocal(o.Subpath) {
				return p, errors.New("subpath must be a relative path within the volume")
			}
		}
		return p, nil
	}
	return p, errors.New("mount type unknown")
}

func bindPoint(p Point, m mount.Mount) (Point, error) {
	switch {
	case m.Source == "":
		return p, errors.New("field Source must not be empty")
	case !path.IsAbs(m.Source):
		return p, fmt.Errorf("invalid mount path: '%s' mount path must be absolute", m.Source)
	}
	p.Source, p.Propagation = path.Clean(m.Source), mount.PropagationRPrivate
	if o := m.BindOptions; o != nil {
		if o.Propagation != "" {
			if !slices.Contains(mount.Propagations, o.Propagation) {
				return p, fmt.Errorf("invalid propagation mode: %s", o.Propagation)
			}
			p.Propagation = o.Propagation
		}
		if o.ReadOnlyNonRecursive && o.ReadOnlyForceRecursive {
			return p, errors.New("mount options conflict: ReadOnlyNonRecursive && ReadOnlyForceRecursive")
		}
		p.NonRecursive, p.CreateSource = o.NonRecursive, o.CreateMountpoint
		p.ReadOnlyNonRecursive, p.ReadOnlyForceRecursive = o.ReadOnlyNonRecursive, o.ReadOnlyForceRecursive
	}
	return p, nil
}

func volumePoint(p Point, m mount.Mount) (Point, error) {
	p.Name = m.Source
	if m.Source != "" {
		if err := validName(m.Source); err != nil {
			return p, err
		}
	}
	o := m.VolumeOptions
	if o == nil {
		return p, nil
	}
	p.NoCopy, p.Labels, p.Subpath = o.NoCopy, maps.Clone(o.Labels), o.Subpath
	if o.Subpath != "" {
		if m.Source == "" {
			return p, errors.New("must not set Subpath when using anonymous volumes")
		}
		if !filepath.IsLocal(o.Subpath) {
			return p, errors.New("subpath must be a relative path within the volume")
		}
	}
	if d := o.DriverConfig; d != nil {
		p.Driver, p.DriverOpts = d.Name, maps.Clone(d.Options)
	}
	return p, nil
}

func tmpfsOptions(o *mount.TmpfsOptions) ([]string, error) {
	if o == nil {
		return nil, nil
	}
	var out []string
	if o.Mode != 0 {
		if o.Mode > 0o7777 {
			return nil, fmt.Errorf("invalid tmpfs mode %o", o.Mode)
		}
		out = append(out, fmt.Sprintf("mode=%o", o.Mode))
	}
	if o.SizeBytes < 0 {
		return nil, fmt.Errorf("invalid tmpfs size %d", o.SizeBytes)
	}
	if o.SizeBytes != 0 {
		out = append(out, fmt.Sprintf("size=%d", o.SizeBytes))
	}
	for _, kv := range o.Options {
		if len(kv) != 1 || kv[0] != "exec" && kv[0] != "noexec" {
			return nil, fmt.Errorf("invalid option: %s", strings.Join(kv, "="))
		}
		out = append(out, kv[0])
	}
	return out, nil
}

// ParseVolumesFrom reads an entry of HostConfig.VolumesFrom: a container's name
// or id and perhaps ":ro", ":rw" or a relabelling.
func ParseVolumesFrom(spec string) (container string, readOnly bool, err error) {
	name, mode, _ := strings.Cut(spec, ":")
	if name == "" {
		return "", false, invalid("volumes-from specification cannot be an empty string")
	}
	m, ok := parseModes(mode)
	if !ok || m.propagation != "" || m.noCopySet || m.chown || m.idmap {
		return "", false, invalid("invalid mode: %s", mode)
	}
	return name, m.readOnly, nil
}

// Resolve lists a container's mount points in Docker's precedence. Volumes of
// other containers (from) come first, Binds replace those, Mounts and Tmpfs too;
// two of the latter at one place are a "Duplicate mount point". Directories that
// Config.Volumes names get an anonymous volume where nothing else is mounted.
func Resolve(cfg *container.Config, hc *container.HostConfig, from func(container string) ([]Point, error)) ([]Point, error) {
	var order []string
	at := map[string]Point{}
	asked := map[string]bool{}
	put := func(p Point) {
		if _, ok := at[p.Target]; !ok {
			order = append(order, p.Target)
		}
		at[p.Target] = p
	}
	ask := func(p Point) error {
		if asked[p.Target] {
			return invalid("Duplicate mount point: %s", p.Target)
		}
		asked[p.Target] = true
		put(p)
		return nil
	}

	for _, spec := range hc.VolumesFrom {
		name, readOnly, err := ParseVolumesFrom(spec)
		if err != nil {
			return nil, err
		}
		points, err := from(name)
		if err != nil {
			return nil, err
		}
		for _, p := range points {
			if p.Type != mount.TypeVolume && p.Type != mount.TypeBind {
				continue
			}
			p.ReadOnly = p.ReadOnly || readOnly
			p.Inherited, p.FromImage, p.NoCopy = true, false, true
			p.Chown, p.Relabel = false, "" // it is the other container's
			put(p)
		}
	}
	for _, b := range hc.Binds {
		p, err := ParseBind(b, hc.VolumeDriver)
		if err != nil {
			return nil, err
		}
		if err := ask(p); err != nil {
			return nil, err
		}
	}
	for _, m := range hc.Mounts {
		p, err := FromMount(m)
		if err != nil {
			return nil, err
		}
		if err := ask(p); err != nil {
			return nil, err
		}
	}
	for _, dst := range slices.Sorted(maps.Keys(hc.Tmpfs)) {
		target, err := cleanTarget(dst)
		if err != nil {
			return nil, invalid("invalid tmpfs %q: %w", dst, err)
		}
		p := Point{Type: mount.TypeTmpfs, Target: target}
		if o := hc.Tmpfs[dst]; o != "" {
			p.Options = strings.Split(o, ",")
		}
		if err := ask(p); err != nil {
			return nil, err
		}
	}
	for _, dst := range slices.Sorted(maps.Keys(cfg.Volumes)) {
		target, err := cleanTarget(dst)
		if err != nil {
			return nil, invalid("invalid volume %q: %w", dst, err)
		}
		if _, ok := at[target]; !ok {
			put(Point{Type: mount.TypeVolume, Target: target, FromImage: true, Driver: hc.VolumeDriver})
		}
	}
	out := make([]Point, len(order))
	for i, t := range order {
		out[i] = at[t]
	}
	return out, nil
}
