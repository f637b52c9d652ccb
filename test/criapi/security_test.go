package criapi

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// secure starts a container with a security context.
func (n *node) secure(t *testing.T, s *v1.LinuxContainerSecurityContext) string {
	t.Helper()
	c := sleeper("a")
	c.Linux.SecurityContext = s
	p := podConfig(t)
	p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{Privileged: s.GetPrivileged()}
	_, id := n.up(t, p, c)
	return id
}

func usersAndGroups(t *testing.T, n *node) {
	for name, c := range map[string]struct {
		s    *v1.LinuxContainerSecurityContext
		id   string
		user *v1.LinuxContainerUser
	}{
		"root":       {nil, "0:0 0", &v1.LinuxContainerUser{}},
		"user":       {&v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 1001}}, "1001:0 0", &v1.LinuxContainerUser{Uid: 1001}},
		"user name":  {&v1.LinuxContainerSecurityContext{RunAsUsername: "nobody"}, "65534:65534 65534", &v1.LinuxContainerUser{Uid: 65534, Gid: 65534}},
		"user group": {&v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 1001}, RunAsGroup: &v1.Int64Value{Value: 1002}}, "1001:1002 1002", nil},
		"groups":     {&v1.LinuxContainerSecurityContext{SupplementalGroups: []int64{1234, 5678}}, "0:0 0 1234 5678", nil},
		"merged groups": {&v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 1000}, SupplementalGroups: []int64{1234}}, "1000:1000 1000 1234 50000",
			&v1.LinuxContainerUser{Uid: 1000, Gid: 1000, SupplementalGroups: []int64{1000, 1234, 50000}}},
		"strict groups": {&v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 1000}, SupplementalGroups: []int64{1234},
			SupplementalGroupsPolicy: v1.SupplementalGroupsPolicy_Strict}, "1000:1000 1000 1234", &v1.LinuxContainerUser{Uid: 1000, Gid: 1000, SupplementalGroups: []int64{1000, 1234}}},
	} {
		id := n.secure(t, c.s)
		show := `set -- $(id -G | tr ' ' '\n' | sort -n); echo "$(id -u):$(id -g) $*"`
		if got := strings.TrimSpace(n.exec(t, id, "sh", "-c", show)); got != c.id {
			t.Errorf("%s: exec is %q, not %q", name, got, c.id)
		}
		st := n.exec(t, id, "cat", "/proc/1/status")
		u := n.status(t, id).User.GetLinux()
		if !strings.Contains(st, fmt.Sprintf("Uid:\t%d\t", u.GetUid())) || !strings.Contains(st, fmt.Sprintf("Gid:\t%d\t", u.GetGid())) {
			t.Errorf("%s: status tells %v, the process is\n%s", name, u, st)
		}
		slices.Sort(u.SupplementalGroups)
		if w := c.user; w != nil && (u.Uid != w.Uid || u.Gid != w.Gid || w.SupplementalGroups != nil && !slices.Equal(u.SupplementalGroups, w.SupplementalGroups)) {
			t.Errorf("%s: status tells %v, not %v", name, u, w)
		}
	}
}

func capabilities(t *testing.T, n *node) {
	caps := func(id, pid string) map[string]string {
		m := map[string]string{}
		for l := range strings.Lines(n.exec(t, id, "cat", "/proc/"+pid+"/status")) {
			if k, v, ok := strings.Cut(l, ":"); ok && strings.HasPrefix(k, "Cap") {
				m[k] = strings.TrimSpace(v)
			}
		}
		return m
	}
	base := n.secure(t, nil)
	usual := caps(base, "1")
	if usual["CapAmb"] != strings.Repeat("0", 16) || usual["CapInh"] != strings.Repeat("0", 16) || usual["CapBnd"] == strings.Repeat("0", 16) {
		t.Errorf("usual: %v", usual)
	}
	if r := n.try(t, base, "ip", "link", "add", "d0", "type", "dummy"); r.ExitCode == 0 {
		t.Error("an ordinary container made a link")
	}
	admin := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{AddCapabilities: []string{"NET_ADMIN"}}})
	n.exec(t, admin, "ip", "link", "set", "lo", "down")
	none := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{DropCapabilities: []string{"ALL"}}})
	for _, pid := range []string{"1", "self"} {
		if c := caps(none, pid); c["CapBnd"] != strings.Repeat("0", 16) || c["CapEff"] != strings.Repeat("0", 16) {
			t.Errorf("dropped all: %v", c)
		}
	}
	all := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{AddCapabilities: []string{"ALL"}}})
	if c := caps(all, "1"); len(strings.TrimLeft(c["CapEff"], "0")) < 8 {
		t.Errorf("all: %v", c)
	}
	raw := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{DropCapabilities: []string{"NET_RAW"}}})
	if c := caps(raw, "1"); c["CapEff"] == usual["CapEff"] {
		t.Errorf("NET_RAW was not dropped: %v", c)
	}
	// Ambient ones reach a process that is not root.
	amb := n.secure(t, &v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 1000},
		Capabilities: &v1.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}})
	for _, pid := range []string{"1", "self"} {
		if c := caps(amb, pid); c["CapAmb"] != "0000000000000400" || c["CapEff"] != "0000000000000400" {
			t.Errorf("ambient, process %s: %v", pid, c)
		}
	}
}

