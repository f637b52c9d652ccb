// Package spec turns services, networks and volumes of a Compose project into
// the engine's create requests. It is pure but for seccomp profiles, which it
// reads from the files that a service names. Package engine carries the requests
// out.
package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// Options of Container.
type Options struct {
	Separator string
	// Number is the container's number in its service; 0 for a one-off.
	Number int
	// Labels are added last.
	Labels map[string]string
	// Aliases gives the container the service's names in its networks.
	Aliases bool
	// AttachStdin ends standard input with the one client that attaches.
	AttachStdin bool
	AutoRemove  bool
	// Links are what Links made of the service's.
	Links []string
	// Inherit are the mounts of the container that this one replaces, and
	// ImageVolumes the volumes that the image declares: anonymous volumes are
	// handed on.
	Inherit      []container.MountPoint
	ImageVolumes map[string]struct{}
	Platform     string
}

// Container is the request for one container of a service. References to other
// services must have been resolved to containers.
func Container(p *types.Project, s types.ServiceConfig, name string, o Options) (client.ContainerCreateOptions, error) {
	var out client.ContainerCreateOptions
	fail := func(err error) (client.ContainerCreateOptions, error) {
		return out, fmt.Errorf("cannot use service %q: %w", s.Name, err)
	}
	labels, err := containerLabels(p, &s, &o)
	if err != nil {
		return fail(err)
	}
	exposed, bound, err := ports(&s)
	if err != nil {
		return fail(err)
	}
	health, err := healthcheck(s.HealthCheck)
	if err != nil {
		return fail(err)
	}
	out.Name, out.Platform = name, s.Platform
	if out.Platform == "" {
		out.Platform = o.Platform
	}
	out.Config = &container.Config{
		Hostname: s.Hostname, Domainname: s.DomainName, User: s.User, ExposedPorts: exposed,
		Tty: s.Tty, OpenStdin: s.StdinOpen, StdinOnce: o.AttachStdin && s.StdinOpen, AttachStdin: o.AttachStdin, AttachStdout: true, AttachStderr: true,
		Cmd: s.Command, Entrypoint: s.Entrypoint, Image: model.ImageName(&s, p.Name, o.Separator), WorkingDir: s.WorkingDir,
		NetworkDisabled: s.NetworkMode == "disabled", Labels: labels, StopSignal: s.StopSignal, Env: environment(s.Environment), Healthcheck: health,
	}
	if s.StopGracePeriod != nil {
		sec := int(time.Duration(*s.StopGracePeriod) / time.Second)
		out.Config.StopTimeout = &sec
	}
	binds, mounts, err := volumes(p, &s, &o)
	if err != nil {
		return fail(err)
	}
	mode, nets, err := networks(p, &s, name, &o)
	if err != nil {
		return fail(err)
	}
	out.Networking = nets
	res, err := resources(&s)
	if err != nil {
		return fail(err)
	}
	sec, unconfined, err := securityOptions(p, s.SecurityOpt)
	if err != nil {
		return fail(err)
	}
	dns, err := addresses(s.DNS)
	if err != nil {
		return fail(err)
	}
	h := &container.HostConfig{
		AutoRemove: o.AutoRemove, Annotations: s.Annotations, Binds: binds, Mounts: mounts, CapAdd: s.CapAdd, CapDrop: s.CapDrop, NetworkMode: mode,
		Init: s.Init, IpcMode: container.IpcMode(s.Ipc), CgroupnsMode: container.CgroupnsMode(s.Cgroup), ReadonlyRootfs: s.ReadOnly, RestartPolicy: restartPolicy(&s),
		ShmSize: int64(s.ShmSize), Sysctls: s.Sysctls, PortBindings: bound, Resources: res, VolumeDriver: s.VolumeDriver, VolumesFrom: s.VolumesFrom,
		DNS: dns, DNSSearch: s.DNSSearch, DNSOptions: s.DNSOpts, ExtraHosts: sorted(s.ExtraHosts.AsList(":")), SecurityOpt: sec, StorageOpt: s.StorageOpt,
		UsernsMode: container.UsernsMode(s.UserNSMode), UTSMode: container.UTSMode(s.Uts), Privileged: s.Privileged, PidMode: container.PidMode(s.Pid),
		Tmpfs: tmpfs(s.Tmpfs), Isolation: container.Isolation(s.Isolation), Runtime: s.Runtime, GroupAdd: s.GroupAdd, Links: o.Links, OomScoreAdj: int(s.OomScoreAdj),
		Umask: s.Umask,
	}
	if s.Logging != nil {
		h.LogConfig = container.LogConfig{Type: s.Logging.Driver, Config: s.Logging.Options}
	} else if s.LogDriver != "" {
		h.LogConfig = container.LogConfig{Type: s.LogDriver, Config: s.LogOpt}
	}
	if unconfined {
		h.MaskedPaths, h.ReadonlyPaths = []string{}, []string{}
	}
	out.HostConfig = h
	if out.Extra.Secrets, err = kept(p, &s); err != nil {
		return fail(err)
	}
	return out, nil
}

