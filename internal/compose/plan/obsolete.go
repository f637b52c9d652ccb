package plan

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// obsolete says why a container has to be made anew, "" if it has not.
func (u *up) obsolete(s types.ServiceConfig, c *container.Summary, policy Policy) (string, error) {
	switch policy {
	case Never:
		return "", nil
	case Force:
		return "asked for", nil
	}
	for _, d := range References(&s) {
		if u.remade[d] && !slices.ContainsFunc(s.Links, func(l string) bool { return l == d || strings.HasPrefix(l, d+":") }) {
			return "it shares with " + d + ", which is made anew", nil
		}
	}
	r, err := Resolve(s, func(d string) (string, bool) { return First(u.o.Containers, d) })
	if errors.Is(err, errNoContainer) {
		return "what it shares is gone", nil
	}
	if err != nil {
		return "", err
	}
	h, err := model.ServiceHash(r)
	if err != nil {
		return "", err
	}
	if c.Labels[model.LabelHash] != h {
		return "its configuration changed", nil
	}
	if l := c.Labels[model.LabelConfigs]; l != "" {
		if h, err = model.ConfigsHash(u.p, &s); err != nil {
			return "", err
		}
		if l != h {
			return "what its configs say changed", nil
		}
	}
	image := model.ImageName(&s, u.p.Name, u.opt.Separator)
	if id := u.o.Images[image]; id != "" && c.Labels[model.LabelImage] != "" && c.Labels[model.LabelImage] != id {
		return "its image changed", nil
	}
	for _, key := range slices.Sorted(maps.Keys(s.Networks)) {
		if u.fresh[key] {
			return "its network changed", nil
		}
		if c.State == container.StateRunning && len(u.rejoin[c.ID]) == 0 && !connected(c, u.o.Networks[key].ID) {
			return "it is not on network " + u.p.Networks[key].Name, nil
		}
	}
	for _, v := range s.Volumes {
		vol, named := u.p.Volumes[v.Source]
		if v.Type != types.VolumeTypeVolume || !named {
			continue
		}
		if u.freshVolumes[v.Source] || !slices.ContainsFunc(c.Mounts, func(m container.MountPoint) bool { return m.Type == mount.TypeVolume && m.Name == vol.Name }) {
			return "its volume " + vol.Name + " changed", nil
		}
	}
	return "", nil
}

func connected(c *container.Summary, id string) bool {
	if c.NetworkSettings == nil {
		return false
	}
	for _, e := range c.NetworkSettings.Networks {
		if e != nil && e.NetworkID == id {
			return true
		}
	}
	return false
}

// name: those with which it shares a namespace or volumes, or to which it links.
func References(s *types.ServiceConfig) []string {
	var out []string
	for _, m := range []string{s.NetworkMode, s.Ipc, s.Pid} {
		if d, ok := strings.CutPrefix(m, types.ServicePrefix); ok {
			out = append(out, d)
		}
	}
	for _, v := range s.VolumesFrom {
		if !strings.HasPrefix(v, types.ContainerPrefix) {
			d, _, _ := strings.Cut(v, ":")
			out = append(out, d)
		}
	}
	for _, l := range s.Links {
		d, _, _ := strings.Cut(l, ":")
		out = append(out, d)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

var errNoContainer = errors.New("container missing")

// Resolve gives a copy of s in which references to services are containers.
func Resolve(s types.ServiceConfig, first func(service string) (id string, ok bool)) (types.ServiceConfig, error) {
	mode := func(what, m string) (string, error) {
		d, ok := strings.CutPrefix(m, types.ServicePrefix)
		if !ok {
			return m, nil
		}
		id, ok := first(d)
		if !ok {
			return "", fmt.Errorf("cannot share %s namespace with service %s: %w", what, d, errNoContainer)
		}
		return types.ContainerPrefix + id, nil
	}
	var err error
	if s.NetworkMode, err = mode("network", s.NetworkMode); err != nil {
		return s, err
	}
	if s.Ipc, err = mode("IPC", s.Ipc); err != nil {
		return s, err
	}
	if s.Pid, err = mode("PID", s.Pid); err != nil {
		return s, err
	}
	s.VolumesFrom = slices.Clone(s.VolumesFrom)
	for i, v := range s.VolumesFrom {
		if c, ok := strings.CutPrefix(v, types.ContainerPrefix); ok {
			s.VolumesFrom[i] = c
			continue
		}
		d, access, has := strings.Cut(v, ":")
		id, ok := first(d)
		if !ok {
			return s, fmt.Errorf("cannot share volume with service %s: %w", d, errNoContainer)
		}
		if s.VolumesFrom[i] = id; has && access != "rw" {
			s.VolumesFrom[i] += ":" + access
		}
	}
	return s, nil
}

// First finds the container that references to a service mean.
func First(list []container.Summary, service string) (string, bool) {
	var best *container.Summary
	for i := range list {
		c := &list[i]
		if model.Service(c) == service && !model.IsOneOff(c) && (best == nil || model.Name(c) < model.Name(best)) {
			best = c
		}
	}
	if best == nil {
		return "", false
	}
	return best.ID, true
}
