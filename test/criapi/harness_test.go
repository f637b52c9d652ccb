// Package criapi speaks the CRI to the shipped daemon, over its real socket: each
// call with valid, invalid and repeated requests, as the kubelet and the CRI's own
// validation suite make them.
package criapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = os.Getenv("SERVIN_LONG") != ""

// TestMain moves the whole suite into a network namespace of its own.
func TestMain(m *testing.M) {
	const marker = "SERVIN_TEST_NETNS"
	if os.Getenv(marker) != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command("unshare", append([]string{"-n", "--", "sh", "-c", `ip link set lo up; exec "$0" "$@"`}, os.Args...)...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		os.Exit(ee.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// node is a daemon on folders of its own, with its CRI.
type node struct {
	t      *testing.T
	dir    string
	bin    string
	args   []string
	config string
	cmd    *exec.Cmd
	exited chan struct{}
	conn   *grpc.ClientConn
	rt     v1.RuntimeServiceClient
	img    v1.ImageServiceClient
}

func start(t *testing.T, args ...string) *node { return startWith(t, "", args...) }

// startWith gives the daemon further lines of configuration.
func startWith(t *testing.T, config string, args ...string) *node {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servind")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the CRI suite needs root")
	}
	// A short path: unix socket names are limited to 107 bytes.
	dir, err := os.MkdirTemp("", "sc")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, bin: bin, args: args, config: strings.ReplaceAll(config, "DIR", dir)}
	t.Cleanup(n.close)
	n.boot()
	n.importBusybox()
	return n
}

func (n *node) boot() {
	n.t.Helper()
	log, err := os.OpenFile(n.dir+"/servind.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	conf := n.dir + "/config.yaml"
	doc := "version: 1\nshutdownTimeout: 1s\ncni: {confDir: " + n.dir + "/net.d}\n" + n.config
	if err := os.WriteFile(conf, []byte(doc), 0o644); err != nil {
		n.t.Fatal(err)
	}
	args := append([]string{"--config", conf, "--root", n.dir + "/root", "--run-root", n.dir + "/run", "--listen", "unix://" + n.dir + "/s.sock", "--cri", "unix://" + n.dir + "/cri.sock"}, n.args...)
	n.cmd = exec.Command(filepath.Join(n.bin, "servind"), args...)
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(n.cmd, n.exited)
	n.conn, err = grpc.NewClient("unix://"+n.dir+"/cri.sock", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		n.t.Fatal(err)
	}
	n.rt, n.img = v1.NewRuntimeServiceClient(n.conn), v1.NewImageServiceClient(n.conn)
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := n.rt.Version(ctx, &v1.VersionRequest{})
		cancel()
		if err == nil {
			return
		}
		select {
		case <-n.exited:
			n.t.Fatalf("the daemon ended:\n%s", n.log())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("the daemon does not answer: %v\n%s", err, n.log())
		}
	}
}

func (n *node) log() string {
	b, _ := os.ReadFile(n.dir + "/servind.log")
	return string(b)
}

// kill ends the daemon at once, without a chance to clean up.
func (n *node) kill() {
	n.t.Helper()
	_ = n.cmd.Process.Kill()
	<-n.exited
	_ = n.conn.Close()
}

