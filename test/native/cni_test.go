package native

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/network/cni/cnitest"
	"github.com/cloudos-io/cloudos/test/harness"
)

// Containers on CNI networks, through the shipped programs.
func TestCNI(t *testing.T) {
	plugins := cnitest.Plugins(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "net.d")
	if err := os.MkdirAll(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	list := `{"cniVersion":"1.1.0","name":"lan","plugins":[
{"type":"bridge","bridge":"cninative0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"` + dir + `/leases","ranges":[[{"subnet":"10.86.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]},"capabilities":{"mac":true,"ips":true}},
{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}`
	if err := os.WriteFile(filepath.Join(conf, "10-lan.conflist"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	// The plugin keeps its bridge, as it always does.
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", "cninative0").Run() })
	e := start(t, "--config", writeConfig(t, dir, "version: 1\nshutdownTimeout: 1s\ncni:\n  confDir: "+conf+"\n  binDir: "+plugins+"\n"))
	if out := e.must("networks", "ls", "--filter", "driver=cni"); !strings.Contains(out, "cni:lan") {
		t.Errorf("networks:\n%s", out)
	}
	if out := e.must("run", "--rm", "--network", "name=cni:lan,ip=10.86.0.77", "bb", "ip", "-o", "-4", "addr", "show", "eth0"); !strings.Contains(out, "10.86.0.77/24") {
		t.Errorf("fixed address: %s", out)
	}
	e.must("run", "-d", "--name", "web", "--network", "cni:lan", "-p", "18095:80", "bb", "sh", "-c", "mkdir -p /w; echo hello >/w/index.html; exec httpd -f -p 80 -h /w")
	served := func() bool {
		resp, err := (&http.Client{Timeout: 2 * time.Second}).Get("http://127.0.0.1:18095/index.html")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b) == "hello\n"
	}
	harness.Eventually(t, "the published port", 10*time.Second, served)
	var in []struct {
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, Gateway string }
		}
	}
	if err := json.Unmarshal([]byte(e.must("inspect", "web")), &in); err != nil {
		t.Fatal(err)
	}
	if n := in[0].NetworkSettings.Networks["cni:lan"]; !strings.HasPrefix(n.IPAddress, "10.86.0.") || n.Gateway != "10.86.0.1" {
		t.Errorf("inspect says %+v", in)
	}
	if r := e.run("run", "--rm", "--network", "cni:lan", "-p", "18095:81", "bb", "true"); r.code != 125 || !strings.Contains(r.err, "port is already allocated") {
		t.Errorf("a port that is taken: %s", r)
	}
	if r := e.run("run", "--rm", "--network", "cni:other", "bb", "true"); r.code != 125 || !strings.Contains(r.err, "cni:other") && !strings.Contains(r.err, "other not found") {
		t.Errorf("a network that is not there: %s", r)
	}
	e.must("restart", "-t", "0", "web")
	harness.Eventually(t, "the port after a restart", 10*time.Second, served)
	e.Kill()
	e.Boot()
	if !served() {
		t.Error("the container lost its network with the engine")
	}
	e.must("network", "disconnect", "cni:lan", "web")
	if served() {
		t.Error("the port is published although the container was disconnected")
	}
	e.must("network", "connect", "cni:lan", "web")
	if out := e.must("exec", "web", "ip", "-o", "-4", "addr", "show", "eth0"); !strings.Contains(out, "10.86.0.") {
		t.Errorf("connected again: %s", out)
	}
	e.must("rm", "-f", "web")
	harness.Eventually(t, "the leases' end", 10*time.Second, func() bool {
		l, _ := filepath.Glob(dir + "/leases/*/10.*")
		return len(l) == 0
	})
	if es, _ := os.ReadDir(e.Dir + "/root/cni/attachments"); len(es) > 0 {
		t.Errorf("records stay: %v", es)
	}
}

func writeConfig(t *testing.T, dir, content string) string {
	t.Helper()
	p := filepath.Join(dir, "servind.yaml")
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}
