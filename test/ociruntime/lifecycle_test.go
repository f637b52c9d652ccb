package ociruntime

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestLife goes once through everything that a container's life has.
func TestLife(t *testing.T) {
	b := newBundle(t, args("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done"))
	b.edit(func(s *specs.Spec) { s.Annotations = map[string]string{"who": "me"} })
	pidFile := filepath.Join(b.dir, "pid")
	b.detached("create", "--bundle", b.dir, "--pid-file", pidFile, "c")
	s := b.state("c")
	data, err := os.ReadFile(pidFile)
	if err != nil || string(data) != strconv.Itoa(s.Pid) || s.Status != "created" || s.Bundle != b.dir || s.Annotations["who"] != "me" {
		t.Fatalf("%+v, pid file %q: %v", s, data, err)
	}
	if out, code := b.try("create", "c"); code != 1 || !strings.Contains(out, "container with given ID already exists") {
		t.Fatalf("created twice: %d %s", code, out)
	}
	// It waits, without privileges and with nothing of the host's in its hands.
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Pid))
	if err != nil || !strings.Contains(string(status), "CapEff:\t0000000020000420") || !strings.Contains(string(status), "NoNewPrivs:\t1") {
		t.Fatalf("%v: %s", err, status)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.Pid))
	if err != nil || len(fds) != 4 {
		t.Fatalf("a waiting process holds %v: %v", fds, err)
	}
	b.ok("start", "c")
	if out, code := b.try("start", "c"); code == 0 || !strings.Contains(out, "cannot start an already running container") {
		t.Fatalf("started twice: %d %s", code, out)
	}
	b.await("c", "running")
	if out, code := b.try("delete", "c"); code == 0 || !strings.Contains(out, "cannot delete container c that is not stopped: running") {
		t.Fatalf("deleted while it ran: %d %s", code, out)
	}
	b.ok("pause", "c")
	b.await("c", "paused")
	if out, code := b.try("exec", "c", "true"); code != 255 || !strings.Contains(out, "cannot exec in a paused container") {
		t.Fatalf("%d %s", code, out)
	}
	b.ok("resume", "c")
	if out, code := b.try("exec", "c", "sh", "-c", "echo out; echo err >&2; exit 5"); code != 5 || !strings.Contains(out, "out\n") || !strings.Contains(out, "err\n") {
		t.Fatalf("%d %s", code, out)
	}
	var pids []int
	if err := json.Unmarshal([]byte(b.ok("ps", "--format", "json", "c")), &pids); err != nil || len(pids) < 1 {
		t.Fatalf("%v %v", pids, err)
	}
	if out := b.ok("list"); !strings.Contains(out, "running") || !strings.HasPrefix(out, "ID          PID") {
		t.Fatal(out)
	}
	b.ok("update", "--pids-limit", "77", "--memory", "64m", "c")
	if out := b.ok("events", "--stats", "c"); !strings.Contains(out, `"limit":77`) || !strings.Contains(out, `"limit":67108864`) {
		t.Fatal(out)
	}
	b.ok("kill", "c", "TERM")
	b.await("c", "stopped")
	for _, a := range [][]string{{"kill", "c", "KILL"}, {"exec", "c", "true"}, {"start", "c"}, {"pause", "c"}} {
		if out, code := b.try(a...); code == 0 {
			t.Errorf("%v of a stopped container: %s", a, out)
		}
	}
	b.ok("delete", "c")
	if out, code := b.try("state", "c"); code != 1 || !strings.Contains(out, "container does not exist") {
		t.Fatalf("%d %s", code, out)
	}
	b.ok("delete", "--force", "c")
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/c"); len(left) != 0 {
		t.Errorf("cgroups are left: %v", left)
	}
}

