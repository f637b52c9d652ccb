package plan

import (
	"math"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestHostileSpecs(t *testing.T) {
	mount := func(m specs.Mount) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Mounts = append(s.Mounts, m) }
	}
	ns := func(t specs.LinuxNamespaceType, path string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
		}
	}
	dev := func(d specs.LinuxDevice) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{d} }
	}
	sysctl := func(k string) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{k: "1"} }
	}
	for name, change := range map[string]func(*specs.Spec){
		"no process":                  func(s *specs.Spec) { s.Process = nil },
		"no linux":                    func(s *specs.Spec) { s.Linux = nil },
		"no mount namespace":          func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] },
		"namespace twice":             ns(specs.PIDNamespace, ""),
		"namespace unknown":           ns("colour", ""),
		"namespace relative":          ns(specs.UserNamespace, "ns"),
		"user namespace without maps": ns(specs.UserNamespace, ""),
		"maps without user namespace": func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} },
		"joined mount namespace":      func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/1/ns/mnt" },
		"offsets without namespace": func(s *specs.Spec) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}}
		},
		"unknown clock": func(s *specs.Spec) {
			ns(specs.TimeNamespace, "")(s)
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"cuckoo\nmonotonic": {Secs: 1}}
		},
		"root propagation":        func(s *specs.Spec) { s.Linux.RootfsPropagation = "sideways" },
		"no command":              func(s *specs.Spec) { s.Process.Args = nil },
		"empty command":           func(s *specs.Spec) { s.Process.Args = []string{""} },
		"NUL in argument":         func(s *specs.Spec) { s.Process.Args = []string{"a\x00b"} },
		"NUL in variable":         func(s *specs.Spec) { s.Process.Env = []string{"A=\x00"} },
		"nameless variable":       func(s *specs.Spec) { s.Process.Env = []string{"=x"} },
		"no variable":             func(s *specs.Spec) { s.Process.Env = []string{"x"} },
		"relative directory":      func(s *specs.Spec) { s.Process.Cwd = "tmp" },
		"endless directory":       func(s *specs.Spec) { s.Process.Cwd = "/" + strings.Repeat("x", 5000) },
		"reserved user":           func(s *specs.Spec) { s.Process.User.UID = math.MaxUint32 },
		"too many groups":         func(s *specs.Spec) { s.Process.User.AdditionalGids = make([]uint32, 1025) },
		"unknown capability":      func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_FLY"} },
		"effective not permitted": func(s *specs.Spec) { s.Process.Capabilities.Permitted = nil },
		"ambient not inheritable": func(s *specs.Spec) { s.Process.Capabilities.Ambient = []string{"CAP_CHOWN"} },
		"unknown limit":           func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_FUN"}} },
		"soft over hard":          func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CPU", Soft: 2, Hard: 1}} },
		"limit twice": func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CPU"}, {Type: "RLIMIT_CPU"}}
		},
		"oom score":          func(s *specs.Spec) { s.Process.OOMScoreAdj = ptr(1001) },
		"scheduler":          func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_MAGIC"} },
		"scheduler priority": func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Priority: 1} },
		"scheduler deadline": func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Runtime: 1} },
		"io priority":        func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "X"} },
		"io priority range": func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}
		},
		"personality":   func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "BSD"} },
		"memory policy": func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "X"} },
		"nodes": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "3-1"}
		},
		"endless nodes": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0-4294967295"}
		},
		"hostname too long":         func(s *specs.Spec) { s.Hostname = strings.Repeat("h", 65) },
		"hostname of the host":      func(s *specs.Spec) { s.Linux.Namespaces[2].Path = "/proc/1/ns/uts"; s.Hostname = "x" },
		"mount on the root":         mount(specs.Mount{Destination: "/", Type: "tmpfs"}),
		"mount on the root by dots": mount(specs.Mount{Destination: "/a/..", Type: "tmpfs"}),
		"mount nowhere":             mount(specs.Mount{Type: "tmpfs"}),
		"mount of nothing":          mount(specs.Mount{Destination: "/x"}),
		"bind over /proc/self":      mount(specs.Mount{Destination: "/proc/self/attr", Source: "/x", Type: "bind"}),
		"tmpfs over /proc":          mount(specs.Mount{Destination: "/proc", Type: "tmpfs"}),
		"bind by dots over /proc":   mount(specs.Mount{Destination: "/x/../proc/./sys", Source: "/x", Type: "bind"}),
		"relative source":           mount(specs.Mount{Destination: "/x", Source: "x", Type: "bind"}),
		"NUL in source":             mount(specs.Mount{Destination: "/x", Source: "/x\x00", Type: "bind"}),
		"option of a bind":          mount(specs.Mount{Destination: "/x", Source: "/x", Type: "bind", Options: []string{"size=1"}}),
		"malformed option":          mount(specs.Mount{Destination: "/x", Type: "tmpfs", Options: []string{"=1"}}),
		"type with a slash":         mount(specs.Mount{Destination: "/x", Type: "../ext4"}),
		"one mapping":               mount(specs.Mount{Destination: "/x", Source: "/x", Type: "bind", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}),
		"mapped tmpfs":              mount(specs.Mount{Destination: "/x", Type: "tmpfs", Options: []string{"idmap"}}),
		"idmap without maps":        mount(specs.Mount{Destination: "/x", Source: "/x", Options: []string{"bind", "idmap"}}),
		"device type":               dev(specs.LinuxDevice{Path: "/dev/x", Type: "q"}),
		"device number":             dev(specs.LinuxDevice{Path: "/dev/x", Type: "c", Major: -1}),
		"device number too large":   dev(specs.LinuxDevice{Path: "/dev/x", Type: "c", Minor: 1 << 20}),
		"device on /proc":           dev(specs.LinuxDevice{Path: "/proc/x", Type: "c"}),
		"device nowhere":            dev(specs.LinuxDevice{Path: "", Type: "c"}),
		"sysctl of the host":        sysctl("kernel.panic"),
		"sysctl by slash":           sysctl("kernel/core_pattern"),
		"sysctl by dots":            sysctl("net/../kernel/core_pattern"),
		"sysctl absolute":           sysctl("/kernel/shmmax"),
		"sysctl of users":           sysctl("user.max_pid_namespaces"),
		"masked root":               func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"/"} },
		"masked relative":           func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"proc/kcore"} },
		"read-only relative":        func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"../x"} },
	} {
		t.Run(name, func(t *testing.T) {
			s := defaultSpec(t, "/rootfs", "/bin/true")
			change(s)
			if p, err := Compile(s, Options{}); !fault.Is(err, fault.Invalid) {
				t.Fatalf("got %v, %v", p, err)
			}
		})
	}
	for name, o := range map[string]Options{
		"filter":      {Seccomp: make([]byte, 12)},
		"long filter": {Seccomp: make([]byte, 8*4097)},
		"descriptors": {PreserveFDs: 1025},
		"hierarchy":   {V1Controllers: []string{"../memory"}},
	} {
		if _, err := Compile(defaultSpec(t, "/rootfs", "/bin/true"), o); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for name, change := range map[string]func(*specs.Spec){
		"apparmor":    func(s *specs.Spec) { s.Process.ApparmorProfile = "x" },
		"selinux":     func(s *specs.Spec) { s.Process.SelinuxLabel = "x" },
		"mount label": func(s *specs.Spec) { s.Linux.MountLabel = "x" },
	} {
		s := defaultSpec(t, "/rootfs", "/bin/true")
		change(s)
		if _, err := Compile(s, Options{}); !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestNotParkable(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"hooks":        func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/x"}}} },
		"joined ipc":   func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/x" },
		"joined net":   func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/x" },
		"no cgroup ns": func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[:5] },
	} {
		s := defaultSpec(t, "/rootfs", "/bin/true")
		change(s)
		if _, err := Compile(s, Options{Parked: true}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := Compile(s, Options{CgroupPaths: map[string]string{}}); err != nil && name != "no cgroup ns" {
			t.Errorf("%s, not parked: %v", name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	p, err := Compile(defaultSpec(f, "/rootfs", "/bin/true"), Options{ID: "x", V1Controllers: []string{"memory"}})
	if err != nil {
		f.Fatal(err)
	}
	raw, err := p.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Decode(b)
		if err != nil {
			if !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Unsupported) {
				t.Fatalf("kind of %v", err)
			}
			return
		}
		again, err := p.Encode()
		if err != nil {
			return // a name over the limit
		}
		if q, err := Decode(again); err != nil || len(q.Ops) != len(p.Ops) {
			t.Fatalf("encoded again: %v", err)
		}
	})
}
