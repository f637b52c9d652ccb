package oci

import (
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// sysctlKind tells which namespace a sysctl belongs to: "net", "ipc", "uts", or
// "" for none. Slashes are taken as dots, as sysctl(8) does.
func sysctlKind(name string) string {
	switch {
	case strings.HasPrefix(name, "net."):
		return "net"
	case strings.HasPrefix(name, "fs.mqueue."):
		return "ipc"
	}
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall",
		"kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
		"kernel.msg_next_id", "kernel.sem_next_id", "kernel.shm_next_id":
		return "ipc"
	case "kernel.domainname":
		return "uts"
	}
	return ""
}

func validSysctl(name string) bool {
	if name == "" || strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") {
		return false
	}
	for part := range strings.SplitSeq(strings.ReplaceAll(name, "/", "."), ".") {
		if part == "" {
			return false
		}
	}
	return !strings.ContainsAny(name, "\x00\n ")
}

func (g *generator) sysctls() error {
	hc := g.in.HostConfig
	all := make(map[string]string, len(hc.Sysctls)+2)
	// With the host's procfs in place of one of its own there is nothing to write
	// them through (see defaultMounts).
	if g.newNet && !(g.in.Rootless && hc.PidMode.IsHost()) {
		// A process may ping and listen on low ports without a capability; the
		// group range cannot be set where the ids are not mapped.
		if !g.userNS && !g.in.Rootless && g.in.Host.PingGroupRange {
			all["net.ipv4.ping_group_range"] = "0 2147483647"
		}
		if g.in.Host.UnprivilegedPortStart {
			all["net.ipv4.ip_unprivileged_port_start"] = "0"
		}
	}
	for name, value := range hc.Sysctls {
		if !validSysctl(name) {
			return fault.New(fault.Invalid, "invalid sysctl %q", name)
		}
		// A dot may be part of a name below net (an interface "eth0.1", given as
		// "net/ipv4/conf/eth0.1/x"), so only the spelling without slashes is folded.
		dotted := name
		if strings.Contains(name, "/") {
			dotted = strings.ReplaceAll(name, "/", ".")
		}
		own, what := false, "kernel"
		switch sysctlKind(dotted) {
		case "net":
			own, what = g.newNet || g.in.Join.Network != "", "network"
		case "ipc":
			own, what = g.newIPC || g.in.Join.IPC != "", "IPC"
		case "uts":
			own, what = g.newUTS, "UTS"
		default:
			return fault.New(fault.Invalid, "sysctl %q is not in a separate kernel namespace", name)
		}
		if !own {
			return fault.New(fault.Invalid, "sysctl %q is not allowed as the container has no %s namespace of its own", name, what)
		}
		delete(all, dotted)
		all[name] = value
	}
	if len(all) > 0 {
		g.spec.Linux.Sysctl = all
	}
	return nil
}
