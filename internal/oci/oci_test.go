package oci

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

var update = flag.Bool("update", false, "write golden files")

func testHost() Host {
	return Host{
		CPUs: 4, CPULimit: 4, Capabilities: slices.Clone(capabilityNames), Seccomp: true, TimeNamespace: true,
		RecursiveReadonly: true, PingGroupRange: true, UnprivilegedPortStart: true, SwapLimit: true,
		ThermalPaths: []string{"/sys/devices/system/cpu/cpu0/thermal_throttle"},
	}
}

func testInput() Input {
	return Input{
		ID:         strings.Repeat("ab", 32),
		Config:     &container.Config{Hostname: "abababababab", Cmd: []string{"/bin/true"}},
		HostConfig: &container.HostConfig{},
		User:       specs.User{AdditionalGids: []uint32{0, 10}},
		Home:       "/root",
		Files:      Files{Hosts: "/r/hosts", Hostname: "/r/hostname", ResolvConf: "/r/resolv.conf"},
		CgroupPath: "/servin/" + strings.Repeat("ab", 32),
		CgroupV2:   true,
		Host:       testHost(),
		Devices: func(p string) ([]specs.LinuxDevice, error) {
			switch p {
			case "/dev/fuse":
				return []specs.LinuxDevice{{Path: p, Type: "c", Major: 10, Minor: 229}}, nil
			case "/dev/snd":
				return []specs.LinuxDevice{{Path: p + "/seq", Type: "c", Major: 116, Minor: 1}, {Path: p + "/by-path/x", Type: "c", Major: 116, Minor: 2}}, nil
			case "/dev/vda":
				return []specs.LinuxDevice{{Path: p, Type: "b", Major: 254, Minor: 0}}, nil
			}
			return nil, os.ErrNotExist
		},
	}
}

func i64(v int64) *int64 { return &v }

var goldens = map[string]func(*Input){
	"default":    func(*Input) {},
	"privileged": func(in *Input) { in.HostConfig.Privileged = true },
	"readonly": func(in *Input) {
		in.HostConfig.ReadonlyRootfs = true
		in.Mounts = []Mount{{Type: "tmpfs", Target: "/run", Options: []string{"size=1m", "exec"}}}
	},
	"tty": func(in *Input) {
		in.Config.Tty = true
		in.HostConfig.ConsoleSize = [2]uint{24, 80}
		in.Config.Env = []string{"PATH=/bin", "HOSTNAME", "A=1", "A=2"}
		in.Config.Entrypoint = []string{"sh", "-c"}
		in.Config.WorkingDir = "/srv"
	},
	"mounts": func(in *Input) {
		in.Mounts = []Mount{
			{Type: "bind", Source: "/h/deep", Target: "/data/deep/er", ReadOnly: true},
			{Type: "bind", Source: "/h/data", Target: "/data", Propagation: "rslave"},
			{Type: "bind", Source: "/h/hosts", Target: "/etc/hosts", ReadOnly: true, ReadOnlyNonRecursive: true, NonRecursive: true},
			{Type: "bind", Source: "/h/shm", Target: "/dev/shm", Propagation: "shared"},
		}
	},
	"limits": func(in *Input) {
		in.HostConfig.Resources = container.Resources{
			Memory: 64 << 20, MemorySwap: 128 << 20, MemoryReservation: 32 << 20, NanoCPUs: 1500000000, CPUShares: 512,
			CpusetCpus: "0-1", CpusetMems: "0", PidsLimit: i64(100), BlkioWeight: 300,
			BlkioWeightDevice:   []*blkiodev.WeightDevice{{Path: "/dev/vda", Weight: 200}},
			BlkioDeviceReadBps:  []*blkiodev.ThrottleDevice{{Path: "/dev/vda", Rate: 1 << 20}},
			Ulimits:             []*container.Ulimit{{Name: "nofile", Soft: 1024, Hard: 2048}, {Name: "core", Soft: -1, Hard: -1}},
			Devices:             []container.DeviceMapping{{PathOnHost: "/dev/fuse", PathInContainer: "/dev/f", CgroupPermissions: "rw"}, {PathOnHost: "/dev/snd"}},
			DeviceCgroupRules:   []string{"c 13:* rm"},
			MemorySwappiness:    i64(10),
			BlkioDeviceWriteBps: nil,
		}
		in.HostConfig.OomScoreAdj = 500
	},
	"userns": func(in *Input) {
		in.IDMap = snapshot.IDMap{UIDs: []snapshot.IDRange{{Host: 200000, Size: 65536}}, GIDs: []snapshot.IDRange{{Host: 200000, Size: 65536}}}
		in.Mounts = []Mount{{Type: "bind", Source: "/v", Target: "/vol", IDMap: true}, {Type: "bind", Source: "/b", Target: "/bind"}}
	},
	"rootless-hostnet": func(in *Input) {
		in.Rootless, in.CgroupPath = true, ""
		in.IDMap = snapshot.IDMap{UIDs: []snapshot.IDRange{{Host: 0, Size: 1}}, GIDs: []snapshot.IDRange{{Host: 0, Size: 1}}}
		in.HostConfig.NetworkMode = "host"
		in.HostConfig.Memory = 64 << 20
	},
	"joined": func(in *Input) {
		in.HostConfig.NetworkMode, in.HostConfig.IpcMode, in.HostConfig.PidMode = "container:x", "container:x", "container:x"
		in.HostConfig.UTSMode = "host"
		in.Join = Join{Network: "/n/net", IPC: "/n/ipc", PID: "/n/pid"}
		in.ShmSource = "/r/shm"
	},
	"security": func(in *Input) {
		in.Host.AppArmor, in.AppArmorProfile = true, "servin-default"
		in.HostConfig.SecurityOpt = []string{"seccomp=unconfined", "no-new-privileges", "systempaths=unconfined", "writable-cgroups=true"}
		in.HostConfig.CapDrop = []string{"ALL"}
		in.HostConfig.CapAdd = []string{"net_admin", "CAP_CHOWN"}
		in.HostConfig.Sysctls = map[string]string{"net.core.somaxconn": "1024", "kernel.shmmax": "1", "net.ipv4.ip_unprivileged_port_start": "1024"}
		in.HostConfig.Annotations = map[string]string{"a": "b"}
	},
}

