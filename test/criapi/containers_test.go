package criapi

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

func containerLists(t *testing.T, n *node) {
	p := podConfig(t)
	pod := n.run(t, p)
	var ids []string
	for _, name := range []string{"one", "two", "three"} {
		c := sleeper(name)
		c.Labels = map[string]string{"name": name, "clist": "yes"}
		ids = append(ids, n.create(t, pod, p, c))
	}
	n.startContainer(t, ids[0])
	state := func(s v1.ContainerState) *v1.ContainerStateValue { return &v1.ContainerStateValue{State: s} }
	for name, c := range map[string]struct {
		f    *v1.ContainerFilter
		want int
	}{
		"pod":       {&v1.ContainerFilter{PodSandboxId: pod}, 3},
		"other pod": {&v1.ContainerFilter{PodSandboxId: "no-such"}, 0},
		"id":        {&v1.ContainerFilter{Id: ids[1]}, 1},
		"prefix":    {&v1.ContainerFilter{Id: ids[1][:12]}, 1},
		"no id":     {&v1.ContainerFilter{Id: "no-such"}, 0},
		"labels":    {&v1.ContainerFilter{LabelSelector: map[string]string{"clist": "yes"}}, 3},
		"label":     {&v1.ContainerFilter{LabelSelector: map[string]string{"name": "two", "clist": "yes"}}, 1},
		"running":   {&v1.ContainerFilter{PodSandboxId: pod, State: state(v1.ContainerState_CONTAINER_RUNNING)}, 1},
		"created":   {&v1.ContainerFilter{PodSandboxId: pod, State: state(v1.ContainerState_CONTAINER_CREATED)}, 2},
		"exited":    {&v1.ContainerFilter{PodSandboxId: pod, State: state(v1.ContainerState_CONTAINER_EXITED)}, 0},
	} {
		r, err := n.rt.ListContainers(ctx(t), &v1.ListContainersRequest{Filter: c.f})
		if err != nil || len(r.Containers) != c.want {
			t.Errorf("%s: %d containers, want %d: %v", name, len(r.GetContainers()), c.want, err)
		}
	}
	for range 2 {
		if _, err := n.rt.RemoveContainer(ctx(t), &v1.RemoveContainerRequest{ContainerId: ids[0]}); err != nil {
			t.Fatal(err) // it runs: it is killed
		}
	}
	r, err := n.rt.ListContainers(ctx(t), &v1.ListContainersRequest{Filter: &v1.ContainerFilter{PodSandboxId: pod}})
	if err != nil || len(r.Containers) != 2 {
		t.Errorf("after removal: %v, %v", r, err)
	}
	again := sleeper("two")
	_, err = n.rt.CreateContainer(ctx(t), &v1.CreateContainerRequest{PodSandboxId: pod, Config: again, SandboxConfig: p})
	wants(t, "the same container again", err, codes.FailedPrecondition)
	again.Metadata.Attempt = 1
	n.create(t, pod, p, again)
}

func containerStatus(t *testing.T, n *node) {
	p := podConfig(t)
	pod := n.run(t, p)
	c := sleeper("a")
	c.Metadata.Attempt = 7
	c.Labels, c.Annotations = map[string]string{"l": "1"}, map[string]string{"a": "2"}
	c.Image.UserSpecifiedImage = "bb:latest"
	c.Envs = []*v1.KeyValue{{Key: "SECRET", Value: []byte("hunter2")}}
	c.Linux.Resources = &v1.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 500}
	id := n.create(t, pod, p, c)
	n.startContainer(t, id)
	r, err := n.rt.ContainerStatus(ctx(t), &v1.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	s := r.Status
	img, err := n.img.ImageStatus(ctx(t), &v1.ImageStatusRequest{Image: &v1.ImageSpec{Image: "bb"}})
	if err != nil {
		t.Fatal(err)
	}
	if s.Metadata.Name != "a" || s.Metadata.Attempt != 7 || s.Labels["l"] != "1" || s.Annotations["a"] != "2" || s.Image.Image != "bb:latest" ||
		s.ImageId != img.Image.Id || s.ImageRef == "" || s.Resources.Linux.CpuShares != 512 || s.Resources.Linux.MemoryLimitInBytes != 64<<20 ||
		s.User.Linux.Uid != 0 || s.StopSignal != v1.Signal_SIGNAL_SIGTERM {
		t.Errorf("%v", s)
	}
	if strings.Contains(r.Info["info"], "hunter2") {
		t.Error("the status tells a secret")
	}
	if out := n.exec(t, id, "sh", "-c", "echo $SECRET; cat /proc/1/oom_score_adj"); out != "hunter2\n500\n" {
		t.Errorf("%q", out)
	}
}