func containerLabels(p *types.Project, s *types.ServiceConfig, o *Options) (map[string]string, error) {
	labels := map[string]string{}
	maps.Copy(labels, s.Labels)
	maps.Copy(labels, s.CustomLabels)
	maps.Copy(labels, o.Labels)
	h, err := model.ServiceHash(*s)
	if err != nil {
		return nil, err
	}
	labels[model.LabelHash] = h
	if h, err = model.ConfigsHash(p, s); err != nil {
		return nil, err
	} else if h != "" {
		labels[model.LabelConfigs] = h
	}
	if o.Number > 0 {
		labels[model.LabelNumber] = strconv.Itoa(o.Number)
	}
	labels[model.LabelDependsOn] = model.DependsOnLabel(s.DependsOn)
	return labels, nil
}

func environment(m types.MappingWithEquals) []string {
	out := make([]string, 0, len(m))
	for k, v := range m {
		if v == nil {
			out = append(out, k)
		} else {
			out = append(out, k+"="+*v)
		}
	}
	return sorted(out)
}

func sorted(l []string) []string {
	slices.Sort(l)
	return l
}

func addresses(list []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("%q is not an address", s)
		}
		out = append(out, a)
	}
	return out, nil
}

func ports(s *types.ServiceConfig) (network.PortSet, network.PortMap, error) {
	set, bound := network.PortSet{}, network.PortMap{}
	for _, e := range s.Expose {
		from, to, err := portRange(e)
		if err != nil {
			return nil, nil, err
		}
		_, proto, _ := strings.Cut(e, "/")
		for n := from; n <= to; n++ {
			p, err := network.ParsePort(strconv.Itoa(n) + "/" + proto)
			if err != nil {
				return nil, nil, err
			}
			set[p] = struct{}{}
		}
	}
	for _, c := range s.Ports {
		if c.Target == 0 || c.Target > 65535 {
			return nil, nil, fmt.Errorf("a port has the target %d", c.Target)
		}
		p, err := network.ParsePort(strconv.Itoa(int(c.Target)) + "/" + c.Protocol)
		if err != nil {
			return nil, nil, err
		}
		set[p] = struct{}{}
		b := network.PortBinding{HostPort: c.Published}
		if c.HostIP != "" {
			if b.HostIP, err = netip.ParseAddr(strings.Trim(c.HostIP, "[]")); err != nil {
				return nil, nil, fmt.Errorf("port %d: %q is not an address", c.Target, c.HostIP)
			}
		}
		bound[p] = append(bound[p], b)
	}
	return set, bound, nil
}

