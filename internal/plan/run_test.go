package plan

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

// box runs a shell script in the default container, changed by change.
func box(t *testing.T, script string, change func(*specs.Spec, *Options)) (string, int) {
	t.Helper()
	needStage(t)
	spec := defaultSpec(t, rootfs(t), "sh", "-c", script)
	o := Options{ID: "box"}
	if change != nil {
		change(spec, &o)
	}
	return start(t, spec, o).wait()
}

func TestProcessAttributes(t *testing.T) {
	type c struct {
		script, want string
		change       func(*specs.Spec, *Options)
	}
	for name, c := range map[string]c{
		"user and groups": {"id", "uid=1000(ann) gid=1000 groups=5,7\n", func(s *specs.Spec, _ *Options) {
			s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5, 7}}
		}},
		"no groups of ours": {"grep Groups /proc/self/status", "Groups:\t \n", nil},
		"home by passwd": {"echo $HOME", "/home/ann\n", func(s *specs.Spec, _ *Options) {
			s.Process.User = specs.User{UID: 1000, GID: 1000}
		}},
		"home unknown": {"echo $HOME", "/\n", func(s *specs.Spec, _ *Options) { s.Process.User = specs.User{UID: 77} }},
		"home given":   {"echo $HOME", "/x\n", func(s *specs.Spec, _ *Options) { s.Process.Env = append(s.Process.Env, "HOME=/x") }},
		"last variable wins": {"echo $A", "2\n", func(s *specs.Spec, _ *Options) {
			s.Process.Env = append(s.Process.Env, "A=1", "A=2")
		}},
		"ambient capabilities": {"grep ^Cap /proc/self/status", "CapInh:\t0000000000000400\nCapPrm:\t0000000000000400\nCapEff:\t0000000000000400\nCapBnd:\t0000000000000401\nCapAmb:\t0000000000000400\n",
			func(s *specs.Spec, _ *Options) {
				n := []string{"CAP_NET_BIND_SERVICE"}
				s.Process.User.UID = 1000
				s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", n[0]}, Effective: n, Permitted: n, Inheritable: n, Ambient: n}
			}},
		"plain user has none": {"grep -e CapPrm -e CapEff -e CapAmb /proc/self/status", "CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapAmb:\t0000000000000000\n",
			func(s *specs.Spec, _ *Options) { s.Process.User.UID = 1000 }},
		"no new privileges": {"grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n", func(s *specs.Spec, _ *Options) { s.Process.NoNewPrivileges = true }},
		"umask":             {"umask", "0077\n", func(s *specs.Spec, _ *Options) { s.Process.User.Umask = ptr(uint32(0o77)) }},
		"default umask":     {"umask", "0022\n", nil},
		"limits": {"ulimit -n; ulimit -c", "123\n0\n", func(s *specs.Spec, _ *Options) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 123, Hard: 200}, {Type: "RLIMIT_CORE"}}
		}},
		"working directory": {"pwd", "/tmp\n", func(s *specs.Spec, _ *Options) { s.Process.Cwd = "/tmp" }},
		"working directory made": {"pwd; stat -c %a:%u /a/b", "/a/b\n755:0\n", func(s *specs.Spec, _ *Options) {
			s.Process.Cwd = "/a/b"
			s.Root.Readonly = true
		}},
		"oom score": {"cat /proc/self/oom_score_adj", "321\n", func(s *specs.Spec, _ *Options) { s.Process.OOMScoreAdj = ptr(321) }},
		"io priority and scheduler": {"grep policy /proc/self/sched", "policy                                       :                    3\n",
			func(s *specs.Spec, _ *Options) {
				s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_IDLE}
				s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 3}
				s.Linux.MaskedPaths = nil
			}},
		"personality": {"cat /proc/self/personality", "00000008\n", func(s *specs.Spec, _ *Options) {
			s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		}},
		"host and domain name": {"hostname; cat /proc/sys/kernel/domainname", "h1\nd1\n", func(s *specs.Spec, _ *Options) { s.Hostname, s.Domainname = "h1", "d1" }},
		"sysctl": {"cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax", "1\n4321\n", func(s *specs.Spec, _ *Options) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.msgmax": "4321"}
		}},
		"loopback is up": {"cat /sys/class/net/lo/operstate; grep -c 7F000001 /proc/net/fib_trie || true; ip addr show lo | grep -c 127.0.0.1", "unknown\n0\n1\n", nil},
		"read-only root": {"touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo ok", "refused\nok\n", func(s *specs.Spec, _ *Options) { s.Root.Readonly = true }},
		"read-only /dev": {"touch /dev/x 2>/dev/null || echo refused; echo x >/dev/null && echo ok", "refused\nok\n", func(s *specs.Spec, _ *Options) {
			for i := range s.Mounts {
				if s.Mounts[i].Destination == "/dev" {
					s.Mounts[i].Options = append(s.Mounts[i].Options, "ro")
				}
			}
		}},
		"device": {"stat -c '%F %t:%T %a %u:%g' /dev/x/fuse /dev/pipe", "character special file a:e5 666 3:4\nfifo 0:0 666 0:0\n", func(s *specs.Spec, _ *Options) {
			s.Linux.Devices = []specs.LinuxDevice{
				{Path: "/dev/x/fuse", Type: "c", Major: 10, Minor: 229, FileMode: ptr(os.FileMode(0o666)), UID: ptr(uint32(3)), GID: ptr(uint32(4))},
				{Path: "/dev/pipe", Type: "p"}}
		}},
		"nothing leaks":         {"ls /proc/self/fd; ls -l /proc/1/cwd | grep -o '> .*'", "0\n1\n2\n3\n> /\n", nil},
		"preserved descriptors": {"ls /proc/self/fd; echo hi >&3; echo ho >&4", "0\n1\n2\n3\n4\n5\nhi\nho\n", func(s *specs.Spec, o *Options) { o.PreserveFDs = 2 }},
		"masks":                 {"cat /proc/keys; ls /proc/acpi; echo x 2>/dev/null >/proc/sys/kernel/msgmax || echo refused; ls /sys/firmware", "refused\n", nil},
		"masks on a bound /proc": {"cat /proc/keys; ls /proc/acpi; echo x 2>/dev/null >/proc/sys/kernel/msgmax || echo refused", "refused\n", func(s *specs.Spec, _ *Options) {
			s.Mounts[0] = specs.Mount{Destination: "/proc", Source: "/proc", Type: "bind", Options: []string{"rbind", "rprivate"}}
			s.Process.OOMScoreAdj = ptr(0)
		}},
		"own process 1 alone": {"echo $$; set -- /proc/[0-9]*; echo $*", "1\n/proc/1\n", nil},
		"memory policy": {"true && echo ok", "ok\n", func(s *specs.Spec, _ *Options) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0"}
		}},
		"time offset": {"cat /proc/self/timens_offsets", "monotonic           5         0\nboottime           77         9\n", func(s *specs.Spec, _ *Options) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 5}, "boottime": {Secs: 77, Nanosecs: 9}}
		}},
		"search path": {"x", "found\n", func(s *specs.Spec, _ *Options) {
			os.Mkdir(filepath.Join(s.Root.Path, "opt"), 0o755)
			os.WriteFile(filepath.Join(s.Root.Path, "opt/prog"), []byte("#!/bin/sh\necho found\n"), 0o755)
			s.Process.Args = []string{"prog"}
			s.Process.Env = []string{"PATH=/nowhere:/etc/passwd:/opt"}
		}},
		"long argument": {"", "70000\n", func(s *specs.Spec, _ *Options) {
			s.Process.Args = []string{"sh", "-c", "echo ${#1}", "x", strings.Repeat("y", 70000)} // and the plan in a memfd
		}},
	} {
		t.Run(name, func(t *testing.T) {
			out, code := box(t, c.script, c.change)
			if out != c.want || code != 0 {
				t.Fatalf("exit %d, got:\n%s\nwant:\n%s", code, out, c.want)
			}
		})
	}
}

