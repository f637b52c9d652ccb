package notation

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
)

// IsCDI reports whether a device is a CDI name: vendor.com/class=name.
func IsCDI(s string) bool {
	kind, name, ok := strings.Cut(s, "=")
	if !ok || name == "" || strings.HasPrefix(s, "/") {
		return false
	}
	vendor, class, ok := strings.Cut(kind, "/")
	return ok && vendor != "" && class != "" && !strings.Contains(class, "/")
}

// Device reads --device: host[:container][:permissions].
func Device(s string) (container.DeviceMapping, error) {
	d := container.DeviceMapping{CgroupPermissions: "rwm"}
	parts := strings.Split(s, ":")
	switch len(parts) {
	case 1:
	case 2:
		if permissions(parts[1]) {
			d.CgroupPermissions = parts[1]
		} else {
			d.PathInContainer = parts[1]
		}
	case 3:
		d.PathInContainer = parts[1]
		if !permissions(parts[2]) {
			return d, fmt.Errorf("device %q: permissions %q are not made of r, w, m", s, parts[2])
		}
		d.CgroupPermissions = parts[2]
	default:
		return d, fmt.Errorf("device %q: write host[:container][:permissions]", s)
	}
	d.PathOnHost = parts[0]
	if d.PathInContainer == "" {
		d.PathInContainer = d.PathOnHost
	}
	if !strings.HasPrefix(d.PathOnHost, "/") || !strings.HasPrefix(d.PathInContainer, "/") {
		return d, fmt.Errorf("device %q: a path is not absolute", s)
	}
	return d, nil
}

// permissions reports whether s is made of r, w and m, each at most once.
func permissions(s string) bool {
	if s == "" {
		return false
	}
	for i, c := range s {
		if !strings.ContainsRune("rwm", c) || strings.ContainsRune(s[:i], c) {
			return false
		}
	}
	return true
}

// DeviceRule checks a device cgroup rule: a|b|c major:minor permissions.
func DeviceRule(s string) (string, error) {
	bad := fmt.Errorf("device rule %q: write 'c 42:* rmw'", s)
	f := strings.Fields(s)
	if len(f) != 3 || len(f[0]) != 1 || !strings.Contains("abc", f[0]) || !permissions(f[2]) {
		return "", bad
	}
	major, minor, ok := strings.Cut(f[1], ":")
	for _, n := range []string{major, minor} {
		if _, err := strconv.ParseUint(n, 10, 32); !ok || err != nil && n != "*" {
			return "", bad
		}
	}
	return strings.Join(f, " "), nil
}

// GPUs reads --gpus: all, a count, or CSV of device=, count=, driver=,
// capabilities=, options=.
func GPUs(s string) (container.DeviceRequest, error) {
	r := container.DeviceRequest{Options: map[string]string{}}
	bad := func(format string, a ...any) (container.DeviceRequest, error) {
		return container.DeviceRequest{}, fmt.Errorf("gpus %q: %s", s, fmt.Sprintf(format, a...))
	}
	fs, err := fields(s)
	if err != nil {
		return bad("%v", err)
	}
	seen := map[string]bool{}
	for _, f := range fs {
		k, v, has := strings.Cut(f, "=")
		if !has {
			k, v = "count", f
		}
		if seen[k] {
			return bad("%s is given twice", k)
		}
		seen[k] = true
		switch k {
		case "driver":
			r.Driver = v
		case "count":
			if v == "all" {
				r.Count = -1
			} else if r.Count, err = strconv.Atoi(v); err != nil {
				return bad("%q is neither a number nor all", v)
			}
		case "device":
			r.DeviceIDs = strings.Split(v, ",")
		case "capabilities":
			r.Capabilities = [][]string{append(strings.Split(v, ","), "gpu")}
		case "options":
			of, err := fields(v)
			if err != nil {
				return bad("%v", err)
			}
			if r.Options, err = Map(of); err != nil {
				return bad("%v", err)
			}
		default:
			return bad("unknown key %q", k)
		}
	}
	if len(r.DeviceIDs) > 0 && seen["count"] {
		return bad("count and device exclude each other")
	}
	if len(r.DeviceIDs) == 0 && !seen["count"] {
		r.Count = 1
	}
	if r.Capabilities == nil {
		r.Capabilities = [][]string{{"gpu"}}
	}
	return r, nil
}