func portRange(e string) (from, to int, err error) {
	nums, _, _ := strings.Cut(e, "/")
	a, b, ok := strings.Cut(nums, "-")
	if !ok {
		b = a
	}
	if from, err = strconv.Atoi(a); err == nil {
		to, err = strconv.Atoi(b)
	}
	if err != nil || from < 1 || to > 65535 || to < from {
		return 0, 0, fmt.Errorf("%q is not a port", e)
	}
	return from, to, nil
}

func healthcheck(c *types.HealthCheckConfig) (*container.HealthConfig, error) {
	if c == nil {
		return nil, nil
	}
	dur := func(d *types.Duration) time.Duration {
		if d == nil {
			return 0
		}
		return time.Duration(*d)
	}
	h := &container.HealthConfig{Test: c.Test, Interval: dur(c.Interval), Timeout: dur(c.Timeout), StartPeriod: dur(c.StartPeriod), StartInterval: dur(c.StartInterval)}
	if c.StartInterval != nil && c.StartPeriod == nil {
		return nil, errors.New("healthcheck.start_interval requires healthcheck.start_period to be set")
	}
	if c.Disable {
		h.Test = []string{"NONE"}
	}
	if c.Retries != nil {
		h.Retries = int(*c.Retries)
	}
	return h, nil
}

func restartPolicy(s *types.ServiceConfig) container.RestartPolicy {
	if s.Deploy != nil && s.Deploy.RestartPolicy != nil {
		r := s.Deploy.RestartPolicy
		out := container.RestartPolicy{Name: restartMode(r.Condition)}
		// Only this one counts attempts; a swarm would with all.
		if r.MaxAttempts != nil && out.Name == container.RestartPolicyOnFailure {
			out.MaximumRetryCount = int(*r.MaxAttempts)
		}
		return out
	}
	if s.Restart == "" {
		return container.RestartPolicy{}
	}
	name, tries, _ := strings.Cut(s.Restart, ":")
	n, _ := strconv.Atoi(tries)
	return container.RestartPolicy{Name: restartMode(name), MaximumRetryCount: n}
}

func restartMode(s string) container.RestartPolicyMode {
	switch s {
	case "none", "no":
		return container.RestartPolicyDisabled
	case "any":
		return container.RestartPolicyAlways
	}
	return container.RestartPolicyMode(s)
}

func tmpfs(list []string) map[string]string {
	out := map[string]string{}
	for _, t := range list {
		path, opts, _ := strings.Cut(t, ":")
		out[path] = opts
	}
	return out
}

func securityOptions(p *types.Project, list []string) (out []string, unconfined bool, err error) {
	for _, o := range list {
		if o == "systempaths=unconfined" {
			unconfined = true
			continue
		}
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			k, v, ok = strings.Cut(o, ":")
		}
		if !ok && k != "no-new-privileges" {
			return nil, false, fmt.Errorf("security_opt %q is not KEY=VALUE", o)
		}
		if k == "seccomp" && v != "unconfined" && v != "builtin" {
			b, err := os.ReadFile(p.RelativePath(v))
			if err != nil {
				return nil, false, fmt.Errorf("cannot read the seccomp profile: %w", err)
			}
			var short bytes.Buffer
			if err := json.Compact(&short, b); err != nil {
				return nil, false, fmt.Errorf("cannot read the seccomp profile %s: %w", v, err)
			}
			o = "seccomp=" + short.String()
		}
		out = append(out, o)
	}
	return out, unconfined, nil
}