func invalidContainers(t *testing.T, n *node) {
	p := podConfig(t)
	pod := n.run(t, p)
	sec := func(s *v1.LinuxContainerSecurityContext) func(*v1.ContainerConfig) {
		return func(c *v1.ContainerConfig) { c.Linux.SecurityContext = s }
	}
	mnt := func(m *v1.Mount) func(*v1.ContainerConfig) {
		return func(c *v1.ContainerConfig) { c.Mounts = []*v1.Mount{m} }
	}
	res := func(r *v1.LinuxContainerResources) func(*v1.ContainerConfig) {
		return func(c *v1.ContainerConfig) { c.Linux.Resources = r }
	}
	for name, c := range map[string]struct {
		change func(*v1.ContainerConfig)
		code   codes.Code
	}{
		"no name":              {func(c *v1.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument},
		"no image":             {func(c *v1.ContainerConfig) { c.Image = nil }, codes.InvalidArgument},
		"missing image":        {func(c *v1.ContainerConfig) { c.Image.Image = "no-such-image" }, codes.NotFound},
		"relative directory":   {func(c *v1.ContainerConfig) { c.WorkingDir = "x" }, codes.InvalidArgument},
		"group without user":   {sec(&v1.LinuxContainerSecurityContext{RunAsGroup: &v1.Int64Value{Value: 5}}), codes.InvalidArgument},
		"negative user":        {sec(&v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: -1}}), codes.InvalidArgument},
		"user with colon":      {sec(&v1.LinuxContainerSecurityContext{RunAsUsername: "a:b"}), codes.InvalidArgument},
		"negative group":       {sec(&v1.LinuxContainerSecurityContext{SupplementalGroups: []int64{-4}}), codes.InvalidArgument},
		"unknown capability":   {sec(&v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{AddCapabilities: []string{"FLY"}}}), codes.InvalidArgument},
		"unknown ambient":      {sec(&v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{AddAmbientCapabilities: []string{"FLY"}}}), codes.InvalidArgument},
		"relative masked path": {sec(&v1.LinuxContainerSecurityContext{MaskedPaths: []string{"etc"}}), codes.InvalidArgument},
		"missing profile":      {sec(&v1.LinuxContainerSecurityContext{Seccomp: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: "/no/such"}}), codes.InvalidArgument},
		"relative profile":     {sec(&v1.LinuxContainerSecurityContext{Seccomp: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: "x.json"}}), codes.InvalidArgument},
		"unloaded AppArmor":    {sec(&v1.LinuxContainerSecurityContext{Apparmor: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: "localhost/no-such"}}), codes.InvalidArgument},
		"target elsewhere":     {sec(&v1.LinuxContainerSecurityContext{NamespaceOptions: &v1.NamespaceOption{Pid: v1.NamespaceMode_TARGET, TargetId: "0123456789"}}), codes.InvalidArgument},
		"relative mount":       {mnt(&v1.Mount{HostPath: "x", ContainerPath: "/x"}), codes.InvalidArgument},
		"mount without target": {mnt(&v1.Mount{HostPath: "/tmp"}), codes.InvalidArgument},
		"mount on root":        {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/"}), codes.InvalidArgument},
		"unknown propagation":  {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/x", Propagation: 9}), codes.InvalidArgument},
		"rro not ro":           {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/x", RecursiveReadOnly: true}), codes.InvalidArgument},
		"rro propagated": {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true,
			Propagation: v1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}), codes.InvalidArgument},
		"rro shared": {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true,
			Propagation: v1.MountPropagation_PROPAGATION_BIDIRECTIONAL}), codes.InvalidArgument},
		"mapped mount in host userns": {mnt(&v1.Mount{HostPath: "/tmp", ContainerPath: "/x", UidMappings: []*v1.IDMapping{{HostId: 5, Length: 5}}}), codes.InvalidArgument},
		"writable image volume":       {mnt(&v1.Mount{Image: &v1.ImageSpec{Image: "bb"}, ContainerPath: "/x"}), codes.InvalidArgument},
		"missing image volume":        {mnt(&v1.Mount{Image: &v1.ImageSpec{Image: "no-such"}, ContainerPath: "/x", Readonly: true}), codes.NotFound},
		"missing part of image":       {mnt(&v1.Mount{Image: &v1.ImageSpec{Image: "bb"}, ContainerPath: "/x", Readonly: true, ImageSubPath: "no/such"}), codes.InvalidArgument},
		"part outside of image":       {mnt(&v1.Mount{Image: &v1.ImageSpec{Image: "bb"}, ContainerPath: "/x", Readonly: true, ImageSubPath: "../etc"}), codes.InvalidArgument},
		"negative memory":             {res(&v1.LinuxContainerResources{MemoryLimitInBytes: -5}), codes.InvalidArgument},
		"swap below memory":           {res(&v1.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 32 << 20}), codes.InvalidArgument},
		"oom score":                   {res(&v1.LinuxContainerResources{OomScoreAdj: 1001}), codes.InvalidArgument},
		"page size":                   {res(&v1.LinuxContainerResources{HugepageLimits: []*v1.HugepageLimit{{PageSize: "../x", Limit: 1}}}), codes.InvalidArgument},
		"unified":                     {res(&v1.LinuxContainerResources{Unified: map[string]string{"../memory.max": "1"}}), codes.InvalidArgument},
		"missing device": {func(c *v1.ContainerConfig) {
			c.Devices = []*v1.Device{{HostPath: "no-such", ContainerPath: "/dev/x"}}
		}, codes.InvalidArgument},
		"environment": {func(c *v1.ContainerConfig) { c.Envs = []*v1.KeyValue{{Key: "", Value: []byte("x")}} }, codes.InvalidArgument},
	} {
		conf := sleeper("bad-" + strings.ReplaceAll(name, " ", "-"))
		c.change(conf)
		_, err := n.rt.CreateContainer(ctx(t), &v1.CreateContainerRequest{PodSandboxId: pod, Config: conf, SandboxConfig: p})
		wants(t, name, err, c.code)
	}
	r, err := n.rt.ListContainers(ctx(t), &v1.ListContainersRequest{Filter: &v1.ContainerFilter{PodSandboxId: pod}})
	if err != nil || len(r.Containers) != 0 {
		t.Errorf("containers are left: %v, %v", r, err)
	}
	// What cannot be started says why, and has ended.
	c := sleeper("no-command")
	c.Command = []string{"/no/such/command"}
	id := n.create(t, pod, p, c)
	_, err = n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: id})
	wants(t, "start of a missing command", err, codes.InvalidArgument)
	if s := n.status(t, id); s.State != v1.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" || s.ExitCode != 128 || s.FinishedAt == 0 || s.Message == "" {
		t.Errorf("%v", s)
	}
}

