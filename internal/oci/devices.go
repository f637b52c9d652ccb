package oci

import (
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// defaultDeviceRules is what the device cgroup lets every container do: nothing
// but the nodes that every /dev holds. The runtime adds terminals.
func defaultDeviceRules() []specs.LinuxDeviceCgroup {
	rule := func(allow bool, major, minor int64) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: allow, Type: "c", Major: &major, Minor: &minor, Access: "rwm"}
	}
	return []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		rule(true, 1, 5),     // zero
		rule(true, 1, 3),     // null
		rule(true, 1, 9),     // urandom
		rule(true, 1, 8),     // random
		rule(true, 5, 0),     // tty
		rule(true, 5, 1),     // console
		rule(false, 10, 229), // fuse
	}
}

func (g *generator) devices() error {
	hc := g.in.HostConfig
	rules := defaultDeviceRules()
	var devs []specs.LinuxDevice
	if hc.Privileged {
		rules = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		for _, d := range g.in.AllDevices {
			devs = append(devs, cloneDevice(d))
		}
	}
	for _, m := range hc.Devices {
		if hc.Privileged && m.PathOnHost == m.PathInContainer {
			continue // it is there already
		}
		target := m.PathInContainer
		if target == "" {
			target = m.PathOnHost
		}
		if !strings.HasPrefix(target, "/") {
			return fault.New(fault.Invalid, "invalid device path %q: it must be absolute", target)
		}
		access := m.CgroupPermissions
		if access == "" {
			access = "rwm"
		}
		if !validAccess(access) {
			return fault.New(fault.Invalid, "invalid device mode %q: use a combination of r, w and m", access)
		}
		if g.in.Devices == nil {
			return fault.New(fault.Invalid, "cannot add device %s: no device can be resolved", m.PathOnHost)
		}
		found, err := g.in.Devices(m.PathOnHost)
		if err != nil {
			return fault.New(fault.Invalid, "error gathering device information while adding custom device %q: %w", m.PathOnHost, err)
		}
		for _, d := range found {
			d = cloneDevice(d)
			// A directory gives several nodes, each keeps its place below it.
			d.Path = target + strings.TrimPrefix(d.Path, m.PathOnHost)
			devs = append(devs, d)
			if !hc.Privileged {
				major, minor := d.Major, d.Minor
				rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &major, Minor: &minor, Access: access})
			}
		}
	}
	if !hc.Privileged {
		for _, r := range hc.DeviceCgroupRules {
			rule, err := ParseDeviceRule(r)
			if err != nil {
				return err
			}
			rules = append(rules, rule)
		}
	}
	g.spec.Linux.Devices = devs
	g.spec.Linux.Resources = &specs.LinuxResources{Devices: rules}
	return nil
}

func cloneDevice(d specs.LinuxDevice) specs.LinuxDevice {
	if d.FileMode != nil {
		v := *d.FileMode
		d.FileMode = &v
	}
	if d.UID != nil {
		v := *d.UID
		d.UID = &v
	}
	if d.GID != nil {
		v := *d.GID
		d.GID = &v
	}
	return d
}

func validAccess(s string) bool {
	if s == "" || len(s) > 3 {
		return false
	}
	for i, c := range s {
		if !strings.ContainsRune("rwm", c) || strings.ContainsRune(s[:i], c) {
			return false
		}
	}
	return true
}

// ParseDeviceRule reads a device cgroup rule: "TYPE MAJOR:MINOR ACCESS", for
// instance "c 13:* rwm".
func ParseDeviceRule(s string) (specs.LinuxDeviceCgroup, error) {
	bad := fault.New(fault.Invalid, "invalid device cgroup rule format: '%s'", s)
	f := strings.Split(s, " ")
	if len(f) != 3 || (f[0] != "a" && f[0] != "b" && f[0] != "c") || !validAccess(f[2]) {
		return specs.LinuxDeviceCgroup{}, bad
	}
	major, minor, ok := strings.Cut(f[1], ":")
	if !ok {
		return specs.LinuxDeviceCgroup{}, bad
	}
	r := specs.LinuxDeviceCgroup{Allow: true, Type: f[0], Access: f[2]}
	for _, n := range []struct {
		text string
		to   **int64
	}{{major, &r.Major}, {minor, &r.Minor}} {
		if n.text == "*" {
			continue // absent is every one
		}
		u, err := strconv.ParseUint(n.text, 10, 32)
		if err != nil {
			return specs.LinuxDeviceCgroup{}, bad
		}
		v := int64(u)
		*n.to = &v
	}
	return r, nil
}
