package oci

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/signal"
)

const (
	maxHostname = 64 // HOST_NAME_MAX
	minMemory   = 6 << 20
)

// Validate refuses a configuration that cannot be run, in the words that Docker
// clients know, and returns warnings. It cleans the working directory and drops
// limits that this host does not know. It looks at the request as it came, before
// a host name is made up. Errors carry fault.Invalid.
func Validate(cfg *container.Config, hc *container.HostConfig, h Host) (warnings []string, err error) {
	if cfg == nil {
		return nil, fault.New(fault.Invalid, "config cannot be empty in order to create a container")
	}
	if err := validConfig(cfg); err != nil {
		return nil, err
	}
	if hc == nil {
		return nil, nil
	}
	for _, check := range []func(*container.Config, *container.HostConfig, Host) error{
		validNetwork, validModes, validHost, validPorts,
	} {
		if err := check(cfg, hc, h); err != nil {
			return nil, err
		}
	}
	warnings, err = ValidateResources(&hc.Resources, h, false)
	if err != nil {
		return nil, err
	}
	if hc.NetworkMode.IsHost() && len(hc.PortBindings) > 0 {
		warnings = append(warnings, "Published ports are discarded when using host network mode")
	}
	return warnings, nil
}

func invalid(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

func validConfig(cfg *container.Config) error {
	if len(cfg.Hostname) > maxHostname {
		return invalid("hostname %q is too long (maximum %d bytes)", cfg.Hostname, maxHostname)
	}
	if strings.ContainsAny(cfg.Hostname, "\x00\n/ ") || strings.ContainsAny(cfg.Domainname, "\x00\n/ ") || len(cfg.Domainname) > maxHostname {
		return invalid("invalid hostname or domain name: %q, %q", cfg.Hostname, cfg.Domainname)
	}
	if cfg.WorkingDir != "" {
		if !path.IsAbs(cfg.WorkingDir) {
			return invalid("the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
		}
		cfg.WorkingDir = path.Clean(cfg.WorkingDir)
	}
	if cfg.StopSignal != "" {
		if _, err := signal.Parse(cfg.StopSignal); err != nil {
			return err
		}
	}
	if err := validEnv(cfg.Env); err != nil {
		return err
	}
	for _, s := range slices.Concat(cfg.Entrypoint, cfg.Cmd, []string{cfg.WorkingDir, cfg.User}) {
		if strings.ContainsRune(s, 0) {
			return invalid("invalid argument %q: it contains a NUL byte", s)
		}
	}
	if cfg.StopTimeout != nil && *cfg.StopTimeout < -1 {
		return invalid("invalid stop timeout %d: use -1 for no limit", *cfg.StopTimeout)
	}
	return validHealth(cfg.Healthcheck)
}

func validEnv(env []string) error {
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if name == "" {
			return invalid("invalid environment variable: %s", e)
		}
		if strings.ContainsRune(e, 0) {
			return invalid("invalid environment variable %q: it contains a NUL byte", name)
		}
	}
	return nil
}

func validHealth(h *container.HealthConfig) error {
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"Interval", h.Interval}, {"Timeout", h.Timeout},
		{"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval},
	} {
		if d.value != 0 && d.value < container.MinimumDuration {
			return invalid("%s in Healthcheck cannot be less than %s", d.name, container.MinimumDuration)
		}
	}
	if h.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	if len(h.Test) > 0 && h.Test[0] != "" {
		switch h.Test[0] {
		case "NONE":
		case "CMD", "CMD-SHELL":
			if len(h.Test) < 2 {
				return invalid("invalid Healthcheck: %s without a command", h.Test[0])
			}
		default:
			return invalid("invalid Healthcheck: unknown type %q, use NONE, CMD or CMD-SHELL", h.Test[0])
		}
	}
	return nil
}

