package spec

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/api"
)

// volumes gives a service's mounts. Plain ones go as binds, which make a missing
// host folder as Docker's do; what needs more goes as mounts.
func volumes(p *types.Project, s *types.ServiceConfig, o *Options) (binds []string, mounts []mount.Mount, err error) {
	taken := map[string]bool{}
	declared := s.Volumes
	for _, m := range o.Inherit {
		if v, ok := inherited(s, o, m); ok {
			mounts = append(mounts, v)
			taken[m.Destination] = true
		}
	}
	for _, v := range declared {
		if taken[v.Target] && v.Source == "" {
			continue
		}
		if bind, ok := asBind(p, &v); ok {
			binds = append(binds, bind)
		} else {
			m, err := asMount(p, &v)
			if err != nil {
				return nil, nil, err
			}
			mounts = append(mounts, m)
		}
		taken[v.Target] = true
	}
	files, err := fileMounts(p, s)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range files {
		if !taken[m.Target] {
			mounts = append(mounts, m)
		}
	}
	return binds, mounts, nil
}

// inherited hands an anonymous volume on from the container that is replaced.
func inherited(s *types.ServiceConfig, o *Options, m container.MountPoint) (mount.Mount, bool) {
	if m.Type != mount.TypeVolume {
		return mount.Mount{}, false
	}
	_, ok := o.ImageVolumes[m.Destination]
	for _, v := range s.Volumes {
		if v.Target == m.Destination {
			ok = v.Source == "" && v.Type == types.VolumeTypeVolume
		}
	}
	return mount.Mount{Type: m.Type, Source: m.Name, Target: m.Destination, ReadOnly: !m.RW}, ok
}

func asBind(p *types.Project, v *types.ServiceVolumeConfig) (string, bool) {
	source := v.Source
	switch v.Type {
	case types.VolumeTypeBind:
		if b := v.Bind; b != nil && (!bool(b.CreateHostPath) || b.Propagation != "" || b.Recursive != "") {
			return "", false
		}
		source = absolute(source)
	case types.VolumeTypeVolume:
		if o := v.Volume; o != nil && (len(o.Labels) > 0 || o.Subpath != "" || o.NoCopy) {
			return "", false
		}
		vol, ok := p.Volumes[source]
		if !ok || source == "" {
			return "", false
		}
		source = vol.Name
	default:
		return "", false
	}
	// A colon cannot be written in this form.
	if strings.Contains(source, ":") || strings.Contains(v.Target, ":") {
		return "", false
	}
	opts := []string{"rw"}
	if v.ReadOnly {
		opts[0] = "ro"
	}
	if v.Bind != nil && v.Bind.SELinux != "" {
		opts = append(opts, v.Bind.SELinux)
	}
	return source + ":" + v.Target + ":" + strings.Join(opts, ","), true
}

func asMount(p *types.Project, v *types.ServiceVolumeConfig) (mount.Mount, error) {
	m := mount.Mount{Type: mount.Type(v.Type), Source: v.Source, Target: v.Target, ReadOnly: v.ReadOnly, Consistency: mount.Consistency(v.Consistency)}
	switch v.Type {
	case types.VolumeTypeBind:
		m.Source = absolute(m.Source)
		if b := v.Bind; b != nil {
			m.BindOptions = &mount.BindOptions{Propagation: mount.Propagation(b.Propagation), CreateMountpoint: bool(b.CreateHostPath),
				NonRecursive: b.Recursive == "disabled", ReadOnlyNonRecursive: b.Recursive == "writable", ReadOnlyForceRecursive: b.Recursive == "readonly"}
		}
	case types.VolumeTypeVolume:
		if vol, ok := p.Volumes[v.Source]; ok && v.Source != "" {
			m.Source = vol.Name
		}
		if o := v.Volume; o != nil {
			m.VolumeOptions = &mount.VolumeOptions{NoCopy: o.NoCopy, Labels: o.Labels, Subpath: o.Subpath}
		}
	case types.VolumeTypeTmpfs:
		m.Source = ""
		if o := v.Tmpfs; o != nil {
			m.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: int64(o.Size), Mode: os.FileMode(o.Mode)}
		}
	case types.VolumeTypeImage:
		if o := v.Image; o != nil {
			m.ImageOptions = &mount.ImageOptions{Subpath: o.SubPath}
		}
	case types.VolumeTypeCluster:
		return m, fmt.Errorf("the volume at %s is of type cluster, which needs a swarm", v.Target)
	case types.VolumeTypeNamedPipe:
		return m, fmt.Errorf("the volume at %s is a named pipe of Windows", v.Target)
	default:
		return m, fmt.Errorf("the volume at %s has the unknown type %q", v.Target, v.Type)
	}
	return m, nil
}

