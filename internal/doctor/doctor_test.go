package doctor

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
)

// healthy is a host with nothing to complain about.
func healthy() Facts {
	sys := map[string]string{}
	for _, n := range needed {
		sys[n.name] = ""
	}
	return Facts{
		Kernel: "6.1.0-1-amd64", Major: 6, Minor: 1, Syscalls: sys, Seccomp: true,
		Cgroup:     Cgroup{Mode: "v2", Controllers: []string{"cpuset", "cpu", "io", "memory", "pids"}, SwapAccounting: true},
		NoFileSoft: 1 << 20, NoFileHard: 1 << 20, KeysMax: 20000, KeysRootMax: 1000000, InotifyInstances: 8192, InotifyWatches: 1 << 20,
		PidMax: 1 << 22, ThreadsMax: 1 << 20, MaxUserNS: 15000, MaxNetNS: 15000, MaxMntNS: 15000, UnprivilegedUserNS: -1, AppArmorUserNS: -1,
		Root:        Disk{Path: "/var/lib/servin", Type: "ext4", Free: 100 << 30, Total: 200 << 30, InodesFree: 9e6, InodesTotal: 1e7},
		RunRoot:     Disk{Path: "/run/servin", Type: "tmpfs", Free: 1 << 30, Total: 1 << 30, InodesFree: 9e6, InodesTotal: 1e7},
		IPv4Forward: 1, BridgeNF: map[string]int64{},
	}
}

func TestHealthyHost(t *testing.T) {
	var titles []string
	for _, f := range Judge(healthy()) {
		if f.Severity != OK && f.Title != "AppArmor is on" {
			t.Errorf("got %+v", f)
		}
		titles = append(titles, f.Title)
	}
	if len(titles) != 10 {
		t.Errorf("got %q", titles)
	}
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		change         func(*Facts)
		severity, want string
	}{
		"old kernel":        {func(f *Facts) { f.Kernel, f.Major, f.Minor = "5.10.0", 5, 10 }, Error, "Linux 5.10.0 is too old"},
		"no openat2":        {func(f *Facts) { f.Syscalls["openat2"] = "function not implemented" }, Error, "the system call openat2 does not work"},
		"no pidfd_getfd":    {func(f *Facts) { f.Syscalls["pidfd_getfd"] = "operation not permitted" }, Warning, "pidfd_getfd"},
		"no userns":         {func(f *Facts) { f.MaxUserNS = 0 }, Warning, "user namespaces are switched off"},
		"no userns at all":  {func(f *Facts) { f.UserNS = "operation not permitted"; f.Rootless = true }, Error, "cannot make a user namespace"},
		"userns sysctl":     {func(f *Facts) { f.UnprivilegedUserNS = 0; f.Rootless = true }, Error, "ordinary users may not make user namespaces"},
		"userns apparmor":   {func(f *Facts) { f.AppArmorUserNS = 1; f.Rootless = true }, Warning, "AppArmor restricts user namespaces"},
		"no subordinates":   {func(f *Facts) { f.SubordinateIDs = "no ids"; f.Rootless = true }, Error, "no ids"},
		"no idmap":          {func(f *Facts) { f.IDMap = "invalid argument" }, Warning, "idmapped mounts do not work on /var/lib/servin"},
		"few netns":         {func(f *Facts) { f.MaxNetNS = 10 }, Warning, "user.max_net_namespaces is 10"},
		"no overlay":        {func(f *Facts) { f.Overlay = "no such device" }, Error, "cannot mount an overlay on /var/lib/servin (ext4): no such device"},
		"read-only":         {func(f *Facts) { f.Root.ReadOnly = true }, Error, "/var/lib/servin is read-only"},
		"no d_type":         {func(f *Facts) { f.Root.NoDType = true }, Error, "without d_type"},
		"little space":      {func(f *Facts) { f.Root.Free = 3 << 30 }, Warning, "3072 MiB free on /var/lib/servin"},
		"no space":          {func(f *Facts) { f.Root.Free = 100 << 20 }, Error, "only 100 MiB free on /var/lib/servin"},
		"run root full":     {func(f *Facts) { f.RunRoot.Free = 1 << 20 }, Error, "only 1024 KiB free on /run/servin"},
		"no inodes":         {func(f *Facts) { f.Root.InodesFree = 10 }, Warning, "only 10 of 10000000 inodes free"},
		"no cgroups":        {func(f *Facts) { f.Cgroup = Cgroup{Mode: "none"} }, Error, "no cgroup hierarchy can be used"},
		"no delegation":     {func(f *Facts) { f.Cgroup = Cgroup{Mode: "none"}; f.Rootless = true }, Warning, "no cgroup hierarchy can be used"},
		"no memory":         {func(f *Facts) { f.Cgroup.Controllers = []string{"cpu", "cpuset", "io", "pids"} }, Warning, "cgroup controllers are missing: memory"},
		"threaded":          {func(f *Facts) { f.Cgroup.NoDomain = "it is of type threaded" }, Error, "cannot hold containers' groups"},
		"no swap":           {func(f *Facts) { f.Cgroup.SwapAccounting = false }, Info, "memory with swap cannot be limited"},
		"v1":                {func(f *Facts) { f.Cgroup.Mode = "hybrid" }, Info, "cgroup hybrid works"},
		"few files":         {func(f *Facts) { f.NoFileHard = 4096 }, Warning, "open files of the engine (hard) is 4096"},
		"few root keys":     {func(f *Facts) { f.KeysRootMax = 200 }, Warning, "kernel.keys.root_maxkeys is 200"},
		"few keys rootless": {func(f *Facts) { f.KeysMax = 200; f.Rootless = true }, Warning, "kernel.keys.maxkeys is 200"},
		"few keys":          {func(f *Facts) { f.KeysMax = 200 }, Info, "kernel.keys.maxkeys is 200"},
		"few watchers":      {func(f *Facts) { f.InotifyInstances = 128 }, Warning, "fs.inotify.max_user_instances is 128"},
		"few pids":          {func(f *Facts) { f.PidMax = 32768 }, Info, "kernel.pid_max is 32768"},
		"no resource cap":   {func(f *Facts) { f.MissingCaps = []string{"CAP_SYS_RESOURCE"} }, Warning, "the engine has no CAP_SYS_RESOURCE"},
		"no admin cap":      {func(f *Facts) { f.MissingCaps = []string{"CAP_SYS_ADMIN"} }, Error, "the engine has no CAP_SYS_ADMIN"},
		"no odd cap":        {func(f *Facts) { f.MissingCaps = []string{"CAP_SYS_TIME"} }, Info, "the engine has no CAP_SYS_TIME"},
		"no seccomp":        {func(f *Facts) { f.Seccomp = false }, Error, "no seccomp filters"},
		"no lsm":            {func(f *Facts) { f.AppArmor = "the kernel has no AppArmor" }, Info, "neither AppArmor nor SELinux"},
		"selinux":           {func(f *Facts) { f.SELinux = "enforcing" }, Info, "SELinux is enforcing"},
		"forwarding":        {func(f *Facts) { f.IPv4Forward = 0 }, Info, "IPv4 forwarding is off"},
		"bridge-nf":         {func(f *Facts) { f.BridgeNF["bridge-nf-call-iptables"] = 1 }, Info, "net.bridge.bridge-nf-call-iptables is on"},
		"clock wrong":       {func(f *Facts) { f.ClockBeforeBuild = true }, Error, "the clock is wrong"},
		"clock alone":       {func(f *Facts) { f.ClockUnsynced = true }, Info, "the clock is not synchronised"},
	} {
		f := healthy()
		f.Syscalls = maps.Clone(f.Syscalls)
		c.change(&f)
		found := Judge(f)
		i := slices.IndexFunc(found, func(x api.Finding) bool { return strings.Contains(x.Title, c.want) })
		if i < 0 {
			t.Errorf("%s: no finding with %q in %+v", name, c.want, found)
			continue
		}
		if found[i].Severity != c.severity {
			t.Errorf("%s: severity %s, want %s", name, found[i].Severity, c.severity)
		}
		if (c.severity == Error || c.severity == Warning) && found[i].Detail == "" && found[i].Fix == "" {
			t.Errorf("%s: a fault with neither reason nor remedy: %+v", name, found[i])
		}
		if !slices.IsSortedFunc(found, func(a, b api.Finding) int {
			order := []string{Error, Warning, Info, OK}
			return slices.Index(order, a.Severity) - slices.Index(order, b.Severity)
		}) {
			t.Errorf("%s: not the worst first", name)
		}
	}
	// Rootless engines are not told what only root could use.
	f := healthy()
	f.Rootless, f.MissingCaps, f.IPv4Forward = true, []string{"CAP_SYS_ADMIN"}, 0
	for _, x := range Judge(f) {
		if x.Severity != OK && x.Title != "AppArmor is on" {
			t.Errorf("rootless: %+v", x)
		}
	}
}