func validNetwork(cfg *container.Config, hc *container.HostConfig, _ Host) error {
	m := hc.NetworkMode
	if string(m) != "container" && !m.IsContainer() {
		if len(hc.Links) > 0 && m.IsHost() {
			return invalid("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
		}
		return nil
	}
	switch {
	case m.ConnectedContainer() == "":
		return invalid("invalid network mode: invalid container format container:<name|id>")
	case cfg.Hostname != "":
		return invalid("conflicting options: hostname and the network mode")
	case len(hc.Links) > 0:
		return invalid("conflicting options: container type network can't be used with links. This would result in undefined behavior")
	case len(hc.DNS) > 0:
		return invalid("conflicting options: dns and the network mode")
	case len(hc.ExtraHosts) > 0:
		return invalid("conflicting options: custom host-to-IP mapping and the network mode")
	case len(hc.PortBindings) > 0 || hc.PublishAllPorts:
		return invalid("conflicting options: port publishing and the container type network mode")
	case len(cfg.ExposedPorts) > 0:
		return invalid("conflicting options: port exposing and the container type network mode")
	}
	return nil
}

func validModes(cfg *container.Config, hc *container.HostConfig, _ Host) error {
	switch {
	case !hc.IpcMode.Valid() || hc.IpcMode.IsContainer() && hc.IpcMode.Container() == "":
		return invalid("invalid IPC mode: %v", hc.IpcMode)
	case !hc.PidMode.Valid():
		return invalid("invalid PID mode: %v", hc.PidMode)
	case !hc.UTSMode.Valid():
		return invalid("invalid UTS mode: %v", hc.UTSMode)
	case hc.UTSMode.IsHost() && cfg.Hostname != "":
		return invalid("conflicting options: hostname and the UTS mode")
	case !hc.CgroupnsMode.Valid():
		return invalid("invalid cgroup namespace mode: %v", hc.CgroupnsMode)
	case !hc.UsernsMode.Valid() && hc.UsernsMode != "auto" && hc.UsernsMode != "private":
		return invalid("invalid user namespace mode: %v", hc.UsernsMode)
	case !hc.Isolation.IsDefault():
		return invalid("invalid isolation (%s): linux only supports 'default'", hc.Isolation)
	case hc.Cgroup != "":
		return invalid("invalid cgroup mode: %v", hc.Cgroup)
	}
	if hc.UsernsMode == "auto" {
		switch {
		case hc.Privileged:
			return invalid("privileged mode is incompatible with user namespaces.  You must run the container in the host namespace when running privileged mode")
		case hc.NetworkMode.IsHost():
			return invalid("cannot share the host's network namespace when user namespaces are enabled")
		case hc.PidMode.IsHost():
			return invalid("cannot share the host PID namespace when user namespaces are enabled")
		}
	}
	return nil
}

func validHost(_ *container.Config, hc *container.HostConfig, h Host) error {
	if hc.AutoRemove && !hc.RestartPolicy.IsNone() {
		return invalid("can't create 'AutoRemove' container with restart policy")
	}
	if err := container.ValidateRestartPolicy(hc.RestartPolicy); err != nil {
		return fault.As(fault.Invalid, err)
	}
	for _, e := range hc.ExtraHosts {
		if err := validExtraHost(e); err != nil {
			return err
		}
	}
	if hc.ShmSize < 0 {
		return invalid("SHM size can not be less than 0")
	}
	if hc.OomScoreAdj < -1000 || hc.OomScoreAdj > 1000 {
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000].", hc.OomScoreAdj)
	}
	if hc.Umask != nil && *hc.Umask > 0o777 {
		return invalid("invalid umask %o: it must be at most 0777", *hc.Umask)
	}
	if _, err := ParseSecurityOpt(hc.SecurityOpt); err != nil {
		return err
	}
	if _, err := normalCapabilities(hc.CapAdd, h); err != nil {
		return invalid("invalid CapAdd: %w", err)
	}
	if _, err := normalCapabilities(hc.CapDrop, h); err != nil {
		return invalid("invalid CapDrop: %w", err)
	}
	for k := range hc.Annotations {
		if k == "" {
			return invalid("invalid Annotations: the empty string is not permitted as an annotation key")
		}
	}
	for name := range hc.Sysctls {
		if !validSysctl(name) {
			return invalid("invalid sysctl %q", name)
		}
	}
	for _, p := range slices.Concat(hc.MaskedPaths, hc.ReadonlyPaths) {
		if !path.IsAbs(p) || strings.ContainsRune(p, 0) {
			return invalid("invalid path %q: masked and read-only paths must be absolute", p)
		}
	}
	for dst, o := range hc.Tmpfs {
		if !path.IsAbs(dst) {
			return invalid("invalid mount path: '%s' mount path must be absolute", dst)
		}
		if path.Clean(dst) == "/" {
			return invalid("invalid specification: destination can't be '/'")
		}
		if _, err := MergeTmpfsOptions(strings.Split(o, ",")); err != nil {
			return err
		}
	}
	if p := path.Clean("/" + hc.CgroupParent); hc.CgroupParent != "" &&
		(strings.ContainsAny(hc.CgroupParent, "\x00\n:") || slices.Contains(strings.Split(hc.CgroupParent, "/"), "..") || p == "/") {
		return invalid("invalid cgroup parent %q", hc.CgroupParent)
	}
	for _, r := range hc.DeviceCgroupRules {
		if _, err := ParseDeviceRule(r); err != nil {
			return err
		}
	}
	if _, err := Rlimits(hc.Ulimits); err != nil {
		return err
	}
	_, err := StorageSize(hc.StorageOpt)
	return err
}

