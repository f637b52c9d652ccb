package host

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// place says where the guest has a path of the host: under the same one, unless the driver knows better.
func (l *live) place(path string) (string, error) {
	if p, ok := l.machine.(vm.Placer); ok {
		return p.Place(path)
	}
	return path, nil
}

// origin says which path of the host the guest has at its own.
func (l *live) origin(path string) (string, error) {
	if p, ok := l.machine.(vm.Placer); ok {
		return p.Origin(path)
	}
	return path, nil
}

// sharesInside are the shares under the guest's paths.
func (l *live) sharesInside() []api.VMShare {
	out := l.shares()
	kept := out[:0]
	for _, s := range out {
		if p, err := l.place(s.Path); err == nil {
			s.Path = p
			kept = append(kept, s)
		}
	}
	return kept
}

// hostPath says whether a client means a folder of its own computer, where that names folders otherwise than
// the guest does: C:\Users, C:/Users. The guest's engine would take it for a volume and an option.
func hostPath(s string) bool {
	return len(s) > 2 && s[1] == ':' && (s[2] == '\\' || s[2] == '/') && s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z'
}

// placeMounts has a request to make a container name folders of the host as the guest does.
func (l *live) placeMounts(body []byte) ([]byte, error) {
	if _, ok := l.machine.(vm.Placer); !ok {
		return body, nil
	}
	var all, hc map[string]json.RawMessage
	if json.Unmarshal(body, &all) != nil {
		return body, nil // the engine says better what is wrong
	}
	where, ok := field(all, "HostConfig")
	if !ok || json.Unmarshal(all[where], &hc) != nil || hc == nil {
		return body, nil
	}
	shares := l.sharesInside()
	changed := false
	translate := func(source string) (string, error) {
		p, err := l.place(source)
		if err != nil {
			return "", err
		}
		changed = true
		return spelled(shares, p), nil
	}
	if key, ok := field(hc, "Binds"); ok {
		var binds []string
		if json.Unmarshal(hc[key], &binds) != nil {
			return body, nil
		}
		for i, b := range binds {
			if !hostPath(b) {
				continue
			}
			rest, more, found := strings.Cut(b[2:], ":")
			if !found {
				return nil, fault.New(fault.Invalid, "cannot mount %q: it names no folder of the container", b)
			}
			p, err := translate(b[:2] + rest)
			if err != nil {
				return nil, err
			}
			binds[i] = p + ":" + more
		}
		if err := set(hc, key, binds); err != nil {
			return nil, err
		}
	}
	if key, ok := field(hc, "Mounts"); ok {
		var mounts []map[string]json.RawMessage
		if json.Unmarshal(hc[key], &mounts) != nil {
			return body, nil
		}
		for _, m := range mounts {
			var kind, source string
			for name, to := range map[string]*string{"Type": &kind, "Source": &source} {
				if k, ok := field(m, name); ok && json.Unmarshal(m[k], to) != nil {
					return body, nil
				}
			}
			if mount.Type(kind) != mount.TypeBind || !hostPath(source) {
				continue
			}
			p, err := translate(source)
			if err != nil {
				return nil, err
			}
			k, _ := field(m, "Source")
			if err := set(m, k, p); err != nil {
				return nil, err
			}
		}
		if err := set(hc, key, mounts); err != nil {
			return nil, err
		}
	}
	if !changed {
		return body, nil
	}
	if err := set(all, where, hc); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// field finds an object's field as the engine does: by its name, or else however it is written.
func field(m map[string]json.RawMessage, name string) (string, bool) {
	if _, ok := m[name]; ok {
		return name, true
	}
	for k := range m {
		if strings.EqualFold(k, name) {
			return k, true
		}
	}
	return "", false
}

func set(m map[string]json.RawMessage, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot pass the request on: %w", err)
	}
	m[key] = b
	return nil
}

// isInside says whether a path of the guest is in one of the shares, which are under the guest's paths.
func isInside(shares []api.VMShare, path string) bool {
	return slices.ContainsFunc(shares, func(s api.VMShare) bool {
		return path == s.Path || strings.HasPrefix(path, strings.TrimSuffix(s.Path, "/")+"/")
	})
}

// spelled writes a path in a share as the share is: Windows does not mind, the guest does.
func spelled(shares []api.VMShare, path string) string {
	for _, s := range shares {
		if n := len(s.Path); len(path) >= n && strings.EqualFold(path[:n], s.Path) && (len(path) == n || path[n] == '/') {
			return s.Path + path[n:]
		}
	}
	return path
}