func exitAndReasons(t *testing.T, n *node) {
	p := podConfig(t)
	pod := n.run(t, p)
	for name, c := range map[string]struct {
		cmd    []string
		limit  int64
		code   int32
		reason string
	}{
		"completed": {[]string{"true"}, 0, 0, "Completed"},
		"error":     {[]string{"sh", "-c", "exit 42"}, 0, 42, "Error"},
		"killed":    {[]string{"sh", "-c", "kill -9 $$"}, 0, 137, "Error"},
		"oom":       {[]string{"sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M"}, 15 << 20, 137, "OOMKilled"},
	} {
		conf := sleeper(name)
		conf.Command = c.cmd
		conf.Linux.Resources = &v1.LinuxContainerResources{MemoryLimitInBytes: c.limit, MemorySwapLimitInBytes: c.limit}
		id := n.create(t, pod, p, conf)
		n.startContainer(t, id)
		s := n.exit(t, id)
		if s.ExitCode != c.code && name != "killed" || s.Reason != c.reason && name != "killed" || s.FinishedAt < s.StartedAt {
			t.Errorf("%s: %d %s", name, s.ExitCode, s.Reason)
		}
		_, err := n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: id})
		wants(t, "start of one that ended", err, codes.FailedPrecondition)
	}
}

func execSync(t *testing.T, n *node) {
	_, id := n.up(t, podConfig(t), sleeper("a"))
	r := n.try(t, id, "sh", "-c", "echo out; echo err >&2; exit 3")
	if string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 3 {
		t.Errorf("%v", r)
	}
	begin := time.Now()
	_, err := n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "4321"}, Timeout: 1})
	wants(t, "timeout", err, codes.DeadlineExceeded)
	if d := time.Since(begin); d < time.Second || d > 10*time.Second {
		t.Errorf("timeout after %s", d)
	}
	if s := n.try(t, id, "pidof", "sleep"); strings.Contains(n.exec(t, id, "ps", "-o", "args"), "4321") {
		t.Errorf("the command goes on: %s", s.Stdout)
	}
	// What it leaves running does not hold the answer back.
	begin = time.Now()
	if out := n.exec(t, id, "sh", "-c", "sleep 1000 & echo left"); out != "left\n" || time.Since(begin) > 10*time.Second {
		t.Errorf("%q after %s", out, time.Since(begin))
	}
	if r := n.try(t, id, "sh", "-c", "head -c 20000000 /dev/zero; echo end >&2"); len(r.Stdout) > 16<<20 || len(r.Stdout) < 15<<20 || string(r.Stderr) != "end\n" {
		t.Errorf("%d bytes, %q", len(r.Stdout), r.Stderr)
	}
	_, err = n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id})
	wants(t, "no command", err, codes.InvalidArgument)
	_, err = n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id, Cmd: []string{"no-such"}})
	if err == nil {
		t.Error("a missing command was executed")
	}
	_, err = n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: -1})
	wants(t, "negative timeout", err, codes.InvalidArgument)
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	_, err = n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
	wants(t, "exec in a stopped container", err, codes.FailedPrecondition)
}

