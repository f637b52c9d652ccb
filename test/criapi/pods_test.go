package criapi

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

func podAttributes(t *testing.T, n *node) {
	p := podConfig(t)
	p.Metadata.Attempt, p.Hostname = 3, "a-host"
	p.Labels, p.Annotations = map[string]string{"foo": "bar"}, map[string]string{"abc": "def"}
	id := n.run(t, p)
	r, err := n.rt.PodSandboxStatus(ctx(t), &v1.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	st := r.Status
	if !proto.Equal(st.Metadata, p.Metadata) || st.Labels["foo"] != "bar" || st.Annotations["abc"] != "def" || st.CreatedAt == 0 || r.Timestamp < st.CreatedAt ||
		net.ParseIP(st.Network.Ip) == nil || !strings.Contains(r.Info["info"], "a-host") {
		t.Errorf("%v", r)
	}
	_, err = n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: p})
	wants(t, "the same pod again", err, codes.FailedPrecondition)
	if r, err := n.rt.PodSandboxStatus(ctx(t), &v1.PodSandboxStatusRequest{PodSandboxId: id[:13]}); err != nil || r.Status.Id != id {
		t.Errorf("by prefix: %v, %v", r, err)
	}
}

func podLists(t *testing.T, n *node) {
	a, b := podConfig(t), podConfig(t)
	a.Labels = map[string]string{"list": "yes", "n": "1"}
	b.Labels = map[string]string{"list": "yes", "n": "2"}
	ida, idb := n.run(t, a), n.run(t, b)
	if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: idb}); err != nil {
		t.Fatal(err)
	}
	state := func(s v1.PodSandboxState) *v1.PodSandboxStateValue { return &v1.PodSandboxStateValue{State: s} }
	yes := map[string]string{"list": "yes"}
	for name, c := range map[string]struct {
		f    *v1.PodSandboxFilter
		want []string
	}{
		"id":            {&v1.PodSandboxFilter{Id: ida}, []string{ida}},
		"prefix":        {&v1.PodSandboxFilter{Id: ida[:12]}, []string{ida}},
		"none":          {&v1.PodSandboxFilter{Id: "non-existent-id"}, nil},
		"labels":        {&v1.PodSandboxFilter{LabelSelector: yes}, []string{idb, ida}},
		"both labels":   {&v1.PodSandboxFilter{LabelSelector: map[string]string{"list": "yes", "n": "2"}}, []string{idb}},
		"ready":         {&v1.PodSandboxFilter{LabelSelector: yes, State: state(v1.PodSandboxState_SANDBOX_READY)}, []string{ida}},
		"not ready":     {&v1.PodSandboxFilter{LabelSelector: yes, State: state(v1.PodSandboxState_SANDBOX_NOTREADY)}, []string{idb}},
		"id and labels": {&v1.PodSandboxFilter{Id: ida, LabelSelector: map[string]string{"n": "2"}}, nil},
	} {
		r, err := n.rt.ListPodSandbox(ctx(t), &v1.ListPodSandboxRequest{Filter: c.f})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range r.Items {
			got = append(got, p.Id)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func invalidPods(t *testing.T, n *node) {
	ns := func(o *v1.NamespaceOption) func(*v1.PodSandboxConfig) {
		return func(p *v1.PodSandboxConfig) {
			p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
		}
	}
	user := func(m ...*v1.IDMapping) func(*v1.PodSandboxConfig) {
		return ns(&v1.NamespaceOption{UsernsOptions: &v1.UserNamespace{Uids: m, Gids: m}})
	}
	for name, c := range map[string]struct {
		change func(*v1.PodSandboxConfig)
		code   codes.Code
	}{
		"no metadata":          {func(p *v1.PodSandboxConfig) { p.Metadata = nil }, codes.InvalidArgument},
		"no name":              {func(p *v1.PodSandboxConfig) { p.Metadata.Name = "" }, codes.InvalidArgument},
		"no uid":               {func(p *v1.PodSandboxConfig) { p.Metadata.Uid = "" }, codes.InvalidArgument},
		"bad hostname":         {func(p *v1.PodSandboxConfig) { p.Hostname = "a b" }, codes.InvalidArgument},
		"long hostname":        {func(p *v1.PodSandboxConfig) { p.Hostname = strings.Repeat("x", 65) }, codes.InvalidArgument},
		"network of container": {ns(&v1.NamespaceOption{Network: v1.NamespaceMode_CONTAINER}), codes.InvalidArgument},
		"ipc of container":     {ns(&v1.NamespaceOption{Ipc: v1.NamespaceMode_CONTAINER}), codes.InvalidArgument},
		"pid of target":        {ns(&v1.NamespaceOption{Pid: v1.NamespaceMode_TARGET}), codes.InvalidArgument},
		"userns of container":  {ns(&v1.NamespaceOption{UsernsOptions: &v1.UserNamespace{Mode: v1.NamespaceMode_CONTAINER}}), codes.InvalidArgument},
		"userns of target":     {ns(&v1.NamespaceOption{UsernsOptions: &v1.UserNamespace{Mode: v1.NamespaceMode_TARGET}}), codes.InvalidArgument},
		"two mappings":         {user(&v1.IDMapping{HostId: 1000, Length: 100}, &v1.IDMapping{HostId: 3000, Length: 100}), codes.InvalidArgument},
		"root unmapped":        {user(&v1.IDMapping{ContainerId: 1, HostId: 1000, Length: 100}), codes.InvalidArgument},
		"mapped to root":       {user(&v1.IDMapping{HostId: 0, Length: 100}), codes.InvalidArgument},
		"mapping too long":     {user(&v1.IDMapping{HostId: 1 << 31, Length: 1 << 31}), codes.InvalidArgument},
		"empty mapping":        {user(&v1.IDMapping{HostId: 1000}), codes.InvalidArgument},
		"sysctl of the host":   {func(p *v1.PodSandboxConfig) { p.Linux.Sysctls = map[string]string{"kernel.panic": "1"} }, codes.InvalidArgument},
		"sysctl that leads out": {func(p *v1.PodSandboxConfig) {
			p.Linux.Sysctls = map[string]string{"net/../../kernel/panic": "1"}
		}, codes.InvalidArgument},
		"sysctl unknown": {func(p *v1.PodSandboxConfig) { p.Linux.Sysctls = map[string]string{"net.no.such": "1"} }, codes.InvalidArgument},
		"bad DNS":        {func(p *v1.PodSandboxConfig) { p.DnsConfig = &v1.DNSConfig{Servers: []string{"1.2.3.4\nfoo"}} }, codes.InvalidArgument},
		"bad port":       {func(p *v1.PodSandboxConfig) { p.PortMappings = []*v1.PortMapping{{ContainerPort: 70000}} }, codes.InvalidArgument},
		"bad host ip": {func(p *v1.PodSandboxConfig) {
			p.PortMappings = []*v1.PortMapping{{ContainerPort: 80, HostPort: 80, HostIp: "x"}}
		}, codes.InvalidArgument},
		"missing profile": {func(p *v1.PodSandboxConfig) {
			p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{Seccomp: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: "/no/such"}}
		}, codes.InvalidArgument},
	} {
		p := podConfig(t)
		c.change(p)
		_, err := n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: p})
		wants(t, name, err, c.code)
	}
	_, err := n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: podConfig(t), RuntimeHandler: "no-such"})
	wants(t, "unknown handler", err, codes.InvalidArgument)
	_, err = n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{})
	wants(t, "no configuration", err, codes.InvalidArgument)
	if l, err := os.ReadDir(n.Dir + "/run/pods"); err != nil || len(l) > 8 {
		t.Errorf("%d directories of pods are left: %v", len(l), err)
	}
}

