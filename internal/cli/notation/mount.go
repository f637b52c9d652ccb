package notation

import (
	"encoding/csv"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/mount"
)

// Volume reads -v: [source:]target[:options]. Bind is what the engine takes as a
// bind or named volume, "" when only a target was given (an anonymous volume).
// A source that begins with "." or "~" is made absolute.
func Volume(s, home string) (bind, anonymous string, err error) {
	if s == "" {
		return "", "", fmt.Errorf("a volume needs a target: write [source:]target[:options]")
	}
	parts := splitDrive(s)
	for _, p := range parts {
		if p == "" {
			return "", "", fmt.Errorf("cannot mount %q: a part between colons is empty", s)
		}
	}
	switch len(parts) {
	case 1:
		if !strings.HasPrefix(s, "/") {
			return "", "", fmt.Errorf("cannot mount %q: the target is not an absolute path", s)
		}
		return "", s, nil
	case 2:
		// target:ro without a source is not a thing; source:target is.
	case 3:
	default:
		return "", "", fmt.Errorf("cannot mount %q: too many colons; write [source:]target[:options], or use --mount", s)
	}
	if !strings.HasPrefix(parts[1], "/") {
		return "", "", fmt.Errorf("cannot mount %q: the target %q is not an absolute path", s, parts[1])
	}
	if strings.HasPrefix(parts[0], ".") || parts[0] == "~" || strings.HasPrefix(parts[0], "~/") {
		if parts[0], err = absolute(parts[0], home); err != nil {
			return "", "", err
		}
	}
	return strings.Join(parts, ":"), "", nil
}

// splitDrive splits at colons but for the one of a drive letter (C:\dir).
func splitDrive(s string) []string {
	if len(s) > 2 && s[1] == ':' && (s[2] == '\\' || s[2] == '/') && (s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z') && strings.Count(s, ":") > 1 {
		rest := strings.Split(s[2:], ":")
		rest[0] = s[:2] + rest[0]
		return rest
	}
	return strings.Split(s, ":")
}

func absolute(p, home string) (string, error) {
	if p == "~" || strings.HasPrefix(p, "~/") {
		if home == "" {
			return "", fmt.Errorf("cannot resolve %q: no home directory is known", p)
		}
		p = home + p[1:]
	}
	return filepath.Abs(p)
}

// Mount reads --mount: comma-separated key=value pairs in CSV quoting. What the
// engine's mounts have no field for (U, idmap, relabel) makes it a bind in the
// notation of -v instead.
func Mount(s, home string) (m mount.Mount, bind string, err error) {
	var modes []string
	m, err = readMount(s, home, &modes)
	if err != nil || len(modes) == 0 {
		return m, "", err
	}
	bad := func(why string) (mount.Mount, string, error) {
		return mount.Mount{}, "", fmt.Errorf("cannot mount %q: %s", s, why)
	}
	o := m.BindOptions
	switch {
	case m.Type != mount.TypeBind && m.Type != mount.TypeVolume || m.Source == "":
		return bad("U, idmap and relabel are for binds and named volumes")
	case m.VolumeOptions != nil, o != nil && (o.CreateMountpoint || o.ReadOnlyForceRecursive || o.ReadOnlyNonRecursive):
		return bad("U, idmap and relabel do not go with the other options given")
	case strings.Contains(m.Source+m.Target, ":"):
		return bad("U, idmap and relabel need names without a colon")
	}
	if m.ReadOnly {
		modes = append(modes, "ro")
	}
	if o != nil && o.Propagation != "" {
		modes = append(modes, string(o.Propagation))
	}
	if o != nil && o.NonRecursive {
		modes = append(modes, "bind")
	}
	return mount.Mount{}, m.Source + ":" + m.Target + ":" + strings.Join(modes, ","), nil
}

