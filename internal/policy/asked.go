package policy

import (
	"path"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
)

func capability(s string) string {
	s = strings.ToUpper(s)
	if s == "ALL" || s == "*" {
		return "*"
	}
	return strings.TrimPrefix(s, "CAP_")
}

func addedCapabilities(hc *container.HostConfig) []string {
	if hc.Privileged {
		return []string{"*"}
	}
	var out []string
	for _, c := range hc.CapAdd {
		out = append(out, capability(c))
	}
	return out
}

func hostNamespaces(hc *container.HostConfig) []string {
	var out []string
	for _, n := range []struct {
		name string
		host bool
	}{
		{"network", hc.NetworkMode.IsHost()}, {"pid", hc.PidMode.IsHost()}, {"ipc", hc.IpcMode.IsHost()},
		{"uts", hc.UTSMode.IsHost()}, {"user", hc.UsernsMode.IsHost()}, {"cgroup", hc.CgroupnsMode.IsHost()},
	} {
		if n.host {
			out = append(out, n.name)
		}
	}
	return out
}

func devices(hc *container.HostConfig) []string {
	if hc.Privileged {
		return []string{"*"}
	}
	var out []string
	for _, d := range hc.Devices {
		p := d.PathOnHost
		if path.IsAbs(p) {
			p = path.Clean(p)
		}
		out = append(out, p)
	}
	for _, r := range hc.DeviceCgroupRules {
		out = append(out, "rule "+r)
	}
	for _, r := range hc.DeviceRequests {
		d := r.Driver
		if d == "" {
			d = "gpu"
		}
		if len(r.DeviceIDs) == 0 {
			out = append(out, d)
		}
		out = append(out, r.DeviceIDs...)
	}
	return out
}

func sysctls(hc *container.HostConfig) []string {
	var out []string
	for k := range hc.Sysctls {
		out = append(out, strings.ReplaceAll(k, "/", "."))
	}
	slices.Sort(out)
	return out
}

func unconfined(hc *container.HostConfig) []string {
	if hc.Privileged {
		return []string{"seccomp", "apparmor", "label", "systempaths"}
	}
	var out []string
	for _, o := range hc.SecurityOpt {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			k, v, _ = strings.Cut(o, ":")
		}
		switch {
		case (k == "seccomp" || k == "apparmor") && v == "unconfined":
			out = append(out, k)
		case k == "seccomp" && v != "" && v != "builtin":
			out = append(out, k) // a profile of the client's may allow anything
		case k == "label" && v == "disable":
			out = append(out, k)
		case k == "systempaths" && v == "unconfined", k == "unmask":
			out = append(out, "systempaths")
		}
	}
	if hc.MaskedPaths != nil && len(hc.MaskedPaths) == 0 || hc.ReadonlyPaths != nil && len(hc.ReadonlyPaths) == 0 {
		if !slices.Contains(out, "systempaths") {
			out = append(out, "systempaths")
		}
	}
	return out
}

func noNewPrivileges(hc *container.HostConfig) bool {
	for _, o := range hc.SecurityOpt {
		switch strings.ReplaceAll(o, ":", "=") {
		case "no-new-privileges", "no-new-privileges=true":
			return true
		}
	}
	return false
}
