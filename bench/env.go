package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// env holds the daemons and images that the rows measure.
type env struct {
	ctx                  context.Context
	dir                  string
	servin, docker       []string // command with its --host
	servinCold           []string // an engine without parked sandboxes
	podman, ctr          []string
	bundle, runtime      string
	servind, dockerd     *exec.Cmd
	containerd           *exec.Cmd
	procs                []*exec.Cmd
	outside              *exec.Cmd // process that holds the outer network namespace
	dockerHost, servHost string
}

const imageRef = "bench:latest"

func (e *env) start(name string, argv ...string) (*exec.Cmd, error) {
	log, err := os.Create(filepath.Join(e.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", name, err)
	}
	e.procs = append(e.procs, cmd)
	return cmd, nil
}

func run(ctx context.Context, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(errb.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

func (e *env) wait(argv ...string) error {
	var err error
	for range 200 {
		if _, err = run(e.ctx, argv...); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

func with(cmd []string, args ...string) []string { return append(append([]string{}, cmd...), args...) }

// setup starts every contestant and gives each the same image.
func setup(ctx context.Context, dir, bin string) (*env, error) {
	e := &env{ctx: ctx, dir: dir}
	docker := os.Getenv("DOCKER")
	if docker == "" {
		docker = "docker"
	}
	_ = exec.Command("ip", "link", "set", "lo", "up").Run()
	// crun refuses a hybrid layout with controllers on the v2 tree.
	_ = syscall.Unmount("/sys/fs/cgroup/unified", syscall.MNT_DETACH)
	_ = os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)

	if err := e.rootfs(); err != nil {
		return e, err
	}
	// Servin.
	e.servHost = "unix://" + dir + "/servin.sock"
	e.runtime = filepath.Join(bin, "servin-runtime")
	e.servin = []string{filepath.Join(bin, "servin"), "--host", e.servHost}
	var err error
	if e.servind, err = e.start("servind", filepath.Join(bin, "servind"), "--root", dir+"/servin", "--run-root", dir+"/servin-run", "--listen", e.servHost); err != nil {
		return e, err
	}
	cold := "unix://" + dir + "/servin-cold.sock"
	e.servinCold = []string{filepath.Join(bin, "servin"), "--host", cold}
	if _, err = e.start("servind-cold", filepath.Join(bin, "servind"), "--root", dir+"/servin-cold", "--run-root", dir+"/servin-cold-run", "--listen", cold, "--pool", "0"); err != nil {
		return e, err
	}
	for _, s := range [][]string{e.servin, e.servinCold} {
		if err := e.wait(with(s, "version")...); err != nil {
			return e, err
		}
		if _, err := run(ctx, with(s, "import", dir+"/bench.tar", imageRef)...); err != nil {
			return e, err
		}
	}
	// The newest Docker on the newest containerd.
	sock := dir + "/containerd.sock"
	conf := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n", dir+"/ctd", dir+"/ctd-run", sock)
	if err := os.WriteFile(dir+"/containerd.toml", []byte(conf), 0o600); err != nil {
		return e, err
	}
	if e.containerd, err = e.start("containerd", "containerd", "-c", dir+"/containerd.toml"); err != nil {
		return e, err
	}
	e.ctr = []string{"ctr", "-a", sock}
	if err := e.wait(with(e.ctr, "version")...); err != nil {
		return e, err
	}
	e.dockerHost = "unix://" + dir + "/docker.sock"
	e.docker = []string{docker, "-H", e.dockerHost}
	if e.dockerd, err = e.start("dockerd", "dockerd", "--data-root", dir+"/docker", "--exec-root", dir+"/docker-run", "-H", e.dockerHost, "-p", dir+"/dockerd.pid", "--containerd", sock); err != nil {
		return e, err
	}
	if err := e.wait(with(e.docker, "version")...); err != nil {
		return e, err
	}
	if _, err := run(ctx, with(e.docker, "import", dir+"/bench.tar", imageRef)...); err != nil {
		return e, err
	}
	if _, err := run(ctx, with(e.docker, "save", imageRef, "-o", dir+"/saved.tar")...); err != nil {
		return e, err
	}
	if _, err := run(ctx, with(e.ctr, "image", "import", dir+"/saved.tar")...); err != nil {
		return e, err
	}
	if err := e.setupPodman(); err != nil {
		return e, err
	}
	if err := e.setupBundle(); err != nil {
		return e, err
	}
	return e, e.setupOutside()
}

// rootfs makes the image's root file system: busybox and iperf3 with its libraries.
func (e *env) rootfs() error {
	root := filepath.Join(e.dir, "rootfs")
	script := `set -e
mkdir -p "$1"/bin "$1"/etc "$1"/tmp "$1"/proc "$1"/sys "$1"/dev; cp /usr/bin/busybox "$1"/bin/busybox
for a in sh true false sleep echo cat ls ip nc wget top; do ln -sf busybox "$1"/bin/$a; done
echo 'root:x:0:0:root:/:/bin/sh' > "$1"/etc/passwd; chmod 1777 "$1"/tmp
cp "$(command -v iperf3)" "$1"/bin/iperf3
ldd "$(command -v iperf3)" | grep -oE '/[^ ]+' | while read -r l; do mkdir -p "$1$(dirname $l)"; cp -L "$l" "$1$l"; done
tar -C "$1" -cf "$2" .`
	_, err := run(e.ctx, "bash", "-c", script, "sh", root, filepath.Join(e.dir, "bench.tar"))
	return err
}

func (e *env) setupPodman() error {
	conf := "[containers]\ndefault_ulimits = [\"nofile=10000:10000\",\"nproc=10000:10000\"]\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n"
	path := e.dir + "/containers.conf"
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		return err
	}
	if err := os.Setenv("CONTAINERS_CONF", path); err != nil {
		return err
	}
	e.podman = []string{"podman", "--root", e.dir + "/podman", "--runroot", e.dir + "/podman-run", "--cgroup-manager", "cgroupfs", "--storage-driver", "overlay", "--runtime", "crun"}
	_, err := run(e.ctx, with(e.podman, "import", e.dir+"/bench.tar", imageRef)...)
	return err
}

func (e *env) setupBundle() error {
	e.bundle = filepath.Join(e.dir, "bundle")
	if err := os.MkdirAll(e.bundle, 0o755); err != nil {
		return err
	}
	if err := os.Rename(e.dir+"/rootfs", e.bundle+"/rootfs"); err != nil {
		return err
	}
	if _, err := run(e.ctx, "bash", "-c", `cd "$1" && rm -f config.json && /usr/sbin/runc spec`, "sh", e.bundle); err != nil {
		return err
	}
	data, err := os.ReadFile(e.bundle + "/config.json")
	if err != nil {
		return err
	}
	var spec map[string]any
	if err := json.Unmarshal(data, &spec); err != nil {
		return err
	}
	spec["ociVersion"] = "1.0.2"
	p := spec["process"].(map[string]any)
	p["terminal"], p["args"] = false, []string{"/bin/true"}
	delete(p, "rlimits")
	spec["root"].(map[string]any)["readonly"] = false
	if data, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(e.bundle+"/config.json", data, 0o644)
}

// setupOutside makes a second host, 192.0.2.2, joined to ours, 192.0.2.1.
func (e *env) setupOutside() error {
	cmd, err := e.start("outside", "unshare", "-n", "sleep", "infinity")
	if err != nil {
		return err
	}
	e.outside = cmd
	time.Sleep(200 * time.Millisecond)
	pid := fmt.Sprint(cmd.Process.Pid)
	_, err = run(e.ctx, "bash", "-ec", `ip link add bench0 type veth peer name eth0 netns $1
ip addr add 192.0.2.1/24 dev bench0; ip link set bench0 up
nsenter -t $1 -n ip addr add 192.0.2.2/24 dev eth0; nsenter -t $1 -n ip link set eth0 up`, "sh", pid)
	return err
}

// close ends what setup started, containers first.
func (e *env) close() {
	if e == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, s := range [][]string{e.servin, e.servinCold} {
		if s != nil {
			_, _ = run(ctx, with(s, "system", "shutdown", "--force")...)
		}
	}
	if e.docker != nil {
		if ids, err := run(ctx, with(e.docker, "ps", "-aq")...); err == nil && ids != "" {
			_, _ = run(ctx, with(with(e.docker, "rm", "-f"), strings.Fields(ids)...)...)
		}
	}
	if e.podman != nil {
		_, _ = run(ctx, with(e.podman, "rm", "-af", "-t", "0")...)
	}
	for i := len(e.procs) - 1; i >= 0; i-- {
		p := e.procs[i]
		_ = p.Process.Signal(syscall.SIGTERM)
		done := make(chan struct{})
		go func() { _ = p.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(15 * time.Second):
			_ = p.Process.Kill()
			<-done
		}
	}
}

// pss adds up the proportional set size of processes, in MB.
func pss(pids ...int) (float64, error) {
	var total float64
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			return 0, err
		}
		for _, line := range strings.Split(string(data), "\n") {
			var kb float64
			if n, _ := fmt.Sscanf(line, "Pss: %f kB", &kb); n == 1 {
				total += kb / 1024
			}
		}
	}
	return total, nil
}

// children lists the pids whose command line contains the text.
func processes(match func(pid int, cmdline string) bool) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		data, err := os.ReadFile(d + "/cmdline")
		if err != nil {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(d), "%d", &pid); err != nil {
			continue
		}
		if match(pid, strings.ReplaceAll(string(data), "\x00", " ")) {
			pids = append(pids, pid)
		}
	}
	return pids
}