func readMount(s, home string, modes *[]string) (mount.Mount, error) {
	var m mount.Mount
	bad := func(format string, a ...any) (mount.Mount, error) {
		return mount.Mount{}, fmt.Errorf("cannot mount %q: %s", s, fmt.Sprintf(format, a...))
	}
	fields, err := fields(s)
	if err != nil {
		return bad("%v", err)
	}
	m.Type = mount.TypeVolume
	bind := func() *mount.BindOptions {
		if m.BindOptions == nil {
			m.BindOptions = &mount.BindOptions{}
		}
		return m.BindOptions
	}
	vol := func() *mount.VolumeOptions {
		if m.VolumeOptions == nil {
			m.VolumeOptions = &mount.VolumeOptions{}
		}
		return m.VolumeOptions
	}
	driver := func() *mount.Driver {
		if vol().DriverConfig == nil {
			vol().DriverConfig = &mount.Driver{}
		}
		return vol().DriverConfig
	}
	tmp := func() *mount.TmpfsOptions {
		if m.TmpfsOptions == nil {
			m.TmpfsOptions = &mount.TmpfsOptions{}
		}
		return m.TmpfsOptions
	}
	readonlyForce := false
	for _, f := range fields {
		k, v, has := strings.Cut(f, "=")
		k = strings.ToLower(k)
		on := true
		switch k { // those that may stand alone
		case "readonly", "ro", "volume-nocopy", "bind-nonrecursive", "bind-create-src", "u", "chown", "idmap":
			if has {
				if on, err = strconv.ParseBool(v); err != nil {
					return bad("%s=%s is neither true nor false", k, v)
				}
			}
		default:
			if !has {
				return bad("%q needs a value", k)
			}
		}
		switch k {
		case "type":
			m.Type = mount.Type(strings.ToLower(v))
			if !slices.Contains([]mount.Type{mount.TypeBind, mount.TypeVolume, mount.TypeTmpfs, mount.TypeImage, mount.TypeNamedPipe}, m.Type) {
				return bad("type %q is none of bind, volume, tmpfs, image", v)
			}
		case "source", "src":
			m.Source = v
			if strings.HasPrefix(v, ".") || v == "~" || strings.HasPrefix(v, "~/") {
				if m.Source, err = absolute(v, home); err != nil {
					return bad("%v", err)
				}
			}
		case "target", "destination", "dst":
			m.Target = v
		case "readonly", "ro":
			m.ReadOnly = on
		case "u", "chown":
			if on {
				*modes = append(*modes, "U")
			}
		case "idmap":
			if on {
				*modes = append(*modes, "idmap")
			}
		case "relabel":
			mode, ok := map[string]string{"shared": "z", "private": "Z"}[v]
			if !ok {
				return bad("relabel is shared or private")
			}
			*modes = append(*modes, mode)
		case "consistency":
			m.Consistency = mount.Consistency(strings.ToLower(v))
		case "bind-propagation":
			bind().Propagation = mount.Propagation(strings.ToLower(v))
			if !slices.Contains(mount.Propagations, bind().Propagation) {
				return bad("propagation %q is unknown", v)
			}
		case "bind-nonrecursive":
			bind().NonRecursive = on
		case "bind-create-src":
			bind().CreateMountpoint = on
		case "bind-recursive":
			switch v {
			case "enabled":
			case "disabled":
				bind().NonRecursive = true
			case "writable":
				bind().ReadOnlyNonRecursive = true
			case "readonly":
				bind().ReadOnlyForceRecursive, readonlyForce = true, true
			default:
				return bad("bind-recursive is one of enabled, disabled, writable, readonly")
			}
		case "volume-subpath":
			vol().Subpath = v
		case "volume-nocopy":
			vol().NoCopy = on
		case "volume-label":
			lk, lv, err := KeyValue(v)
			if err != nil {
				return bad("%v", err)
			}
			if vol().Labels == nil {
				vol().Labels = map[string]string{}
			}
			vol().Labels[lk] = lv
		case "volume-driver":
			driver().Name = v
		case "volume-opt":
			ok, ov, err := KeyValue(v)
			if err != nil {
				return bad("%v", err)
			}
			if driver().Options == nil {
				driver().Options = map[string]string{}
			}
			driver().Options[ok] = ov
		case "image-subpath":
			m.ImageOptions = &mount.ImageOptions{Subpath: v}
		case "tmpfs-size":
			if tmp().SizeBytes, err = Bytes(v); err != nil {
				return bad("%v", err)
			}
		case "tmpfs-mode":
			mode, err := strconv.ParseUint(v, 8, 32)
			if err != nil || mode > 07777 {
				return bad("mode %q is not octal", v)
			}
			tmp().Mode = fs.FileMode(mode)
		case "tmpfs-options", "tmpfs-opt":
			for _, o := range strings.Split(v, ":") {
				if a, b, ok := strings.Cut(o, "="); ok {
					tmp().Options = append(tmp().Options, []string{a, b})
				} else {
					tmp().Options = append(tmp().Options, []string{o})
				}
			}
		default:
			return bad("unknown key %q", k)
		}
	}
	if m.Target == "" {
		return bad("target is missing")
	}
	for _, x := range []struct {
		has bool
		of  mount.Type
	}{{m.BindOptions != nil, mount.TypeBind}, {m.VolumeOptions != nil, mount.TypeVolume}, {m.TmpfsOptions != nil, mount.TypeTmpfs}, {m.ImageOptions != nil, mount.TypeImage}} {
		if x.has && x.of != m.Type {
			return bad("%s options do not go with type %s", x.of, m.Type)
		}
	}
	if (m.Type == mount.TypeBind || m.Type == mount.TypeImage) && m.Source == "" {
		return bad("a %s mount needs a source", m.Type)
	}
	if m.Type == mount.TypeTmpfs && m.Source != "" {
		return bad("a tmpfs mount has no source")
	}
	if readonlyForce {
		if !m.ReadOnly {
			return bad("bind-recursive=readonly needs readonly too")
		}
		if p := m.BindOptions.Propagation; p != mount.PropagationRPrivate {
			return bad("bind-recursive=readonly needs bind-propagation=rprivate too")
		}
	}
	return m, nil
}

// fields splits by commas in CSV quoting.
func fields(s string) ([]string, error) {
	if strings.TrimSpace(s) == "" {
		return nil, fmt.Errorf("it is empty")
	}
	r := csv.NewReader(strings.NewReader(s))
	out, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("its quotes do not match")
	}
	return out, nil
}

// Tmpfs reads --tmpfs: target[:options].
func Tmpfs(s string) (target, options string, err error) {
	target, options, _ = strings.Cut(s, ":")
	if !strings.HasPrefix(target, "/") {
		return "", "", fmt.Errorf("cannot mount tmpfs %q: the target is not an absolute path", s)
	}
	return target, options, nil
}