func missingObjects(t *testing.T, n *node) {
	const id = "3e2d1c0b-0000-0000-0000-000000000000"
	c := ctx(t)
	fails := map[string]error{}
	set := func(name string, err error) { fails[name] = err }
	_, err := n.rt.PodSandboxStatus(c, &v1.PodSandboxStatusRequest{PodSandboxId: id})
	set("PodSandboxStatus", err)
	_, err = n.rt.PodSandboxStats(c, &v1.PodSandboxStatsRequest{PodSandboxId: id})
	set("PodSandboxStats", err)
	_, err = n.rt.PortForward(c, &v1.PortForwardRequest{PodSandboxId: id})
	set("PortForward", err)
	_, err = n.rt.UpdatePodSandboxResources(c, &v1.UpdatePodSandboxResourcesRequest{PodSandboxId: id})
	set("UpdatePodSandboxResources", err)
	_, err = n.rt.CreateContainer(c, &v1.CreateContainerRequest{PodSandboxId: id, Config: sleeper("a")})
	set("CreateContainer", err)
	_, err = n.rt.StartContainer(c, &v1.StartContainerRequest{ContainerId: id})
	set("StartContainer", err)
	_, err = n.rt.ContainerStatus(c, &v1.ContainerStatusRequest{ContainerId: id})
	set("ContainerStatus", err)
	_, err = n.rt.ContainerStats(c, &v1.ContainerStatsRequest{ContainerId: id})
	set("ContainerStats", err)
	_, err = n.rt.UpdateContainerResources(c, &v1.UpdateContainerResourcesRequest{ContainerId: id})
	set("UpdateContainerResources", err)
	_, err = n.rt.ReopenContainerLog(c, &v1.ReopenContainerLogRequest{ContainerId: id})
	set("ReopenContainerLog", err)
	_, err = n.rt.ExecSync(c, &v1.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
	set("ExecSync", err)
	_, err = n.rt.Exec(c, &v1.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
	set("Exec", err)
	_, err = n.rt.Attach(c, &v1.AttachRequest{ContainerId: id, Stdout: true})
	set("Attach", err)
	_, err = n.rt.CheckpointContainer(c, &v1.CheckpointContainerRequest{ContainerId: id})
	set("CheckpointContainer", err)
	for name, err := range fails {
		wants(t, name, err, codes.NotFound)
	}
	// What takes something away is content where there is nothing.
	_, err = n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{PodSandboxId: id})
	wants(t, "StopPodSandbox", err, codes.OK)
	_, err = n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{PodSandboxId: id})
	wants(t, "RemovePodSandbox", err, codes.OK)
	_, err = n.rt.StopContainer(c, &v1.StopContainerRequest{ContainerId: id})
	wants(t, "StopContainer", err, codes.OK)
	_, err = n.rt.RemoveContainer(c, &v1.RemoveContainerRequest{ContainerId: id})
	wants(t, "RemoveContainer", err, codes.OK)
	_, err = n.img.RemoveImage(c, &v1.RemoveImageRequest{Image: &v1.ImageSpec{Image: strings.Repeat("0", 64)}})
	wants(t, "RemoveImage", err, codes.OK)
	for name, call := range map[string]func() error{
		"StopPodSandbox":   func() error { _, err := n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{}); return err },
		"RemovePodSandbox": func() error { _, err := n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{}); return err },
		"StopContainer":    func() error { _, err := n.rt.StopContainer(c, &v1.StopContainerRequest{}); return err },
		"RemoveContainer":  func() error { _, err := n.rt.RemoveContainer(c, &v1.RemoveContainerRequest{}); return err },
		"ImageStatus":      func() error { _, err := n.img.ImageStatus(c, &v1.ImageStatusRequest{}); return err },
		"PullImage":        func() error { _, err := n.img.PullImage(c, &v1.PullImageRequest{}); return err },
		"RemoveImage":      func() error { _, err := n.img.RemoveImage(c, &v1.RemoveImageRequest{}); return err },
	} {
		wants(t, name+" of nothing", call(), codes.InvalidArgument)
	}
}

