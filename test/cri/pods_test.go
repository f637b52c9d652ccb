package cri

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// TestKubelet runs pods of every kind under one kubelet.
func TestKubelet(t *testing.T) {
	for _, c := range []struct {
		name string
		cni  bool
	}{{"bridge", false}, {"cni", true}} {
		if os.Getenv("SERVIN_CRI_PEER") != "" && !c.cni {
			continue
		}
		t.Run(c.name, func(t *testing.T) { testKubelet(newNode(t, c.cni)) })
	}
}

func testKubelet(n *node) {
	n.t.Run("pods", func(t *testing.T) {
		for name, fn := range map[string]func(t *testing.T, n *node){
			"basic": testBasic, "probes": testProbes, "restarts": testRestarts, "init": testInit, "sidecar": testSidecar,
			"volumes": testVolumes, "resources": testResources, "oom": testOOM, "security": testSecurity, "namespaces": testNamespaces,
			"hooks": testHooks, "rotation": testRotation, "network": testNetwork, "userns": testUserNS, "change": testChange,
		} {
			t.Run(name, func(t *testing.T) { t.Parallel(); fn(t, n) })
		}
	})
	n.t.Run("stats", func(t *testing.T) { testStats(t, n) })
	n.t.Run("kubelet restart", func(t *testing.T) { testRestart(t, n, "kept1", func() { n.stopKubelet(); n.startKubelet() }) })
	n.t.Run("kubelet crash", func(t *testing.T) {
		testRestart(t, n, "kept2", func() { _ = n.cmd.Process.Kill(); _ = n.cmd.Wait(); n.startKubelet() })
	})
	n.t.Run("engine crash", func(t *testing.T) { testRestart(t, n, "kept3", func() { n.engine.kill(); n.engine.start() }) })
	n.t.Run("eviction", func(t *testing.T) { testEviction(t, n) })
	n.t.Run("image collection", func(t *testing.T) {
		if n.cni {
			t.Skip("SKIP: a kubelet looks for images every five minutes: once is enough")
		}
		n.pulled(t, "waste")
		deadline := time.Now().Add(11 * time.Minute)
		for strings.Contains(n.images(), "/waste") {
			if time.Now().After(deadline) {
				t.Fatalf("the unused image stays:\n%s\n%s", n.images(), n.errors())
			}
			time.Sleep(time.Second)
		}
	})
}

func testBasic(t *testing.T, n *node) {
	p := n.up(t, "basic", `  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, "echo out; echo err >&2; exec httpd -f -p 8080 -h /data"]
    lifecycle: {postStart: {exec: {command: [sh, -c, "echo hello >/data/index.html"]}}}
`)
	if ip := net.ParseIP(p.Status.PodIP); ip == nil {
		t.Errorf("pod address %q", p.Status.PodIP)
	}
	c := container(p, "c")
	if c.RestartCount != 0 || c.ContainerID == "" || c.ImageID == "" || c.State.Running == nil {
		t.Errorf("container %+v", c)
	}
	if got := n.logs(t, "basic", "c", ""); !strings.Contains(got, "out\n") || !strings.Contains(got, "err\n") {
		t.Errorf("logs %q", got)
	}
	if got := n.logs(t, "basic", "c", "?tailLines=1&timestamps=true"); strings.Count(got, "\n") != 1 || !strings.Contains(got, "T") {
		t.Errorf("last line %q", got)
	}
	for _, ws := range []bool{false, true} {
		out, errs, code, err := n.exec("basic", "c", "", false, ws, "sh", "-c", "echo a; echo b >&2; exit 7")
		if out != "a\n" || errs != "b\n" || code != 7 || err != nil {
			t.Errorf("exec (websocket %v): %q %q %d %v", ws, out, errs, code, err)
		}
		if out, _, _, err := n.exec("basic", "c", "through", false, false, "cat"); out != "through" || err != nil {
			t.Errorf("exec with stdin: %q %v", out, err)
		}
		if out, _, _, err := n.exec("basic", "c", "tty; exit\n", true, ws, "sh"); !strings.Contains(out, "tty") || err != nil {
			t.Errorf("exec with a terminal: %q %v", out, err)
		}
	}
	n.up(t, "attached", "  containers: [{name: c, image: IMAGE, stdin: true, stdinOnce: true, command: [sh, -c, \"read x; echo got $x; sleep 1000\"]}]\n")
	for _, ws := range []bool{false, true} {
		out, err := n.attach("attached", "c", "word\n", "got", ws)
		if ws && !strings.Contains(n.logs(t, "attached", "c", ""), "got word") || !ws && !strings.Contains(out, "got word") {
			t.Errorf("attach (websocket %v): %q %v", ws, out, err)
		}
	}
	if _, _, code, err := n.exec("basic", "c", "", false, false, "/no/such"); err == nil && code == 0 {
		t.Error("a command that is not there was executed")
	}
	n.forward(t, "basic", 8080, func(addr string) {
		for range 3 {
			if got, err := fetch("http://" + addr + "/index.html"); got != "hello\n" {
				t.Errorf("through port-forward: %q %v", got, err)
			}
		}
	})
	if got, err := fetch("http://" + p.Status.PodIP + ":8080/index.html"); got != "hello\n" {
		t.Errorf("at the pod's address: %q %v", got, err)
	}
}