func validExtraHost(v string) error {
	name, ip, ok := strings.Cut(v, ":")
	if !ok {
		name, ip, ok = strings.Cut(v, "=")
	}
	if !ok || name == "" {
		return invalid("bad format for add-host: %q", v)
	}
	if ip == "host-gateway" {
		return nil
	}
	if a, err := netip.ParseAddr(strings.Trim(ip, "[]")); err != nil || a.Zone() != "" {
		return invalid("invalid IP address in add-host: %q", ip)
	}
	return nil
}

func validPorts(cfg *container.Config, hc *container.HostConfig, _ Host) error {
	proto := func(p network.Port) bool {
		return p.Proto() == network.TCP || p.Proto() == network.UDP || p.Proto() == network.SCTP
	}
	for p := range cfg.ExposedPorts {
		if !p.IsValid() || p.Num() == 0 || !proto(p) {
			return invalid("invalid port specification: %q", p.String())
		}
	}
	for p, bindings := range hc.PortBindings {
		if !p.IsValid() || p.Num() == 0 || !proto(p) {
			return invalid("invalid port specification: %q", p.String())
		}
		for _, b := range bindings {
			if b.HostPort == "" {
				continue
			}
			if _, err := network.ParsePortRange(b.HostPort); err != nil {
				return invalid("invalid port specification: %q", b.HostPort)
			}
		}
	}
	return nil
}

// StorageSize reads --storage-opt: the one key is size, the value a size in
// bytes with a unit; 0 is no limit.
func StorageSize(opts map[string]string) (int64, error) {
	for k, v := range opts {
		if !strings.EqualFold(k, "size") {
			return 0, invalid("unknown option %s for storage-opt, use size", k)
		}
		n, err := units.RAMInBytes(v)
		if err != nil || n <= 0 {
			return 0, invalid("invalid size %q for storage-opt", v)
		}
		return n, nil
	}
	return 0, nil
}

