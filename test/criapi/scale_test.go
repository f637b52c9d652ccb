package criapi

import (
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestManyPods runs many pods at the same time, lists them and takes them away.
func TestManyPods(t *testing.T) {
	n := start(t)
	count := 24
	if s := os.Getenv("SERVIN_PODS"); s != "" {
		count, _ = strconv.Atoi(s)
	} else if long {
		count = 200
	}
	type pair struct{ pod, id string }
	all := make([]pair, count)
	var mu sync.Mutex
	times := map[string][]time.Duration{}
	timed := func(name string, f func() error) bool {
		begin := time.Now()
		err := f()
		mu.Lock()
		times[name] = append(times[name], time.Since(begin))
		mu.Unlock()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return err == nil
	}
	begin := time.Now()
	var wg sync.WaitGroup
	c := ctx(t)
	for i := range all {
		wg.Go(func() {
			p := podConfig(t)
			conf := sleeper("a")
			conf.Command = []string{"sleep", "1000"}
			p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: &v1.NamespaceOption{Pid: v1.NamespaceMode_CONTAINER}}
			_ = timed("run", func() error {
				r, err := n.rt.RunPodSandbox(c, &v1.RunPodSandboxRequest{Config: p})
				all[i].pod = r.GetPodSandboxId()
				return err
			}) && timed("create", func() error {
				r, err := n.rt.CreateContainer(c, &v1.CreateContainerRequest{PodSandboxId: all[i].pod, Config: conf, SandboxConfig: p})
				all[i].id = r.GetContainerId()
				return err
			}) && timed("start", func() error {
				_, err := n.rt.StartContainer(c, &v1.StartContainerRequest{ContainerId: all[i].id})
				return err
			})
		})
	}
	wg.Wait()
	t.Logf("%d pods up after %s", count, time.Since(begin))
	for range 5 {
		timed("list pods", func() error { _, err := n.rt.ListPodSandbox(c, &v1.ListPodSandboxRequest{}); return err })
		timed("list containers", func() error { _, err := n.rt.ListContainers(c, &v1.ListContainersRequest{}); return err })
		timed("container stats", func() error {
			r, err := n.rt.ListContainerStats(c, &v1.ListContainerStatsRequest{})
			if len(r.GetStats()) != count {
				t.Errorf("stats of %d containers", len(r.GetStats()))
			}
			return err
		})
		timed("pod stats", func() error { _, err := n.rt.ListPodSandboxStats(c, &v1.ListPodSandboxStatsRequest{}); return err })
	}
	addresses := map[string]bool{}
	memory := 0
	for i, p := range all {
		addresses[n.podStatus(t, p.pod).Network.Ip] = true
		if i < 4 {
			for _, x := range processesIn(t, p.id) {
				memory += pss(x.Pid)
			}
		}
	}
	if len(addresses) != count {
		t.Errorf("%d addresses for %d pods", len(addresses), count)
	}
	t.Logf("daemon %d KiB PSS, a pod with its container %d KiB", pss(n.Cmd.Process.Pid)>>10, memory/4>>10)
	begin = time.Now()
	for _, p := range all {
		wg.Go(func() {
			_ = timed("stop", func() error {
				_, err := n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{PodSandboxId: p.pod})
				return err
			}) && timed("remove", func() error {
				_, err := n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{PodSandboxId: p.pod})
				return err
			})
		})
	}
	wg.Wait()
	t.Logf("all gone after %s", time.Since(begin))
	for name, l := range times {
		slices.Sort(l)
		t.Logf("%-16s median %v, last %v", name, l[len(l)/2].Round(10*time.Microsecond), l[len(l)-1].Round(10*time.Microsecond))
	}
}

// TestOneAtATime gives the figures of a pod alone.
func TestOneAtATime(t *testing.T) {
	n := start(t)
	times := map[string][]time.Duration{}
	c := ctx(t)
	for range 15 {
		p := podConfig(t)
		p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: &v1.NamespaceOption{Pid: v1.NamespaceMode_CONTAINER}}
		conf := sleeper("a")
		conf.Command = []string{"sleep", "1000"}
		var pod, id string
		for _, s := range []struct {
			name string
			f    func() error
		}{
			{"1 run", func() error {
				r, err := n.rt.RunPodSandbox(c, &v1.RunPodSandboxRequest{Config: p})
				pod = r.GetPodSandboxId()
				return err
			}},
			{"2 create", func() error {
				r, err := n.rt.CreateContainer(c, &v1.CreateContainerRequest{PodSandboxId: pod, Config: conf, SandboxConfig: p})
				id = r.GetContainerId()
				return err
			}},
			{"3 start", func() error {
				_, err := n.rt.StartContainer(c, &v1.StartContainerRequest{ContainerId: id})
				return err
			}},
			{"4 stop", func() error {
				_, err := n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{PodSandboxId: pod})
				return err
			}},
			{"5 remove", func() error {
				_, err := n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{PodSandboxId: pod})
				return err
			}},
		} {
			begin := time.Now()
			if err := s.f(); err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
			times[s.name] = append(times[s.name], time.Since(begin))
		}
		time.Sleep(30 * time.Millisecond)
	}
	for name, l := range times {
		slices.Sort(l)
		t.Logf("%-10s median %v, last %v", name, l[len(l)/2].Round(10*time.Microsecond), l[len(l)-1].Round(10*time.Microsecond))
	}
}
