package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	podsParallel = 100
	podsListed   = 200
	podImage     = "docker.io/library/" + imageRef
	pauseImage   = "bench-pause:latest"
)

// kube is an engine seen through the CRI.
type kube struct {
	name   string
	cri    cri.RuntimeServiceClient
	conn   *grpc.ClientConn
	daemon int
	shim   string // what its monitors' command lines hold
	logs   string
}

// pods measures the CRI beside containerd's: with our bridge on our side, and
// with the same chain of CNI plugins on both.
func (b *bench) pods() error {
	if !b.only.MatchString("CRI: ") {
		return nil
	}
	plugins := os.Getenv("SERVIN_BENCH_CNI")
	if plugins == "" {
		return errors.New("SERVIN_BENCH_CNI names no folder of CNI plugins: start it with bench/run")
	}
	ours, err := b.kube("servin", "")
	if err != nil {
		return err
	}
	oursCNI, err := b.kube("servin-cni", plugins)
	if err != nil {
		return err
	}
	theirs, err := b.kube("containerd", plugins)
	if err != nil {
		return err
	}
	defer func() {
		for _, k := range []*kube{ours, oursCNI, theirs} {
			k.conn.Close()
		}
		for _, k := range []string{"servin", "servin-cni"} {
			_, _ = run(context.WithoutCancel(b.ctx), filepath.Join(filepath.Dir(b.e.runtime), "servin"), "--host", "unix://"+b.dir+"/pods-"+k+"/s.sock", "system", "shutdown", "--force")
		}
	}()
	up, down, upCNI, downCNI := &row{}, &row{}, &row{}, &row{}
	if err := b.row("CRI: pod and container up, our bridge on our side, two at a time", "ms", "less", "8 times faster", "containerd", func(r *row) error {
		up = r
		return b.alternatePods(up, down, "servin", ours, theirs)
	}); err != nil {
		return err
	}
	b.extra(down, "CRI: the same, stopped and removed", "8 times faster")
	if err := b.row("CRI: pod and container up, the same CNI chain on both, two at a time", "ms", "less", "2 times faster", "containerd", func(r *row) error {
		upCNI = r
		return b.alternatePods(upCNI, downCNI, "servin", oursCNI, theirs)
	}); err != nil {
		return err
	}
	b.extra(downCNI, "CRI: the same, the same CNI chain, stopped and removed", "2 times faster")
	if err := b.withoutPlugins(plugins, upCNI, downCNI); err != nil {
		return err
	}
	if err := b.row(fmt.Sprintf("CRI: %d pods with a container started in parallel", podsParallel), "ms", "less", "all of them run", "containerd", func(r *row) error {
		for _, k := range []*kube{ours, theirs} {
			if err := b.parallelPods(r, k); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return b.manyPods(ours)
}

// extra adds a row that another one measured along the way.
func (b *bench) extra(r *row, name, bar string) {
	if len(r.Samples) == 0 {
		return
	}
	r.Name, r.Unit, r.Better, r.Bar, r.Against = name, "ms", "less", bar, "containerd"
	b.rep.Rows = append(b.rep.Rows, r)
}

// kube starts an engine with a CRI socket and gives it the image. Without a
// folder of plugins the engine's own bridge connects the pods.
func (b *bench) kube(name, plugins string) (*kube, error) {
	dir := b.dir + "/pods-" + name
	conf := dir + "/net.d"
	if err := os.MkdirAll(conf, 0o755); err != nil {
		return nil, err
	}
	if plugins != "" {
		list := b.chain(dir, name)
		if err := os.WriteFile(conf+"/10-pods.conflist", list, 0o644); err != nil {
			return nil, err
		}
	}
	k := &kube{name: name, logs: dir + "/logs"}
	sock, bin := dir+"/cri.sock", filepath.Dir(b.e.runtime)
	if name == "containerd" {
		k.shim = "containerd-shim"
		toml := fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
address = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [%q]
conf_dir = %q
`, dir+"/root", dir+"/run", sock, "docker.io/library/"+pauseImage, plugins, conf)
		if err := os.WriteFile(dir+"/containerd.toml", []byte(toml), 0o600); err != nil {
			return nil, err
		}
		cmd, err := b.e.start("pods-containerd", "containerd", "-c", dir+"/containerd.toml")
		if err != nil {
			return nil, err
		}
		k.daemon = cmd.Process.Pid
		ctr := []string{"ctr", "-a", sock, "-n", "k8s.io"}
		if err := b.e.wait(with(ctr, "version")...); err != nil {
			return nil, err
		}
		d := b.e.docker
		for _, argv := range [][]string{
			with(d, "import", "-c", `CMD ["/bin/sleep","1000000"]`, b.dir+"/bench.tar", pauseImage),
			with(d, "save", pauseImage, imageRef, "-o", dir+"/pods.tar"),
			with(ctr, "images", "import", dir+"/pods.tar"),
		} {
			if _, err := run(b.ctx, argv...); err != nil {
				return nil, err
			}
		}
	} else {
		k.shim = "servin-shim"
		yaml := "version: 1\nshutdownTimeout: 2s\ncni:\n  confDir: " + conf + "\n  binDir: " + plugins + "\n"
		if err := os.WriteFile(dir+"/servind.yaml", []byte(yaml), 0o600); err != nil {
			return nil, err
		}
		cmd, err := b.e.start("pods-"+name, filepath.Join(bin, "servind"), "--config", dir+"/servind.yaml", "--root", dir+"/root", "--run-root", dir+"/run",
			"--listen", "unix://"+dir+"/s.sock", "--cri", "unix://"+sock)
		if err != nil {
			return nil, err
		}
		k.daemon = cmd.Process.Pid
		cli := []string{filepath.Join(bin, "servin"), "--host", "unix://" + dir + "/s.sock"}
		if err := b.e.wait(with(cli, "version")...); err != nil {
			return nil, err
		}
		if _, err := run(b.ctx, with(cli, "import", b.dir+"/bench.tar", imageRef)...); err != nil {
			return nil, err
		}
	}
	var err error
	if k.conn, err = grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, err
	}
	k.cri = cri.NewRuntimeServiceClient(k.conn)
	for range 200 {
		var s *cri.StatusResponse
		if s, err = k.cri.Status(b.ctx, &cri.StatusRequest{}); err == nil {
			for _, c := range s.Status.Conditions {
				if !c.Status && (c.Type == cri.RuntimeReady || c.Type == cri.NetworkReady) {
					err = fmt.Errorf("%s is not ready: %s %s", name, c.Type, c.Message)
				}
			}
		}
		if err == nil {
			return k, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, err
}

// chain is what a cluster's nodes commonly have, on a bridge of its own.
func (b *bench) chain(dir, name string) []byte {
	n := map[string]int{"servin-cni": 201, "containerd": 202, "chain": 203}[name]
	return fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"pods","plugins":[
{"type":"bridge","bridge":"bcni%d","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.%d.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}`, n, dir+"/leases", n)
}

// up starts a pod with a container that sleeps.
func (k *kube) up(ctx context.Context, name string) (id string, err error) {
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name}, Hostname: name, LogDirectory: filepath.Join(k.logs, name),
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/bench-" + k.name, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
	if err := os.MkdirAll(pod.LogDirectory, 0o755); err != nil {
		return "", err
	}
	p, err := k.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return "", err
	}
	c, err := k.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.PodSandboxId, SandboxConfig: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: podImage}, Command: []string{"/bin/sleep", "1000000"}, LogPath: "c.log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: pod.Linux.SecurityContext.NamespaceOptions}},
	}})
	if err != nil {
		return p.PodSandboxId, err
	}
	_, err = k.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId})
	return p.PodSandboxId, err
}

