package osimage

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// authority makes certificates for one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
	made int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key, a.pem, _ = a.make(&x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// make signs a certificate, by itself where there is no authority yet.
func (a *authority) make(c *x509.Certificate) (cert *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.made++
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(a.made), time.Now().Add(-24*time.Hour), time.Now().Add(24*time.Hour)
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		a.t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b}))
}

// client writes a client's certificate as a folder of SERVIN_CERT_PATH.
func (a *authority) client(authority string) string {
	a.t.Helper()
	_, _, cert, key := a.make(&x509.Certificate{Subject: pkix.Name{CommonName: "operator"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	dir := a.t.TempDir()
	for name, text := range map[string]string{"ca.pem": authority, "cert.pem": cert, "key.pem": key} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return dir
}

// indented is a text as a block of YAML.
func indented(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n    ") }

// TestInstallNetwork installs from a start over the network, with a document and a release that a server has whose
// connection breaks off, and then speaks to the machine as an operator does: over TCP, with certificates on both sides.
func TestInstallNetwork(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	signed := func(o *osimage.Options) { o.Version, o.Sign = "1.0.0", []ed25519.PrivateKey{key} }
	image := build(t, "netboot", signed)
	in, err := osimage.Inspect(image)
	if err != nil {
		t.Fatal(err)
	}
	first := releaseOf(t, "1.0.0", func(o *osimage.Options) { signed(o); o.Platform = "metal" })
	next := resealed(t, first, version("1.1.0"), key)

	ca := newAuthority(t)
	_, _, cert, certKey := ca.make(&x509.Certificate{Subject: pkix.Name{CommonName: "box-11"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	from := fmt.Sprintf("http://10.0.2.2:%d/", l.Addr().(*net.TCPAddr).Port) // the host's loopback
	document := "version: 1\nhostname: box-11\ninstall: {source: \"" + from + "cloudos.release\", then: poweroff}\n" +
		"engine: {listen: [\"tcp://0.0.0.0:2376\"]}\ntls:\n  ca: |\n    " + indented(ca.pem) + "\n  cert: |\n    " + indented(cert) + "\n  key: |\n    " + indented(certKey) + "\n"
	var asked, resumed atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET /document", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, document) })
	mux.HandleFunc("GET /cloudos.release", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			resumed.Add(1)
		}
		if asked.Add(1) <= 2 { // a connection that breaks off, twice
			w = &breaking{ResponseWriter: w, left: 20 << 20}
		}
		http.ServeFile(w, r, first)
	})
	server := &http.Server{Handler: mux}
	go server.Serve(l)
	defer server.Close()

	target := disk(t, 3<<30)
	m := start(t, 10*time.Minute, append(drive("target", target), "-kernel", filepath.Join(image, "kernel"), "-initrd", filepath.Join(image, "initrd"),
		"-append", in.Image.CommandLine+" cloudos.config="+from+"document")...)
	m.await("is installed on", 8*time.Minute)
	m.ended(time.Minute)
	if resumed.Load() < 2 {
		t.Errorf("the download was taken up %d times", resumed.Load())
	}

	port := freePort(t)
	m = start(t, 20*time.Minute, append(append([]string{"-action", "reboot=reset"}, drive("target", target)...),
		"-netdev", fmt.Sprintf("user,id=operator,net=10.0.9.0/24,hostfwd=tcp:127.0.0.1:%d-:2376", port), "-device", "virtio-net-pci,netdev=operator")...)
	m.connect()
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Hostname != "box-11" || s.ConfigSource != "disk" {
		t.Fatalf("the machine is %+v", s)
	}
	var shown string
	if err := m.ctl("GET", "/v1/config", nil, &shown); err != nil || strings.Contains(shown, "PRIVATE KEY") || !strings.Contains(shown, "not shown") {
		t.Fatalf("the document is %q, %v", shown, err)
	}
	us := ca.client(ca.pem)
	operator := func(certs string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(programs(t), "cloudos"), args...)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SERVIN_HOST=tcp://127.0.0.1:%d", port), "SERVIN_CERT_PATH="+certs)
		out, err := cmd.CombinedOutput()
		t.Logf("cloudos %s: %v\n%s", strings.Join(args, " "), err, out)
		return string(out), err
	}
	if out, err := operator(us, "status"); err != nil || !strings.Contains(out, "box-11: CloudOS 1.0.0") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	stranger := newAuthority(t)
	if out, err := operator(stranger.client(ca.pem), "status"); err == nil {
		t.Fatalf("a client by another authority was answered: %s", out)
	}
	if out, err := operator(ca.client(stranger.pem), "status"); err == nil {
		t.Fatalf("a machine by another authority was believed: %s", out)
	}
	// Another configuration, made of what is shown: the key stays.
	out, err := operator(us, "config")
	_, text, found := strings.Cut(out, "In use, from: disk\n")
	if err != nil || !found || strings.Contains(text, "PRIVATE KEY") || strings.Count(text, "box-11") != 1 {
		t.Fatalf("the configuration is %q, %v", out, err)
	}
	changed := filepath.Join(t.TempDir(), "config.yaml")
	give := func(text string) {
		t.Helper()
		if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	give(text + "bogus: 1\n")
	if out, err := operator(us, "config", "set", changed); err == nil || !strings.Contains(out, "field bogus not found") {
		t.Fatalf("a wrong configuration: %v, %s", err, out)
	}
	give(strings.Replace(text, "box-11", "box-12", 1))
	if out, err := operator(us, "config", "set", changed); err != nil || !strings.Contains(out, "next start") {
		t.Fatalf("another configuration: %v, %s", err, out)
	}
	if out, err := operator(us, "config"); err != nil || !strings.Contains(out, "box-11") || !strings.Contains(out, "config --next") {
		t.Fatalf("the configuration is %q, %v", out, err)
	}
	if out, err := operator(us, "config", "--next"); err != nil || !strings.Contains(out, "box-12") || strings.Contains(out, "PRIVATE KEY") {
		t.Fatalf("the next configuration is %q, %v", out, err)
	}
	if out, err := operator(us, "reboot"); err != nil {
		t.Fatal(out)
	}
	m.again()
	m.settled()
	if out, err := operator(us, "status"); err != nil || !strings.Contains(out, "box-12: CloudOS 1.0.0") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	if out, err := operator(us, "upgrade", next); err != nil || !strings.Contains(out, "system 1.1.0 came up well and is kept") {
		t.Fatalf("the upgrade: %v, %s", err, out)
	}
	if out, err := operator(us, "rollback"); err != nil || !strings.Contains(out, "system 1.0.0 came up well and is kept") {
		t.Fatalf("going back: %v, %s", err, out)
	}
	m.restarts = strings.Count(m.said(), "the machine is down")
	m.cut()
}

// breaking ends a connection after so many bytes.
type breaking struct {
	http.ResponseWriter
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return b.ResponseWriter.Write(p)
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
