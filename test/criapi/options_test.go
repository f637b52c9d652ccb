package criapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{c, key}
}

func (a authority) issue(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	kd, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kd})
}

// TestTCP reaches the CRI over mutual TLS, and only so.
func TestTCP(t *testing.T) {
	dir := t.TempDir()
	ca, other := newAuthority(t), newAuthority(t)
	cert, key := ca.issue(t)
	for name, b := range map[string][]byte{"ca": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}), "cert": cert, "key": key} {
		if err := os.WriteFile(dir+"/"+name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	startWith(t, "criTCP: {listen: '127.0.0.1:10010', ca: "+dir+"/ca, cert: "+dir+"/cert, key: "+dir+"/key}\n")
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	call := func(creds credentials.TransportCredentials) error {
		conn, err := grpc.NewClient("127.0.0.1:10010", grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = v1.NewRuntimeServiceClient(conn).Version(ctx(t), &v1.VersionRequest{})
		return err
	}
	with := func(a authority) credentials.TransportCredentials {
		c, k := a.issue(t)
		pair, err := tls.X509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		return credentials.NewTLS(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}})
	}
	if err := call(with(ca)); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	wants(t, "a stranger's certificate", call(with(other)), codes.Unavailable)
	wants(t, "no certificate", call(credentials.NewTLS(&tls.Config{RootCAs: pool})), codes.Unavailable)
	wants(t, "no TLS", call(insecure.NewCredentials()), codes.Unavailable)
}

// TestHandlers runs a pod with another OCI runtime.
func TestHandlers(t *testing.T) {
	n := start(t)
	s, err := n.rt.Status(ctx(t), &v1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	ran := false
	for _, h := range s.RuntimeHandlers {
		if h.Name == "runsc" {
			continue // it wants a sandbox of its own kind
		}
		if h.Name != "" && h.Name != "servin" {
			if out, err := exec.Command(h.Name, "--version").CombinedOutput(); err != nil || h.Name == "crun" {
				t.Logf("%s is left out: %v %s", h.Name, err, strings.SplitN(string(out), "\n", 2)[0])
				continue
			}
		}
		p := podConfig(t)
		p.LogDirectory = t.TempDir()
		pod := n.runWith(t, p, h.Name)
		c := sleeper("a")
		c.LogPath = "a.log"
		c.Command = []string{"sh", "-c", "hostname; ip -o -4 addr show eth0; trap 'exit 0' TERM; while :; do sleep 0.1; done"}
		id := n.create(t, pod, p, c)
		n.startContainer(t, id)
		st := n.podStatus(t, pod)
		if st.RuntimeHandler != h.Name {
			t.Errorf("handler %q, not %q", st.RuntimeHandler, h.Name)
		}
		harness.Eventually(t, "output of "+h.Name, 10*time.Second, func() bool {
			return strings.Contains(text(readLog(t, p.LogDirectory+"/a.log"), "stdout"), st.Network.Ip+"/")
		})
		if out := n.exec(t, id, "echo", "x"); out != "x\n" {
			t.Errorf("%s: %q", h.Name, out)
		}
		if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: id, Timeout: 5}); err != nil {
			t.Error(err)
		}
		ran = true
	}
	if !ran {
		t.Error("no handler was tried")
	}
}

// TestRefused starts daemons whose configuration cannot be served.
func TestRefused(t *testing.T) {
	for _, args := range [][]string{{"--cri", "tcp://127.0.0.1:1"}, {"--cri", "unix://relative"}, {"--cri", "/path"}} {
		dir := t.TempDir()
		out, err := exec.Command("../../bin/servind", append([]string{"--root", dir + "/root", "--run-root", dir + "/run", "--listen", "unix://" + dir + "/s"}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "unix:///absolute/path") {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
}