// TestErrors are the texts and codes that callers act on.
func TestErrors(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		args   []string
		want   string
		code   int
	}{
		"unknown program":   {args("nothing"), []string{"run", "x"}, `exec: \"nothing\": executable file not found in $PATH`, 1},
		"missing program":   {args("/nothing"), []string{"create", "x"}, `exec: \"/nothing\": stat /nothing: no such file or directory`, 1},
		"no program":        {args("/etc/group2"), []string{"create", "x"}, `no such file or directory`, 1},
		"directory":         {args("/etc"), []string{"create", "x"}, `exec: \"/etc\": permission denied`, 1},
		"missing cwd":       {func(s *specs.Spec) { s.Process.Cwd = "" }, []string{"create", "x"}, "Cwd property must not be empty", 1},
		"terminal":          {func(s *specs.Spec) { s.Process.Terminal = true }, []string{"create", "x"}, "cannot allocate tty if runc will detach without setting console socket", 1},
		"bad id":            {nil, []string{"create", "a/b"}, "invalid container ID format", 1},
		"no such container": {nil, []string{"start", "x"}, "container does not exist", 1},
		"bad signal":        {nil, []string{"kill", "x", "SIGNOTHING"}, "container does not exist", 1},
		"unknown command":   {nil, []string{"frobnicate"}, "No help topic for 'frobnicate'", 3},
		"too few arguments": {nil, []string{"create"}, "requires exactly 1 argument(s)", 1},
		"no pivot":          {nil, []string{"run", "--no-pivot", "x"}, "--no-pivot is refused", 1},
		"rdt":               {func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"} }, []string{"run", "x"}, "intelRdt is specified in config", 1},
		"mount": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: "/nothing", Options: []string{"bind"}})
		}, []string{"run", "x"}, "error mounting", 1},
		"not executable": {args("/tmp/garbage"), []string{"run", "x"}, "exec /tmp/garbage: exec format error", 255},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBundle(t)
			if err := os.WriteFile(filepath.Join(b.dir, "rootfs/tmp/garbage"), []byte("\x7fELF"), 0o755); err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				b.edit(c.change)
			}
			log := filepath.Join(b.dir, "log")
			b.global = []string{"--log", log, "--log-format", "json"}
			out, code := b.try(c.args...)
			data, _ := os.ReadFile(log)
			if code != c.code || !strings.Contains(string(data)+strings.ReplaceAll(out, `"`, `\"`), c.want) {
				t.Errorf("exit %d, log %s, output %s", code, data, out)
			}
			var line struct{ Level, Msg, Time string }
			if len(data) > 0 && (json.Unmarshal(data[:strings.IndexByte(string(data), '\n')], &line) != nil || line.Level != "error" || line.Msg == "" || line.Time == "") {
				t.Errorf("no log line: %s", data)
			}
			if entries, _ := os.ReadDir(b.root); len(entries) != 0 {
				t.Errorf("records are left: %v", entries)
			}
			if left, _ := filepath.Glob("/sys/fs/cgroup/*/x"); len(left) != 0 {
				t.Errorf("cgroups are left: %v", left)
			}
		})
	}
}

