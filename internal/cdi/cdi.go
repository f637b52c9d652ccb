// Package cdi gives containers devices described by the Container Device
// Interface: --device vendor.com/class=name, and --gpus through whatever spec of a
// GPU vendor the host has. Specs are read when a container asks for a device and
// let go at once, so that an engine nobody asks holds nothing. The engine imports it.
package cdi

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// DefaultDirs are where specs lie; later ones win.
func DefaultDirs() []string { return []string{"/etc/cdi", "/var/run/cdi"} }

// Injector adds devices to specs.
type Injector struct{ dirs []string }

// New makes an injector; nil dirs are the default ones. Nothing is read yet.
func New(dirs []string) *Injector {
	if dirs == nil {
		dirs = DefaultDirs()
	}
	return &Injector{dirs: slices.Clone(dirs)}
}

// Dirs are where specs are looked for, the later ones before the earlier.
func (i *Injector) Dirs() []string { return slices.Clone(i.dirs) }

// gpuVendors are asked in this order where a request names no driver.
var gpuVendors = []struct{ driver, kind string }{
	{"nvidia", "nvidia.com/gpu"}, {"amd", "amd.com/gpu"}, {"intel", "intel.com/gpu"},
}

// Wanted splits a host configuration: which CDI devices and device requests are
// in it, and which plain device mappings remain. --device with a qualified name
// comes as a request of driver "cdi" from newer clients, as a mapping from others.
func Wanted(hc *container.HostConfig) (requests []container.DeviceRequest, plain []container.DeviceMapping) {
	requests = slices.Clone(hc.DeviceRequests)
	for _, d := range hc.Devices {
		if parser.IsQualifiedName(d.PathOnHost) {
			requests = append(requests, container.DeviceRequest{Driver: "cdi", DeviceIDs: []string{d.PathOnHost}})
			continue
		}
		plain = append(plain, d)
	}
	return requests, plain
}

// Validate refuses requests that are wrong whatever the host has.
func Validate(requests []container.DeviceRequest) error {
	for _, r := range requests {
		if r.Driver == "cdi" {
			switch {
			case r.Count != 0:
				return fault.New(fault.Invalid, "unexpected count in CDI device request")
			case len(r.Options) > 0:
				return fault.New(fault.Invalid, "unexpected options in CDI device request")
			}
			for _, id := range r.DeviceIDs {
				if _, _, _, err := parser.ParseQualifiedName(id); err != nil {
					return fault.New(fault.Invalid, "invalid CDI device name: %w", err)
				}
			}
			continue
		}
		if r.Count != 0 && len(r.DeviceIDs) > 0 {
			return fault.New(fault.Invalid, "cannot set both Count and DeviceIDs on device request")
		}
		if r.Count < -1 || r.Count > 1024 {
			return fault.New(fault.Invalid, "invalid count %d of devices: use -1 for all", r.Count)
		}
	}
	return nil
}

// Inject adds the requested devices to the spec: nodes, mounts, variables, hooks.
// Nothing is changed when it fails.
func (i *Injector) Inject(ctx context.Context, spec *specs.Spec, requests []container.DeviceRequest) error {
	if len(requests) == 0 {
		return nil
	}
	if err := Validate(requests); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(i.dirs...))
	if err != nil {
		return fault.New(fault.Internal, "cannot read CDI specs: %w", err)
	}
	var names []string
	for _, r := range requests {
		if r.Driver == "cdi" {
			names = append(names, r.DeviceIDs...)
			continue
		}
		gpu, err := i.gpus(cache, r)
		if err != nil {
			return err
		}
		names = append(names, gpu...)
	}
	names = compact(names)
	if len(names) == 0 {
		return nil
	}
	// Edits go on a copy of what they touch: an edit may fail half way, as nodes
	// are looked up one by one.
	trial := shallow(spec)
	if unresolved, err := cache.InjectDevices(trial, names...); err != nil {
		if len(unresolved) > 0 {
			return fault.New(fault.Invalid, "CDI device injection failed: unresolvable CDI devices %s: no spec in %s names them%s",
				strings.Join(unresolved, ", "), strings.Join(i.dirs, ", "), broken(cache))
		}
		return fault.New(fault.Invalid, "CDI device injection failed: %w", err)
	}
	*spec = *trial
	return nil
}

// broken tells of specs that could not be read, which may be why a name is unknown.
func broken(cache *cdi.Cache) string {
	var errs []string
	all := cache.GetErrors()
	for _, path := range slices.Sorted(maps.Keys(all)) {
		errs = append(errs, errors.Join(all[path]...).Error())
	}
	if len(errs) == 0 {
		return ""
	}
	return " (" + strings.Join(errs, "; ") + ")"
}