func namespaces(t *testing.T, n *node) {
	p := podConfig(t)
	p.Hostname = "shared-host"
	pod := n.run(t, p)
	a, b := n.create(t, pod, p, sleeper("a")), n.create(t, pod, p, sleeper("b"))
	n.startContainer(t, a)
	n.startContainer(t, b)
	for _, kind := range []string{"net", "ipc", "uts", "pid", "mnt"} {
		x, y := n.exec(t, a, "readlink", "/proc/self/ns/"+kind), n.exec(t, b, "readlink", "/proc/self/ns/"+kind)
		host, err := os.Readlink("/proc/self/ns/" + kind)
		shared := kind != "pid" && kind != "mnt"
		if err != nil || (x == y) != shared || strings.TrimSpace(x) == host {
			t.Errorf("%s: %s and %s, the host's is %s", kind, x, y, host)
		}
	}
	if h := n.exec(t, a, "hostname"); h != "shared-host\n" {
		t.Errorf("hostname %q", h)
	}
	if h := n.exec(t, b, "sh", "-c", "echo $HOSTNAME; cat /etc/hostname"); h != "shared-host\nshared-host\n" {
		t.Errorf("hostname %q", h)
	}
	n.exec(t, a, "sh", "-c", "echo hi >/dev/shm/x")
	if s := n.exec(t, b, "cat", "/dev/shm/x"); s != "hi\n" {
		t.Errorf("/dev/shm: %q", s)
	}
	n.exec(t, a, "sh", "-c", "nc -l -p 7777 -e echo pong >/dev/null 2>&1 &")
	if s := n.exec(t, b, "sh", "-c", "sleep 0.2; nc 127.0.0.1 7777 </dev/null"); s != "pong\n" {
		t.Errorf("loopback: %q", s)
	}
	if s := n.exec(t, a, "sh", "-c", "ps | wc -l"); strings.TrimSpace(s) == "1" {
		t.Errorf("processes: %q", s)
	}
}