// TestTerminal: the master of a container's terminal goes over the console socket.
func TestTerminal(t *testing.T) {
	b := newBundle(t, args("sh", "-c", "tty; stty size; read x; echo got $x; sleep 100"))
	b.edit(func(s *specs.Spec) {
		s.Process.Terminal = true
		s.Process.ConsoleSize = &specs.Box{Width: 91, Height: 33}
	})
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(b.dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	masters := make(chan *os.File, 2)
	go func() {
		for range 2 {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			buf, oob := make([]byte, 100), make([]byte, 100)
			_, n, _, _, err := c.ReadMsgUnix(buf, oob)
			c.Close()
			if err != nil {
				return
			}
			cms, _ := unix.ParseSocketControlMessage(oob[:n])
			if len(cms) == 1 {
				if fds, _ := unix.ParseUnixRights(&cms[0]); len(fds) == 1 {
					masters <- os.NewFile(uintptr(fds[0]), "pty")
				}
			}
		}
		close(masters)
	}()
	b.ok("create", "--console-socket", l.Addr().String(), "c")
	pty := <-masters
	defer pty.Close()
	b.ok("start", "c")
	if _, err := pty.WriteString("word\n"); err != nil {
		t.Fatal(err)
	}
	expect(t, pty, "/dev/pts/0", "33 91", "got word")
	b.edit(args("unused"))
	b.ok("exec", "-d", "-t", "--console-socket", l.Addr().String(), "c", "sh", "-c", "tty; id -u; sleep 1")
	second := <-masters
	defer second.Close()
	expect(t, second, "/dev/pts/", "0")
}

func expect(t *testing.T, f *os.File, words ...string) {
	t.Helper()
	var all string
	buf := make([]byte, 1000)
	for _, w := range words {
		for !strings.Contains(all, w) {
			n, err := f.Read(buf)
			if err != nil {
				t.Fatalf("no %q in %q: %v", w, all, err)
			}
			all += string(buf[:n])
		}
	}
}

// TestReparented: when create has ended, init is the child of its caller's
// subreaper, which gets to know how it ended.
func TestReparented(t *testing.T) {
	b := newBundle(t, args("sh", "-c", "exit 42"))
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // the end of the test
	b.detached("create", "c")
	pid := b.state("c").Pid
	b.ok("start", "c")
	var ws unix.WaitStatus
	if n, err := unix.Wait4(pid, &ws, 0, nil); n != pid || err != nil || ws.ExitStatus() != 42 {
		t.Fatalf("%d %v %d", n, err, ws.ExitStatus())
	}
	b.await("c", "stopped")
}

// TestDescriptors: preserved descriptors and those of socket activation arrive in order.
func TestDescriptors(t *testing.T) {
	b := newBundle(t, args("sh", "-c", "cat <&3; cat <&4; env | grep LISTEN; ls /proc/self/fd"))
	var files []*os.File
	for i := range 2 {
		name := filepath.Join(b.dir, strconv.Itoa(i))
		if err := os.WriteFile(name, []byte("file"+strconv.Itoa(i)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	// LISTEN_PID must be the runtime's own.
	cmd := b.command("run", "--preserve-fds", "1", "x")
	sh := exec.Command("sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"`}, cmd.Args...)...)
	sh.Dir, sh.ExtraFiles = b.dir, files
	out, code := output(t, sh)
	if code != 0 || !strings.Contains(out, "file0\nfile1\n") || !strings.Contains(out, "LISTEN_FDS=1") || !strings.Contains(out, "LISTEN_PID=1") || !strings.Contains(out, "0\n1\n2\n3\n4\n5\n") {
		t.Fatalf("%d %s", code, out)
	}
}

// TestHooks: each kind at its time, in its namespaces, with its state.
func TestHooks(t *testing.T) {
	b := newBundle(t, args("sh", "-c", "echo process; cat /tmp/inside"))
	record := filepath.Join(b.dir, "record")
	hook := func(kind string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", `s=$(cat); echo "` + kind + ` $(echo "$s" | sed 's/.*"status":"\([a-z]*\)".*/\1/')" >>` + record}}}
	}
	b.edit(func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{Prestart: hook("prestart"), CreateRuntime: hook("createRuntime"), CreateContainer: hook("createContainer"), //nolint:staticcheck // deprecated, not gone
			StartContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >/tmp/inside"}}},
			Poststart:      hook("poststart"), Poststop: hook("poststop")}
	})
	b.detached("create", "c")
	data, _ := os.ReadFile(record)
	if string(data) != "prestart creating\ncreateRuntime creating\ncreateContainer creating\n" {
		t.Fatalf("after create: %s", data)
	}
	b.ok("start", "c")
	b.await("c", "stopped")
	b.ok("delete", "c")
	data, _ = os.ReadFile(record)
	if !strings.HasSuffix(string(data), "creating\npoststart running\npoststop stopped\n") {
		t.Fatalf("at the end: %s", data)
	}
	inside, _ := os.ReadFile(filepath.Join(b.dir, "rootfs/tmp/inside"))
	if !strings.Contains(string(inside), `"status":"created"`) || !strings.Contains(string(inside), `"pid":1`) {
		t.Fatalf("startContainer was told %s", inside)
	}
}

// TestKilled: a creation that is killed at any moment leaves nothing that a
// forced deletion does not remove, and no process.
func TestKilled(t *testing.T) {
	b := newBundle(t, args("sleep", "100"))
	n := 12
	if os.Getenv("SERVIN_LONG") != "" {
		n = 150
	}
	for i := range n {
		id := "k" + strconv.Itoa(i)
		cmd := b.command("run", "-d", id)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sleep(i * 25000 / n)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		b.ok("delete", "-f", id)
		if entries, _ := os.ReadDir(b.root); len(entries) != 0 {
			t.Fatalf("%d: %v is left", i, entries)
		}
		eventually(t, "no process is left", func() bool {
			procs, _ := filepath.Glob("/sys/fs/cgroup/*/" + id + "/cgroup.procs")
			for _, p := range procs {
				if data, _ := os.ReadFile(p); len(data) > 0 {
					return false
				}
			}
			return true
		})
		for _, dir := range []string{"/sys/fs/cgroup/*/" + id, "/sys/fs/cgroup/*/*/*/" + id} {
			if left, _ := filepath.Glob(dir); len(left) > 0 {
				t.Errorf("%d: cgroups are left: %v", i, left)
			}
		}
	}
}

func sleep(us int) { unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: int64(us)}) } //nolint:errcheck // a pause

// TestRootless: an ordinary user runs a container in a user namespace of its own,
// with no more than the one id that it has.
func TestRootless(t *testing.T) {
	b := newBundle(t)
	uid := uint32(12345)
	top := filepath.Dir(b.dir)
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", uid, uid), top).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.as = &uid
	if err := os.Remove(filepath.Join(b.dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	b.ok("spec", "--rootless")
	b.edit(func(s *specs.Spec) {
		s.Process.Terminal, s.Process.Rlimits = false, nil
		s.Process.Args = []string{"sh", "-c", "id -u; cat /proc/self/uid_map; touch /etc/mine /tmp/x; grep -c ociVersion /etc/given; exit 3"}
		s.Root.Readonly = false
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/etc/given", Type: "bind", Source: filepath.Join(b.dir, "config.json"), Options: []string{"bind", "ro"}})
	})
	out, code := b.try("run", "x")
	if code != 3 || !strings.HasPrefix(out, "0\n") || !strings.Contains(out, "12345          1") {
		t.Fatalf("%d %s", code, out)
	}
	b.edit(args("sleep", "100"))
	b.detached("run", "-d", "y")
	if out := b.ok("exec", "y", "id", "-u"); out != "0\n" {
		t.Errorf("exec: %s", out)
	}
	b.ok("kill", "y", "KILL")
	b.await("y", "stopped")
	b.ok("delete", "y")
}

// TestDevice: a network device of the host moves into the container with its address.
func TestDevice(t *testing.T) {
	b := newBundle(t, args("ip", "-o", "-4", "addr", "show", "dev", "inside"))
	for _, c := range [][]string{{"link", "add", "oct0", "type", "veth", "peer", "name", "oct1"}, {"addr", "add", "192.0.2.7/24", "dev", "oct0"}, {"link", "set", "oct0", "up"}} {
		if out, err := exec.Command("ip", c...).CombinedOutput(); err != nil {
			t.Skipf("SKIP: ip %v: %v: %s", c, err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", "oct1").Run() })
	b.edit(func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"oct0": {Name: "inside"}} })
	if out := b.ok("run", "x"); !strings.Contains(out, "192.0.2.7/24") {
		t.Fatal(out)
	}
}