func absolute(p string) string {
	if path.IsAbs(p) || filepath.IsAbs(p) {
		return p
	}
	if abs, err := filepath.Abs(p); err == nil {
		return abs
	}
	return p
}

// File is a secret or config whose content is copied into the container before
// it starts, because no file of the host holds it.
type File struct {
	Target   string
	Content  string
	Mode     int64
	UID, GID string
}

// fileMounts are the secrets and configs that are files of the host.
func fileMounts(p *types.Project, s *types.ServiceConfig) ([]mount.Mount, error) {
	var out []mount.Mount
	add := func(r types.FileReferenceConfig, o types.FileObjectConfig, dir, kind string) error {
		if o.File == "" {
			return nil
		}
		if _, err := os.Stat(o.File); errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s %q: the file %s does not exist", kind, r.Source, o.File)
		}
		out = append(out, mount.Mount{Type: mount.TypeBind, Source: absolute(o.File), Target: fileTarget(r, dir), ReadOnly: true, BindOptions: &mount.BindOptions{}})
		return nil
	}
	for _, r := range s.Secrets {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Secrets[r.Source]), "/run/secrets", "secret"); err != nil {
			return nil, err
		}
	}
	for _, r := range s.Configs {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Configs[r.Source]), "/", "config"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func fileTarget(r types.FileReferenceConfig, dir string) string {
	switch {
	case r.Target == "":
		return path.Join(dir, r.Source)
	case !path.IsAbs(r.Target):
		return path.Join(dir, r.Target)
	}
	return path.Clean(r.Target)
}

// Files are the secrets and configs of a service that come from variables or the
// Compose file itself.
func Files(p *types.Project, s *types.ServiceConfig) ([]File, error) {
	var out []File
	add := func(r types.FileReferenceConfig, o types.FileObjectConfig, dir, kind string) error {
		if o.File != "" || bool(o.External) {
			return nil
		}
		content := o.Content
		if content == "" && o.Environment != "" {
			v, ok := p.Environment[o.Environment]
			if !ok {
				return fmt.Errorf("cannot use %s %q: the environment variable %q is not set", kind, r.Source, o.Environment)
			}
			content = v
		}
		f := File{Target: fileTarget(r, dir), Content: content, Mode: 0o444, UID: r.UID, GID: r.GID}
		if r.Mode != nil {
			f.Mode = int64(*r.Mode)
		}
		out = append(out, f)
		return nil
	}
	for _, r := range s.Secrets {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Secrets[r.Source]), "/run/secrets", "secret"); err != nil {
			return nil, err
		}
	}
	for _, r := range s.Configs {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Configs[r.Source]), "/", "config"); err != nil {
			return nil, err
		}
	}
	if len(out) > 0 && s.ReadOnly {
		return nil, fmt.Errorf("cannot put %s into service %q: its root file system is read-only; keep it in a file instead", out[0].Target, s.Name)
	}
	return out, nil
}

// kept are the secrets and configs that the engine itself keeps: external ones.
func kept(p *types.Project, s *types.ServiceConfig) ([]api.SecretRef, error) {
	var out []api.SecretRef
	add := func(r types.FileReferenceConfig, o types.FileObjectConfig, kind api.SecretKind, dir string) error {
		if !bool(o.External) {
			return nil
		}
		ref := api.SecretRef{Kind: kind, Name: o.Name, Target: fileTarget(r, dir)}
		for _, v := range []struct {
			text string
			to   *uint32
		}{{r.UID, &ref.UID}, {r.GID, &ref.GID}} {
			if v.text == "" {
				continue
			}
			n, err := strconv.ParseUint(v.text, 10, 32)
			if err != nil {
				return fmt.Errorf("%s %q: the owner %q is not a number", kind, r.Source, v.text)
			}
			*v.to = uint32(n)
		}
		if r.Mode != nil {
			m := uint32(*r.Mode)
			ref.Mode = &m
		}
		out = append(out, ref)
		return nil
	}
	for _, r := range s.Secrets {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Secrets[r.Source]), api.KindSecret, "/run/secrets"); err != nil {
			return nil, err
		}
	}
	for _, r := range s.Configs {
		if err := add(types.FileReferenceConfig(r), types.FileObjectConfig(p.Configs[r.Source]), api.KindConfig, "/"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Sources lists the keys of a project's volumes that a service mounts.
func Sources(p *types.Project, s *types.ServiceConfig) []string {
	set := map[string]bool{}
	for _, v := range s.Volumes {
		if _, ok := p.Volumes[v.Source]; ok && v.Type == types.VolumeTypeVolume {
			set[v.Source] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}
