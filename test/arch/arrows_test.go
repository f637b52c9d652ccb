// Package arch checks the shape of the tree: which package may import which,
// what each program may link, and that every package says what it is for.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
	"testing"
)

const module = "github.com/cloudos-io/cloudos/"

// arrows lists, for each folder of ours, the folders of ours it may import; a
// folder stands for itself and everything below. Importing within one's own
// top folder is always allowed. A new arrow is a decision: add an ADR with it.
var arrows = map[string][]string{
	"api":                {},
	"client":             {"api"},
	"cmd/servin":         {"internal/cli", "client", "api"},
	"cmd/servind":        {"internal/wire", "internal/config", "internal/daemon", "internal/dockerapi", "internal/image", "internal/network/dhcp", "internal/rootless", "internal/runtime", "internal/shim", "internal/criu", "api"},
	"cmd/servin-hello":   {},
	"internal/fault":     {},
	"internal/pattern":   {},                                                              // ADR 57
	"internal/durable":   {},                                                              // ADR 53: it replaces files
	"internal/container": {"internal/fault", "internal/volume", "internal/caller", "api"}, // ADR 8, 28
	"internal/event":     {"internal/fault"},
	"internal/store":     {"internal/fault"},
	"internal/logs":      {"internal/durable", "internal/fault"},
	"internal/alert":     {"internal/fault", "api"}, // ADR 31
	"internal/tracing":   {"internal/fault"},        // ADR 31
	"internal/config":    {"internal/fault", "api"},
	"internal/seccomp":   {"internal/fault"},
	"internal/plan":      {"internal/fault", "internal/seccomp"},
	"internal/snapshot":  {"internal/fault", "internal/quota"},
	"internal/idmap":     {"internal/fault", "internal/snapshot"},
	"internal/apparmor":  {"internal/fault"},
	"internal/cdi":       {"internal/fault"},
	"internal/doctor":    {"internal/fault", "api"},
	"internal/oci":       {"internal/fault", "internal/signal", "internal/snapshot", "internal/image", "internal/seccomp", "internal/apparmor"},
	"internal/plugin":    {"internal/fault", "internal/pattern"},
	"internal/quota":     {},
	"internal/signal":    {"internal/fault"},
	"internal/secret":    {"internal/durable", "internal/fault", "api", "internal/pattern"}, // ADR 27
	"internal/caller":    {},
	"internal/policy":    {"internal/fault", "internal/caller", "api"},                                                            // ADR 28
	"internal/signature": {"internal/durable", "internal/fault", "internal/image", "internal/policy", "api"},                      // ADR 35
	"internal/audit":     {"internal/fault", "internal/caller", "api"},                                                            // ADR 29
	"internal/volume":    {"internal/fault", "internal/snapshot", "internal/plugin", "internal/quota", "internal/pattern"},        // ADR 26
	"internal/network":   {"internal/pattern", "internal/durable", "internal/fault", "internal/plugin"},                           // ADR 33
	"internal/image":     {"internal/durable", "internal/fault", "internal/signal", "internal/snapshot", "internal/hello", "api"}, // ADR 35
	"internal/hello":     {},
	"internal/shim":      {"internal/fault", "internal/plan"},
	"internal/runtime":   {"internal/durable", "internal/fault", "internal/shim", "internal/plan", "internal/seccomp", "internal/snapshot", "internal/apparmor", "internal/criu"}, // ADR 36
	"internal/engine": {"internal/durable", "internal/fault", "internal/signal", "internal/container", "internal/event", "internal/oci", "internal/image", "internal/snapshot", "internal/pattern",
		"internal/network", "internal/volume", "internal/runtime", "internal/store", "internal/logs", "internal/idmap", "internal/cdi",
		"internal/doctor", "internal/apparmor", "internal/config", "internal/caller", "internal/policy", "api", "internal/namespace",
		"internal/checkpoint"}, // ADR 36
	"internal/dockerapi": {"internal/caller", "internal/audit", "internal/policy", "internal/fault", "internal/image", "internal/engine", "api", "internal/pattern"},
	"internal/build":     {"internal/caller", "internal/fault", "internal/image", "internal/network"},                                        // ADR 18, 52
	"internal/criapi":    {"internal/audit", "internal/caller", "internal/fault", "internal/image", "internal/engine", "internal/container"}, // ADR 10
	"internal/namespace": {"internal/fault"},                                                                                                 // ADR 10
	"internal/cli":       {"internal/durable", "client", "internal/filesync", "api"},
	"internal/nri":       {"internal/fault", "internal/container", "internal/engine"}, // ADR 14
	"internal/rootless":  {"internal/durable", "internal/fault", "internal/idmap", "internal/snapshot"},
	"cmd/servin-compose": {"internal/compose", "internal/cli", "api"},            // ADR 21
	"internal/compose":   {"internal/cli", "internal/filesync", "client", "api"}, // ADR 21
	"servintest":         {"client", "api"},                                      // ADR 23
	"internal/filesync":  {"client"},                                             // ADR 21

	// the image, ADR 38
	"internal/vmwire":      {},
	"internal/osimage":     {"internal/durable", "internal/fault", "internal/vmwire", "internal/osinit/config", "internal/slots", "internal/gpt", "internal/release"},                                                                                              // ADR 43
	"internal/osinit":      {"internal/pattern", "internal/durable", "internal/fault", "internal/vmwire", "internal/config", "internal/slots", "internal/gpt", "internal/release", "api/system", "api/debugshell", "internal/daemon/await", "internal/osimage/pe"}, // ADR 43, 46, 47, 48
	"internal/slots":       {"internal/fault", "internal/gpt"},
	"internal/release":     {"internal/fault", "internal/pattern"}, // ADR 43
	"internal/gpt":         {},
	"cmd/cloudos":          {"internal/cli", "client", "api"}, // ADR 43
	"cmd/cloudos-image":    {"internal/osimage", "internal/release", "internal/fault", "internal/vmwire", "api"},
	"cmd/cloudos-modprobe": {"internal/osinit/modules"},
	"cmd/cloudos-init":     {"internal/osinit"},
	"cmd/cloudos-seal":     {"internal/osinit/tpm", "internal/osinit/seal"},

	"cmd/servin-vmd": {"internal/vm", "internal/release", "api"},                                           // ADR 41, 50
	"internal/vm":    {"internal/durable", "internal/fault", "internal/vmwire", "internal/release", "api"}, // ADR 41, 50

	// checkpoints, ADR 36
	"internal/criu":       {},
	"internal/checkpoint": {"internal/fault", "api", "internal/pattern"},

	// the OCI command line, ADR 15
	"cmd/servin-runtime":  {"internal/ociruntime"},
	"internal/ociruntime": {"internal/durable", "internal/plan", "internal/seccomp", "internal/shim", "internal/runtime", "internal/criu"}, // ADR 36
}

