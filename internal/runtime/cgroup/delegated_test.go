package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// tree makes a directory that looks like a delegated cgroup.
func tree(t *testing.T, controllers string) (mount, base string) {
	t.Helper()
	mount, base = t.TempDir(), "/user.slice/engine.scope"
	dir := filepath.Join(mount, base)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for f, data := range map[string]string{"cgroup.procs": "", "cgroup.subtree_control": "", "cgroup.controllers": controllers} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return mount, base
}

func TestDelegated(t *testing.T) {
	mount, base := tree(t, "cpu memory pids\n")
	h := delegatedAt(mount, base)
	if h.Mode != V2 {
		t.Fatalf("mode %d of a delegated subtree", h.Mode)
	}
	lacking := h.Lacking()
	for _, c := range []string{"memory", "cpu", "pids"} {
		if why, ok := lacking[c]; ok {
			t.Errorf("%s is there, yet: %s", c, why)
		}
	}
	for _, c := range []string{"cpuset", "io"} {
		if lacking[c] == "" {
			t.Errorf("%s is not delegated, and nobody says so", c)
		}
	}
	g, err := h.Create("/servin-x", "abc")
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(mount, base, "servin-x/abc"); !slices.Equal(g.dirs(), []string{want}) {
		t.Errorf("the group lies in %v, not below the subtree in %s", g.dirs(), want)
	}
	if _, err := os.Stat(filepath.Join(mount, base, "servin-x/abc")); err != nil {
		t.Error(err)
	}
	// Device rules take BPF in the first user namespace; without mknod there is
	// nothing that they would forbid.
	any := int64(-1)
	if _, err := g.Apply(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "a", Major: &any, Minor: &any, Access: "rwm"}}}); err != nil {
		t.Errorf("device rules: %v", err)
	}
}

func TestNotDelegated(t *testing.T) {
	mount, base := tree(t, "cpu memory pids\n")
	if err := os.Remove(filepath.Join(mount, base, "cgroup.subtree_control")); err != nil {
		t.Fatal(err)
	}
	for name, h := range map[string]*Host{"no base": delegatedAt(mount, ""), "no mount": delegatedAt("", base), "not a cgroup": delegatedAt(mount, base)} {
		if h.Mode != None {
			t.Errorf("%s: mode %d", name, h.Mode)
		}
		for _, c := range []string{"memory", "cpu", "cpuset", "pids", "io"} {
			if h.Lacking()[c] == "" {
				t.Errorf("%s: nobody says why there is no %s controller", name, c)
			}
		}
		g, err := h.Create("/p", "id")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := g.Freeze(t.Context()); !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: freezing: %v", name, err)
		}
		if _, err := g.Stats(); !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: stats: %v", name, err)
		}
		if err := g.Remove(t.Context()); err != nil {
			t.Errorf("%s: remove: %v", name, err)
		}
	}
}

func TestPidsIn(t *testing.T) {
	pids, err := PidsIn(os.Getpid())
	if err != nil || !slices.Contains(pids, os.Getpid()) {
		t.Errorf("%v, %v: not even this process", pids, err)
	}
	if _, err := PidsIn(0); !fault.Is(err, fault.Conflict) {
		t.Errorf("processes of nobody: %v", err)
	}
}