// fails runs a spec that must not start and gives the error.
func fails(t *testing.T, spec *specs.Spec, o Options) (*stageError, int) {
	t.Helper()
	p, err := Compile(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	s := startStage(t, p)
	started, err := s.run(p, 0)
	var se *stageError
	if started || !errors.As(err, &se) {
		t.Fatalf("started %v: %v", started, err)
	}
	_, code := s.wait()
	return se, code
}

func TestExecFailures(t *testing.T) {
	needStage(t)
	root := rootfs(t)
	for name, mode := range map[string]os.FileMode{"noexec": 0o644, "badformat": 0o755} {
		if err := os.WriteFile(filepath.Join(root, "bin", name), []byte("junk"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		arg  string
		err  error
		code int
	}{
		{"missing", unix.ENOENT, 127}, {"/bin/missing", unix.ENOENT, 127}, {"/etc/passwd/x", unix.ENOENT, 127},
		{"noexec", unix.EACCES, 126}, {"/tmp", unix.EACCES, 126}, {"/bin/badformat", unix.ENOEXEC, 126},
	} {
		for _, init := range []bool{false, true} {
			se, code := fails(t, defaultSpec(t, root, c.arg), Options{Init: init})
			if !errors.Is(se, c.err) || code != c.code || se.name != "exec "+c.arg {
				t.Errorf("%s (init %v): %v, exit %d, want %v, %d", c.arg, init, se, code, c.err, c.code)
			}
		}
	}
}

func TestInit(t *testing.T) {
	t.Run("code", func(t *testing.T) {
		out, code := box(t, "echo $$; cat /proc/1/comm; (sleep 0.1 &) ; kill -9 $$", func(_ *specs.Spec, o *Options) { o.Init = true })
		if code != 128+9 || !strings.HasPrefix(out, "2\n") {
			t.Fatalf("exit %d: %s", code, out)
		}
	})
	t.Run("signals", func(t *testing.T) {
		needStage(t)
		spec := defaultSpec(t, rootfs(t), "sh", "-c", "trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.05; done")
		s := start(t, spec, Options{Init: true})
		for i := 0; ; i++ {
			if b, _ := os.ReadFile(s.log.Name()); strings.Contains(string(b), "ready") {
				break
			}
			if i == 500 {
				t.Fatal("never ready")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if out, code := s.wait(); code != 7 || !strings.Contains(out, "term") {
			t.Fatalf("exit %d: %s", code, out)
		}
	})
	t.Run("unprivileged", func(t *testing.T) {
		out, code := box(t, "grep -h -e ^Uid -e ^CapBnd -e ^CapEff -e ^NoNew /proc/1/status", func(s *specs.Spec, o *Options) {
			o.Init = true
			s.Process.User.UID, s.Process.NoNewPrivileges = 1000, true
		})
		if want := "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t1\n"; out != want || code != 0 {
			t.Fatalf("exit %d: %s", code, out)
		}
	})
}

func TestTerminal(t *testing.T) {
	needStage(t)
	spec := defaultSpec(t, rootfs(t), "sh", "-c", "tty; stat -c '%F %u' /dev/console $(tty); stty size; echo hi >/dev/console; cat /proc/self/stat | { read a b c d e f g h; test $g != 0 && echo controlled; }")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Width: 91, Height: 33}
	spec.Process.User.UID = 1000
	s := start(t, spec, Options{})
	m := s.fds[1]
	if m == nil {
		t.Fatal("no terminal came back")
	}
	ws, err := unix.IoctlGetWinsize(int(m.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Col != 91 || ws.Row != 33 {
		t.Fatalf("size %+v: %v", ws, err)
	}
	var out strings.Builder
	buf := make([]byte, 4096)
	for {
		m.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := m.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			break
		}
	}
	if _, code := s.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
	want := "/dev/pts/0\r\ncharacter special file 1000\r\ncharacter special file 1000\r\n33 91\r\nhi\r\ncontrolled\r\n"
	if out.String() != want {
		t.Errorf("got %q\nwant %q", out.String(), want)
	}
}

func TestHold(t *testing.T) {
	needStage(t)
	spec := defaultSpec(t, rootfs(t), "echo", "ran")
	p, err := Compile(spec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	before, last := p.SplitExec()
	s := startStage(t, p)
	if started, err := s.run(before, 0); started || err != nil {
		t.Fatal(started, err)
	}
	if b, _ := os.ReadFile(s.log.Name()); len(b) != 0 {
		t.Fatalf("ran already: %s", b)
	}
	hook, err := Hooks([]specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > /tmp/state; echo $X >> /tmp/state"}, Env: []string{"X=env"}}}, []byte("{}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if started, err := s.run(hook, 0); started || err != nil {
		t.Fatal(started, err)
	}
	if started, err := s.run(last, 0); !started || err != nil {
		t.Fatal(started, err)
	}
	if out, code := s.wait(); out != "ran\n" || code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	if b, _ := os.ReadFile(filepath.Join(spec.Root.Path, "tmp/state")); string(b) != "{}\nenv\n" {
		t.Fatalf("the hook saw %q", b)
	}
}

func TestHooks(t *testing.T) {
	needStage(t)
	p, err := Compile(defaultSpec(t, rootfs(t), "true"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	before, after := p.SplitPivot()
	if after == nil || len(before.Ops)+len(after.Ops) != len(p.Ops) || after.Ops[0].Kind != OpPivot {
		t.Fatal("split in the wrong place")
	}
	for name, c := range map[string]struct {
		hook specs.Hook
		want error
	}{
		"fails":   {specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 3"}}, unix.Errno(0x10000 | 3<<8)}, // its wait status
		"missing": {specs.Hook{Path: "/bin/nothing"}, unix.Errno(0x10000 | 127<<8)},
		"hangs":   {specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 60"}, Timeout: ptr(1)}, unix.ETIMEDOUT},
	} {
		t.Run(name, func(t *testing.T) {
			s := startStage(t, p)
			if _, err := s.run(before, 0); err != nil {
				t.Fatal(err)
			}
			h, err := Hooks([]specs.Hook{c.hook}, []byte("{}"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.run(h, 0); !errors.Is(err, c.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestExecInto(t *testing.T) {
	needStage(t)
	for _, userns := range []bool{false, true} {
		t.Run(fmt.Sprintf("userns %v", userns), func(t *testing.T) {
			spec := defaultSpec(t, rootfs(t), "sleep", "60")
			if userns {
				spec = withUserNS(t, spec)
			}
			c := start(t, spec, Options{})
			pid := c.cmd.Process.Pid
			proc := &specs.Process{Args: []string{"sh", "-c", "for n in mnt net uts ipc cgroup user; do test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo $n differs; done; id; pwd; hostname; grep ^Cap /proc/self/status; ls /proc/self/fd"},
				Cwd: "/tmp", Env: []string{"PATH=/bin"}, User: specs.User{UID: 1000, GID: 1000}, OOMScoreAdj: ptr(10),
				Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 99, Hard: 99}}}
			p, err := Exec(proc, Options{UserNS: userns})
			if err != nil {
				t.Fatal(err)
			}
			s := startStage(t, p) // in the host's pid namespace: procfs shows it nothing of itself
			if started, err := s.run(p, pid); !started || err != nil {
				t.Fatal(started, err)
			}
			out, _ := s.wait()
			if !strings.Contains(out, "uid=1000(ann) gid=1000") || !strings.Contains(out, "\n/tmp\nbox\n") {
				t.Fatalf("got %s", out)
			}
		})
	}
}

// withUserNS maps the container's ids to a range of the host's.
func withUserNS(t *testing.T, spec *specs.Spec) *specs.Spec {
	t.Helper()
	const base = 300000
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: base, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	err := filepath.Walk(spec.Root.Path, func(p string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		return os.Lchown(p, int(st.Uid)+base, int(st.Gid)+base)
	})
	if err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(spec.Root.Path); strings.HasPrefix(filepath.Base(d), "Test") || filepath.Base(d) == "001"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

func TestUserNamespace(t *testing.T) {
	out, code := box(t, "id -u; cat /proc/self/uid_map; stat -c '%F %t:%T' /dev/null /dev/tty; echo x >/dev/null && echo ok; cat /proc/self/oom_score_adj; ls /proc/acpi; cat /proc/keys; touch /tmp/f && stat -c %u /tmp/f; cat /proc/sys/net/ipv4/ip_forward", func(s *specs.Spec, o *Options) {
		withUserNS(t, s)
		s.Process.OOMScoreAdj = ptr(100)
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	})
	want := "0\n         0     300000      65536\ncharacter special file 1:3\ncharacter special file 5:0\nok\n100\n0\n1\n"
	if out != want || code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
}

func TestParked(t *testing.T) {
	needStage(t)
	root := rootfs(t)
	spec := defaultSpec(t, root, "sh", "-c", "cat /proc/self/mountinfo; hostname")
	cold, _ := start(t, spec, Options{}).wait()
	park, err := Park(true, Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := startStage(t, park)
	if started, err := s.run(park, 0); started || err != nil {
		t.Fatal(started, err)
	}
	left, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", s.cmd.Process.Pid))
	if err != nil || strings.Count(string(left), "\n") != 1 || !strings.Contains(string(left), "tmpfs") {
		t.Fatalf("parked with mounts of the host: %s %v", left, err)
	}
	p, err := Compile(spec, Options{Parked: true})
	if err != nil {
		t.Fatal(err)
	}
	if started, err := s.run(p, 0); !started || err != nil {
		t.Fatal(started, err)
	}
	parked, code := s.wait()
	if a, b := mountPoints(cold), mountPoints(parked); a != b || code != 0 {
		t.Fatalf("exit %d; cold:\n%s\nparked:\n%s", code, a, b)
	}
}

// mountPoints drops from mountinfo what differs from run to run: ids and devices.
func mountPoints(mountinfo string) string {
	var out []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 9 {
			out = append(out, strings.TrimSpace(line))
			continue
		}
		out = append(out, strings.Join(f[4:], " "))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// TestPreparedAreUsed: what Park makes is what Docker's default container asks for.
func TestPreparedAreUsed(t *testing.T) {
	o := Options{V1Controllers: []string{"memory", "cpu,cpuacct", "name=systemd"}}
	park, err := Park(true, o)
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]bool{}
	for _, op := range park.Ops {
		if op.Kind == OpPrepare {
			key, _, _ := strings.Cut(strings.TrimPrefix(op.String(), "PREPARE "), " flags=")
			made[key] = true
		}
	}
	spec := defaultSpec(t, "/", "true")
	spec.Mounts = usualMounts()
	o.Parked = true
	p, err := Compile(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range p.Ops {
		if op.Kind != OpMount {
			continue
		}
		f := strings.Fields(op.String())
		key := strings.Join(append(append([]string{}, f[2:5]...), f[6:]...), " ")
		key, _, _ = strings.Cut(key, " flags=")
		if !made[key] {
			t.Errorf("%s is not prepared (%s)", op.Name, key)
		}
		delete(made, key)
	}
	for k := range made {
		t.Errorf("%s is prepared and not used", k)
	}
}
