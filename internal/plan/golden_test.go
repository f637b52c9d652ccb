package plan

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// dump renders a plan for golden files.
func dump(p *Plan) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "clone %#x pidns %q userns %q uids %v gids %v\n", p.CloneFlags, p.PIDNamespace, p.UserNamespace, p.UIDMap, p.GIDMap)
	for i, s := range p.Slots {
		fmt.Fprintf(&b, "slot %d: %+v\n", i, s)
	}
	for i, op := range p.Ops {
		switch i {
		case p.pivot:
			if p.pivot > 0 {
				b.WriteString("-- hooks of the creation\n")
			}
		case p.exec:
			if p.exec > 0 {
				b.WriteString("-- held here\n")
			}
		}
		fmt.Fprintf(&b, "%-40s %s\n", op.Name, op)
	}
	return b.Bytes()
}

func everything(t *testing.T) *specs.Spec {
	s := defaultSpec(t, "/bundle/rootfs", "prog", "arg")
	s.Root.Readonly = true
	s.Domainname = "dom"
	s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5}, Umask: ptr(uint32(0o27))}
	s.Process.Terminal = true
	s.Process.ConsoleSize = &specs.Box{Width: 80, Height: 24}
	s.Process.NoNewPrivileges = true
	s.Process.Cwd = "/work"
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: 20}}
	s.Process.OOMScoreAdj = ptr(-5)
	s.Process.ApparmorProfile, s.Process.SelinuxLabel = "servin-default", "system_u:system_r:container_t:s0:c1,c2"
	s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedRR, Priority: 3, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
	s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 4}
	l := s.Linux
	l.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
	l.RootfsPropagation = "rshared"
	l.Sysctl = map[string]string{"net.ipv4.conf.eth0/1.forwarding": "1", "kernel/shmmax": "5"}
	l.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
	l.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0-2,5", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}}
	l.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: ptr(os.FileMode(0o600))}}
	l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	for i := range l.Namespaces {
		switch l.Namespaces[i].Type {
		case specs.IPCNamespace:
			l.Namespaces[i].Path = "/run/ns/ipc"
		case specs.PIDNamespace:
			l.Namespaces[i].Path = "/run/ns/pid"
		}
	}
	l.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}, "boottime": {Secs: 2, Nanosecs: 3}}
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/data", Source: "/srv/data", Type: "bind", Options: []string{"rbind", "ro", "rprivate", "nosuid"}},
		specs.Mount{Destination: "rel/path/../x", Source: "/srv/x", Options: []string{"bind", "rro", "noexec", "rshared"}},
		specs.Mount{Destination: "/tree", Source: "/srv/t", Options: []string{"rbind", "rnoexec", "ro"}},
		specs.Mount{Destination: "/mapped", Source: "/srv/m", Type: "bind", Options: []string{"bind"},
			UIDMappings: []specs.LinuxIDMapping{{HostID: 1, Size: 2}}, GIDMappings: []specs.LinuxIDMapping{{HostID: 3, Size: 4}}},
		specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup", "size=1m", "ro", "noatime", "lazytime", "slave"}},
		specs.Mount{Destination: "/proc/meminfo", Source: "/var/lib/lxcfs/meminfo", Type: "bind", Options: []string{"bind"}},
	)
	return s
}

func TestGolden(t *testing.T) {
	v1 := []string{"cpu,cpuacct", "memory", "name=systemd"}
	filter := make([]byte, 80)
	type gen func(t *testing.T) (*Plan, error)
	for name, f := range map[string]gen{
		"default": func(t *testing.T) (*Plan, error) {
			return Compile(defaultSpec(t, "/bundle/rootfs", "sh", "-c", "true"), Options{ID: "abc", V1Controllers: v1, Seccomp: filter})
		},
		"default-v2": func(t *testing.T) (*Plan, error) {
			return Compile(defaultSpec(t, "/bundle/rootfs", "/bin/true"), Options{CgroupV2: true, Init: true})
		},
		"parked": func(t *testing.T) (*Plan, error) {
			return Compile(defaultSpec(t, "/bundle/rootfs", "/bin/true"), Options{V1Controllers: v1, Seccomp: filter, Parked: true})
		},
		"park": func(t *testing.T) (*Plan, error) { return Park(true, Options{V1Controllers: v1}) },
		"park-v2-hostnet": func(t *testing.T) (*Plan, error) {
			return Park(false, Options{CgroupV2: true})
		},
		"park-rootless": func(t *testing.T) (*Plan, error) { return Park(true, Options{CgroupV2: true, BindDevices: true}) },
		"rootless-one-id": func(t *testing.T) (*Plan, error) {
			return Compile(defaultSpec(t, "/bundle/rootfs", "/bin/true"), Options{CgroupV2: true, BindDevices: true, KeepGroups: true})
		},
		"everything": func(t *testing.T) (*Plan, error) {
			return Compile(everything(t), Options{ID: "abc", V1Controllers: v1, Seccomp: filter, SeccompFlags: 4, SeccompNotify: true,
				AppArmor: true, SELinux: true, PreserveFDs: 2})
		},
		"userns": func(t *testing.T) (*Plan, error) {
			s := defaultSpec(t, "/bundle/rootfs", "/bin/true")
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/v", Source: "/srv/v", Options: []string{"rbind", "ridmap"}})
			return Compile(s, Options{V1Controllers: v1})
		},
		"no-cgroupns": func(t *testing.T) (*Plan, error) {
			s := defaultSpec(t, "/bundle/rootfs", "/bin/true")
			s.Linux.Namespaces = s.Linux.Namespaces[:5]
			return Compile(s, Options{V1Controllers: v1, CgroupPaths: map[string]string{"cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct/c", "memory": "/sys/fs/cgroup/memory/c", "name=systemd": "/sys/fs/cgroup/systemd/c"}})
		},
		"exec": func(t *testing.T) (*Plan, error) {
			p := everything(t).Process
			p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0-1,64"}
			return Exec(p, Options{ID: "abc", V1Controllers: v1, Seccomp: filter, AppArmor: true, SELinux: true, UserNS: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := f(t)
			if err != nil {
				t.Fatal(err)
			}
			got := dump(p)
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("differs from %s (run with -update and look at the difference):\n%s", path, got)
			}
			raw, err := p.Encode()
			if err != nil {
				t.Fatal(err)
			}
			back, err := Decode(raw)
			if err != nil {
				t.Fatal(err)
			}
			if again, _ := back.Encode(); !bytes.Equal(raw, again) {
				t.Fatal("encoding is not stable")
			}
		})
	}
}

// TestParkedRootless: a procfs that was not prepared cannot be had any more once
// the host's is out of sight.
func TestParkedRootless(t *testing.T) {
	o := Options{CgroupV2: true, BindDevices: true, Parked: true, Prepare: defaultSpec(t, "/bundle/rootfs", "/bin/true").Mounts}
	if _, err := Compile(defaultSpec(t, "/bundle/rootfs", "/bin/true"), o); err != nil {
		t.Errorf("what was prepared: %v", err)
	}
	s := defaultSpec(t, "/bundle/rootfs", "/bin/true")
	for i := range s.Mounts {
		if s.Mounts[i].Type == "proc" {
			s.Mounts[i].Options = append(s.Mounts[i].Options, "hidepid=2")
		}
	}
	if _, err := Compile(s, o); err == nil {
		t.Error("a procfs with other options passed")
	}
	o.BindDevices = false
	if _, err := Compile(s, o); err != nil {
		t.Errorf("as root: %v", err)
	}
}