func resources(s *types.ServiceConfig) (container.Resources, error) {
	r := container.Resources{
		CgroupParent: s.CgroupParent, Memory: int64(s.MemLimit), MemorySwap: int64(s.MemSwapLimit), MemoryReservation: int64(s.MemReservation),
		OomKillDisable: &s.OomKillDisable, CPUCount: s.CPUCount, CPUPeriod: s.CPUPeriod, CPUQuota: s.CPUQuota, CPURealtimePeriod: s.CPURTPeriod,
		CPURealtimeRuntime: s.CPURTRuntime, CPUShares: s.CPUShares, NanoCPUs: int64(s.CPUS * 1e9), CPUPercent: int64(s.CPUPercent * 100),
		CpusetCpus: s.CPUSet, DeviceCgroupRules: s.DeviceCgroupRules,
	}
	if s.MemSwappiness != 0 {
		v := int64(s.MemSwappiness)
		r.MemorySwappiness = &v
	}
	if s.PidsLimit != 0 {
		r.PidsLimit = &s.PidsLimit
	}
	if b := s.BlkioConfig; b != nil {
		r.BlkioWeight = b.Weight
		for _, d := range b.WeightDevice {
			r.BlkioWeightDevice = append(r.BlkioWeightDevice, &blkiodev.WeightDevice{Path: d.Path, Weight: d.Weight})
		}
		r.BlkioDeviceReadBps, r.BlkioDeviceReadIOps = throttle(b.DeviceReadBps), throttle(b.DeviceReadIOps)
		r.BlkioDeviceWriteBps, r.BlkioDeviceWriteIOps = throttle(b.DeviceWriteBps), throttle(b.DeviceWriteIOps)
	}
	if s.Deploy != nil {
		if l := s.Deploy.Resources.Limits; l != nil {
			if l.MemoryBytes != 0 {
				r.Memory = int64(l.MemoryBytes)
			}
			if l.NanoCPUs != 0 {
				r.NanoCPUs = int64(float64(l.NanoCPUs) * 1e9)
			}
			if l.Pids > 0 {
				r.PidsLimit = &l.Pids
			}
		}
		if l := s.Deploy.Resources.Reservations; l != nil {
			if l.MemoryBytes != 0 {
				r.MemoryReservation = int64(l.MemoryBytes)
			}
			for _, d := range l.Devices {
				r.DeviceRequests = append(r.DeviceRequests, container.DeviceRequest{Driver: d.Driver, Count: int(d.Count), DeviceIDs: d.IDs, Capabilities: [][]string{d.Capabilities}, Options: d.Options})
			}
		}
	}
	var cdi []string
	for _, d := range s.Devices {
		if d.Source == d.Target && strings.Contains(d.Source, "=") && !strings.HasPrefix(d.Source, "/") {
			cdi = append(cdi, d.Source)
			continue
		}
		r.Devices = append(r.Devices, container.DeviceMapping{PathOnHost: d.Source, PathInContainer: d.Target, CgroupPermissions: d.Permissions})
	}
	if len(cdi) > 0 {
		r.DeviceRequests = append(r.DeviceRequests, container.DeviceRequest{Driver: "cdi", DeviceIDs: cdi})
	}
	for _, g := range s.Gpus {
		r.DeviceRequests = append(r.DeviceRequests, container.DeviceRequest{Driver: g.Driver, Count: int(g.Count), DeviceIDs: g.IDs,
			Capabilities: [][]string{append(slices.Clone(g.Capabilities), "gpu")}, Options: g.Options})
	}
	for _, name := range slices.Sorted(maps.Keys(s.Ulimits)) {
		u := s.Ulimits[name]
		if u == nil {
			return r, fmt.Errorf("ulimit %s has no value", name)
		}
		l := &container.Ulimit{Name: name, Soft: int64(u.Single), Hard: int64(u.Single)}
		if u.Soft != 0 {
			l.Soft = int64(u.Soft)
		}
		if u.Hard != 0 {
			l.Hard = int64(u.Hard)
		}
		r.Ulimits = append(r.Ulimits, l)
	}
	return r, nil
}

func throttle(list []types.ThrottleDevice) (out []*blkiodev.ThrottleDevice) {
	for _, d := range list {
		out = append(out, &blkiodev.ThrottleDevice{Path: d.Path, Rate: uint64(d.Rate)})
	}
	return out
}
