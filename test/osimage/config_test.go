package osimage

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// TestWrongConfigurationInImage is refused when the image is built, before anything is fetched.
func TestWrongConfigurationInImage(t *testing.T) {
	for name, c := range map[string]struct{ doc, want string }{
		"unknown field":  {"version: 1\nhostnam: x\n", "hostnam"},
		"no version":     {"hostname: x\n", "version"},
		"two documents":  {"version: 1\n---\nversion: 1\n", "one document"},
		"engine's field": {"version: 1\nengine: {nonsense: 1}\n", "engine"},
		"too big":        {"version: 1\n#" + strings.Repeat("x", 1<<20), "larger"},
	} {
		out := filepath.Join(t.TempDir(), "out")
		_, err := osimage.Build(t.Context(), osimage.Options{Arch: "amd64", Format: "vm", Output: out, Cache: out, Config: []byte(c.doc), Log: t.Logf})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%s: something was written", name)
		}
	}
}

// TestConfigurationInImage boots an image that carries its configuration: it is used where no
// other place has one, and it alone.
func TestConfigurationInImage(t *testing.T) {
	long(t)
	const doc = "version: 1\nhostname: from-image\nsysctl: {vm.swappiness: \"7\"}\n"
	image := build(t, "vm", func(o *osimage.Options) { o.Config = []byte(doc) })
	in, err := osimage.Inspect(image)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if in.Print(&b, 5); !strings.Contains(b.String(), "  | hostname: from-image\n") {
		t.Fatalf("inspect says\n%s", b.String())
	}
	data := disk(t, 2<<30)
	boot := func(words, source, hostname string) {
		t.Helper()
		m := vm(t, image, data, words)
		if s := m.settled(); s.State != vmwire.StateReady || s.ConfigSource != source || s.Hostname != hostname || len(s.Problems) > 0 {
			t.Fatalf("the machine is %+v", s)
		}
		if source == "image" {
			if err := m.ctl("PUT", "/v1/config", "version: 1\nhostname: from-disk\n", nil); err != nil {
				t.Fatal(err)
			}
		}
		m.off()
	}
	boot("cloudos.config=base64:"+base64.StdEncoding.EncodeToString([]byte("version: 1\nhostname: from-words\n")), "cmdline", "from-words")
	boot("", "image", "from-image")
	boot("", "disk", "from-disk")
}

// TestWrongConfigurationOverNetwork starts a machine in safe mode that was reached over the network before: there it says what is
// wrong, to whom its last good configuration trusts, and takes another.
func TestWrongConfigurationOverNetwork(t *testing.T) {
	long(t)
	ca, stranger := newAuthority(t), newAuthority(t)
	_, _, cert, key := ca.make(&x509.Certificate{Subject: pkix.Name{CommonName: "box"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	document := "version: 1\nhostname: box-1\nnetwork:\n  links:\n  - name: eth0\n  - name: eth1\n    addresses: [10.0.9.77/24]\n" +
		"engine: {listen: [\"tcp://0.0.0.0:2376\"]}\ntls:\n  ca: |\n    " + indented(ca.pem) + "\n  cert: |\n    " + indented(cert) + "\n  key: |\n    " + indented(key) + "\n"
	image, data, port := vmImage(t), disk(t, 2<<30), freePort(t)
	boot := func(words string) *machine {
		// Not the address that DHCP would give.
		return vm(t, image, data, words, "-netdev", fmt.Sprintf("user,id=operator,net=10.0.9.0/24,hostfwd=tcp:127.0.0.1:%d-10.0.9.77:2376", port), "-device", "virtio-net-pci,netdev=operator")
	}
	us := ca.client(ca.pem)
	operator := func(program, certs string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(programs(t), program), args...)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SERVIN_HOST=tcp://127.0.0.1:%d", port), "SERVIN_CERT_PATH="+certs)
		out, err := cmd.CombinedOutput()
		t.Logf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
		return string(out), err
	}
	bad := "cloudos.config=base64:" + base64.StdEncoding.EncodeToString([]byte("version: 1\nhostname: wrong\nbogus: 1\n"))

	m := boot(bad)
	if s := m.settled(); s.State != vmwire.StateSafe {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := operator("cloudos", us, "status"); err == nil {
		t.Fatalf("a machine that knows nobody answers: %s", out)
	}
	if err := m.ctl("PUT", "/v1/config", document, nil); err != nil {
		t.Fatal(err)
	}
	m.off()

	m = boot("")
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Hostname != "box-1" {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := operator("cloudos", us, "status"); err != nil || !strings.Contains(out, "box-1: CloudOS") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	m.await("is kept for safe mode", time.Minute)
	m.off()

	m = boot(bad)
	if s := m.settled(); s.State != vmwire.StateSafe || s.Engine.Running || len(s.Problems) != 1 || s.Hostname != "box-1" {
		t.Fatalf("the machine is %+v", s)
	}
	m.await("The system's API is served on", time.Minute)
	m.await("the system's API is served on 0.0.0.0:2376", time.Minute)
	out, err := operator("cloudos", us, "status")
	for end := time.Now().Add(time.Minute); err != nil && time.Now().Before(end); out, err = operator("cloudos", us, "status") {
		time.Sleep(time.Second) // the link comes up by itself
	}
	if err != nil || !strings.Contains(out, "box-1: CloudOS") || !strings.Contains(out, "field bogus not found") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	for who, certs := range map[string]string{"a client by another authority": stranger.client(ca.pem), "nobody": t.TempDir()} {
		if out, err := operator("cloudos", certs, "status"); err == nil {
			t.Fatalf("%s was answered: %s", who, out)
		}
	}
	if out, err := operator("servin", us, "ps"); err == nil || !strings.Contains(out, "safe mode") {
		t.Errorf("what asks for the engine is told %q, %v", out, err)
	}
	out, err = operator("cloudos", us, "config")
	_, text, found := strings.Cut(out, "In use, from: last good (not the one from cmdline)\n")
	if err != nil || !found || strings.Contains(text, "PRIVATE KEY") || strings.Count(text, "box-1") != 1 {
		t.Fatalf("the configuration is %q, %v", out, err)
	}
	text, _, _ = strings.Cut(text, "Another document is kept")
	changed := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(changed, []byte(strings.Replace(text, "box-1", "box-2", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := operator("cloudos", us, "config", "set", "--reboot", changed); err != nil {
		t.Fatalf("another configuration: %v, %s", err, out)
	}
	m.ended(time.Minute)

	m = boot("")
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Hostname != "box-2" || s.ConfigSource != "disk" {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := operator("cloudos", us, "status"); err != nil || !strings.Contains(out, "box-2: CloudOS") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	m.off()
}
