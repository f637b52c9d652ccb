package cri

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	uexec "k8s.io/client-go/util/exec"
)

const (
	nodeIP = "192.168.77.1"
	image  = "localhost/bb:latest"
)

// node is a stand-alone kubelet on an engine.
type node struct {
	t   *testing.T
	dir string
	engine
	cmd *exec.Cmd
	// extra is added to the kubelet's configuration; evict are its thresholds of
	// eviction, which must not be the disk's of the day.
	extra   string
	evict   string
	env     []string
	flags   []string
	cgroups []string
	cni     bool
	*registry
}

func newNode(t *testing.T, cni bool) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "kb")
	if err != nil {
		t.Fatal(err)
	}
	// Processes in user namespaces of their own must get through.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, env: os.Environ(), cni: cni}
	for _, d := range []string{"manifests", "logs", "kubelet", "engine"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.makeCgroups()
	n.engine = newEngine(t, filepath.Join(dir, "engine"), cni)
	n.engine.start()
	busybox(t, "").save(t, filepath.Join(dir, "bb.tar"), image)
	n.registry = newRegistry(t)
	n.load(filepath.Join(dir, "bb.tar"))
	n.startKubelet()
	t.Cleanup(n.close)
	return n
}

// makeCgroups makes the root of the pods' cgroups, for this kubelet alone.
func (n *node) makeCgroups() {
	name := "sv" + filepath.Base(n.dir)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		n.cgroups = []string{"/sys/fs/cgroup/" + name}
	} else {
		ctrls, _ := filepath.Glob("/sys/fs/cgroup/*")
		for _, c := range ctrls {
			if st, err := os.Lstat(c); err == nil && st.IsDir() {
				n.cgroups = append(n.cgroups, filepath.Join(c, name))
			}
		}
	}
	for _, c := range n.cgroups {
		if err := os.MkdirAll(c, 0o755); err != nil {
			n.t.Fatal(err)
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(filepath.Dir(c), f)); err == nil {
				_ = os.WriteFile(filepath.Join(c, f), b, 0o644)
			}
		}
	}
}

func (n *node) cgroupRoot() string { return "/sv" + filepath.Base(n.dir) }

func (n *node) startKubelet() {
	n.t.Helper()
	conf := `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: 10250
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
staticPodPath: ` + n.dir + `/manifests
podLogsDir: ` + n.dir + `/logs
volumePluginDir: ` + n.dir + `/plugins
cgroupDriver: cgroupfs
cgroupRoot: ` + n.cgroupRoot() + `
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://` + n.socket() + `
fileCheckFrequency: 1s
syncFrequency: 2s
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerLogMaxSize: 64Ki
containerLogMaxFiles: 3
containerLogMonitorInterval: 3s
imageMinimumGCAge: 1s
imageGCHighThresholdPercent: 1
imageGCLowThresholdPercent: 0
evictionHard: {` + cmp.Or(n.evict, "memory.available: 50Mi, nodefs.available: 100Mi, imagefs.available: 100Mi") + `}
crashLoopBackOff: {maxContainerRestartPeriod: 2s}
featureGates: {KubeletCrashLoopBackOffMax: true}
` + n.extra
	if err := os.WriteFile(filepath.Join(n.dir, "kubelet.yaml"), []byte(conf), 0o644); err != nil {
		n.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "kubelet.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.cmd = exec.Command(os.Getenv("KUBELET"), "--config", filepath.Join(n.dir, "kubelet.yaml"), "--root-dir", filepath.Join(n.dir, "kubelet"),
		"--node-ip", nodeIP, "--hostname-override", "node", "-v", "2")
	n.cmd.Args = append(n.cmd.Args, n.flags...)
	n.cmd.Env, n.cmd.Stdout, n.cmd.Stderr = n.env, log, log
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, "the kubelet", func() error { _, err := n.get("/healthz"); return err })
}

func (n *node) stopKubelet() {
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	_ = n.cmd.Wait()
}

func (n *node) close() {
	if n.t.Failed() {
		n.t.Logf("kubelet:\n%s", n.errors())
		n.t.Logf("engine:\n%s", n.log())
	}
	for _, f := range n.manifests() {
		_ = os.Remove(f)
	}
	deadline := time.Now().Add(60 * time.Second)
	for len(n.running()) > 0 && time.Now().Before(deadline) {
		time.Sleep(300 * time.Millisecond)
	}
	if r := n.running(); len(r) > 0 {
		n.t.Errorf("pods that do not end: %v\n%s", r, n.errors())
	}
	n.stopKubelet()
	n.engine.close()
	n.leaks()
	// Volumes are mounted below.
	out, _ := exec.Command("sh", "-c", "grep -F "+n.dir+" /proc/self/mounts | cut -d' ' -f2 | sort -r | xargs -rn1 umount -l").CombinedOutput()
	if len(out) > 0 {
		n.t.Logf("umount: %s", out)
	}
	for _, c := range n.cgroups {
		removeCgroup(c)
	}
	_ = os.RemoveAll(n.dir)
}