// gpus turns a --gpus request into device names of the vendor that fits.
func (i *Injector) gpus(cache *cdi.Cache, r container.DeviceRequest) ([]string, error) {
	sets := r.Capabilities
	if len(sets) == 0 && r.Driver == "" {
		return nil, fault.New(fault.Invalid, "invalid device request: it names neither a driver nor a capability")
	}
	var kind string
	have := cache.ListDevices()
	for _, v := range gpuVendors {
		if r.Driver != "" && r.Driver != v.driver {
			continue
		}
		if r.Driver == "" && !wants(sets, v.driver) {
			continue
		}
		if slices.ContainsFunc(have, func(d string) bool { return strings.HasPrefix(d, v.kind+"=") }) {
			kind = v.kind
			break
		}
	}
	if kind == "" {
		return nil, fault.New(fault.Invalid, "could not select device driver %q with capabilities: %v: no CDI spec of a GPU in %s; for NVIDIA make one with: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
			r.Driver, sets, strings.Join(i.dirs, ", "))
	}
	switch {
	case r.Count == -1 || r.Count == 0 && len(r.DeviceIDs) == 0:
		if slices.Contains(have, kind+"=all") {
			return []string{kind + "=all"}, nil
		}
		return slices.DeleteFunc(have, func(d string) bool { return !strings.HasPrefix(d, kind+"=") }), nil
	case len(r.DeviceIDs) > 0:
		out := make([]string, len(r.DeviceIDs))
		for n, id := range r.DeviceIDs {
			if out[n] = id; !parser.IsQualifiedName(id) {
				out[n] = kind + "=" + id
			}
		}
		return out, nil
	}
	out := make([]string, r.Count)
	for n := range out {
		out[n] = kind + "=" + strconv.Itoa(n)
		if !slices.Contains(have, out[n]) {
			return nil, fault.New(fault.Invalid, "cannot give %d GPUs: the CDI specs of this host know no device %s", r.Count, out[n])
		}
	}
	return out, nil
}

// wants tells whether one of the alternatives is met by a GPU of the vendor.
func wants(sets [][]string, vendor string) bool {
	for _, set := range sets {
		gpu, other := false, false
		for _, c := range set {
			switch c {
			case "gpu":
				gpu = true
			case "nvidia", "amd", "intel":
				other = other || c != vendor
				gpu = gpu || c == vendor
			case "compute", "compat32", "graphics", "utility", "video", "display":
			default:
				other = true
			}
		}
		if gpu && !other {
			return true
		}
	}
	return false
}

func compact(names []string) []string {
	var out []string
	for _, n := range names {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// shallow copies a spec so far as CDI edits write to it.
func shallow(s *specs.Spec) *specs.Spec {
	c := *s
	c.Mounts = slices.Clone(s.Mounts)
	c.Annotations = maps.Clone(s.Annotations)
	if s.Process != nil {
		p := *s.Process
		p.Env = slices.Clone(p.Env)
		p.User.AdditionalGids = slices.Clone(p.User.AdditionalGids)
		c.Process = &p
	}
	if s.Hooks != nil {
		h := *s.Hooks
		h.Prestart, h.CreateRuntime = slices.Clone(h.Prestart), slices.Clone(h.CreateRuntime)
		h.CreateContainer, h.StartContainer = slices.Clone(h.CreateContainer), slices.Clone(h.StartContainer)
		h.Poststart, h.Poststop = slices.Clone(h.Poststart), slices.Clone(h.Poststop)
		c.Hooks = &h
	}
	if s.Linux != nil {
		l := *s.Linux
		l.Devices, l.NetDevices = slices.Clone(l.Devices), maps.Clone(l.NetDevices)
		if l.Resources != nil {
			r := *l.Resources
			r.Devices = slices.Clone(r.Devices)
			l.Resources = &r
		}
		if l.IntelRdt != nil {
			rdt := *l.IntelRdt
			l.IntelRdt = &rdt
		}
		c.Linux = &l
	}
	return &c
}

// Devices lists what the host's specs offer, for system info; broken specs are
// in err, beside what the others offer.
func (i *Injector) Devices(context.Context) (names []string, err error) {
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(i.dirs...))
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read CDI specs: %w", err)
	}
	names = cache.ListDevices()
	slices.Sort(names)
	if all := cache.GetErrors(); len(all) > 0 {
		err = fault.New(fault.Invalid, "cannot read some CDI specs%s", broken(cache))
	}
	return names, err
}
