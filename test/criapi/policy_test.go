package criapi

import (
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPolicy shows that the engine's rules bind who comes by the CRI: by the
// namespaces that a pod's container really gets.
func TestPolicy(t *testing.T) {
	file := t.TempDir() + "/policy.yaml"
	if err := os.WriteFile(file, []byte("version: 1\nrules:\n  - name: no-host\n    hostNamespaces: {allow: []}\n    privileged: deny\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := startWith(t, "policy: "+file+"\n")
	refused := func(name string, o *v1.NamespaceOption, privileged bool) {
		p := podConfig(t)
		p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
		pod := n.run(t, p)
		c := sleeper("a")
		c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: o, Privileged: privileged}
		_, err := n.rt.CreateContainer(ctx(t), &v1.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: p})
		wants(t, name, err, codes.PermissionDenied)
	}
	own := v1.NamespaceMode_CONTAINER
	refused("network", &v1.NamespaceOption{Network: v1.NamespaceMode_NODE, Pid: own}, false)
	refused("ipc", &v1.NamespaceOption{Ipc: v1.NamespaceMode_NODE, Pid: own}, false)
	refused("pid", &v1.NamespaceOption{Pid: v1.NamespaceMode_NODE}, false)
	refused("privileged", &v1.NamespaceOption{Pid: own}, true)
	_, id := n.up(t, podConfig(t), sleeper("a"))
	n.exec(t, id, "true")
}