// ValidateResources refuses wrong limits and drops, with a warning, those the
// host does not know. update tells that they change a container's, so that what
// is unset keeps its value.
func ValidateResources(r *container.Resources, h Host, update bool) (warnings []string, err error) {
	if r.MemorySwappiness != nil && *r.MemorySwappiness == -1 {
		r.MemorySwappiness = nil
	}
	switch {
	case r.Memory < 0 || r.MemoryReservation < 0 || r.MemorySwap < -1:
		return nil, invalid("invalid memory limit: it must not be negative")
	case r.Memory != 0 && r.Memory < minMemory:
		return nil, invalid("Minimum memory limit allowed is 6MB")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return nil, invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory == 0 && r.MemorySwap > 0 && !update:
		return nil, invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < 0 || *r.MemorySwappiness > 100):
		return nil, invalid("Invalid value: %v, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.MemoryReservation > 0 && r.MemoryReservation < minMemory:
		return nil, invalid("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > 0 && r.Memory < r.MemoryReservation:
		return nil, invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return nil, invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return nil, invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(h.CPUs)*1e9:
		return nil, invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", h.CPUs)
	case r.CPUShares < 0:
		return nil, invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return nil, invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return nil, invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case (r.CPURealtimePeriod != 0 || r.CPURealtimeRuntime != 0) && !h.CPURealtime:
		return nil, invalid("kernel does not support CPU real-time scheduler")
	case r.CPURealtimePeriod != 0 && r.CPURealtimeRuntime > r.CPURealtimePeriod:
		return nil, invalid("cpu real-time runtime cannot be higher than cpu real-time period")
	case r.BlkioWeight > 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return nil, invalid("Range of blkio weight is from 10 to 1000")
	case r.IOMaximumBandwidth != 0:
		return nil, invalid("invalid option: QoS maximum bandwidth configuration is not supported on linux")
	case r.IOMaximumIOps != 0:
		return nil, invalid("invalid option: QoS maximum IOPs configuration is not supported on linux")
	}
	if err := h.permits(r); err != nil {
		return nil, err
	}
	cpus, err := CPUSet(r.CpusetCpus)
	if err != nil {
		return nil, invalid("Invalid value %s for cpuset cpus: %w", r.CpusetCpus, err)
	}
	if len(cpus) > 0 && slices.Max(cpus) >= h.CPULimit {
		return nil, invalid("Requested CPUs are not available - requested %s, available: %s", r.CpusetCpus, fmt.Sprintf("0-%d", h.CPULimit-1))
	}
	mems, err := CPUSet(r.CpusetMems)
	if err != nil {
		return nil, invalid("Invalid value %s for cpuset mems: %w", r.CpusetMems, err)
	}
	if have, ok := memoryNodes(); ok && len(mems) > 0 && slices.ContainsFunc(mems, func(n int) bool { return !slices.Contains(have, n) }) {
		return nil, invalid("Requested memory nodes are not available - requested %s, available: %s", r.CpusetMems, strings.Trim(fmt.Sprint(have), "[]"))
	}
	for _, d := range r.BlkioWeightDevice {
		if d == nil || d.Weight < 10 || d.Weight > 1000 {
			return nil, invalid("invalid weight for device: it must be from 10 to 1000")
		}
	}

	if r.Memory > 0 && r.MemorySwap != -1 && !h.SwapLimit {
		warnings = append(warnings, "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		r.MemorySwap = 0
	}
	if r.OomKillDisable != nil && *r.OomKillDisable && r.Memory == 0 {
		warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
	}
	if r.CPUPercent > 0 {
		warnings = append(warnings, "linux does not support CPU percent. Percent discarded.")
		r.CPUPercent = 0
	}
	return warnings, nil
}

// permits refuses limits that nothing here could enforce.
func (h Host) permits(r *container.Resources) error {
	if len(h.Lacking) == 0 {
		return nil
	}
	for _, l := range []struct {
		asked            bool
		controller, what string
	}{
		{r.Memory > 0 || r.MemorySwap > 0 || r.MemoryReservation > 0, "memory", "memory"},
		{r.NanoCPUs > 0 || r.CPUQuota > 0 || r.CPUShares > 0, "cpu", "CPU time"},
		{r.CpusetCpus != "" || r.CpusetMems != "", "cpuset", "the CPUs to run on"},
		{r.PidsLimit != nil && *r.PidsLimit > 0, "pids", "the number of processes"},
		{r.BlkioWeight > 0 || len(r.BlkioWeightDevice)+len(r.BlkioDeviceReadBps)+len(r.BlkioDeviceWriteBps)+
			len(r.BlkioDeviceReadIOps)+len(r.BlkioDeviceWriteIOps) > 0, "io", "disk access"},
	} {
		if why := h.Lacking[l.controller]; why != "" && l.asked {
			return fault.New(fault.Unsupported, "cannot limit %s: %s", l.what, why)
		}
	}
	return nil
}
