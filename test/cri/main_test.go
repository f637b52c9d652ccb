package cri

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// kernelFlags are what a kubelet sets for the whole host; they are put back.
var kernelFlags = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// TestMain moves everything into network and mount namespaces of its own: a
// kubelet writes to places that cannot be configured.
func TestMain(m *testing.M) {
	const marker = "SERVIN_TEST_NETNS"
	switch {
	case os.Getenv("SERVIN_LONG") == "":
		fmt.Println("SKIP: building and running a kubelet takes minutes: make test-long does")
		return
	case os.Getuid() != 0:
		fmt.Println("SKIP: a kubelet needs root")
		return
	case os.Getenv(marker) != "":
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	kubelet, err := buildKubelet()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	was := map[string][]byte{}
	for _, f := range kernelFlags {
		if b, err := os.ReadFile("/proc/sys/" + f); err == nil {
			was[f] = b
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), marker+"=1", "KUBELET="+kubelet)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS}
	err = cmd.Run()
	for f, b := range was {
		if werr := os.WriteFile("/proc/sys/"+f, b, 0o644); werr != nil {
			fmt.Fprintln(os.Stderr, werr)
		}
	}
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		os.Exit(ee.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// prepare makes the namespaces look like a host.
func prepare() error {
	script := `set -e
mount --make-rshared /
mkdir -p /var/log/containers
mount -t tmpfs tmpfs /var/log/containers
ip link set lo up
ip link add node0 type bridge
ip addr add ` + nodeIP + `/24 dev node0
ip link set node0 up
ip route add default dev node0`
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot prepare the namespaces: %w: %s", err, out)
	}
	return nil
}

func root() string {
	dir, _ := filepath.Abs("../..")
	return dir
}

// buildKubelet builds the kubelet that go.mod pins.
func buildKubelet() (string, error) {
	path := filepath.Join(root(), "bin", "kubelet")
	version := "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w "+version, "-o", path, "k8s.io/kubernetes/cmd/kubelet")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build the kubelet: %w: %s", err, out)
	}
	out, err := exec.Command(path, "--version").Output()
	if err != nil || strings.TrimSpace(string(out)) != "Kubernetes v1.36.3" {
		return "", fmt.Errorf("the kubelet built is %q: %w", out, err)
	}
	return path, nil
}
