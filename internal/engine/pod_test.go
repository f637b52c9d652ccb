package engine

import (
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/container"
)

func TestMemberName(t *testing.T) {
	p := &container.Pod{Name: "p", Namespace: "n", UID: "u:1"}
	again := &container.Pod{Name: "p", Namespace: "n", UID: "u:1", Attempt: 2}
	long := &container.Pod{Name: strings.Repeat("p", 253), Namespace: "n", UID: "u"}
	seen := map[string]bool{}
	for _, n := range []string{memberName(p, "c", 0), memberName(p, "c", 1), memberName(again, "c", 0), memberName(long, "c", 0), memberName(long, "c", 1)} {
		if got, err := container.CheckName(n); err != nil || got != n || seen[n] {
			t.Errorf("%q: %v", n, err)
		}
		seen[n] = true
	}
	if !seen["k8s_c_p_n_u-1_0"] {
		t.Errorf("%v", seen)
	}
}

func TestSysctlNamespace(t *testing.T) {
	for name, want := range map[string]string{
		"net.core.somaxconn": "net", "net/ipv4/conf/eth0.1/forwarding": "net", "kernel.shm_rmid_forced": "ipc", "kernel/msgmax": "ipc", "fs.mqueue.msg_max": "ipc",
		"kernel.domainname": "uts", "kernel.panic": "", "vm.swappiness": "", "fs.file-max": "", "": "",
	} {
		if got := sysctlNamespace(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

func TestInNamespace(t *testing.T) {
	f := func(v ...string) Filters {
		m := Filters{}
		for _, x := range v {
			if m["namespace"] == nil {
				m["namespace"] = map[string]bool{}
			}
			m["namespace"][x] = true
		}
		return m
	}
	for i, c := range []struct {
		f          Filters
		plain, pod bool
	}{
		{nil, true, false}, {f("*"), true, true}, {f("kubernetes"), false, true}, {f("default"), true, false}, {f("default", "kubernetes"), true, true}, {f("other"), false, false},
	} {
		if inNamespace(c.f, false) != c.plain || inNamespace(c.f, true) != c.pod {
			t.Errorf("%d: %v", i, c.f)
		}
	}
}

func TestPodDNSValid(t *testing.T) {
	for i, c := range []struct {
		servers, search, options []string
		want                     bool
	}{
		{nil, nil, nil, true}, {[]string{"10.0.0.1", "fd00::1"}, []string{"a.b"}, []string{"ndots:5"}, true}, {[]string{"x"}, nil, nil, false},
		{nil, []string{"a\nnameserver 6.6.6.6"}, nil, false}, {nil, nil, []string{""}, false}, {nil, nil, []string{"a b"}, false},
	} {
		if PodDNSValid(c.servers, c.search, c.options) != c.want {
			t.Errorf("%d", i)
		}
	}
}
