// Package criapi speaks the CRI to the shipped daemon, over its real socket: each
// call with valid, invalid and repeated requests, as the kubelet and the CRI's own
// validation suite make them.
package criapi

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = harness.Long()

func TestMain(m *testing.M) { harness.Main(m) }

// node is a daemon on folders of its own, with its CRI.
type node struct {
	*harness.Daemon
	t    *testing.T
	conn *grpc.ClientConn
	rt   v1.RuntimeServiceClient
	img  v1.ImageServiceClient
}

func start(t *testing.T, args ...string) *node { return startWith(t, "", args...) }

// startWith gives the daemon further lines of configuration.
func startWith(t *testing.T, config string, args ...string) *node {
	t.Helper()
	n := &node{Daemon: harness.New(t, "sc"), t: t}
	n.Config = "cni: {confDir: " + n.Dir + "/net.d}\n" + strings.ReplaceAll(config, "DIR", n.Dir)
	n.Args = append([]string{"--cri", "unix://" + n.Dir + "/cri.sock"}, args...)
	n.Ready = func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := n.rt.Version(ctx, &v1.VersionRequest{})
		return err
	}
	t.Cleanup(n.Close)
	n.Boot()
	n.importBusybox()
	return n
}

// Boot starts the daemon and connects to its CRI anew.
func (n *node) Boot() {
	n.t.Helper()
	var err error
	n.conn, err = grpc.NewClient("unix://"+n.Dir+"/cri.sock", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		n.t.Fatal(err)
	}
	n.rt, n.img = v1.NewRuntimeServiceClient(n.conn), v1.NewImageServiceClient(n.conn)
	n.Daemon.Boot()
}

// Kill ends the daemon at once, without a chance to clean up.
func (n *node) Kill() {
	n.Daemon.Kill()
	_ = n.conn.Close()
}

// Close ends the daemon in good order.
func (n *node) Close() {
	select {
	case <-n.Exited:
		n.Boot()
	default:
	}
	n.Daemon.Close()
	_ = n.conn.Close()
}

// servin runs the command line.
func (n *node) servin(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(n.Bin, "servin"), append([]string{"--host", "unix://" + n.Dir + "/s.sock"}, args...)...)
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

// importBusybox makes the image "bb": busybox, whose user 1000 is in group 50000.
func (n *node) importBusybox() {
	n.t.Helper()
	cmd := exec.Command(filepath.Join(n.Bin, "servin"), "--host", n.Host(), "import", "-", "bb")
	cmd.Stdin = harness.Busybox(n.t, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\ndefault-user:x:1000:1000::/:/bin/sh",
		"root:x:0:\nnobody:x:65534:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user", true)
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
	harness.Eventually(t, "the container's end", 20*time.Second, func() bool {
		s = n.status(t, id)
		return s.State == v1.ContainerState_CONTAINER_EXITED
	})
	return s
}

// wants fails unless err has the code.
func wants(t *testing.T, what string, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: got %v, want %s", what, err, code)
	}
}