func TestGather(t *testing.T) {
	root := t.TempDir()
	before := mountinfo(t)
	f := Gather(t.Context(), Config{Root: root, RunRoot: root + "/not/made/yet", Capabilities: []string{"A"}, AllCapabilities: []string{"A", "B"}, AppArmor: "off"})
	if f.Major < 5 || f.Kernel == "" || f.Root.Total == 0 || f.RunRoot.Total == 0 || !slices.Equal(f.MissingCaps, []string{"B"}) || f.NoFileHard == 0 || f.PidMax <= 0 {
		t.Errorf("got %+v", f)
	}
	for _, n := range needed {
		if _, ok := f.Syscalls[n.name]; !ok && n.required {
			t.Errorf("%s was not probed", n.name)
		}
	}
	if left, _ := os.ReadDir(root); len(left) != 0 {
		t.Errorf("left %v behind", left)
	}
	if after := mountinfo(t); after != before {
		t.Error("mounts changed")
	}
	if os.Geteuid() == 0 && f.UserNS == "" && f.IDMap != "" {
		t.Logf("no idmapped mounts on %s: %s", f.Root.Type, f.IDMap)
	}
	t.Logf("%+v", f)
	for _, x := range Judge(f) {
		t.Logf("%+v", x)
	}
	// The process whose namespace was used is gone.
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err == nil && pid > 0 {
		t.Errorf("child %d was not reaped", pid)
	}
}

func mountinfo(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestVersion(t *testing.T) {
	for s, want := range map[string][2]int{"6.1.0-1-amd64": {6, 1}, "5.15": {5, 15}, "6.18.44-fc-v595": {6, 18}, "6.10-rc1": {6, 10}, "": {0, 0}} {
		if a, b := version(s); a != want[0] || b != want[1] {
			t.Errorf("%q: %d.%d", s, a, b)
		}
	}
}