func commandAndArgs(t *testing.T, n *node) {
	p := podConfig(t)
	p.LogDirectory = t.TempDir()
	pod := n.run(t, p)
	for name, c := range map[string]struct {
		conf func(*v1.ContainerConfig)
		want string
	}{
		"command": {func(c *v1.ContainerConfig) { c.Command = []string{"echo", "a"} }, "a\n"},
		"both":    {func(c *v1.ContainerConfig) { c.Command, c.Args = []string{"echo", "a"}, []string{"b c"} }, "a b c\n"},
		"args":    {func(c *v1.ContainerConfig) { c.Command, c.Args = nil, []string{"echo", "d"} }, "d\n"},
		"dir":     {func(c *v1.ContainerConfig) { c.WorkingDir, c.Command = "/made/here", []string{"pwd"} }, "/made/here\n"},
		"env": {func(c *v1.ContainerConfig) {
			c.Envs, c.Command = []*v1.KeyValue{{Key: "A", Value: []byte("1")}, {Key: "A", Value: []byte("2")}}, []string{"sh", "-c", "echo $A"}
		}, "2\n"},
	} {
		conf := sleeper(name)
		conf.LogPath = name + ".log"
		c.conf(conf)
		id := n.create(t, pod, p, conf)
		n.startContainer(t, id)
		n.exit(t, id)
		if got := text(readLog(t, filepath.Join(p.LogDirectory, conf.LogPath)), "stdout"); got != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// line is a line of a log in the CRI's format.
type line struct {
	at          time.Time
	stream, tag string
	text        string
}

func readLog(t *testing.T, path string) (out []line) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(l, "\n"), " ", 4)
		if len(f) != 4 || f[1] != "stdout" && f[1] != "stderr" || f[2] != "F" && f[2] != "P" {
			t.Fatalf("bad line %q", l)
		}
		at, err := time.Parse(time.RFC3339Nano, f[0])
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, line{at, f[1], f[2], f[3]})
	}
	return out
}