// composition roots may import everything below internal/.
var roots = []string{"internal/wire", "internal/daemon", "test", "bench"}

// links lists modules that a program must never link.
var links = map[string][]string{
	"cmd/servin":           {"github.com/containerd/containerd/v2", "github.com/vishvananda/netlink", "go.etcd.io/bbolt", "google.golang.org/grpc", "github.com/cloudos-io/cloudos/internal/engine"},
	"cmd/servin-hello":     {"github.com/"},
	"cmd/cloudos":          {"github.com/containerd/containerd/v2", "github.com/vishvananda/netlink", "go.etcd.io/bbolt", "google.golang.org/grpc", "github.com/cloudos-io/cloudos/internal/engine"},
	"cmd/cloudos-init":     {"github.com/containerd", "google.golang.org/grpc", "go.etcd.io/bbolt", "github.com/cloudos-io/cloudos/internal/engine"},
	"cmd/cloudos-modprobe": {"net", "github.com/vishvananda/netlink"},
	"cmd/servind":          {"k8s.io/kubernetes", "github.com/moby/moby/client"},

	"cmd/servin-runtime": {"github.com/containerd/containerd/v2", "go.etcd.io/bbolt", "google.golang.org/grpc", "github.com/cloudos-io/cloudos/internal/engine"},
}

type pkg struct {
	ImportPath, Doc, Dir   string
	Imports, Deps, GoFiles []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Doc,Dir,Imports,Deps,GoFiles"}, args...)...)
	cmd.Dir = "../.."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func TestArrows(t *testing.T) {
	for _, p := range list(t, "./...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		isRoot := false
		for _, r := range roots {
			isRoot = isRoot || under(from, r)
		}
		if isRoot {
			continue
		}
		home, allowed, known := "", []string(nil), false
		for dir, to := range arrows {
			if under(from, dir) && len(dir) > len(home) {
				home, allowed, known = dir, to, true
			}
		}
		if !known {
			t.Errorf("%s is in no row of the list of arrows", from)
			continue
		}
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, module) {
				continue
			}
			to := strings.TrimPrefix(imp, module)
			ok := under(to, home)
			for _, a := range allowed {
				ok = ok || under(to, a)
			}
			if !ok {
				t.Errorf("%s must not import %s", from, to)
			}
		}
	}
}

func TestPrograms(t *testing.T) {
	for prog, banned := range links {
		for _, p := range list(t, "./"+prog) {
			for _, dep := range p.Deps {
				for _, b := range banned {
					if strings.HasPrefix(dep, b) && !strings.HasPrefix(dep, module+"api") {
						t.Errorf("%s links %s", prog, dep)
					}
				}
			}
		}
	}
}

func TestPackageNames(t *testing.T) {
	bad := map[string]bool{"util": true, "utils": true, "common": true, "helper": true, "helpers": true, "misc": true, "base": true, "types": true, "manager": true}
	for _, p := range list(t, "./...") {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package doc", p.ImportPath)
		}
		if bad[path.Base(p.ImportPath)] {
			t.Errorf("%s: the name says nothing", p.ImportPath)
		}
	}
}

// TestEngineKeepsNoMethods sees that the linker may leave out methods that nobody
// calls (ADR 55).
func TestEngineKeepsNoMethods(t *testing.T) {
	cmd := exec.Command("go", "build", "-tags", "nri_no_wasm,grpcnotrace", "-trimpath", "-ldflags", "-dumpdep", "-o", os.DevNull, "./cmd/servind")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out[:min(len(out), 2000)])
	}
	if !bytes.Contains(out, []byte("main.main -> ")) {
		t.Fatal("the linker says nothing of what it keeps")
	}
	for line := range bytes.Lines(out) {
		if l := bytes.TrimSpace(line); bytes.HasSuffix(l, []byte("<ReflectMethod>")) && bytes.Contains(l, []byte(" -> ")) {
			t.Errorf("methods are called by names that are known only when the program runs: %s", l)
		}
	}
}