func hostNetwork(t *testing.T, n *node) {
	p := podConfig(t)
	o := &v1.NamespaceOption{Network: v1.NamespaceMode_NODE, Pid: v1.NamespaceMode_NODE, Ipc: v1.NamespaceMode_NODE}
	p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
	c := sleeper("a")
	c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: o}
	pod, id := n.up(t, p, c)
	for _, kind := range []string{"net", "ipc", "uts", "pid"} {
		host, _ := os.Readlink("/proc/self/ns/" + kind)
		if x := strings.TrimSpace(n.exec(t, id, "readlink", "/proc/self/ns/"+kind)); x != host {
			t.Errorf("%s is %s, the host's %s", kind, x, host)
		}
	}
	st := n.podStatus(t, pod)
	if st.Network.Ip != "" || st.Linux.Namespaces.Options.Network != v1.NamespaceMode_NODE || st.Linux.Namespaces.Options.Pid != v1.NamespaceMode_NODE {
		t.Errorf("status: %v", st)
	}
	host, _ := os.Hostname()
	if h := n.exec(t, id, "sh", "-c", "hostname; echo $HOSTNAME"); h != host+"\n"+host+"\n" {
		t.Errorf("hostname %q, the host's %q", h, host)
	}
	if s := n.exec(t, id, "pidof", "servind"); strings.TrimSpace(s) == "" {
		t.Error("the host's processes cannot be seen")
	}
}

func sharedProcesses(t *testing.T, n *node) {
	p := podConfig(t)
	o := &v1.NamespaceOption{Pid: v1.NamespaceMode_POD}
	p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
	pod := n.run(t, p)
	conf := func(name string, o *v1.NamespaceOption) *v1.ContainerConfig {
		c := sleeper(name)
		c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: o}
		return c
	}
	a, b := n.create(t, pod, p, conf("a", o)), n.create(t, pod, p, conf("b", o))
	own := n.create(t, pod, p, conf("own", &v1.NamespaceOption{Pid: v1.NamespaceMode_CONTAINER}))
	for _, id := range []string{a, b, own} {
		n.startContainer(t, id)
	}
	if s := n.exec(t, a, "cat", "/proc/1/cmdline"); !strings.Contains(s, "servin-pause") {
		t.Errorf("init is %q", s)
	}
	if x, y := n.exec(t, a, "readlink", "/proc/self/ns/pid"), n.exec(t, b, "readlink", "/proc/self/ns/pid"); x != y {
		t.Errorf("pid namespaces %s and %s", x, y)
	}
	if s := n.exec(t, own, "cat", "/proc/1/cmdline"); !strings.Contains(s, "trap") {
		t.Errorf("init of its own is %q", s)
	}
	target := n.create(t, pod, p, conf("debug", &v1.NamespaceOption{Pid: v1.NamespaceMode_TARGET, TargetId: own}))
	n.startContainer(t, target)
	if x, y := n.exec(t, own, "readlink", "/proc/self/ns/pid"), n.exec(t, target, "readlink", "/proc/self/ns/pid"); x != y {
		t.Errorf("pid namespaces of target %s and of who joined it %s", x, y)
	}
	// Orphans go to the pause, which reaps them; it has no right at all.
	n.exec(t, a, "sh", "-c", "(sleep 0.1 &) ; true")
	harness.Eventually(t, "the orphan's end", 5*time.Second, func() bool {
		return !strings.Contains(n.exec(t, a, "ps", "-o", "stat,args"), "Z ")
	})
	s := n.exec(t, a, "cat", "/proc/1/status")
	for _, want := range []string{"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t65535"} {
		if !strings.Contains(s, want) {
			t.Errorf("the pause lacks %q:\n%s", want, s)
		}
	}
	// A container that ends leaves the others alone.
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: a, Timeout: 5}); err != nil {
		t.Fatal(err)
	}
	n.exec(t, b, "true")
}

