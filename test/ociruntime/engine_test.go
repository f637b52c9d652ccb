package ociruntime

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tool is a command line that is tried with servin-runtime underneath.
type tool struct {
	t    *testing.T
	argv []string
	env  []string
}

func (c *tool) try(a ...string) (string, int) {
	c.t.Helper()
	cmd := exec.Command(c.argv[0], append(append([]string(nil), c.argv[1:]...), a...)...)
	cmd.Env = append(os.Environ(), c.env...)
	return output(c.t, cmd)
}

func (c *tool) ok(a ...string) string {
	c.t.Helper()
	out, code := c.try(a...)
	if code != 0 {
		c.t.Fatalf("%s: exit %d: %s", strings.Join(a, " "), code, out)
	}
	return strings.TrimSpace(out)
}

// wants runs a command and checks its status and what it says.
func (c *tool) wants(code int, words string, a ...string) {
	c.t.Helper()
	out, got := c.try(a...)
	if got != code || !strings.Contains(out, words) {
		c.t.Errorf("%s: exit %d, not %d with %q: %s", strings.Join(a, " "), got, code, words, out)
	}
}

func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIP: %s is not installed", p)
		}
	}
}

// daemon runs a program until the test ends.
func daemon(t *testing.T, log string, env []string, argv ...string) {
	t.Helper()
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
		f.Close()
		if t.Failed() {
			data, _ := os.ReadFile(log)
			t.Logf("%s: %s", argv[0], data[max(0, len(data)-4000):])
		}
	})
}