// servin runs the command line.
func (n *node) servin(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(n.bin, "servin"), append([]string{"--host", "unix://" + n.dir + "/s.sock"}, args...)...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (n *node) must(args ...string) string {
	n.t.Helper()
	out, err := n.servin(args...)
	if err != nil {
		n.t.Fatalf("servin %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

func (n *node) close() {
	select {
	case <-n.exited:
		n.boot()
	default:
	}
	if out, err := n.servin("system", "shutdown", "--force"); err != nil {
		n.t.Errorf("shutdown: %v: %s", err, out)
	}
	select {
	case <-n.exited:
	case <-time.After(30 * time.Second):
		n.t.Errorf("the daemon did not end after shutdown")
		_ = n.cmd.Process.Kill()
		<-n.exited
	}
	_ = n.conn.Close()
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(n.dir+"/")) {
		n.t.Errorf("mounts are left after shutdown:\n%s", grep(string(b), n.dir))
	}
	if n.t.Failed() {
		n.t.Logf("daemon's log:\n%s", n.log())
	}
	if err := os.RemoveAll(n.dir); err != nil {
		n.t.Errorf("cannot remove the engine's folders: %v", err)
	}
}

func grep(text, what string) string {
	var b strings.Builder
	for l := range strings.Lines(text) {
		if strings.Contains(l, what) {
			b.WriteString(l)
		}
	}
	return b.String()
}

// importBusybox makes the image "bb": busybox, whose user 1000 is in group 50000.
func (n *node) importBusybox() {
	n.t.Helper()
	const script = `set -e
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
mkdir -p r/bin r/etc r/tmp r/proc r/sys r/dev r/root; chmod 1777 r/tmp
cp /usr/bin/busybox r/bin/busybox
for a in $(r/bin/busybox --list); do [ "$a" = busybox ] || ln r/bin/busybox r/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\ndefault-user:x:1000:1000::/:/bin/sh\n' > r/etc/passwd
printf 'root:x:0:\nnobody:x:65534:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n' > r/etc/group
tar -C r -cf - .`
	out, err := exec.Command("bash", "-c", script).Output()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(n.bin, "servin"), "--host", "unix://"+n.dir+"/s.sock", "import", "-", "bb")
	cmd.Stdin = bytes.NewReader(out)
	if b, err := cmd.CombinedOutput(); err != nil {
		n.t.Fatalf("cannot import busybox: %v: %s", err, b)
	}
}

func ctx(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return c
}

var serial atomic.Int64

// podConfig is the least that a pod needs.
func podConfig(t *testing.T) *v1.PodSandboxConfig {
	i := serial.Add(1)
	return &v1.PodSandboxConfig{
		Metadata: &v1.PodSandboxMetadata{Name: fmt.Sprintf("pod-%d", i), Namespace: "test", Uid: fmt.Sprintf("uid-%d", i), Attempt: 0},
		Linux:    &v1.LinuxPodSandboxConfig{},
	}
}

// run makes a pod and removes it when the test ends.
func (n *node) run(t *testing.T, c *v1.PodSandboxConfig) string {
	t.Helper()
	return n.runWith(t, c, "")
}

func (n *node) runWith(t *testing.T, c *v1.PodSandboxConfig, handler string) string {
	t.Helper()
	r, err := n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	t.Cleanup(func() {
		c, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
			t.Errorf("StopPodSandbox: %v", err)
		}
		if _, err := n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
			t.Errorf("RemovePodSandbox: %v", err)
		}
	})
	return r.PodSandboxId
}

// sleeper is a container that stays.
func sleeper(name string) *v1.ContainerConfig {
	return &v1.ContainerConfig{
		Metadata: &v1.ContainerMetadata{Name: name}, Image: &v1.ImageSpec{Image: "bb"}, Command: []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"},
		Linux: &v1.LinuxContainerConfig{},
	}
}

func (n *node) create(t *testing.T, pod string, p *v1.PodSandboxConfig, c *v1.ContainerConfig) string {
	t.Helper()
	r, err := n.rt.CreateContainer(ctx(t), &v1.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: p})
	if err != nil {
		t.Fatalf("CreateContainer: %v", err)
	}
	return r.ContainerId
}

func (n *node) startContainer(t *testing.T, id string) {
	t.Helper()
	if _, err := n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}
}

// up makes a pod with one container and starts it.
func (n *node) up(t *testing.T, p *v1.PodSandboxConfig, c *v1.ContainerConfig) (pod, container string) {
	t.Helper()
	pod = n.run(t, p)
	container = n.create(t, pod, p, c)
	n.startContainer(t, container)
	return pod, container
}

func (n *node) status(t *testing.T, id string) *v1.ContainerStatus {
	t.Helper()
	r, err := n.rt.ContainerStatus(ctx(t), &v1.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatalf("ContainerStatus: %v", err)
	}
	return r.Status
}

func (n *node) podStatus(t *testing.T, id string) *v1.PodSandboxStatus {
	t.Helper()
	r, err := n.rt.PodSandboxStatus(ctx(t), &v1.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatalf("PodSandboxStatus: %v", err)
	}
	return r.Status
}

// exec runs a command in a container; it must succeed.
func (n *node) exec(t *testing.T, id string, cmd ...string) string {
	t.Helper()
	r := n.try(t, id, cmd...)
	if r.ExitCode != 0 {
		t.Fatalf("%q: exit code %d: %s%s", cmd, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout)
}

func (n *node) try(t *testing.T, id string, cmd ...string) *v1.ExecSyncResponse {
	t.Helper()
	r, err := n.rt.ExecSync(ctx(t), &v1.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: 20})
	if err != nil {
		t.Fatalf("ExecSync %q: %v", cmd, err)
	}
	return r
}

func (n *node) exit(t *testing.T, id string) *v1.ContainerStatus {
	t.Helper()
	var s *v1.ContainerStatus
	eventually(t, "the container's end", 20*time.Second, func() bool {
		s = n.status(t, id)
		return s.State == v1.ContainerState_CONTAINER_EXITED
	})
	return s
}

func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// wants fails unless err has the code.
func wants(t *testing.T, what string, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: got %v, want %s", what, err, code)
	}
}