func TestGolden(t *testing.T) {
	for name, change := range goldens {
		t.Run(name, func(t *testing.T) {
			in := testInput()
			change(&in)
			ApplyDefaults(in.HostConfig, in.Host, Defaults{})
			spec, warnings, err := Generate(in)
			if err != nil {
				t.Fatal(err)
			}
			// The profile is large and depends on kernel and architecture; its
			// presence is what a golden can hold.
			if s := spec.Linux.Seccomp; s != nil {
				spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: s.DefaultAction}
			}
			got, err := json.MarshalIndent(struct {
				Spec     *specs.Spec
				Warnings []string
			}{spec, warnings}, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s; run with -update and look at the diff\n%s", file, got)
			}
		})
	}
}

func TestGenerateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Input)
		want   string
	}{
		"no command":         {func(in *Input) { in.Config.Cmd = nil }, "no command specified"},
		"unknown capability": {func(in *Input) { in.HostConfig.CapAdd = []string{"FLY"} }, `unknown capability: "CAP_FLY"`},
		"missing capability": {func(in *Input) { in.Host.Capabilities = nil; in.HostConfig.CapAdd = []string{"SYS_ADMIN"} }, "not available in the current environment"},
		"duplicate mount":    {func(in *Input) { in.Mounts = []Mount{{Type: "bind", Target: "/a"}, {Type: "tmpfs", Target: "/a"}} }, "Duplicate mount point: /a"},
		"mount over root":    {func(in *Input) { in.Mounts = []Mount{{Type: "bind", Target: "/"}} }, "invalid mount target"},
		"unclean target":     {func(in *Input) { in.Mounts = []Mount{{Type: "bind", Target: "/a/../b"}} }, "invalid mount target"},
		"sysctl of the host": {func(in *Input) { in.HostConfig.Sysctls = map[string]string{"kernel.panic": "1"} }, "not in a separate kernel namespace"},
		"sysctl of host net": {func(in *Input) {
			in.HostConfig.NetworkMode = "host"
			in.HostConfig.Sysctls = map[string]string{"net.x": "1"}
		}, "no network namespace"},
		"sysctl escape":    {func(in *Input) { in.HostConfig.Sysctls = map[string]string{"net/../kernel/panic": "1"} }, "invalid sysctl"},
		"apparmor missing": {func(in *Input) { in.HostConfig.SecurityOpt = []string{"apparmor=x"} }, "AppArmor is not enabled"},
		"seccomp json":     {func(in *Input) { in.HostConfig.SecurityOpt = []string{"seccomp={"} }, "cannot load seccomp profile"},
		"no such device":   {func(in *Input) { in.HostConfig.Devices = []container.DeviceMapping{{PathOnHost: "/dev/no"}} }, "/dev/no"},
		"device access": {func(in *Input) {
			in.HostConfig.Devices = []container.DeviceMapping{{PathOnHost: "/dev/fuse", CgroupPermissions: "rx"}}
		}, "invalid device mode"},
		"character throttled": {func(in *Input) { in.HostConfig.BlkioDeviceReadBps = []*blkiodev.ThrottleDevice{{Path: "/dev/fuse"}} }, "no block device"},
		"join without a path": {func(in *Input) { in.HostConfig.NetworkMode = "container:x" }, "no path"},
		"tmpfs option":        {func(in *Input) { in.Mounts = []Mount{{Type: "tmpfs", Target: "/a", Options: []string{"upperdir=/"}}} }, "invalid tmpfs option"},
		"writable cgroups":    {func(in *Input) { in.Rootless = true; in.HostConfig.SecurityOpt = []string{"writable-cgroups"} }, "conflicts with user namespaces"},
	} {
		in := testInput()
		c.change(&in)
		_, _, err := Generate(in)
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestSeccompProfilesAreCachedByCapabilities(t *testing.T) {
	in := testInput()
	in.Seccomp = NewProfiles(nil)
	gen := func() *specs.LinuxSeccomp {
		t.Helper()
		s, _, err := Generate(in)
		if err != nil {
			t.Fatal(err)
		}
		return s.Linux.Seccomp
	}
	a, b := gen(), gen()
	if a == nil || a != b {
		t.Fatal("same container, other profile")
	}
	in.HostConfig.CapAdd = []string{"SYS_ADMIN"}
	c := gen()
	if allows(a, "mount") || !allows(c, "mount") {
		t.Fatal("mount should be allowed with SYS_ADMIN alone")
	}
	in.HostConfig.CapAdd = nil
	in.HostConfig.SecurityOpt = []string{`seccomp={"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`}
	if d := gen(); d.DefaultAction != specs.ActErrno || len(d.Syscalls) != 1 {
		t.Fatalf("custom profile: %+v", d)
	}
	in.Seccomp = NewProfiles([]byte(`{"defaultAction":"SCMP_ACT_LOG"}`))
	in.HostConfig.SecurityOpt = nil
	if d := gen(); d.DefaultAction != specs.ActLog {
		t.Fatalf("engine's own default: %+v", d)
	}
	in.HostConfig.SecurityOpt = []string{"seccomp=builtin"}
	if d := gen(); len(d.Syscalls) != len(a.Syscalls) {
		t.Fatal("builtin is not the built-in profile")
	}
}

func allows(p *specs.LinuxSeccomp, name string) bool {
	return slices.ContainsFunc(p.Syscalls, func(s specs.LinuxSyscall) bool {
		return s.Action == specs.ActAllow && slices.Contains(s.Names, name)
	})
}

func TestEnvironment(t *testing.T) {
	cfg := &container.Config{Hostname: "h", Env: []string{"A=1", "B=2", "PATH=/x", "=odd"}}
	got := Environment(cfg, true, []string{"L=1"}, []string{"A=3", "B", "C=4", "TERM"}, "/home/u")
	want := []string{"PATH=/x", "HOSTNAME=h", "L=1", "A=3", "=odd", "C=4", "HOME=/home/u"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if got := Environment(&container.Config{Env: []string{"HOME=/opt"}}, false, nil, nil, "/root"); got[len(got)-1] != "HOME=/opt" {
		t.Errorf("got %q", got)
	}
}

func TestExec(t *testing.T) {
	in := testInput()
	in.HostConfig.Umask = new(uint32)
	spec, _, err := Generate(in)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := json.Marshal(spec.Process)
	e := ExecInput{
		Init: spec.Process, Config: in.Config, Host: in.Host, User: specs.User{UID: 7, GID: 8}, Home: "/home/seven",
		Request: container.ExecCreateRequest{Cmd: []string{"sh"}, Tty: true, ConsoleSize: &[2]uint{3, 4}, Env: []string{"X=1"}, WorkingDir: "/tmp/../srv", Privileged: true},
	}
	p, err := GenerateExec(e)
	if err != nil {
		t.Fatal(err)
	}
	if p.User.UID != 7 || p.User.Umask == nil || p.Cwd != "/srv" || *p.ConsoleSize != (specs.Box{Height: 3, Width: 4}) ||
		!slices.Contains(p.Env, "X=1") || !slices.Contains(p.Env, "TERM=xterm") || !slices.Contains(p.Env, "HOME=/home/seven") ||
		len(p.Capabilities.Bounding) != len(capabilityNames) {
		t.Errorf("got %+v", p)
	}
	p.Capabilities.Bounding[0] = "changed"
	if after, _ := json.Marshal(spec.Process); !bytes.Equal(before, after) {
		t.Error("the container's process changed")
	}
	for _, bad := range []container.ExecCreateRequest{{}, {Cmd: []string{"a"}, Env: []string{"=x"}}, {Cmd: []string{"a"}, WorkingDir: "rel"}} {
		e.Request = bad
		if _, err := GenerateExec(e); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: got %v", bad, err)
		}
	}
}

func TestValidate(t *testing.T) {
	tcp := network.MustParsePort("80/tcp")
	type change = func(*container.Config, *container.HostConfig)
	for want, c := range map[string]change{
		"Minimum memory limit allowed is 6MB":                                           func(_ *container.Config, h *container.HostConfig) { h.Memory = 1 << 20 },
		"Minimum memoryswap limit should be larger than memory limit, see usage":        func(_ *container.Config, h *container.HostConfig) { h.Memory, h.MemorySwap = 64<<20, 32<<20 },
		"You should always set the Memory limit when using Memoryswap limit, see usage": func(_ *container.Config, h *container.HostConfig) { h.MemorySwap = 32 << 20 },
		"range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs available":        func(_ *container.Config, h *container.HostConfig) { h.NanoCPUs = 5e9 },
		"Conflicting options: Nano CPUs and CPU Period cannot both be set":              func(_ *container.Config, h *container.HostConfig) { h.NanoCPUs, h.CPUPeriod = 1e9, 100000 },
		"Requested CPUs are not available - requested 0-9, available: 0-3":              func(_ *container.Config, h *container.HostConfig) { h.CpusetCpus = "0-9" },
		"invalid restart policy: unknown policy 'sometimes'":                            func(_ *container.Config, h *container.HostConfig) { h.RestartPolicy.Name = "sometimes" },
		"invalid restart policy: maximum retry count can only be used with 'on-failure'": func(_ *container.Config, h *container.HostConfig) {
			h.RestartPolicy = container.RestartPolicy{Name: "always", MaximumRetryCount: 3}
		},
		"can't create 'AutoRemove' container with restart policy": func(_ *container.Config, h *container.HostConfig) {
			h.AutoRemove = true
			h.RestartPolicy.Name = "always"
		},
		"conflicting options: hostname and the network mode": func(c *container.Config, h *container.HostConfig) { c.Hostname = "x"; h.NetworkMode = "container:y" },
		"conflicting options: port publishing and the container type network mode": func(_ *container.Config, h *container.HostConfig) {
			h.PublishAllPorts = true
			h.NetworkMode = "container:y"
		},
		"conflicting options: dns and the network mode": func(_ *container.Config, h *container.HostConfig) {
			h.DNS = []netip.Addr{netip.MustParseAddr("1.1.1.1")}
			h.NetworkMode = "container:y"
		},
		"invalid network mode: invalid container format container:<name|id>": func(_ *container.Config, h *container.HostConfig) { h.NetworkMode = "container:" },
		"conflicting options: hostname and the UTS mode":                     func(c *container.Config, h *container.HostConfig) { c.Hostname = "x"; h.UTSMode = "host" },
		`invalid port specification: "99999"`: func(_ *container.Config, h *container.HostConfig) {
			h.PortBindings = network.PortMap{tcp: {{HostPort: "99999"}}}
		},
		`invalid port specification: "90-80"`: func(_ *container.Config, h *container.HostConfig) {
			h.PortBindings = network.PortMap{tcp: {{HostPort: "90-80"}}}
		},
		"invalid IPC mode: both":           func(_ *container.Config, h *container.HostConfig) { h.IpcMode = "both" },
		"invalid PID mode: container:":     func(_ *container.Config, h *container.HostConfig) { h.PidMode = "container:" },
		"invalid signal: SIGFOO":           func(c *container.Config, _ *container.HostConfig) { c.StopSignal = "SIGFOO" },
		"invalid environment variable: =x": func(c *container.Config, _ *container.HostConfig) { c.Env = []string{"=x"} },
		"the working directory 'rel' is invalid, it needs to be an absolute path": func(c *container.Config, _ *container.HostConfig) { c.WorkingDir = "rel" },
		"Interval in Healthcheck cannot be less than 1ms": func(c *container.Config, _ *container.HostConfig) {
			c.Healthcheck = &container.HealthConfig{Interval: 1}
		},
		"is too long (maximum 64 bytes)":                               func(c *container.Config, _ *container.HostConfig) { c.Hostname = strings.Repeat("a", 65) },
		"invalid CapAdd: unknown capability":                           func(_ *container.Config, h *container.HostConfig) { h.CapAdd = []string{"FLY"} },
		`invalid --security-opt 2: "nothing=1"`:                        func(_ *container.Config, h *container.HostConfig) { h.SecurityOpt = []string{"nothing=1"} },
		"Invalid value 2000, range for oom score adj is [-1000, 1000]": func(_ *container.Config, h *container.HostConfig) { h.OomScoreAdj = 2000 },
		"invalid ulimit type: bogus":                                   func(_ *container.Config, h *container.HostConfig) { h.Ulimits = []*container.Ulimit{{Name: "bogus"}} },
		`bad format for add-host: "x"`:                                 func(_ *container.Config, h *container.HostConfig) { h.ExtraHosts = []string{"x"} },
		"invalid cgroup parent":                                        func(_ *container.Config, h *container.HostConfig) { h.CgroupParent = "/a/../../b" },
		"unknown option color for storage-opt":                         func(_ *container.Config, h *container.HostConfig) { h.StorageOpt = map[string]string{"color": "red"} },
		"invalid device cgroup rule format: 'c x:1 r'":                 func(_ *container.Config, h *container.HostConfig) { h.DeviceCgroupRules = []string{"c x:1 r"} },
		"privileged mode is incompatible with user namespaces.":        func(_ *container.Config, h *container.HostConfig) { h.Privileged = true; h.UsernsMode = "auto" },
		"Range of blkio weight is from 10 to 1000":                     func(_ *container.Config, h *container.HostConfig) { h.BlkioWeight = 5 },
		"kernel does not support CPU real-time scheduler":              func(_ *container.Config, h *container.HostConfig) { h.CPURealtimePeriod = 5 },
	} {
		cfg, hc := &container.Config{}, &container.HostConfig{}
		c(cfg, hc)
		_, err := Validate(cfg, hc, testHost())
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	cfg := &container.Config{WorkingDir: "/a/../b", StopSignal: "RTMIN+3"}
	hc := &container.HostConfig{NetworkMode: "host", PortBindings: network.PortMap{tcp: {{HostPort: "80"}}}}
	w, err := Validate(cfg, hc, testHost())
	if err != nil || cfg.WorkingDir != "/b" || len(w) != 1 || w[0] != "Published ports are discarded when using host network mode" {
		t.Errorf("got %v %v %q", w, err, cfg.WorkingDir)
	}
}