func text(l []line, stream string) string {
	var b strings.Builder
	for _, x := range l {
		if x.stream == stream {
			b.WriteString(x.text)
			if x.tag == "F" {
				b.WriteByte('\n')
			}
		}
	}
	return b.String()
}

func logs(t *testing.T, n *node) {
	p := podConfig(t)
	p.LogDirectory = t.TempDir()
	pod := n.run(t, p)
	c := sleeper("both")
	c.LogPath = "both.log"
	c.Command = []string{"sh", "-c", "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end"}
	id := n.create(t, pod, p, c)
	n.startContainer(t, id)
	if s := n.exit(t, id); s.LogPath != p.LogDirectory+"/both.log" {
		t.Errorf("log path %q", s.LogPath)
	}
	l := readLog(t, p.LogDirectory+"/both.log")
	if text(l, "stderr") != "err\n" || text(l, "stdout") != "out\n"+strings.Repeat("x", 40000)+"\nend" && text(l, "stdout") != "out\n"+strings.Repeat("x", 40000)+"\nend\n" {
		t.Errorf("stderr %q, %d bytes of stdout", text(l, "stderr"), len(text(l, "stdout")))
	}

	k := sleeper("keep")
	k.LogPath = "keep.log"
	k.Command = []string{"sh", "-c", "while :; do echo hello; sleep 0.05; done"}
	kid := n.create(t, pod, p, k)
	_, err := n.rt.ReopenContainerLog(ctx(t), &v1.ReopenContainerLogRequest{ContainerId: kid})
	wants(t, "reopen before the start", err, codes.FailedPrecondition)
	n.startContainer(t, kid)
	path := p.LogDirectory + "/keep.log"
	harness.Eventually(t, "output", 5*time.Second, func() bool { b, _ := os.ReadFile(path); return len(b) > 0 })
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.rt.ReopenContainerLog(ctx(t), &v1.ReopenContainerLogRequest{ContainerId: kid}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("no new log: %v", err)
	}
	harness.Eventually(t, "output in the new log", 5*time.Second, func() bool { b, _ := os.ReadFile(path); return len(b) > 0 })
	old := len(readLog(t, path+".old"))
	time.Sleep(200 * time.Millisecond)
	if again := len(readLog(t, path+".old")); again != old {
		t.Errorf("the old log grew from %d to %d lines", old, again)
	}
	// The logs are the kubelet's: they stay.
	if _, err := n.rt.RemoveContainer(ctx(t), &v1.RemoveContainerRequest{ContainerId: kid}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the log went with the container: %v", err)
	}
}

