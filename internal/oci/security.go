package oci

import (
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Profile names that are no profile.
const (
	Unconfined     = "unconfined"
	SeccompBuiltin = "builtin"
)

// SecurityOptions are the parsed --security-opt values of a container.
type SecurityOptions struct {
	NoNewPrivileges *bool
	WritableCgroups *bool
	// Seccomp is "", "unconfined", "builtin" or a profile's JSON.
	Seccomp  string
	AppArmor string
	// Labels are SELinux options ("disable", "type:container_t").
	Labels []string
	// SystemPaths is set by systempaths=unconfined: nothing is masked.
	SystemPaths bool
}

// ParseSecurityOpt reads HostConfig.SecurityOpt.
func ParseSecurityOpt(list []string) (SecurityOptions, error) {
	var o SecurityOptions
	yes := true
	for _, opt := range list {
		switch opt {
		case "no-new-privileges":
			o.NoNewPrivileges = &yes
			continue
		case "writable-cgroups":
			o.WritableCgroups = &yes
			continue
		case "disable":
			o.Labels = append(o.Labels, "disable")
			continue
		}
		k, v, ok := strings.Cut(opt, "=")
		if !ok {
			// The colon is the old separator, still sent by old clients.
			k, v, ok = strings.Cut(opt, ":")
		}
		if !ok {
			return o, fault.New(fault.Invalid, "invalid --security-opt 1: %q", opt)
		}
		switch k {
		case "label":
			o.Labels = append(o.Labels, v)
		case "apparmor":
			o.AppArmor = v
		case "seccomp":
			o.Seccomp = v
		case "no-new-privileges", "writable-cgroups":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return o, fault.New(fault.Invalid, "invalid --security-opt 2: %q", opt)
			}
			if k == "no-new-privileges" {
				o.NoNewPrivileges = &b
			} else {
				o.WritableCgroups = &b
			}
		case "systempaths":
			if v != Unconfined {
				return o, fault.New(fault.Invalid, "invalid --security-opt 2: %q", opt)
			}
			o.SystemPaths = true
		default:
			return o, fault.New(fault.Invalid, "invalid --security-opt 2: %q", opt)
		}
	}
	return o, nil
}

// appArmor picks the profile: the one asked for, none for privileged ones, else
// the default.
func appArmor(o SecurityOptions, privileged bool, h Host, byDefault string) (string, error) {
	switch {
	case !h.AppArmor && o.AppArmor != "" && o.AppArmor != Unconfined:
		return "", fault.New(fault.Invalid, "cannot apply AppArmor profile %q: AppArmor is not enabled on this host, leave out --security-opt apparmor=", o.AppArmor)
	case !h.AppArmor:
		return "", nil
	case o.AppArmor != "":
		return o.AppArmor, nil
	case privileged:
		return Unconfined, nil
	}
	return byDefault, nil
}

func (g *generator) seccomp() error {
	hc := g.in.HostConfig
	profile := g.opts.Seccomp
	// A privileged container is confined only by a profile that it names.
	if profile == Unconfined || hc.Privileged && profile == "" {
		return nil
	}
	if !g.in.Host.Seccomp {
		if profile != "" && profile != SeccompBuiltin {
			return fault.New(fault.Invalid, "seccomp is not enabled in your kernel, cannot run a custom seccomp profile")
		}
		g.warn("seccomp is not enabled in your kernel, running container without default profile")
		return nil
	}
	cache := g.in.Seccomp
	if cache == nil {
		cache = NewProfiles(nil)
	}
	p, err := cache.profile(profile, g.spec)
	if err != nil {
		return err
	}
	g.spec.Linux.Seccomp = p
	return nil
}

// MaskedPaths are hidden in ordinary containers: kernel interfaces that tell of
// or reach the host and know no namespace.
func MaskedPaths(h Host) []string {
	paths := []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
		"/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	return append(paths, h.ThermalPaths...)
}

// ReadonlyPaths can be read but not written in ordinary containers.
func ReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// paths returns masked and read-only paths of a container. Lists in the host
// configuration win, empty ones too, except that a nil list is no list.
func paths(hc *container.HostConfig, o SecurityOptions, h Host) (masked, readonly []string) {
	if !hc.Privileged && !o.SystemPaths {
		masked, readonly = MaskedPaths(h), ReadonlyPaths()
	}
	if hc.MaskedPaths != nil {
		masked = append([]string{}, hc.MaskedPaths...)
	}
	if hc.ReadonlyPaths != nil {
		readonly = append([]string{}, hc.ReadonlyPaths...)
	}
	return masked, readonly
}
