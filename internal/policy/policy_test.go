package policy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func parse(t *testing.T, text string) *Document {
	t.Helper()
	d, err := Parse([]byte("version: 1\nrules:\n" + text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return d
}

func TestBrokenDocuments(t *testing.T) {
	for _, text := range []string{
		"", "rules: []", "version: 2", "version: 1\nruels: []", "version: 1\nrules: [{}]", "version: 1\nrules: [{name: a}, {name: a}]",
		"version: 1\nrules: [{name: a, priviledged: deny}]", "version: 1\nrules: [{name: a, privileged: maybe}]",
		"version: 1\nrules: [{name: a, hostNamespaces: {allow: [net]}}]", "version: 1\nrules: [{name: a, mounts: {binds: [{source: srv}]}}]",
		"version: 1\nrules: [{name: a, mounts: {types: [nfs]}}]", "version: 1\nrules: [{name: a, resources: {memory: {max: lots}}}]",
		"version: 1\nrules: [{name: a, images: {signedBy: [{}]}}]", "version: 1\nrules: [{name: a, users: {allow: [9-1]}}]",
		"version: 1\n---\nversion: 1", "version: 1\nrules: [{name: a, unconfined: {deny: [selinux]}}]",
		"version: 1\nrules: [{name: a, resources: {cpus: {max: NaN}}}]", "version: 1\n# " + strings.Repeat("x", maxDocument),
	} {
		if _, err := Parse([]byte(text)); !fault.Is(err, fault.Invalid) {
			t.Errorf("%.80q: %v", text, err)
		}
	}
}

func TestCreate(t *testing.T) {
	no := false
	for _, c := range []struct {
		rule string
		make func(c *Container)
		bad  bool
	}{
		{"images: {allow: [registry.corp/**]}", func(c *Container) { c.Image = "registry.corp/a/b:1" }, false},
		{"images: {allow: [registry.corp/**]}", func(c *Container) { c.Image = "alpine" }, true},
		{"images: {allow: [registry.corp/**]}", func(c *Container) { c.Image = "registry.corp.evil/a" }, true},
		{"images: {allow: [alpine]}", func(c *Container) { c.Image = "docker.io/library/alpine:3@sha256:" + strings.Repeat("a", 64) }, false},
		{"images: {allow: ['alpine:3']}", func(c *Container) { c.Image = "alpine" }, true},
		{"images: {allow: ['docker.io/library/*']}", func(c *Container) { c.Image = "alpine" }, false},
		{"images: {allow: ['docker.io/library/*']}", func(c *Container) { c.Image = "mallory/alpine" }, true},
		{"images: {allow: ['*']}", func(c *Container) { c.Image = "quay.io/a/b" }, false},
		{"images: {deny: ['**:latest']}", func(c *Container) { c.Image = "alpine" }, true},
		{"images: {deny: ['**:latest']}", func(c *Container) { c.Image = "alpine:3" }, false},
		// By id: what the image is called counts, for both.
		{"images: {deny: [evil]}", func(c *Container) { c.Image, c.ImageID, c.Names = "abcd", "sha256:abcd1", []string{"evil:1"} }, true},
		{"images: {allow: [good]}", func(c *Container) { c.Image, c.ImageID, c.Names = "abcd", "sha256:abcd1", []string{"good:1"} }, false},
		{"images: {allow: [good]}", func(c *Container) { c.Image, c.ImageID = "abcd", "sha256:abcd1" }, true},
		{"images: {deny: [evil]}", func(c *Container) { c.Image, c.Names = "fine", []string{"fine:latest", "evil:1"} }, true},
		{"images: {digest: required}", func(c *Container) { c.Image = "alpine:3" }, true},
		{"images: {digest: required}", func(c *Container) { c.Image = "alpine@sha256:" + strings.Repeat("a", 64) }, false},
		{"images: {signedBy: [{key: /k}]}", func(c *Container) {}, true},

		{"users: {nonRoot: true}", func(c *Container) {}, true},
		{"users: {nonRoot: true}", func(c *Container) { c.Config.User = "0:5" }, true},
		{"users: {nonRoot: true}", func(c *Container) { c.Config.User = "00" }, true},
		{"users: {nonRoot: true}", func(c *Container) { c.Config.User = "root" }, true},
		{"users: {nonRoot: true}", func(c *Container) { c.Config.User = "app" }, true},
		{"users: {nonRoot: true}", func(c *Container) { c.Config.User = "1000:0" }, false},
		{"users: {allow: [1000-1999, app]}", func(c *Container) { c.Config.User = "app" }, false},
		{"users: {allow: [1000-1999, app]}", func(c *Container) { c.Config.User = "2000" }, true},

		{"privileged: deny", func(c *Container) { c.HostConfig.Privileged = true }, true},
		{"privileged: deny", func(c *Container) {}, false},
		{"capabilities: {allow: [NET_BIND_SERVICE]}", func(c *Container) { c.HostConfig.CapAdd = []string{"cap_net_bind_service"} }, false},
		{"capabilities: {allow: [CAP_NET_BIND_SERVICE]}", func(c *Container) { c.HostConfig.CapAdd = []string{"ALL"} }, true},
		{"capabilities: {deny: [SYS_ADMIN]}", func(c *Container) { c.HostConfig.CapAdd = []string{"all"} }, true},
		{"capabilities: {deny: [SYS_ADMIN]}", func(c *Container) { c.HostConfig.Privileged = true }, true},
		{"capabilities: {deny: [SYS_ADMIN]}", func(c *Container) { c.HostConfig.CapAdd = []string{"NET_ADMIN"} }, false},
		{"hostNamespaces: {allow: [network]}", func(c *Container) { c.HostConfig.NetworkMode = "host" }, false},
		{"hostNamespaces: {allow: [network]}", func(c *Container) { c.HostConfig.PidMode = "host" }, true},
		{"hostNamespaces: {allow: []}", func(c *Container) { c.HostConfig.CgroupnsMode = "host" }, true},

		{"mounts: {binds: [{source: /srv}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srv/a"}} }, false},
		{"mounts: {binds: [{source: /srv}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srv"}} }, false},
		{"mounts: {binds: [{source: /srv}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srvx"}} }, true},
		{"mounts: {binds: [{source: /srv}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srv/../etc"}} }, true},
		{"mounts: {binds: [{source: /}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/etc"}} }, false},
		{"mounts: {binds: [{source: /srv, readOnly: true}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srv/a"}} }, true},
		{"mounts: {binds: [{source: /srv, readOnly: true}]}", func(c *Container) { c.Mounts = []Mount{{Type: "bind", Source: "/srv/a", ReadOnly: true}} }, false},
		{"mounts: {binds: []}", func(c *Container) { c.Mounts = []Mount{{Type: "volume", Source: "v"}} }, false},
		{"mounts: {binds: []}", func(c *Container) { c.Mounts = []Mount{{Type: "volume", Source: "v", Device: "ext4:/dev/sda1"}} }, true},
		{"mounts: {types: [tmpfs]}", func(c *Container) { c.Mounts = []Mount{{Type: "volume", Source: "v"}} }, true},
		{"devices: {allow: [/dev/fuse]}", func(c *Container) {
			c.HostConfig.Devices = []container.DeviceMapping{{PathOnHost: "/dev/../dev/sda"}}
		}, true},
		{"devices: {allow: [/dev/fuse]}", func(c *Container) { c.HostConfig.Devices = []container.DeviceMapping{{PathOnHost: "/dev/fuse"}} }, false},
		{"devices: {allow: []}", func(c *Container) { c.HostConfig.DeviceCgroupRules = []string{"c *:* rwm"} }, true},
		{"devices: {deny: [/dev/sda]}", func(c *Container) { c.HostConfig.Privileged = true }, true},
		{"networks: {allow: [app-*]}", func(c *Container) { c.Networks = []string{"app-1"} }, false},
		{"networks: {allow: [app-*]}", func(c *Container) { c.Networks = []string{"app-1", "bridge"} }, true},
		{"sysctls: {allow: ['net.ipv4.*']}", func(c *Container) { c.HostConfig.Sysctls = map[string]string{"net/ipv4/ip_forward": "1"} }, false},
		{"sysctls: {allow: ['net.ipv4.*']}", func(c *Container) { c.HostConfig.Sysctls = map[string]string{"kernel.msgmax": "1"} }, true},
		{"unconfined: {allow: []}", func(c *Container) { c.HostConfig.SecurityOpt = []string{"seccomp:unconfined"} }, true},
		{"unconfined: {allow: [apparmor]}", func(c *Container) { c.HostConfig.SecurityOpt = []string{"apparmor=unconfined"} }, false},
		{"unconfined: {allow: []}", func(c *Container) { c.HostConfig.SecurityOpt = []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW"}`} }, true},
		{"unconfined: {allow: []}", func(c *Container) { c.HostConfig.MaskedPaths = []string{} }, true},
		{"unconfined: {allow: []}", func(c *Container) { c.HostConfig.SecurityOpt = []string{"no-new-privileges"} }, false},
		{"runtimes: {allow: [servin]}", func(c *Container) {}, false},
		{"runtimes: {allow: [servin]}", func(c *Container) { c.HostConfig.Runtime = "runc" }, true},
		{"resources: {memory: {required: true}}", func(c *Container) {}, true},
		{"resources: {memory: {max: 1g}, cpus: {max: '1.5'}, pids: {required: true}}", func(c *Container) {
			n := int64(9)
			c.HostConfig.Memory, c.HostConfig.CPUQuota, c.HostConfig.PidsLimit = 1<<30, 150000, &n
		}, false},
		{"resources: {cpus: {max: '1.5'}}", func(c *Container) { c.HostConfig.NanoCPUs = 2e9 }, true},
		{"readOnlyRoot: required", func(c *Container) {}, true},
		{"noNewPrivileges: required", func(c *Container) { c.HostConfig.SecurityOpt = []string{"no-new-privileges:true"} }, false},
		{"noNewPrivileges: required", func(c *Container) { c.HostConfig.SecurityOpt = []string{"no-new-privileges=false"} }, true},
		{"userNamespace: required", func(c *Container) { c.HostConfig.UsernsMode = "auto" }, false},

		{"when: {uids: [1000]}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged = true }, false},
		{"when: {notUids: [0]}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged, c.Caller.UID = true, 1000 }, true},
		{"when: {subjects: ['CN=ci*']}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged, c.Caller.Subject = true, "CN=ci-1" }, true},
		{"when: {images: [alpine]}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged = true }, true},
		{"when: {notImages: [alpine]}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged = true }, false},
		{"when: {labels: {tier: web}}\n  privileged: deny", func(c *Container) {
			c.HostConfig.Privileged, c.Config.Labels = true, map[string]string{"tier": "web"}
		}, true},
		{"when: {edges: [cri]}\n  privileged: deny", func(c *Container) { c.HostConfig.Privileged = true }, false},
	} {
		d := parse(t, "- name: r\n  "+c.rule)
		x := Container{Caller: caller.Caller{Edge: "docker", Local: true}, Image: "alpine", ImageID: "sha256:ffff", Config: &container.Config{}, HostConfig: &container.HostConfig{Init: &no}}
		c.make(&x)
		v := d.create(context.Background(), x, nil)
		if (len(v) > 0) != c.bad {
			t.Errorf("%s: %v, want a violation: %v", c.rule, v, c.bad)
		}
		if err := Refuse(v); c.bad && (!fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), `policy rule "r" refuses`)) {
			t.Errorf("%s: %v", c.rule, err)
		}
	}
}

func TestExec(t *testing.T) {
	for rule, want := range map[string]struct{ plain, privileged bool }{ // what is refused
		"exec: {allowed: deny}":                     {true, true},
		"exec: {privileged: deny}":                  {false, true},
		"exec: {users: {nonRoot: true}}":            {true, true},
		"privileged: deny":                          {false, true},
		"capabilities: {allow: [NET_BIND_SERVICE]}": {false, true},
		"capabilities: {deny: [SYS_ADMIN]}":         {false, true},
		"capabilities: {allow: ['*']}":              {false, false},
		"networks: {allow: []}":                     {false, false},
	} {
		d := parse(t, "- name: r\n  "+rule)
		for privileged, bad := range map[bool]bool{false: want.plain, true: want.privileged} {
			x := Exec{Container: Container{Image: "alpine", Config: &container.Config{}, HostConfig: &container.HostConfig{}}, Privileged: privileged}
			if v := d.exec(x); (len(v) > 0) != bad {
				t.Errorf("%s, privileged %t: %v", rule, privileged, v)
			}
		}
	}
}

type verifier struct{ err error }

func (v verifier) Verify(_ context.Context, _, _ string, s []Signer) error {
	if len(s) != 1 || s[0].Key != "/k" {
		return errors.New("wrong signers")
	}
	return v.err
}

func TestSignatures(t *testing.T) {
	d := parse(t, "- name: r\n  images: {signedBy: [{key: /k}]}\n  message: ask ops")
	x := Container{Image: "a", Digest: "sha256:1", Config: &container.Config{}, HostConfig: &container.HostConfig{}}
	if v := d.create(context.Background(), x, verifier{}); len(v) != 0 {
		t.Error(v)
	}
	if v := d.create(context.Background(), x, verifier{errors.New("forged")}); len(v) != 1 || !strings.Contains(v[0].String(), "ask ops") {
		t.Error(v)
	}
}

func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.yaml")
	write := func(s string, mode os.FileMode) {
		if err := errors.Join(os.WriteFile(path, []byte(s), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("version: 1\nrules: [{name: a, privileged: deny}]\n", 0o644)
	s, err := Load(Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"version: 1\nrules: [{nam: b}]\n", "version: 9\n", "\x00"} {
		write(bad, 0o644)
		if err := s.Reload(); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "stays in force") {
			t.Errorf("%q: %v", bad, err)
		}
		if st := s.Status(); len(st.Rules) != 1 || st.Rules[0] != "a" || st.Problem == "" {
			t.Errorf("%q: %+v", bad, st)
		}
		if _, err := Load(Config{Path: path}); err == nil {
			t.Errorf("%q: an engine started with it", bad)
		}
	}
	write("version: 1\nrules: [{name: b}]\n", 0o646)
	if err := s.Reload(); err == nil {
		t.Error("a policy that everybody can write was loaded")
	}
	write("version: 1\nrules: [{name: b}]\n", 0o600)
	if err := s.Reload(); err != nil || s.Status().Rules[0] != "b" || s.Status().Problem != "" {
		t.Errorf("%v %+v", err, s.Status())
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		p, s string
		ok   bool
	}{
		{"", "", true}, {"*", "abc", true}, {"*", "a/b", false}, {"**", "a/b", true}, {"a*c", "abc", true}, {"a*c", "a/c", false},
		{"a/**/c", "a/b/b/c", true}, {"**/c", "a/b/c", true}, {"*/c", "a/b/c", false}, {"a**", "a", true}, {"*b*", "abab", true},
		{"**/b*c", "x/b/bc", true}, {"a*b*c*d", "aXbXcX", false}, {"*a", "aaab", false},
	} {
		if got := match(c.p, c.s); got != c.ok {
			t.Errorf("match(%q, %q) is %v", c.p, c.s, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nrules: [{name: a, images: {allow: ['*']}}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(b)
		if err != nil {
			return
		}
		_ = d.create(context.Background(), Container{Image: "a", Config: &container.Config{}, HostConfig: &container.HostConfig{Privileged: true}}, nil)
	})
}

func FuzzMatch(f *testing.F) {
	f.Add("a**b*", "axbx")
	f.Fuzz(func(t *testing.T, p, s string) {
		if len(p) < 1000 && len(s) < 1000 {
			_ = match(p, s)
		}
		if !strings.Contains(p, "*") && match(p, s) != (p == s) {
			t.Errorf("match(%q, %q)", p, s)
		}
	})
}