func volumes(t *testing.T, n *node) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/flag", []byte("flag\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, dir+"-link"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir + "-link") })
	c := sleeper("a")
	c.Mounts = []*v1.Mount{
		{HostPath: dir, ContainerPath: "/data"}, {HostPath: dir + "-link", ContainerPath: "/link"}, {HostPath: dir + "/flag", ContainerPath: "/etc/flag", Readonly: true},
		{HostPath: dir + "/made", ContainerPath: "made", SelinuxRelabel: true},
	}
	_, id := n.up(t, podConfig(t), c)
	if out := n.exec(t, id, "cat", "/data/flag", "/link/flag", "/etc/flag"); out != "flag\nflag\nflag\n" {
		t.Errorf("%q", out)
	}
	n.exec(t, id, "touch", "/data/new", "/made/new")
	for _, f := range []string{"/new", "/made/new"} {
		if _, err := os.Stat(dir + f); err != nil {
			t.Error(err)
		}
	}
	if r := n.try(t, id, "touch", "/etc/flag"); r.ExitCode == 0 {
		t.Error("a read-only mount was written to")
	}
	s := n.status(t, id)
	if len(s.Mounts) != 4 || s.Mounts[0].HostPath != dir || s.Mounts[0].ContainerPath != "/data" || s.Mounts[0].Readonly || !s.Mounts[2].Readonly {
		t.Errorf("%v", s.Mounts)
	}
}

func propagation(t *testing.T, n *node) {
	for _, mode := range []v1.MountPropagation{v1.MountPropagation_PROPAGATION_PRIVATE, v1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, v1.MountPropagation_PROPAGATION_BIDIRECTIONAL} {
		dir, src := t.TempDir(), t.TempDir()
		for _, d := range []string{dir + "/mnt/host", dir + "/mnt/container"} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(src+"/flag", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(dir+"/mnt", dir+"/mnt", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatal(err)
		}
		flag := uintptr(unix.MS_SHARED)
		if mode == v1.MountPropagation_PROPAGATION_PRIVATE {
			flag = unix.MS_PRIVATE
		}
		if err := unix.Mount("", dir+"/mnt", "", flag|unix.MS_REC, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for unix.Unmount(dir+"/mnt/host", unix.MNT_DETACH) == nil {
			}
			for unix.Unmount(dir+"/mnt/container", unix.MNT_DETACH) == nil {
			}
			_ = unix.Unmount(dir+"/mnt", unix.MNT_DETACH)
		})
		c := sleeper(strings.ToLower(mode.String()))
		c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{Privileged: true}
		c.Mounts = []*v1.Mount{{HostPath: dir, ContainerPath: dir, Propagation: mode}}
		p := podConfig(t)
		p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{Privileged: true}
		_, id := n.up(t, p, c)
		if err := unix.Mount(src, dir+"/mnt/host", "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		seen := n.exec(t, id, "ls", "-A", dir+"/mnt/host") != ""
		if want := mode != v1.MountPropagation_PROPAGATION_PRIVATE; seen != want {
			t.Errorf("%s: the container sees the host's mount: %v", mode, seen)
		}
		n.exec(t, id, "mount", "--bind", "/etc", dir+"/mnt/container")
		l, err := os.ReadDir(dir + "/mnt/container")
		if want := mode == v1.MountPropagation_PROPAGATION_BIDIRECTIONAL; err != nil || (len(l) > 0) != want {
			t.Errorf("%s: the host sees %d files of the container's mount: %v", mode, len(l), err)
		}
		if s := n.status(t, id); s.Mounts[0].Propagation != mode {
			t.Errorf("%s: %v", mode, s.Mounts)
		}
	}
}

func readOnlyMounts(t *testing.T, n *node) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/tmpfs", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir+"/tmpfs", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/tmpfs", unix.MNT_DETACH) })
	p := podConfig(t)
	pod := n.run(t, p)
	for _, recursive := range []bool{false, true} {
		c := sleeper(fmt.Sprint("rro-", recursive))
		c.Mounts = []*v1.Mount{{HostPath: dir, ContainerPath: "/mnt", Readonly: true, RecursiveReadOnly: recursive}}
		id := n.create(t, pod, p, c)
		n.startContainer(t, id)
		if r := n.try(t, id, "touch", "/mnt/tmpfs/file"); (r.ExitCode == 0) == recursive {
			t.Errorf("recursive %v: %v", recursive, r)
		}
		if r := n.try(t, id, "touch", "/mnt/file"); r.ExitCode == 0 || !strings.Contains(string(r.Stderr), "Read-only file system") {
			t.Errorf("recursive %v: %v", recursive, r)
		}
	}
}