// leaks looks for what an engine that is gone has left.
func (n *node) leaks() {
	if _, ok := n.engine.(*servin); !ok {
		return
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for _, l := range strings.Split(string(mounts), "\n") {
		if strings.Contains(l, n.dir+"/engine") {
			n.t.Errorf("a mount stays: %s", l)
		}
	}
	for _, c := range n.cgroups {
		_ = filepath.Walk(c, func(p string, st os.FileInfo, err error) error {
			if err == nil && st.IsDir() && !strings.Contains(filepath.Base(p), "kube") && !strings.HasPrefix(filepath.Base(p), "pod") && !isQOS(p) && p != c {
				n.t.Errorf("a cgroup stays: %s", p)
			}
			return nil
		})
	}
	procs, _ := exec.Command("sh", "-c", "grep -lsF "+n.dir+"/engine /proc/[0-9]*/cmdline | xargs -rn1 cat | tr '\\0' ' '").CombinedOutput()
	if s := strings.TrimSpace(string(procs)); s != "" && !strings.Contains(s, "grep -lsF") {
		n.t.Errorf("processes stay: %s", s)
	}
}

func isQOS(p string) bool {
	b := filepath.Base(p)
	return b == "burstable" || b == "besteffort"
}

func removeCgroup(dir string) {
	es, _ := os.ReadDir(dir)
	for _, e := range es {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	_ = syscall.Rmdir(dir)
}

// errors are what the kubelet complained about last.
func (n *node) errors() string {
	b, _ := os.ReadFile(filepath.Join(n.dir, "kubelet.log"))
	var out []string
	for _, l := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(l, "E") || strings.HasPrefix(l, "F") {
			out = append(out, l)
		}
	}
	if len(out) > 30 {
		out = out[len(out)-30:]
	}
	return strings.Join(out, "\n")
}

func (n *node) manifests() []string {
	fs, _ := filepath.Glob(filepath.Join(n.dir, "manifests", "*.yaml"))
	return fs
}

var insecure = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}

func (n *node) get(path string) ([]byte, error) {
	resp, err := insecure.Get("https://127.0.0.1:10250" + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, b)
	}
	return b, err
}

// blockImage is a container's image on a line of its own.
var blockImage = regexp.MustCompile(`(?m)^( +)image: IMAGE\n`)

// apply makes a static pod of the indented body of its spec.
func (n *node) apply(name, spec string) {
	n.t.Helper()
	n.applyMeta(name, "", spec)
}

func (n *node) applyMeta(name, meta, spec string) {
	n.t.Helper()
	spec = blockImage.ReplaceAllString(spec, "${1}image: "+image+"\n${1}imagePullPolicy: Never\n")
	spec = strings.ReplaceAll(spec, "image: IMAGE", "image: "+image+", imagePullPolicy: Never")
	m := "apiVersion: v1\nkind: Pod\nmetadata:\n  name: " + name + "\n  namespace: default\n" + meta + "spec:\n" + spec
	tmp := filepath.Join(n.dir, name+".tmp")
	if err := os.WriteFile(tmp, []byte(m), 0o644); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(n.dir, "manifests", name+".yaml")); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) remove(name string) { _ = os.Remove(filepath.Join(n.dir, "manifests", name+".yaml")) }

func (n *node) pods() (map[string]corev1.Pod, error) {
	b, err := n.get("/pods")
	if err != nil {
		return nil, err
	}
	var l corev1.PodList
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, err
	}
	out := map[string]corev1.Pod{}
	for _, p := range l.Items {
		out[strings.TrimSuffix(p.Name, "-node")] = p
	}
	return out, nil
}

// running are the pods of which the kubelet knows containers.
func (n *node) running() []string {
	b, err := n.get("/runningpods/")
	var l corev1.PodList
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, p := range l.Items {
		out = append(out, p.Name)
	}
	return out
}

// wait waits until a pod is as ok wants it.
func (n *node) wait(t *testing.T, name, what string, ok func(p corev1.Pod) bool) corev1.Pod {
	t.Helper()
	var p corev1.Pod
	eventually(t, name+": "+what, func() error {
		ps, err := n.pods()
		if err != nil {
			return err
		}
		p = ps[name]
		if !ok(p) {
			b, _ := json.Marshal(p.Status)
			return fmt.Errorf("%s\n%s", b, n.complaints(name))
		}
		return nil
	})
	return p
}

func (n *node) complaints(name string) string {
	var out []string
	for _, l := range strings.Split(n.errors(), "\n") {
		if strings.Contains(l, name+"-node") {
			out = append(out, l)
		}
	}
	if len(out) > 3 {
		out = out[len(out)-3:]
	}
	return strings.Join(out, "\n")
}