func archive(t *testing.T, dir string) string {
	t.Helper()
	root, tar := filepath.Join(dir, "image"), filepath.Join(dir, "image.tar")
	rootfs(t, root)
	if out, err := exec.Command("tar", "-C", root, "-cf", tar, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return tar
}

// TestDocker runs whole flows of Debian's Docker on servin-runtime.
func TestDocker(t *testing.T) {
	rt := program(t)
	need(t, "dockerd", "containerd", "docker")
	dir := shortDir(t)
	sock := "unix://" + filepath.Join(dir, "s")
	daemon(t, filepath.Join(dir, "log"), []string{"TMPDIR=" + dir}, "dockerd", "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"-H", sock, "-p", filepath.Join(dir, "pid"), "--add-runtime", "servin="+rt, "--default-runtime", "servin")
	d := &tool{t: t, argv: []string{"docker", "-H", sock}, env: []string{"DOCKER_CONFIG=" + dir}}
	eventually(t, "dockerd answers", func() bool { _, code := d.try("version"); return code == 0 })
	t.Cleanup(d.cleanup)
	d.ok("import", archive(t, dir), "bb")
	if out := d.ok("info", "--format", "{{.DefaultRuntime}}"); out != "servin" {
		t.Fatalf("the default runtime is %s", out)
	}
	d.flows("bb")
	d.wants(0, "", "update", "--restart", "no", "main")
	d.ok("run", "-d", "--name", "sick", "--health-cmd", "test -e /ok", "--health-interval", "300ms", "--health-retries", "2", "bb", "sleep", "1000")
	eventually(t, "it is unhealthy", func() bool { return d.ok("inspect", "-f", "{{.State.Health.Status}}", "sick") == "unhealthy" })
	d.ok("exec", "sick", "touch", "/ok")
	eventually(t, "it is healthy", func() bool { return d.ok("inspect", "-f", "{{.State.Health.Status}}", "sick") == "healthy" })
	d.ok("run", "-d", "--name", "again", "--restart", "on-failure:2", "bb", "sh", "-c", "sleep 0.1; exit 3")
	eventually(t, "it has been restarted twice", func() bool {
		return d.ok("inspect", "-f", "{{.RestartCount}} {{.State.Running}}", "again") == "2 false"
	})
	if out := d.ok("stats", "--no-stream", "--format", "{{.PIDs}}", "sick"); out == "" || out == "0" || out == "--" {
		t.Errorf("stats say %q processes", out)
	}
	d.wants(137, "", "run", "--rm", "-m", "8m", "--memory-swap", "8m", "bb", "sh", "-c", "x=a; while :; do x=$x$x; done")
}

// cleanup ends every container that is left.
func (c *tool) cleanup() {
	out, _ := c.try("ps", "-aq")
	if ids := strings.Fields(out); len(ids) > 0 {
		c.try(append([]string{"rm", "-f"}, ids...)...)
	}
}

// flows is what Docker and Podman have in common. It leaves a container "main".
func (c *tool) flows(image string) {
	c.t.Helper()
	c.wants(0, "hello", "run", "--rm", image, "echo", "hello")
	c.wants(3, "", "run", "--rm", image, "sh", "-c", "exit 3")
	c.wants(127, "", "run", "--rm", image, "nothing")
	c.wants(126, "", "run", "--rm", image, "/etc")
	c.wants(137, "", "run", "--rm", image, "sh", "-c", "sh -c 'kill -KILL $$'; exit $?")
	c.wants(0, "uid=1000(user) gid=1000(user)", "run", "--rm", "-u", "user", image, "id")
	c.wants(1, "Read-only file system", "run", "--rm", "--read-only", image, "touch", "/x")
	c.wants(0, "tmpfs", "run", "--rm", "--tmpfs", "/t:size=1m", "--read-only", image, "sh", "-c", "touch /t/x && mount | grep ' /t '")
	c.wants(0, "lo", "run", "--rm", "--network", "none", image, "ip", "-o", "link")
	c.wants(0, "init", "run", "--rm", "--init", image, "sh", "-c", "cat /proc/1/comm; ls /proc/1/exe -l 2>&1")
	c.wants(0, "Seccomp:\t2", "run", "--rm", image, "cat", "/proc/self/status")
	c.wants(0, "Seccomp:\t0", "run", "--rm", "--privileged", image, "cat", "/proc/self/status")
	c.wants(0, "yes", "run", "--rm", "--sysctl", "net.ipv4.ip_unprivileged_port_start=77", "--ulimit", "nofile=100:200", "--ulimit", "nproc=500:500", "--shm-size", "2m", "--cap-drop", "ALL",
		image, "sh", "-c", "test $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start) = 77 && test $(ulimit -n) = 100 && grep -q 'CapEff:.0000000000000000' /proc/self/status && echo yes")
	in := exec.Command(c.argv[0], append(append([]string(nil), c.argv[1:]...), "run", "--rm", "-i", image, "cat")...)
	in.Env, in.Stdin = append(os.Environ(), c.env...), strings.NewReader("through the pipe")
	if out, code := output(c.t, in); code != 0 || !strings.Contains(out, "through the pipe") {
		c.t.Errorf("run -i: %d %s", code, out)
	}
	tty := exec.Command("script", "-qec", strings.Join(c.argv, " ")+" run --rm -t "+image+" sh -c 'tty; stty size'", "/dev/null")
	tty.Env = append(os.Environ(), c.env...)
	if out, code := output(c.t, tty); code != 0 || !strings.Contains(out, "/dev/pts/0") {
		c.t.Errorf("run -t: %d %s", code, out)
	}

	c.ok("run", "-d", "--name", "main", "--stop-timeout", "3", "-v", "/etc/hostname:/host:ro", image, "sh", "-c", "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done")
	c.wants(0, "out", "exec", "main", "echo", "out")
	c.wants(4, "", "exec", "main", "sh", "-c", "exit 4")
	if out, code := c.try("exec", "main", "nothing"); code != 126 && code != 127 || !strings.Contains(out, "executable file not found in $PATH") {
		c.t.Errorf("exec of nothing: %d %s", code, out) // Docker's number changed with its versions
	}
	c.wants(0, "uid=1000", "exec", "-u", "1000", "main", "id")
	c.wants(0, "V=1", "exec", "-e", "V=1", "-w", "/tmp", "main", "sh", "-c", "env; test $PWD = /tmp")
	ex := exec.Command("script", "-qec", strings.Join(c.argv, " ")+" exec -t main tty", "/dev/null")
	ex.Env = append(os.Environ(), c.env...)
	if out, code := output(c.t, ex); code != 0 || !strings.Contains(out, "/dev/pts/") {
		c.t.Errorf("exec -t: %d %s", code, out)
	}
	c.wants(0, "sleep", "top", "main")
	c.ok("pause", "main")
	if s := c.ok("inspect", "-f", "{{.State.Status}}", "main"); s != "paused" {
		c.t.Errorf("it is %s", s)
	}
	if out, code := c.try("exec", "main", "true"); code == 0 {
		c.t.Errorf("exec in a paused container: %s", out)
	}
	c.ok("unpause", "main")
	c.ok("update", "--memory", "64m", "--memory-swap", "64m", "--cpu-shares", "512", "main")
	c.wants(0, fmt.Sprint(64<<20), "exec", "main", "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
	c.ok("stop", "main")
	if s := c.ok("inspect", "-f", "{{.State.ExitCode}}", "main"); s != "9" {
		c.t.Errorf("it ended with %s", s)
	}
	c.wants(0, "bye", "logs", "main")
	c.ok("start", "main")
	c.ok("restart", "main")
	c.wants(0, "up", "logs", "main")
	c.ok("kill", "-s", "KILL", "main")
	eventually(c.t, "it has been killed", func() bool {
		return c.ok("inspect", "-f", "{{.State.ExitCode}} {{.State.Running}}", "main") == "137 false"
	})
	c.ok("start", "main")
}

// TestPodman runs whole flows of Podman on servin-runtime.
func TestPodman(t *testing.T) {
	rt := program(t)
	need(t, "podman", "conmon")
	dir := shortDir(t)
	conf := filepath.Join(dir, "containers.conf")
	if err := os.WriteFile(conf, []byte("[containers]\ndefault_ulimits = [\"nofile=1000:1000\",\"nproc=1000:1000\"]\ncgroupns = \"private\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &tool{t: t, argv: []string{"podman", "--runtime", rt, "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"),
		"--tmpdir", filepath.Join(dir, "tmp"), "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"}, env: []string{"CONTAINERS_CONF=" + conf}}
	t.Cleanup(p.cleanup)
	p.ok("import", archive(t, dir), "localhost/bb:latest")
	p.flows("localhost/bb")
	p.ok("run", "-d", "--name", "sick", "--health-cmd", "test -e /ok", "--health-interval", "disable", "localhost/bb", "sleep", "1000")
	p.wants(1, "", "healthcheck", "run", "sick")
	p.ok("exec", "sick", "touch", "/ok")
	p.ok("healthcheck", "run", "sick")
	p.ok("pod", "create", "--name", "pod", "--infra=false")
	p.ok("run", "-d", "--pod", "pod", "--name", "member", "localhost/bb", "sleep", "1000")
	p.wants(0, "member", "pod", "ps", "--ctr-names")
	p.ok("pod", "rm", "-f", "pod")
}

// TestContainerd runs containerd's own command line, with its shim for runc.
func TestContainerd(t *testing.T) {
	rt := program(t)
	peers := os.Getenv("SERVIN_BENCH_PEERS")
	if peers == "" {
		if cache, err := os.UserCacheDir(); err == nil {
			peers = filepath.Join(cache, "servin-bench/peers")
		}
	}
	// The newest if it has been built (bench/run builds it), else Debian's.
	t.Setenv("PATH", peers+":"+os.Getenv("PATH"))
	need(t, "containerd", "ctr", "containerd-shim-runc-v2")
	dir := shortDir(t)
	conf := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n[ttrpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "s"), filepath.Join(dir, "t"))
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	daemon(t, filepath.Join(dir, "log"), []string{"TMPDIR=" + dir}, "containerd", "-c", conf)
	c := &tool{t: t, argv: []string{"ctr", "-a", filepath.Join(dir, "s")}}
	eventually(t, "containerd answers", func() bool { _, code := c.try("version"); return code == 0 })
	t.Log(c.ok("version"))
	root := filepath.Join(dir, "rootfs")
	rootfs(t, root)
	run := func(a ...string) []string {
		return append([]string{"run", "--runc-binary", rt, "--rootfs"}, a...)
	}
	c.wants(0, "hello", run("--rm", root, "a", "echo", "hello")...)
	c.wants(3, "", run("--rm", root, "a", "sh", "-c", "exit 3")...)
	c.wants(1, "executable file not found in $PATH", run("--rm", root, "a", "nothing")...)
	c.ok(run("-d", "--memory-limit", "67108864", root, "main", "sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.1; done")...)
	t.Cleanup(func() {
		c.try("tasks", "kill", "-s", "KILL", "main")
		c.try("tasks", "rm", "main")
		c.try("containers", "rm", "main")
	})
	c.wants(0, "out", "tasks", "exec", "--exec-id", "1", "main", "echo", "out")
	c.wants(6, "", "tasks", "exec", "--exec-id", "2", "main", "sh", "-c", "exit 6")
	c.wants(0, "main", "tasks", "ls")
	c.wants(0, "memory", "tasks", "metrics", "main")
	c.ok("tasks", "pause", "main")
	c.wants(0, "PAUSED", "tasks", "ls")
	c.ok("tasks", "resume", "main")
	c.wants(0, "PID", "tasks", "ps", "main")
	tty := exec.Command("script", "-qec", strings.Join(c.argv, " ")+" tasks exec -t --exec-id 4 main tty", "/dev/null")
	if out, code := output(t, tty); code != 0 || !strings.Contains(out, "/dev/pts/") {
		t.Errorf("exec -t: %d %s", code, out)
	}
	c.ok("tasks", "kill", "-s", "TERM", "main")
	eventually(t, "it has ended", func() bool { out, _ := c.try("tasks", "ls"); return strings.Contains(out, "STOPPED") })
	c.wants(0, "exit code 8", "tasks", "delete", "main")
	c.ok("containers", "delete", "main")
}
