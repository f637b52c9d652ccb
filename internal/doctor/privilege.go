package doctor

import "github.com/cloudos-io/cloudos/api"

// capabilityUse tells what is lost without a capability.
var capabilityUse = map[string]struct{ severity, use string }{
	"CAP_SYS_ADMIN":    {Error, "mounts and namespaces"},
	"CAP_NET_ADMIN":    {Error, "container networks; only --network host and none work"},
	"CAP_SETUID":       {Error, "running processes as other users"},
	"CAP_SETGID":       {Error, "running processes in other groups"},
	"CAP_SETPCAP":      {Error, "taking capabilities away from containers"},
	"CAP_CHOWN":        {Error, "unpacking images"},
	"CAP_DAC_OVERRIDE": {Error, "unpacking images"},
	"CAP_FOWNER":       {Error, "unpacking images"},
	"CAP_MKNOD":        {Warning, "unpacking device nodes and whiteouts; devices are bound from the host instead"},
	"CAP_SETFCAP":      {Warning, "images whose programs have file capabilities, such as ping"},
	"CAP_KILL":         {Warning, "signals to processes of other users"},
	"CAP_SYS_CHROOT":   {Warning, "unpacking images in a confined process"},
	"CAP_SYS_RESOURCE": {Warning, "raising limits: --ulimit above the engine's own and --oom-score-adj below it fail, kernel quotas apply to the engine"},
	"CAP_SYS_PTRACE":   {Warning, "entering containers of other users' namespaces (exec with --userns)"},
	"CAP_SYS_NICE":     {Info, "real-time scheduling in containers"},
	"CAP_NET_RAW":      {Info, "ping in containers that need the capability"},
	"CAP_SYS_MODULE":   {Info, "loading kernel modules (overlay, bridge, nf_tables) on demand; they must be loaded already"},
	"CAP_MAC_ADMIN":    {Info, "loading the AppArmor profile"},
}

func capabilities(f Facts) []api.Finding {
	if f.Rootless {
		return nil
	}
	var out []api.Finding
	for _, c := range f.MissingCaps {
		u, ok := capabilityUse[c]
		if !ok {
			u.severity, u.use = Info, "containers that are given it; --privileged and --cap-add leave it out or fail"
		}
		out = append(out, api.Finding{
			Severity: u.severity, Title: "the engine has no " + c, Detail: "Without it there is no " + u.use + ".",
			Fix: "start servind without restricting its capabilities (CapabilityBoundingSet= of the service, or the sandbox around it)",
		})
		if !ok {
			out[len(out)-1].Detail = "It cannot be had by " + u.use + "."
		}
	}
	return out
}

func modules(f Facts) []api.Finding {
	var out []api.Finding
	if !f.Seccomp {
		out = append(out, api.Finding{
			Severity: Error, Title: "the kernel has no seccomp filters",
			Detail: "Containers would have every system call; a profile of one's own is refused.",
			Fix:    "use a kernel with CONFIG_SECCOMP_FILTER",
		})
	}
	switch {
	case f.SELinux != "":
		out = append(out, api.Finding{Severity: Info, Title: "SELinux is " + f.SELinux, Detail: "Containers get labels; bind mounts need :z or :Z to be readable inside."})
	case f.AppArmor == "":
		out = append(out, api.Finding{Severity: Info, Title: "AppArmor is on", Detail: "Containers run under the profile servin-default."})
	default:
		out = append(out, api.Finding{
			Severity: Info, Title: "neither AppArmor nor SELinux confines containers: " + f.AppArmor,
			Detail: "Capabilities, seccomp, masked paths and namespaces do; a security module would be one wall more.",
		})
	}
	return out
}

func forwarding(f Facts) []api.Finding {
	if f.Rootless {
		return nil
	}
	var out []api.Finding
	if f.IPv4Forward == 0 {
		// The engine switches it on with its first network; that it is off now is no fault.
		out = append(out, api.Finding{
			Severity: Info, Title: "IPv4 forwarding is off",
			Detail: "The engine switches it on with the first bridge network.", Fix: "sysctl -w net.ipv4.ip_forward=1",
		})
	}
	for _, v := range []string{"iptables", "ip6tables"} {
		if f.BridgeNF["bridge-nf-call-"+v] > 0 {
			out = append(out, api.Finding{
				Severity: Info, Title: "net.bridge.bridge-nf-call-" + v + " is on",
				Detail: "Packets between containers of one bridge pass the host's " + v + " rules too: a FORWARD drop there cuts containers off from one another, and every packet costs more.",
				Fix:    "sysctl -w net.bridge.bridge-nf-call-" + v + "=0, unless Kubernetes or another engine needs it",
			})
		}
	}
	return out
}

func clock(f Facts) []api.Finding {
	switch {
	case f.ClockBeforeBuild:
		return []api.Finding{{
			Severity: Error, Title: "the clock is wrong: it says a time before this engine was built",
			Detail: "Certificates of registries look not yet valid, so pulls fail.", Fix: "set the clock: timedatectl set-ntp true",
		}}
	case f.ClockUnsynced:
		return []api.Finding{{Severity: Info, Title: "the clock is not synchronised", Detail: "Log records of several hosts do not fit together.", Fix: "timedatectl set-ntp true"}}
	}
	return nil
}