func ready(p corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func done(p corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func container(p corev1.Pod, name string) corev1.ContainerStatus {
	for _, cs := range [][]corev1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for _, c := range cs {
			if c.Name == name {
				return c
			}
		}
	}
	return corev1.ContainerStatus{}
}

// up applies a pod and waits until it is ready.
func (n *node) up(t *testing.T, name, spec string) corev1.Pod {
	t.Helper()
	n.apply(name, spec)
	t.Cleanup(func() { n.remove(name) })
	return n.wait(t, name, "ready", ready)
}

// finish applies a pod and waits until it has ended.
func (n *node) finish(t *testing.T, name, spec string) corev1.Pod {
	t.Helper()
	n.apply(name, spec)
	t.Cleanup(func() { n.remove(name) })
	return n.wait(t, name, "ended", done)
}

func (n *node) logs(t *testing.T, name, ctr, query string) string {
	t.Helper()
	b, err := n.get("/containerLogs/default/" + name + "-node/" + ctr + query)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

var restConfig = &rest.Config{Host: "https://127.0.0.1:10250", TLSClientConfig: rest.TLSClientConfig{Insecure: true}}

// exec runs a command in a container; websocket chooses the protocol.
func (n *node) exec(name, ctr, stdin string, tty, websocket bool, cmd ...string) (stdout, stderr string, code int, err error) {
	q := url.Values{"command": cmd, "output": {"1"}}
	if stdin != "" {
		q.Set("input", "1")
	}
	if tty {
		q.Set("tty", "1")
	} else {
		q.Set("error", "1")
	}
	u := &url.URL{Scheme: "https", Host: "127.0.0.1:10250", Path: "/exec/default/" + name + "-node/" + ctr, RawQuery: q.Encode()}
	var x remotecommand.Executor
	if websocket {
		x, err = remotecommand.NewWebSocketExecutor(restConfig, "GET", u.String())
	} else {
		x, err = remotecommand.NewSPDYExecutor(restConfig, "POST", u)
	}
	if err != nil {
		return "", "", -1, err
	}
	var out, errb bytes.Buffer
	o := remotecommand.StreamOptions{Stdout: &out, Tty: tty}
	if stdin != "" {
		o.Stdin = strings.NewReader(stdin)
		if tty {
			// A terminal's input does not end by itself.
			r, w := io.Pipe()
			defer w.Close()
			o.Stdin = io.MultiReader(o.Stdin, r)
		}
	}
	if !tty {
		o.Stderr = &errb
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = x.StreamWithContext(ctx, o)
	var ce uexec.CodeExitError
	if errors.As(err, &ce) {
		return out.String(), errb.String(), ce.Code, nil
	}
	return out.String(), errb.String(), 0, err
}

// attach joins a container's own streams until it says what is waited for, or
// for a second.
func (n *node) attach(name, ctr, stdin, until string, websocket bool) (string, error) {
	u := &url.URL{Scheme: "https", Host: "127.0.0.1:10250", Path: "/attach/default/" + name + "-node/" + ctr,
		RawQuery: url.Values{"input": {"1"}, "output": {"1"}}.Encode()}
	var x remotecommand.Executor
	var err error
	if websocket {
		x, err = remotecommand.NewWebSocketExecutor(restConfig, "GET", u.String())
	} else {
		x, err = remotecommand.NewSPDYExecutor(restConfig, "POST", u)
	}
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out := &watched{until: until, seen: cancel}
	r, w := io.Pipe()
	defer w.Close()
	err = x.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: io.MultiReader(strings.NewReader(stdin), r), Stdout: out})
	return out.String(), err
}

// watched is a buffer that tells when it has seen something.
type watched struct {
	mu    sync.Mutex
	b     bytes.Buffer
	until string
	seen  func()
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b.Write(p)
	if strings.Contains(w.b.String(), w.until) {
		time.AfterFunc(200*time.Millisecond, w.seen)
	}
	return len(p), nil
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// sh runs a shell command in a container and returns what it says.
func (n *node) sh(t *testing.T, name, ctr, script string) string {
	t.Helper()
	out, errs, code, err := n.exec(name, ctr, "", false, false, "sh", "-c", script)
	if err != nil || code != 0 {
		t.Errorf("%s/%s: sh -c %q: exit %d: %v: %s%s", name, ctr, script, code, err, out, errs)
	}
	return strings.TrimSpace(out)
}

// forward opens a port of a pod on the host and calls fn with its address.
func (n *node) forward(t *testing.T, name string, port int, fn func(addr string)) {
	t.Helper()
	tr, up, err := spdy.RoundTripperFor(restConfig)
	if err != nil {
		t.Fatal(err)
	}
	u := &url.URL{Scheme: "https", Host: "127.0.0.1:10250", Path: "/portForward/default/" + name + "-node"}
	stop, ready := make(chan struct{}), make(chan struct{})
	var errs bytes.Buffer
	fw, err := portforward.New(spdy.NewDialer(up, &http.Client{Transport: tr}, "POST", u), []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, &errs)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- fw.ForwardPorts() }()
	select {
	case <-ready:
		ps, err := fw.GetPorts()
		if err != nil {
			t.Fatal(err)
		}
		fn(fmt.Sprintf("127.0.0.1:%d", ps[0].Local))
	case err := <-ended:
		t.Errorf("port-forward: %v: %s", err, errs.String())
		return
	}
	close(stop)
	<-ended
}