func privileged(t *testing.T, n *node) {
	id := n.secure(t, &v1.LinuxContainerSecurityContext{Privileged: true, Seccomp: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_RuntimeDefault}})
	n.exec(t, id, "ip", "link", "set", "lo", "down")
	n.exec(t, id, "hostname", "changed")
	if s := n.exec(t, id, "grep", "Seccomp:", "/proc/self/status"); !strings.HasSuffix(strings.TrimSpace(s), "0") {
		t.Errorf("%q", s)
	}
	if s := n.exec(t, id, "sh", "-c", "ls /dev | wc -l"); strings.TrimSpace(s) == "" {
		t.Errorf("%q", s)
	}
	if _, err := os.Stat("/dev/fuse"); err == nil {
		n.exec(t, id, "ls", "/dev/fuse")
	}
	if r := n.try(t, id, "sh", "-c", "mount -t tmpfs none /tmp"); r.ExitCode != 0 {
		t.Errorf("%v", r)
	}
}

func seccomp(t *testing.T, n *node) {
	profile := func(calls string) *v1.SecurityProfile {
		f := t.TempDir() + "/p.json"
		doc := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[` + calls + `],"action":"SCMP_ACT_ERRNO"}]}`
		if err := os.WriteFile(f, []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
		return &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: f}
	}
	mode := []string{"sh", "-c", "grep Seccomp: /proc/self/status | tr -dc 0-9"}
	for name, c := range map[string]struct {
		p    *v1.SecurityProfile
		want string
	}{
		"unconfined": {&v1.SecurityProfile{ProfileType: v1.SecurityProfile_Unconfined}, "0"},
		"default":    {&v1.SecurityProfile{}, "2"},
		"nil":        {nil, "0"},
	} {
		id := n.secure(t, &v1.LinuxContainerSecurityContext{Seccomp: c.p})
		if got := n.exec(t, id, mode...); got != c.want {
			t.Errorf("%s: mode %s", name, got)
		}
	}
	chmod := n.secure(t, &v1.LinuxContainerSecurityContext{Seccomp: profile(`"chmod","fchmodat"`)})
	if r := n.try(t, chmod, "chmod", "400", "/"); r.ExitCode == 0 || !strings.Contains(string(r.Stderr), "Operation not permitted") {
		t.Errorf("chmod: %v", r)
	}
	sys := &v1.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	free := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: sys, Seccomp: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Unconfined}})
	n.exec(t, free, "hostname", "new")
	held := n.secure(t, &v1.LinuxContainerSecurityContext{Capabilities: sys, Seccomp: profile(`"sethostname"`)})
	if r := n.try(t, held, "hostname", "new"); r.ExitCode == 0 {
		t.Error("the profile did not hold")
	}
	priv := n.secure(t, &v1.LinuxContainerSecurityContext{Privileged: true, Seccomp: profile(`"sethostname"`)})
	n.exec(t, priv, "hostname", "new")
}

func paths(t *testing.T, n *node) {
	usual := n.secure(t, nil)
	if s := n.exec(t, usual, "sh", "-c", "ls /sys/firmware | wc -l; touch /proc/sys/kernel/panic 2>&1; true"); !strings.HasPrefix(strings.TrimSpace(s), "0") || !strings.Contains(s, "Read-only") {
		t.Errorf("usual: %q", s)
	}
	masked := n.secure(t, &v1.LinuxContainerSecurityContext{MaskedPaths: []string{"/bin/ls"}})
	if r := n.try(t, masked, "/bin/sh", "-c", "/bin/ls"); r.ExitCode == 0 || !strings.Contains(string(r.Stderr), "ermission denied") {
		t.Errorf("masked: %v", r)
	}
	ro := n.secure(t, &v1.LinuxContainerSecurityContext{ReadonlyPaths: []string{"/tmp"}})
	if r := n.try(t, ro, "touch", "/tmp/test"); r.ExitCode == 0 || string(r.Stderr) != "touch: /tmp/test: Read-only file system\n" {
		t.Errorf("read-only: %v", r)
	}
	for _, readonly := range []bool{false, true} {
		id := n.secure(t, &v1.LinuxContainerSecurityContext{ReadonlyRootfs: readonly})
		if r := n.try(t, id, "touch", "/x"); (r.ExitCode != 0) != readonly {
			t.Errorf("read-only root %v: %v", readonly, r)
		}
	}
}

func noNewPrivileges(t *testing.T, n *node) {
	for _, on := range []bool{false, true} {
		id := n.secure(t, &v1.LinuxContainerSecurityContext{NoNewPrivs: on})
		want := "0"
		if on {
			want = "1"
		}
		for _, pid := range []string{"1", "self"} {
			if s := n.exec(t, id, "sh", "-c", "grep NoNewPrivs /proc/"+pid+"/status | tr -dc 0-9"); s != want {
				t.Errorf("%v, process %s: %q", on, pid, s)
			}
		}
	}
}

func userNamespaces(t *testing.T, n *node) {
	m := []*v1.IDMapping{{ContainerId: 0, HostId: 1000, Length: 100000}}
	// With the host's network, too.
	host := &v1.NamespaceOption{Network: v1.NamespaceMode_NODE, Pid: v1.NamespaceMode_CONTAINER, UsernsOptions: &v1.UserNamespace{Mode: v1.NamespaceMode_POD, Uids: m, Gids: m}}
	hp, hc := podConfig(t), sleeper("host-network")
	hp.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: host}
	hc.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: host}
	_, hid := n.up(t, hp, hc)
	own, _ := os.Readlink("/proc/self/ns/net")
	if s := strings.Fields(n.exec(t, hid, "sh", "-c", "readlink /proc/self/ns/net; cat /proc/self/uid_map")); !slices.Equal(s, []string{own, "0", "1000", "100000"}) {
		t.Errorf("with the host's network: %v", s)
	}
	if r := n.try(t, hid, "ip", "link", "set", "lo", "down"); r.ExitCode == 0 {
		t.Error("a pod with ids of its own changed the host's link")
	}
	for name, pid := range map[string]v1.NamespaceMode{"own processes": v1.NamespaceMode_CONTAINER, "shared processes": v1.NamespaceMode_POD} {
		o := &v1.NamespaceOption{Pid: pid, UsernsOptions: &v1.UserNamespace{Mode: v1.NamespaceMode_POD, Uids: m, Gids: m}}
		p := podConfig(t)
		p.Hostname = "mapped"
		p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
		p.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"}
		pod := n.run(t, p)
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		conf := func(name string) *v1.ContainerConfig {
			c := sleeper(name)
			c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: o}
			c.Mounts = []*v1.Mount{{HostPath: dir, ContainerPath: "/data", UidMappings: m, GidMappings: m}}
			return c
		}
		a, b := n.create(t, pod, p, conf("a")), n.create(t, pod, p, conf("b"))
		n.startContainer(t, a)
		n.startContainer(t, b)
		if s := strings.Fields(n.exec(t, a, "cat", "/proc/self/uid_map")); !slices.Equal(s, []string{"0", "1000", "100000"}) {
			t.Errorf("%s: %v", name, s)
		}
		for _, kind := range []string{"user", "net", "ipc", "uts"} {
			if x, y := n.exec(t, a, "readlink", "/proc/self/ns/"+kind), n.exec(t, b, "readlink", "/proc/self/ns/"+kind); x != y {
				t.Errorf("%s: %s namespaces %s and %s", name, kind, x, y)
			}
		}
		if s := n.exec(t, a, "sh", "-c", "id -u; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward; hostname; ls /sys/class/net; echo x >/dev/shm/f; echo y >/root/f; echo z >/tmp/f; stat -c %u /etc/passwd"); s != "0\n1\n1\nmapped\neth0\nlo\n0\n" {
			t.Errorf("%s: %q", name, s)
		}
		if s := n.exec(t, b, "cat", "/dev/shm/f", "/etc/hostname"); s != "x\nmapped\n" {
			t.Errorf("%s: %q", name, s)
		}
		// On the disk of an idmapped volume are the ids that the container sees.
		n.exec(t, a, "sh", "-c", "touch /data/f; stat -c %u /data/f")
		st, err := os.Stat(dir + "/f")
		if err != nil || owner(st) != 0 {
			t.Errorf("%s: owner %d, %v", name, owner(st), err)
		}
		if s := n.podStatus(t, pod).Linux.Namespaces.Options.UsernsOptions; s.GetMode() != v1.NamespaceMode_POD || s.GetUids()[0].HostId != 1000 {
			t.Errorf("%s: %v", name, s)
		}
		// No capability reaches out.
		if r := n.try(t, a, "sh", "-c", "echo 1 >/proc/sys/kernel/panic"); r.ExitCode == 0 {
			t.Errorf("%s: the host's sysctl was written", name)
		}
	}
}
