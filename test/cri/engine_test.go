package cri

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// engine is a container runtime under a kubelet.
type engine interface {
	start()
	// kill ends it as a crash would; what it runs goes on.
	kill()
	socket() string
	// load makes images of a docker archive known.
	load(archive string)
	// images are the tags that it has.
	images() string
	log() string
	// close ends everything it runs.
	close()
}

// newEngine is Servin; with SERVIN_CRI_PEER, a folder with containerd and runc, it
// is those, to see what a stock engine does.
func newEngine(t *testing.T, dir string, cni bool) engine {
	conf := filepath.Join(dir, "net.d")
	if err := os.MkdirAll(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	plugins := filepath.Join(root(), "bin", "cni-plugins")
	peer := os.Getenv("SERVIN_CRI_PEER")
	if cni || peer != "" {
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", plugins+"/", "tool")
		build.Dir, build.Env = filepath.Join(root(), "test", "cni"), append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("cannot build the CNI plugins: %v: %s", err, out)
		}
		list := `{"cniVersion":"1.0.0","name":"pods","plugins":[
{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"` + dir + `/leases","ranges":[[{"subnet":"10.89.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","snat":true,"capabilities":{"portMappings":true}},
{"type":"bandwidth","capabilities":{"bandwidth":true}}]}`
		if err := os.WriteFile(filepath.Join(conf, "10-pods.conflist"), []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d := daemon{t: t, dir: dir}
	if peer != "" {
		toml := fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
address = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "localhost/bb:latest"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [%q]
conf_dir = %q
`, dir+"/root", dir+"/run", dir+"/cri.sock", plugins, conf)
		d.write("containerd.toml", toml)
		d.argv = []string{filepath.Join(peer, "containerd"), "-c", dir + "/containerd.toml"}
		d.env = append(os.Environ(), "PATH="+peer+":"+os.Getenv("PATH"))
		return &containerd{d, peer}
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin = filepath.Join(root(), "bin")
	}
	d.write("servind.yaml", "version: 1\nshutdownTimeout: 2s\ncni:\n  confDir: "+conf+"\n  binDir: "+plugins+"\n")
	d.argv = []string{filepath.Join(bin, "servind"), "--config", dir + "/servind.yaml", "--root", dir + "/root", "--run-root", dir + "/run",
		"--listen", "unix://" + dir + "/s.sock", "--cri", "unix://" + dir + "/cri.sock"}
	return &servin{d, bin}
}

// daemon is the process of an engine.
type daemon struct {
	t    *testing.T
	dir  string
	argv []string
	env  []string
	cmd  *exec.Cmd
}

func (d *daemon) write(name, content string) {
	if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o644); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) socket() string { return d.dir + "/cri.sock" }

func (d *daemon) start() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.dir, "engine.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.cmd = exec.Command(d.argv[0], d.argv[1:]...)
	d.cmd.Env, d.cmd.Stdout, d.cmd.Stderr = d.env, log, log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	eventually(d.t, "the engine's socket", func() error {
		c, err := net.Dial("unix", d.socket())
		if err == nil {
			c.Close()
		}
		return err
	})
}

func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

func (d *daemon) log() string { return tail(filepath.Join(d.dir, "engine.log")) }

func tail(path string) string {
	b, _ := os.ReadFile(path)
	if len(b) > 8000 {
		b = b[len(b)-8000:]
	}
	return string(b)
}

func (d *daemon) must(argv ...string) string {
	d.t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

type servin struct {
	daemon
	bin string
}

func (s *servin) cli(args ...string) []string {
	return append([]string{filepath.Join(s.bin, "servin"), "--host", "unix://" + s.dir + "/s.sock"}, args...)
}

func (s *servin) load(archive string) { s.must(s.cli("load", "-i", archive)...) }
func (s *servin) images() string      { return s.must(s.cli("images")...) }

func (s *servin) close() {
	s.must(s.cli("system", "shutdown", "--force")...)
	_ = s.cmd.Wait()
}

type containerd struct {
	daemon
	bin string
}

func (c *containerd) ctr(args ...string) []string {
	return append([]string{filepath.Join(c.bin, "ctr"), "-a", c.socket(), "-n", "k8s.io"}, args...)
}

func (c *containerd) load(archive string) { c.must(c.ctr("images", "import", archive)...) }
func (c *containerd) images() string      { return c.must(c.ctr("images", "ls", "-q")...) }

func (c *containerd) close() {
	for _, id := range strings.Fields(c.must(c.ctr("tasks", "ls", "-q")...)) {
		if len(id) == 64 {
			_ = exec.Command(c.ctr("x")[0], c.ctr("tasks", "kill", "-s", "KILL", id)[1:]...).Run()
		}
	}
	time.Sleep(2 * time.Second)
	_ = c.cmd.Process.Signal(os.Interrupt)
	_ = c.cmd.Wait()
}

// eventually polls until ok returns nil.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within 90 s: %v", what, err)
}