func dnsAndHosts(t *testing.T, n *node) {
	p := podConfig(t)
	p.Hostname = "named"
	p.DnsConfig = &v1.DNSConfig{Servers: []string{"10.10.10.10"}, Searches: []string{"google.com", "svc.local"}, Options: []string{"ndots:8"}}
	pod, id := n.up(t, p, sleeper("a"))
	if s := n.exec(t, id, "cat", "/etc/resolv.conf"); s != "nameserver 10.10.10.10\nsearch google.com svc.local\noptions ndots:8\n" {
		t.Errorf("resolv.conf: %q", s)
	}
	if s, ip := n.exec(t, id, "cat", "/etc/hosts"), n.podStatus(t, pod).Network.Ip; !strings.Contains(s, ip+"\tnamed\n") || !strings.Contains(s, "127.0.0.1\tlocalhost\n") {
		t.Errorf("hosts: %q", s)
	}
	// The kubelet brings a hosts file of its own.
	file := t.TempDir() + "/hosts"
	if err := os.WriteFile(file, []byte("# kubelet's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := sleeper("own-hosts")
	c.Mounts = []*v1.Mount{{HostPath: file, ContainerPath: "/etc/hosts"}}
	b := n.create(t, pod, p, c)
	n.startContainer(t, b)
	if s := n.exec(t, b, "cat", "/etc/hosts"); s != "# kubelet's\n" {
		t.Errorf("hosts: %q", s)
	}
}

func sysctls(t *testing.T, n *node) {
	p := podConfig(t)
	p.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.ipv4.ip_local_port_range": "1024 65000", "net/ipv4/ip_forward": "1"}
	_, id := n.up(t, p, sleeper("a"))
	for path, want := range map[string]string{
		"kernel/shm_rmid_forced": "1", "fs/mqueue/msg_max": "100", "net/ipv4/ip_local_port_range": "1024\t65000", "net/ipv4/ip_forward": "1",
		"net/ipv4/ip_unprivileged_port_start": "0",
	} {
		if s := strings.TrimSpace(n.exec(t, id, "cat", "/proc/sys/"+path)); s != want {
			t.Errorf("%s is %q, not %q", path, s, want)
		}
	}
}

func ports(t *testing.T, n *node) {
	p := podConfig(t)
	p.PortMappings = []*v1.PortMapping{{ContainerPort: 8080, HostPort: 12001}, {ContainerPort: 9090}}
	c := sleeper("web")
	c.Command = []string{"sh", "-c", "echo it works >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"}
	pod, _ := n.up(t, p, c)
	ip := n.podStatus(t, pod).Network.Ip
	for _, at := range []string{"127.0.0.1:12001", ip + ":8080"} {
		var body string
		harness.Eventually(t, at, 10*time.Second, func() bool {
			h := http.Client{Timeout: time.Second}
			r, err := h.Get("http://" + at + "/")
			if err != nil {
				return false
			}
			defer r.Body.Close()
			b, _ := io.ReadAll(r.Body)
			body = string(b)
			return true
		})
		if body != "it works\n" {
			t.Errorf("%s: %q", at, body)
		}
	}
	taken := podConfig(t)
	taken.PortMappings = []*v1.PortMapping{{ContainerPort: 80, HostPort: 12001}}
	if _, err := n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: taken}); err == nil {
		t.Error("a port was published twice")
	}
	// Stopping gives the port back at once.
	if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	n.run(t, taken)
}