// down ends a pod as a kubelet does: the container first, without grace.
func (k *kube) down(ctx context.Context, pod string) error {
	cs, err := k.cri.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: pod}})
	if err != nil {
		return err
	}
	for _, c := range cs.Containers {
		if _, err := k.cri.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.Id}); err != nil {
			return err
		}
	}
	if _, err := k.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	_, err = k.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
	return err
}

// two does something twice at the same time and adds how long each took.
func two(r *row, who string, keep bool, fn func(i int) error) error {
	var wg sync.WaitGroup
	var took [2]float64
	var errs [2]error
	for i := range 2 {
		wg.Go(func() {
			t := time.Now()
			errs[i] = fn(i)
			took[i] = float64(time.Since(t).Microseconds()) / 1e3
		})
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return fmt.Errorf("%s: %w", who, err)
	}
	if keep {
		r.add(who, took[0])
		r.add(who, took[1])
	}
	return nil
}

// alternatePods starts and ends two pods with each engine in turn. The first one
// counts under the name given.
func (b *bench) alternatePods(up, down *row, first string, ks ...*kube) error {
	rounds := max(b.n/2, 1)
	for round := range rounds + 1 {
		for i, k := range ks {
			who := k.name
			if i == 0 {
				who = first
			}
			var ids [2]string
			if err := two(up, who, round > 0, func(i int) (err error) {
				ids[i], err = k.up(b.ctx, fmt.Sprintf("p%d-%d", round, i))
				return err
			}); err != nil {
				return err
			}
			if err := two(down, who, round > 0, func(i int) error { return k.down(b.ctx, ids[i]) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// withoutPlugins takes from both sides what the chain of plugins needs by itself.
func (b *bench) withoutPlugins(plugins string, up, down *row) error {
	if len(up.Samples) == 0 {
		return nil
	}
	add, del, err := b.chainAlone(plugins)
	if err != nil {
		return err
	}
	for _, w := range []struct {
		from *row
		name string
		own  float64
	}{{up, "CRI: pod and container up, without the plugins' own time", add}, {down, "CRI: stopped and removed, without the plugins' own time", del}} {
		r := &row{Name: w.name, Unit: "ms", Better: "less", Bar: "8 times faster", Against: "containerd"}
		for _, who := range w.from.Order {
			for _, v := range w.from.Samples[who] {
				r.add(who, max(v-w.own, 0))
			}
		}
		r.add("the plugins alone", w.own)
		b.rep.Rows = append(b.rep.Rows, r)
	}
	return nil
}

// chainAlone takes the medians of the chain's ADD and DEL, two at a time as the
// pods are.
func (b *bench) chainAlone(plugins string) (add, del float64, err error) {
	dir := b.dir + "/pods-chain"
	list, err := libcni.ConfListFromBytes(b.chain(dir, "chain"))
	if err != nil {
		return 0, 0, err
	}
	cni := libcni.NewCNIConfigWithCacheDir([]string{plugins}, dir+"/cache", nil)
	adds, dels := &row{}, &row{}
	for round := range max(b.n/2, 1) + 1 {
		var rts [2]*libcni.RuntimeConf
		var held [2]*os.File
		for i := range rts {
			if held[i], err = newNetNS(); err != nil {
				return 0, 0, err
			}
			rts[i] = &libcni.RuntimeConf{ContainerID: fmt.Sprintf("chain%d-%d", round, i), NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), held[i].Fd()), IfName: "eth0"}
		}
		err := errors.Join(
			two(adds, "plugins", round > 0, func(i int) error {
				_, err := cni.AddNetworkList(b.ctx, list, rts[i])
				return err
			}),
			two(dels, "plugins", round > 0, func(i int) error { return cni.DelNetworkList(b.ctx, list, rts[i]) }))
		held[0].Close()
		held[1].Close()
		if err != nil {
			return 0, 0, err
		}
	}
	return quantile(adds.Samples["plugins"], 0.5), quantile(dels.Samples["plugins"], 0.5), nil
}

// newNetNS makes a network namespace that lives as long as the file.
func newNetNS() (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{err: err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- result{f, err}
	}()
	r := <-ch
	return r.f, r.err
}

// each does something for n pods, so many at a time, and returns their ids.
func each(n, wide int, fn func(i int) error) error {
	var wg sync.WaitGroup
	errs := make([]error, n)
	slots := make(chan struct{}, wide)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			errs[i] = fn(i)
			<-slots
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (b *bench) parallelPods(r *row, k *kube) error {
	ids := make([]string, podsParallel)
	t := time.Now()
	err := each(podsParallel, podsParallel, func(i int) (err error) {
		ids[i], err = k.up(b.ctx, fmt.Sprint("par", i))
		return err
	})
	d := time.Since(t)
	if err != nil {
		return fmt.Errorf("%s: %w", k.name, err)
	}
	r.add(k.name, float64(d.Microseconds())/1e3)
	return each(podsParallel, 4, func(i int) error { return k.down(b.ctx, ids[i]) })
}

// manyPods weighs pods and takes the time of the lists that a kubelet asks for.
// The bars are absolute.
func (b *bench) manyPods(k *kube) error {
	weigh := func() (float64, error) {
		time.Sleep(2 * time.Second)
		return pss(append(processes(func(_ int, c string) bool { return strings.Contains(c, k.shim) || strings.Contains(c, "servin-pause") }), k.daemon)...)
	}
	empty, err := weigh()
	if err != nil {
		return err
	}
	ids := make([]string, podsListed)
	if err := each(podsListed, 8, func(i int) (err error) {
		ids[i], err = k.up(b.ctx, fmt.Sprint("many", i))
		return err
	}); err != nil {
		return err
	}
	if err := b.row("CRI: memory of a pod above its workload, PSS", "MB", "less", "under 1 MB", "", func(r *row) error {
		full, err := weigh()
		r.add("servin", (full-empty)/podsListed)
		return err
	}); err != nil {
		return err
	}
	of := fmt.Sprintf(" with %d pods", podsListed)
	for _, l := range []struct {
		name string
		call func() (int, error)
	}{
		{"list of pods", func() (int, error) {
			l, err := k.cri.ListPodSandbox(b.ctx, &cri.ListPodSandboxRequest{})
			return len(l.GetItems()), err
		}},
		{"list of containers", func() (int, error) {
			l, err := k.cri.ListContainers(b.ctx, &cri.ListContainersRequest{})
			return len(l.GetContainers()), err
		}},
		{"stats of pods", func() (int, error) {
			l, err := k.cri.ListPodSandboxStats(b.ctx, &cri.ListPodSandboxStatsRequest{})
			return len(l.GetStats()), err
		}},
		{"stats of containers", func() (int, error) {
			l, err := k.cri.ListContainerStats(b.ctx, &cri.ListContainerStatsRequest{})
			return len(l.GetStats()), err
		}},
	} {
		if err := b.row("CRI: "+l.name+of, "ms", "less", "under 20 ms", "", func(r *row) error {
			for i := range b.n + 1 {
				t := time.Now()
				n, err := l.call()
				if err != nil {
					return err
				}
				if n != podsListed {
					return fmt.Errorf("%d of %d", n, podsListed)
				}
				if i > 0 {
					r.add("servin", float64(time.Since(t).Microseconds())/1e3)
				}
				time.Sleep(20 * time.Millisecond)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return each(podsListed, 8, func(i int) error { return k.down(b.ctx, ids[i]) })
}
