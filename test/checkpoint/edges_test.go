package checkpoint

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestCRI: the kubelet's call leaves the container running and writes a file in the
// layout that is known for it.
func TestCRI(t *testing.T) {
	criuWorks(t)
	dir := t.TempDir()
	e := start(t, "cri: unix://"+dir+"/cri\n")
	e.image()
	conn, err := grpc.NewClient("unix://"+dir+"/cri", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	rt := v1.NewRuntimeServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	p := &v1.PodSandboxConfig{Metadata: &v1.PodSandboxMetadata{Name: "p", Uid: "u", Namespace: "n"}, Hostname: "p", LogDirectory: dir, Linux: &v1.LinuxPodSandboxConfig{}}
	pod, err := rt.RunPodSandbox(ctx, &v1.RunPodSandboxRequest{Config: p})
	if err != nil {
		t.Fatal(err)
	}
	defer rt.RemovePodSandbox(ctx, &v1.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
	c, err := rt.CreateContainer(ctx, &v1.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, SandboxConfig: p, Config: &v1.ContainerConfig{
		Metadata: &v1.ContainerMetadata{Name: "c"}, Image: &v1.ImageSpec{Image: "bb"}, Command: []string{"sh", "-c", counter}, LogPath: "c.log", Linux: &v1.LinuxContainerConfig{},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rt.StartContainer(ctx, &v1.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		t.Fatal(err)
	}
	e.eventually("it counts", func() bool { return e.count(c.ContainerId) > 5 })
	n := e.count(c.ContainerId)
	at := filepath.Join(dir, "c.tar")
	if _, err := rt.CheckpointContainer(ctx, &v1.CheckpointContainerRequest{ContainerId: c.ContainerId, Location: at, Timeout: 60}); err != nil {
		t.Fatal(err)
	}
	e.goesOn(c.ContainerId, n)
	f, err := os.Open(at)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seen := map[string]bool{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[h.Name] = true
		if strings.HasSuffix(h.Name, ".dump") {
			var v map[string]any
			if err := json.NewDecoder(tr).Decode(&v); err != nil {
				t.Errorf("%s: %v", h.Name, err)
			}
			if h.Name == "spec.dump" && v["process"] == nil || h.Name == "config.dump" && v["id"] != c.ContainerId {
				t.Errorf("%s: %v", h.Name, v)
			}
		}
	}
	for _, name := range []string{"checkpoint/", "checkpoint/inventory.img", "checkpoint/pstree.img", "spec.dump", "config.dump", "rootfs-diff.tar", "stats-dump"} {
		if !seen[name] {
			t.Errorf("it lacks %s: %v", name, seen)
		}
	}
	if l, _ := os.ReadDir(e.Dir + "/root/checkpoints"); len(l) != 0 {
		t.Errorf("%v is left", l)
	}
}

// TestDocker: Docker's command line finds its experimental commands, and those work.
func TestDocker(t *testing.T) {
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Skip("SKIP: there is no docker command")
	}
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	try := func(args ...string) (string, error) {
		cmd := exec.Command(docker, args...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST="+e.Host(), "HOME="+e.Dir)
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := try(args...)
		if err != nil {
			t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return out
	}
	if out := run("checkpoint", "ls", "box"); out != "CHECKPOINT NAME" {
		t.Errorf("%q", out)
	}
	if out := run("version", "--format", "{{.Server.Experimental}}"); out != "true" {
		t.Errorf("experimental: %q", out)
	}
	if out, err := try("checkpoint", "rm", "box", "no"); err == nil || !strings.Contains(out, "does not exist for container") {
		t.Errorf("%v: %s", err, out)
	}
	if exec.Command("criu", "check").Run() != nil {
		if out, err := try("checkpoint", "create", "box", "c1"); err == nil || !strings.Contains(out, "cannot checkpoint container box") {
			t.Errorf("%v: %s", err, out)
		}
		if s := e.status("box"); s != "running" {
			t.Errorf("it is %s", s)
		}
		t.Log("the rest takes a kernel that criu knows: TestSecondKernel")
		return
	}
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	n := e.count("box")
	run("checkpoint", "create", "box", "c1")
	if out := run("checkpoint", "ls", "box"); !strings.Contains(out, "c1") {
		t.Errorf("%q", out)
	}
	run("start", "--checkpoint", "c1", "box")
	e.goesOn("box", n)
	n = e.count("box")
	run("checkpoint", "create", "--checkpoint-dir", e.Dir+"/elsewhere", "box", "c2")
	run("start", "--checkpoint-dir", e.Dir+"/elsewhere", "--checkpoint", "c2", "box")
	e.goesOn("box", n)
	run("checkpoint", "create", "--leave-running", "box", "c3")
	e.goesOn("box", n)
	run("checkpoint", "rm", "box", "c3")
}

// TestConnection: an open connection goes on at the same address, and without being
// asked for is a reason not to write the container down.
func TestConnection(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("networks", "create", "--subnet", "10.77.0.0/24", "net")
	e.ok("run", "-d", "--name", "srv", "--network", "net", "bb", "sh", "-c", "nc -ll -p 7000 -e sh -c 'i=0; while sleep 0.1; do i=$((i+1)); echo $i; done'")
	e.ok("run", "-d", "--name", "cli", "--network", "net", "--ip", "10.77.0.99", "bb", "sh", "-c", "sleep 1; nc srv 7000 | while read n; do echo $n > /n.new; mv /n.new /n; done")
	e.eventually("data comes", func() bool { return e.count("cli") > 3 })
	e.fails("tcp", "containers", "checkpoint", "cli", "cp")
	n := e.count("cli")
	e.goesOn("cli", n)
	n = e.count("cli")
	e.ok("containers", "checkpoint", "--tcp-established", "cli", "cp")
	e.ok("containers", "restore", "cli", "cp")
	e.goesOn("cli", n)
}

// TestRestoreKilled: an engine that is killed while it brings a container back
// leaves nothing half, and the checkpoint serves again.
func TestRestoreKilled(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	n := e.count("box")
	e.ok("containers", "checkpoint", "box", "cp")
	for _, after := range []time.Duration{30, 100, 250, 500, 1000} {
		done := make(chan struct{})
		go func() { defer close(done); e.try("containers", "restore", "box", "cp") }()
		time.Sleep(after * time.Millisecond)
		e.Kill()
		<-done
		e.Boot()
		switch s := e.status("box"); s {
		case "running":
			e.goesOn("box", n)
			e.ok("kill", "box")
			e.eventually("it ends", func() bool { return e.status("box") == "exited" })
		case "exited":
		default:
			t.Fatalf("after %d ms it is %s", after, s)
		}
	}
	e.ok("containers", "restore", "box", "cp")
	e.goesOn("box", n)
}

// TestMigrateBroken: whichever of the three ends in the middle of a move, the
// container runs once in the end.
func TestMigrateBroken(t *testing.T) {
	criuWorks(t)
	a, b := start(t, ""), start(t, "")
	a.image()
	a.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	a.eventually("it counts", func() bool { return a.count("box") > 5 })
	once := func(what string, n int) {
		t.Helper()
		// Who interrupts need not wait for the processes to go on.
		a.eventually(what+": nothing is held", func() bool { return a.status("box") != "paused" })
		here, there := a.status("box"), b.status("box")
		switch {
		case here == "running" && there == "":
			a.goesOn("box", n)
		case here == "" && there == "running": // it was too late
			b.goesOn("box", n)
			b.ok("containers", "migrate", "--rounds", "0", "box", a.Host())
		default:
			t.Fatalf("%s: it is %q here and %q there", what, here, there)
		}
		for _, e := range []*engine{a, b} {
			e.eventually(what+": nothing is left", func() bool { l, _ := os.ReadDir(e.Dir + "/root/checkpoints"); return len(l) == 0 })
		}
	}
	migrate := func() *exec.Cmd {
		cmd := exec.Command(a.Bin+"/servin", "--host", a.Host(), "containers", "migrate", "--rounds", "1", "box", b.Host())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	for _, after := range []time.Duration{500 * time.Millisecond, 1500 * time.Millisecond, 3 * time.Second} {
		n := a.count("box")
		cmd := migrate()
		time.Sleep(after)
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		once("interrupted after "+after.String(), n)
		n = a.count("box")
		cmd = migrate()
		time.Sleep(after)
		a.Kill()
		_ = cmd.Wait()
		a.Boot()
		once("source killed after "+after.String(), n)
		n = a.count("box")
		cmd = migrate()
		time.Sleep(after)
		b.Kill()
		_ = cmd.Wait()
		b.Boot()
		once("target killed after "+after.String(), n)
	}
}

// TestKeepAddress: a container that is made again gets its address if it asks.
func TestKeepAddress(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("networks", "create", "--subnet", "10.78.0.0/24", "net")
	e.ok("run", "-d", "--name", "one", "--network", "net", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("one") > 5 })
	ip := func(c string) string {
		return e.ok("inspect", "--format", "{{.NetworkSettings.Networks.net.IPAddress}}", c)
	}
	n, was := e.count("one"), ip("one")
	e.ok("containers", "checkpoint", "one", "cp")
	e.ok("run", "-d", "--name", "other", "--network", "net", "--ip", "10.78.0.77", "bb", "sleep", "1000")
	e.ok("containers", "restore", "--name", "two", "--keep-address", "one", "cp")
	e.goesOn("two", n)
	if now := ip("two"); now != was {
		t.Errorf("it was %s and is %s", was, now)
	}
	e.fails("", "containers", "restore", "--name", "three", "--keep-address", "one", "cp")
	if s := e.status("three"); s != "" {
		t.Errorf("it is %s", s)
	}
}
