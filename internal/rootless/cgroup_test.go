package rootless

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fake makes a tree of plain files that looks like a delegated cgroup with the
// given processes in it.
func fake(t *testing.T, own, processes string) groups {
	t.Helper()
	g := groups{mount: t.TempDir(), own: own}
	for _, d := range []string{own, filepath.Join(own, leaf)} {
		if filepath.Base(own) == leaf {
			d = filepath.Dir(d)
		}
		dir := filepath.Join(g.mount, d)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f, data := range map[string]string{"cgroup.procs": processes, "cgroup.controllers": "cpu memory\n", "cgroup.subtree_control": ""} {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		processes = ""
	}
	return g
}

func TestDelegated(t *testing.T) {
	const scope = "/user.slice/servind.scope"
	for _, c := range []struct {
		name, own, processes, want string
		spoil                      string
	}{
		{name: "alone", own: scope, processes: "42\n", want: scope},
		{name: "in the leaf already", own: scope + "/" + leaf, processes: "", want: scope},
		{name: "others are there", own: scope, processes: "42\n43\n", want: ""},
		{name: "the root", own: "/", want: ""},
		{name: "no hierarchy", own: "", want: ""},
		{name: "no control over children", own: scope, processes: "42\n", spoil: "cgroup.subtree_control", want: ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := fake(t, c.own, c.processes)
			if c.spoil != "" {
				if err := os.Remove(filepath.Join(g.mount, c.own, c.spoil)); err != nil {
					t.Fatal(err)
				}
			}
			if got := g.delegated(42); got != c.want {
				t.Fatalf("subtree %q, want %q", got, c.want)
			}
			if c.want == "" {
				return
			}
			moved, err := os.ReadFile(filepath.Join(g.mount, c.want, leaf, "cgroup.procs"))
			if err != nil || string(moved) != "42" {
				t.Errorf("the engine was not moved out of the way: %q, %v", moved, err)
			}
			on, _ := os.ReadFile(filepath.Join(g.mount, c.want, "cgroup.subtree_control"))
			if !strings.HasPrefix(string(on), "+") {
				t.Errorf("no controller was enabled: %q", on)
			}
		})
	}
}

func TestProcs(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("1\n0\nx\n22\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := procs(dir); !slices.Equal(got, []int{1, 0, 22}) {
		t.Errorf("%v", got)
	}
	if got := procs(dir + "/none"); got != nil {
		t.Errorf("%v", got)
	}
}
