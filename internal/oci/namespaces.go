package oci

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// namespaces decides for each kind: a new one, one to join, or the host's.
func (g *generator) namespaces() error {
	hc, join := g.in.HostConfig, g.in.Join
	add := func(t specs.LinuxNamespaceType, path string) {
		g.spec.Linux.Namespaces = append(g.spec.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	needed := func(t, path string, of bool) error {
		if of && path == "" {
			return fault.New(fault.Invalid, "cannot join %s namespace: no path for it", t)
		}
		return nil
	}
	for _, err := range []error{
		needed("network", join.Network, hc.NetworkMode.IsContainer()),
		needed("ipc", join.IPC, hc.IpcMode.IsContainer()),
		needed("pid", join.PID, hc.PidMode.IsContainer()),
	} {
		if err != nil {
			return err
		}
	}

	add(specs.MountNamespace, "")
	if join.User != "" || len(g.in.IDMap.UIDs) > 0 {
		g.userNS = true
		add(specs.UserNamespace, join.User)
		g.spec.Linux.UIDMappings = mappings(g.in.IDMap.UIDs)
		g.spec.Linux.GIDMappings = mappings(g.in.IDMap.GIDs)
	}
	switch {
	case join.Network != "":
		add(specs.NetworkNamespace, join.Network)
	case hc.NetworkMode.IsHost() && !g.in.Config.NetworkDisabled:
	default:
		g.newNet = true
		add(specs.NetworkNamespace, "")
	}
	if join.Time != "" || g.in.Host.TimeNamespace {
		add(specs.TimeNamespace, join.Time)
	}
	if !hc.UTSMode.IsHost() {
		g.newUTS = join.UTS == ""
		add(specs.UTSNamespace, join.UTS)
	}
	if !hc.PidMode.IsHost() {
		g.newPID = join.PID == ""
		add(specs.PIDNamespace, join.PID)
	}
	if !hc.IpcMode.IsHost() {
		g.newIPC = join.IPC == ""
		add(specs.IPCNamespace, join.IPC)
	}
	switch {
	case join.Cgroup != "":
		add(specs.CgroupNamespace, join.Cgroup)
	case hc.CgroupnsMode.IsPrivate():
		add(specs.CgroupNamespace, "")
	}

	if g.newUTS {
		g.spec.Hostname = g.in.Config.Hostname
		g.spec.Domainname = g.in.Config.Domainname
	}
	return nil
}