func fetch(url string) (string, error) {
	resp, err := (&http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func testProbes(t *testing.T, n *node) {
	n.apply("probes", `  terminationGracePeriodSeconds: 1
  containers:
  - name: live
    image: IMAGE
    command: [sh, -c, "touch /tmp/alive; sleep 1000"]
    livenessProbe: {exec: {command: [cat, /tmp/alive]}, periodSeconds: 1, failureThreshold: 2}
  - name: ready
    image: IMAGE
    command: [sh, -c, "exec httpd -f -p 8080 -h /data"]
    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 30}
    readinessProbe: {httpGet: {path: /ok, port: 8080}, periodSeconds: 1}
`)
	t.Cleanup(func() { n.remove("probes") })
	p := n.wait(t, "probes", "started, not ready", func(p corev1.Pod) bool {
		c := container(p, "ready")
		return c.Started != nil && *c.Started && !c.Ready && container(p, "live").Ready
	})
	if ready(p) {
		t.Error("the pod is ready although a probe fails")
	}
	n.sh(t, "probes", "ready", "echo 1 >/data/ok")
	n.wait(t, "probes", "ready", ready)
	n.sh(t, "probes", "ready", "rm /data/ok")
	n.wait(t, "probes", "not ready", func(p corev1.Pod) bool { return !ready(p) })
	n.sh(t, "probes", "live", "rm /tmp/alive")
	n.wait(t, "probes", "restarted", func(p corev1.Pod) bool {
		c := container(p, "live")
		return c.RestartCount == 1 && c.State.Running != nil && c.LastTerminationState.Terminated != nil
	})
}

func testRestarts(t *testing.T, n *node) {
	p := n.finish(t, "never", `  restartPolicy: Never
  containers:
  - {name: good, image: IMAGE, command: ["true"]}
  - {name: bad, image: IMAGE, command: [sh, -c, "echo why >/dev/termination-log; exit 3"]}
`)
	bad := container(p, "bad").State.Terminated
	if p.Status.Phase != corev1.PodFailed || bad == nil || bad.ExitCode != 3 || bad.Message != "why\n" || bad.Reason != "Error" || bad.StartedAt.IsZero() || bad.FinishedAt.IsZero() {
		t.Errorf("%s: %+v", p.Status.Phase, bad)
	}
	if good := container(p, "good").State.Terminated; good == nil || good.Reason != "Completed" {
		t.Errorf("good: %+v", good)
	}
	n.apply("crash", `  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "echo again; exit 1"]}
`)
	t.Cleanup(func() { n.remove("crash") })
	n.wait(t, "crash", "restarted twice", func(p corev1.Pod) bool { return container(p, "c").RestartCount >= 2 })
	// The kubelet removes the one before the previous meanwhile.
	eventually(t, "logs of the previous container", func() error {
		if got := n.logs(t, "crash", "c", "?previous=true"); got != "again\n" {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	p = n.finish(t, "onfailure", `  restartPolicy: OnFailure
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, "test -e /v/x && exit 0; touch /v/x; exit 1"]
    volumeMounts: [{name: v, mountPath: /v}]
`)
	if c := container(p, "c"); p.Status.Phase != corev1.PodSucceeded || c.RestartCount != 1 {
		t.Errorf("on failure: %s, %d restarts", p.Status.Phase, c.RestartCount)
	}
	n.apply("notfound", `  containers:
  - {name: c, image: IMAGE, command: [/no/such]}
`)
	t.Cleanup(func() { n.remove("notfound") })
	n.wait(t, "notfound", "an error of the start", func(p corev1.Pod) bool {
		c := container(p, "c")
		return c.State.Waiting != nil && strings.Contains(c.State.Waiting.Reason+c.State.Waiting.Message, "Error") ||
			c.LastTerminationState.Terminated != nil || c.State.Terminated != nil
	})
}

func testInit(t *testing.T, n *node) {
	n.up(t, "init", `  volumes: [{name: v, emptyDir: {}}]
  initContainers:
  - {name: i1, image: IMAGE, command: [sh, -c, "sleep 1; echo one >>/v/order"], volumeMounts: [{name: v, mountPath: /v}]}
  - {name: i2, image: IMAGE, command: [sh, -c, "echo two >>/v/order"], volumeMounts: [{name: v, mountPath: /v}]}
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "echo three >>/v/order; sleep 1000"], volumeMounts: [{name: v, mountPath: /v}]}
`)
	if got := strings.Fields(n.sh(t, "init", "c", "cat /v/order")); strings.Join(got, " ") != "one two three" {
		t.Errorf("order %q", got)
	}
	p := n.finish(t, "initfails", `  restartPolicy: Never
  initContainers: [{name: i, image: IMAGE, command: ["false"]}]
  containers: [{name: c, image: IMAGE, command: ["true"]}]
`)
	if c := container(p, "c"); p.Status.Phase != corev1.PodFailed || c.State.Waiting == nil {
		t.Errorf("%s %+v", p.Status.Phase, c)
	}
}

func testSidecar(t *testing.T, n *node) {
	p := n.finish(t, "sidecar", `  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  volumes: [{name: v, emptyDir: {}}]
  initContainers:
  - name: s
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "trap 'exit 0' TERM; echo up >/v/up; while :; do sleep 0.2; done"]
    startupProbe: {exec: {command: [cat, /v/up]}, periodSeconds: 1}
    volumeMounts: [{name: v, mountPath: /v}]
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "cat /v/up"], volumeMounts: [{name: v, mountPath: /v}]}
`)
	if c := container(p, "c").State.Terminated; p.Status.Phase != corev1.PodSucceeded || c == nil || c.ExitCode != 0 {
		t.Errorf("%s %+v", p.Status.Phase, c)
	}
	if s := container(p, "s").State.Terminated; s == nil || s.ExitCode != 0 {
		t.Errorf("sidecar %+v", container(p, "s").State)
	}
}

func testVolumes(t *testing.T, n *node) {
	host := filepath.Join(n.dir, "host")
	if err := os.MkdirAll(filepath.Join(host, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	_ = os.WriteFile(filepath.Join(host, "file"), []byte("from the host\n"), 0o644)
	_ = os.WriteFile(filepath.Join(host, "sub", "x"), []byte("sub\n"), 0o644)
	n.applyMeta("volumes", "  labels: {color: green}\n  annotations: {note: kept}\n", `  volumes:
  - {name: shared, emptyDir: {}}
  - {name: mem, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  - {name: host, hostPath: {path: `+host+`, type: Directory}}
  - {name: made, hostPath: {path: `+host+`/made, type: DirectoryOrCreate}}
  - {name: file, hostPath: {path: `+host+`/file, type: File}}
  - name: down
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: limit, resourceFieldRef: {containerName: a, resource: limits.memory}}
      - {path: notes, fieldRef: {fieldPath: metadata.annotations}}
  containers:
  - name: a
    image: IMAGE
    command: [sh, -c, "echo written >/shared/f; sleep 1000"]
    resources: {limits: {memory: 64Mi}}
    env:
    - {name: MY_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: MY_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    volumeMounts:
    - {name: shared, mountPath: /shared}
    - {name: mem, mountPath: /mem}
    - {name: host, mountPath: /host}
    - {name: host, mountPath: /ro, readOnly: true}
    - {name: host, mountPath: /sub, subPath: sub}
    - {name: host, mountPath: /rro, readOnly: true, recursiveReadOnly: IfPossible}
    - {name: host, mountPath: /prop, mountPropagation: HostToContainer}
    - {name: file, mountPath: /etc/one}
    - {name: made, mountPath: /made}
    - {name: down, mountPath: /down}
  - {name: b, image: IMAGE, command: [sleep, "1000"], volumeMounts: [{name: shared, mountPath: /shared}]}
`)
	t.Cleanup(func() { n.remove("volumes") })
	p := n.wait(t, "volumes", "ready", ready)
	for script, want := range map[string]string{
		"cat /host/file /etc/one /sub/x":                                      "from the host\nfrom the host\nsub",
		"echo new >/host/new && cat /ro/new":                                  "new",
		"touch /ro/x 2>/dev/null || echo refused":                             "refused",
		"touch /rro/x 2>/dev/null || echo refused":                            "refused",
		"grep -c ' /mem tmpfs ' /proc/mounts":                                 "1",
		"cat /down/labels; echo; cat /down/limit":                             "color=\"green\"\n67108864",
		"grep -c note=.kept /down/notes":                                      "1",
		"test -d /made && echo made":                                          "made",
		"echo $MY_NAME":                                                       "volumes-node",
		"echo $MY_IP":                                                         p.Status.PodIP,
		"cat /etc/hostname":                                                   "volumes-node",
		"grep volumes-node /etc/hosts | tr '\\t' ' '":                         p.Status.PodIP + " volumes-node",
		"dd if=/dev/zero of=/mem/big bs=1M count=9 2>&1 | grep -c 'No space'": "1",
	} {
		if got := n.sh(t, "volumes", "a", script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if got := n.sh(t, "volumes", "b", "cat /shared/f"); got != "written" {
		t.Errorf("shared: %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(host, "new")); string(b) != "new\n" {
		t.Errorf("on the host: %q %v", b, err)
	}
}

// cgroupFile reads a file of a container's own cgroup, as the container sees it.
func (n *node) cgroupFile(t *testing.T, pod, v1, v2 string) string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return n.sh(t, pod, "c", "cat /sys/fs/cgroup/"+v2)
	}
	return n.sh(t, pod, "c", "cat /sys/fs/cgroup/"+v1)
}

func testResources(t *testing.T, n *node) {
	p := n.up(t, "resources", `  containers:
  - {name: c, image: IMAGE, command: [sleep, "1000"], resources: {limits: {memory: 64Mi, cpu: 200m}, requests: {memory: 32Mi, cpu: 100m}}}
`)
	if p.Status.QOSClass != corev1.PodQOSBurstable {
		t.Errorf("class %s", p.Status.QOSClass)
	}
	v2 := false
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		v2 = true
	}
	if got := n.cgroupFile(t, "resources", "memory/memory.limit_in_bytes", "memory.max"); got != "67108864" {
		t.Errorf("memory limit %q", got)
	}
	if got := n.cgroupFile(t, "resources", "cpu/cpu.cfs_quota_us", "cpu.max"); got != "20000" && got != "20000 100000" {
		t.Errorf("quota %q", got)
	}
	if !v2 {
		if got := n.cgroupFile(t, "resources", "cpu/cpu.shares", ""); got != "102" {
			t.Errorf("shares %q", got)
		}
	}
	// It is in the kubelet's place: below the pod's cgroup.
	for _, c := range n.cgroups {
		if strings.HasSuffix(filepath.Dir(c), "/memory") || v2 {
			m, _ := filepath.Glob(filepath.Join(c, "kubepods", "burstable", "pod"+string(p.UID), "*", "cgroup.procs"))
			busy := 0
			for _, f := range m {
				if b, _ := os.ReadFile(f); len(b) > 0 {
					busy++
				}
			}
			if busy == 0 {
				t.Errorf("no process in %s/kubepods/burstable/pod%s", c, p.UID)
			}
		}
	}
	if got := n.sh(t, "resources", "c", "cat /proc/1/oom_score_adj"); got != "998" && got != "999" && got != "997" {
		// 1000 - 1000*request/capacity
		t.Errorf("oom_score_adj %s", got)
	}
}

func testOOM(t *testing.T, n *node) {
	p := n.finish(t, "oom", `  restartPolicy: Never
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "exec tail /dev/zero"], resources: {limits: {memory: 16Mi}}}
`)
	if c := container(p, "c").State.Terminated; c == nil || c.Reason != "OOMKilled" || c.ExitCode != 137 {
		t.Errorf("%+v", c)
	}
}

func testSecurity(t *testing.T, n *node) {
	n.up(t, "security", `  securityContext:
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 4000
    supplementalGroups: [3000]
    seccompProfile: {type: RuntimeDefault}
    sysctls: [{name: net.ipv4.ip_local_port_range, value: "20000 30000"}]
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: c
    image: IMAGE
    command: [sleep, "1000"]
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}}
    volumeMounts: [{name: v, mountPath: /v}]
  - {name: p, image: IMAGE, command: [sleep, "1000"], securityContext: {privileged: true, runAsUser: 0}}
  - {name: u, image: IMAGE, command: [sleep, "1000"], securityContext: {seccompProfile: {type: Unconfined}, procMount: Default}}
`)
	for script, want := range map[string]string{
		"id -u; id -g": "1000\n1000",
		"id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' '":                      "1000 2000 3000 4000",
		"touch /x 2>/dev/null || echo refused":                               "refused",
		"touch /v/x && stat -c %g /v/x":                                      "4000",
		"grep NoNewPrivs /proc/self/status | tr -d '\\t'":                    "NoNewPrivs:1",
		"grep Seccomp: /proc/self/status | tr -d '\\t'":                      "Seccomp:2",
		"grep CapBnd /proc/self/status | tr -d '\\t'":                        "CapBnd:0000000000000400",
		"cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '":          "20000 30000",
		"echo x >/proc/sys/kernel/hostname 2>/dev/null || echo refused":      "refused",
		"test -r /proc/kcore && head -c1 /proc/kcore | wc -c || echo masked": "0",
	} {
		if got := n.sh(t, "security", "c", script); got != want && !(want == "0" && got == "masked") {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if got := n.sh(t, "security", "p", "test -e /dev/loop-control -o -e /dev/mem -o -e /dev/vda -o -e /dev/ttyS0 && echo devices; grep Seccomp: /proc/self/status | tr -d '\\t'"); got != "devices\nSeccomp:0" {
		t.Errorf("privileged: %q", got)
	}
	if got := n.sh(t, "security", "u", "grep Seccomp: /proc/self/status | tr -d '\\t'"); got != "Seccomp:0" {
		t.Errorf("unconfined: %q", got)
	}
}

func testNamespaces(t *testing.T, n *node) {
	n.up(t, "shared", `  shareProcessNamespace: true
  hostAliases: [{ip: 10.1.2.3, hostnames: [alias.example]}]
  hostname: chosen
  dnsPolicy: None
  dnsConfig: {nameservers: [192.0.2.53], searches: [example.org], options: [{name: ndots, value: "3"}]}
  containers:
  - {name: a, image: IMAGE, command: [sleep, "1234567"]}
  - {name: b, image: IMAGE, command: [sleep, "1000"]}
`)
	for script, want := range map[string]string{
		"ps | grep -c '[s]leep 1234567'":       "1",
		"hostname":                             "chosen",
		"grep -c alias.example /etc/hosts":     "1",
		"grep -v '^#' /etc/resolv.conf | sort": "nameserver 192.0.2.53\noptions ndots:3\nsearch example.org",
		"touch /dev/shm/from-b && echo ok":     "ok",
	} {
		if got := n.sh(t, "shared", "b", script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if got := n.sh(t, "shared", "a", "ls /dev/shm"); got != "from-b" {
		t.Errorf("/dev/shm is not the pod's: %q", got)
	}
	n.up(t, "dns", "  containers: [{name: c, image: IMAGE, command: [sleep, \"1000\"]}]\n")
	if got := n.sh(t, "dns", "c", "grep -v '^#' /etc/resolv.conf"); !strings.Contains(got, "nameserver 10.96.0.10") || !strings.Contains(got, "search default.svc.cluster.local svc.cluster.local cluster.local") || !strings.Contains(got, "ndots:5") {
		t.Errorf("cluster DNS: %q", got)
	}
	n.up(t, "hostns", `  hostNetwork: true
  hostPID: true
  hostIPC: true
  containers: [{name: c, image: IMAGE, command: [sleep, "1000"]}]
`)
	for f, mine := range map[string]string{"net": "", "pid": "", "ipc": ""} {
		mine, _ = os.Readlink("/proc/self/ns/" + f)
		if got := n.sh(t, "hostns", "c", "readlink /proc/self/ns/"+f); got != mine {
			t.Errorf("%s namespace %s, want %s", f, got, mine)
		}
	}
}

func testHooks(t *testing.T, n *node) {
	out := filepath.Join(n.dir, "hooks")
	if err := os.MkdirAll(out, 0o777); err != nil {
		t.Fatal(err)
	}
	n.up(t, "hooks", `  terminationGracePeriodSeconds: 20
  volumes: [{name: v, hostPath: {path: `+out+`}}]
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, "trap 'echo term >>/v/log; exit 0' TERM; while :; do sleep 0.1; done"]
    volumeMounts: [{name: v, mountPath: /v}]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "echo start >>/v/log"]}}
      preStop: {exec: {command: [sh, -c, "sleep 1; echo stop >>/v/log"]}}
`)
	n.remove("hooks")
	eventually(t, "its end", func() error {
		if b, err := os.ReadFile(filepath.Join(out, "log")); string(b) != "start\nstop\nterm\n" {
			return fmt.Errorf("order %q: %v", b, err)
		}
		return nil
	})
}

func testRotation(t *testing.T, n *node) {
	p := n.up(t, "rotation", `  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "i=0; while :; do i=$((i+1)); echo line $i ................................................................; usleep 2000; done"]}
`)
	dir := filepath.Join(n.dir, "logs", "default_rotation-node_"+string(p.UID), "c")
	eventually(t, "rotated logs", func() error {
		fs, err := os.ReadDir(dir)
		gz := 0
		for _, f := range fs {
			if strings.HasSuffix(f.Name(), ".gz") {
				gz++
			}
		}
		if len(fs) < 3 || gz == 0 {
			return fmt.Errorf("%d files, %d compressed: %v", len(fs), gz, err)
		}
		if len(fs) > 4 {
			return fmt.Errorf("%d files", len(fs))
		}
		return nil
	})
	// It goes on being written.
	before := n.logs(t, "rotation", "c", "?tailLines=1")
	eventually(t, "new lines", func() error {
		if n.logs(t, "rotation", "c", "?tailLines=1") == before {
			return fmt.Errorf("still %q", before)
		}
		return nil
	})
}

// pulled has the kubelet pull an image of its own, which is unused afterwards.
func (n *node) pulled(t *testing.T, name string) {
	t.Helper()
	ref := n.push(busybox(t, name), name)
	n.apply(name, "  restartPolicy: Never\n  containers: [{name: c, image: \""+ref+"\", imagePullPolicy: Always, command: [cat, /etc/salt]}]\n")
	n.wait(t, name, "ended", done)
	if got := n.logs(t, name, "c", ""); got != name {
		t.Errorf("the pulled image says %q", got)
	}
	n.remove(name)
	eventually(t, "the pod's end", func() error {
		if d, _ := filepath.Glob(filepath.Join(n.dir, "logs", "default_"+name+"-node_*")); len(d) > 0 {
			return fmt.Errorf("%v", d)
		}
		return nil
	})
}

// testEviction: under pressure a kubelet gives up what is not used. It evicts no
// static pod, since each counts as critical, and a stand-alone kubelet has no
// others.
func testEviction(t *testing.T, n *node) {
	n.pulled(t, "pressing")
	// What its users brought is not the kubelet's to remove.
	own := "localhost/own"
	busybox(t, "own").save(t, filepath.Join(n.dir, "own.tar"), own+":latest")
	n.load(filepath.Join(n.dir, "own.tar"))
	n.finish(t, "ended", "  restartPolicy: Never\n  containers: [{name: c, image: IMAGE, command: [\"true\"]}]\n")
	kept := n.up(t, "pressed", "  containers: [{name: c, image: IMAGE, command: [sleep, \"1000\"]}]\n")
	n.stopKubelet()
	was := n.extra
	n.evict = "imagefs.available: 100000Gi"
	n.extra += "evictionPressureTransitionPeriod: 1s\n"
	n.startKubelet()
	eventually(t, "the unused image's end", func() error {
		if l := n.images(); strings.Contains(l, "/pressing") {
			return fmt.Errorf("%s", l)
		}
		return nil
	})
	if l := n.images(); !strings.Contains(l, "localhost/bb") || os.Getenv("SERVIN_CRI_PEER") == "" && !strings.Contains(l, own) {
		t.Errorf("an image in use, or a user's own, is gone:\n%s", l)
	}
	n.stopKubelet()
	n.extra, n.evict = was, ""
	n.startKubelet()
	p := n.wait(t, "pressed", "ready", ready)
	if a, b := container(kept, "c"), container(p, "c"); a.ContainerID != b.ContainerID {
		t.Errorf("%s became %s", a.ContainerID, b.ContainerID)
	}
}

func testNetwork(t *testing.T, n *node) {
	server := n.up(t, "server", `  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, "echo served >/data/index.html; exec httpd -f -p 80 -h /data"]
    ports: [{containerPort: 80, hostPort: 18090}]
`)
	n.applyMeta("client", "  annotations: {kubernetes.io/ingress-bandwidth: 10M, kubernetes.io/egress-bandwidth: 10M}\n", "  containers: [{name: c, image: IMAGE, command: [sleep, \"1000\"]}]\n")
	t.Cleanup(func() { n.remove("client") })
	client := n.wait(t, "client", "ready", ready)
	if client.Status.PodIP == server.Status.PodIP {
		t.Errorf("two pods at %s", client.Status.PodIP)
	}
	// Not wget: the C library of a static busybox may fall over without its parts.
	get := func(ip string, port int) string {
		return fmt.Sprintf("printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w 5 %s %d | tail -n 1", ip, port)
	}
	if got := n.sh(t, "client", "c", get(server.Status.PodIP, 80)); got != "served" {
		t.Errorf("from pod to pod: %q", got)
	}
	if got := n.sh(t, "client", "c", get(nodeIP, 18090)); got != "served" {
		t.Errorf("from pod to host port: %q", got)
	}
	for _, at := range []string{nodeIP, "127.0.0.1"} {
		if got, err := fetch("http://" + at + ":18090/"); got != "served\n" {
			t.Errorf("host port at %s: %q %v", at, got, err)
		}
	}
	if got := n.sh(t, "client", "c", "ip -o link show eth0 | wc -l"); got != "1" {
		t.Error("no eth0")
	}
}

func testUserNS(t *testing.T, n *node) {
	n.up(t, "userns", `  hostUsers: false
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - {name: c, image: IMAGE, command: [sleep, "1000"], volumeMounts: [{name: v, mountPath: /v}]}
`)
	got := strings.Fields(n.sh(t, "userns", "c", "cat /proc/self/uid_map"))
	if len(got) != 3 || got[0] != "0" || got[1] == "0" || got[2] != "65536" {
		t.Errorf("mapping %q", got)
	}
	if got := n.sh(t, "userns", "c", "touch /v/x && stat -c %u /v/x && id -u"); got != "0\n0" {
		t.Errorf("owner %q", got)
	}
}

// A manifest that changes replaces its pod, one that goes ends it.
func testChange(t *testing.T, n *node) {
	body := "  terminationGracePeriodSeconds: 1\n  containers: [{name: c, image: IMAGE, command: [sleep, \"1000\"], env: [{name: V, value: \"%d\"}]}]\n"
	one := n.up(t, "change", fmt.Sprintf(body, 1))
	n.apply("change", fmt.Sprintf(body, 2))
	n.wait(t, "change", "replaced", func(p corev1.Pod) bool { return ready(p) && p.UID != one.UID })
	if got := n.sh(t, "change", "c", "echo $V"); got != "2" {
		t.Errorf("V is %q", got)
	}
	n.remove("change")
	eventually(t, "its end", func() error {
		for _, p := range n.running() {
			if strings.HasPrefix(p, "change") {
				return fmt.Errorf("%s runs", p)
			}
		}
		if d, _ := filepath.Glob(filepath.Join(n.dir, "logs", "default_change-node_*")); len(d) > 0 {
			return fmt.Errorf("logs stay: %v", d)
		}
		return nil
	})
}

func testStats(t *testing.T, n *node) {
	n.up(t, "stats", `  containers: [{name: c, image: IMAGE, command: [sh, -c, "while :; do :; done"], resources: {limits: {cpu: 50m}}}]
`)
	eventually(t, "figures", func() error {
		b, err := n.get("/stats/summary")
		if err != nil {
			return err
		}
		return checkSummary(b, "stats-node")
	})
	if _, err := n.get("/metrics/resource"); err != nil {
		t.Error(err)
	}
}

// testRestart: a running pod does not notice what the restart does.
func testRestart(t *testing.T, n *node, name string, restart func()) {
	spec := `  initContainers:
  - {name: i, image: IMAGE, command: ["true"]}
  - {name: s, image: IMAGE, restartPolicy: Always, command: [sleep, "1000"]}
  containers:
  - {name: a, image: IMAGE, command: [sh, -c, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"]}
  - {name: b, image: IMAGE, command: [sleep, "1000"], livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1}}
`
	before := n.up(t, name, spec)
	restart()
	time.Sleep(8 * time.Second) // some rounds of the kubelet
	after := n.wait(t, name, "ready", ready)
	if before.UID != after.UID || before.Status.PodIP != after.Status.PodIP {
		t.Errorf("pod %s at %s became %s at %s", before.UID, before.Status.PodIP, after.UID, after.Status.PodIP)
	}
	for _, c := range []string{"a", "b", "s"} {
		x, y := container(before, c), container(after, c)
		if x.ContainerID != y.ContainerID || y.RestartCount != 0 {
			t.Errorf("%s: %s became %s after %d restarts", c, x.ContainerID, y.ContainerID, y.RestartCount)
		}
	}
	lines := strings.Fields(n.logs(t, name, "a", ""))
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			t.Errorf("line %d of the log is %q", i+1, l)
			break
		}
	}
	eventually(t, "more lines in the log", func() error {
		if more := strings.Fields(n.logs(t, name, "a", "")); len(more) < len(lines)+10 {
			return fmt.Errorf("%d lines were logged, then %d", len(lines), len(more))
		}
		return nil
	})
	if got := n.sh(t, name, "b", "echo alive"); got != "alive" {
		t.Errorf("exec says %q", got)
	}
}
