package dockerapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen("unix://"+path, ListenOptions{Group: "0"})
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode() != os.ModeSocket|0o660 || fi.Sys().(*syscall.Stat_t).Gid != 0 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
	if l.Addr().String() != path {
		t.Errorf("address %s", l.Addr())
	}
	if _, err := Listen("unix://"+path, ListenOptions{}); !fault.Is(err, fault.Conflict) {
		t.Errorf("a served socket was taken: %v", err)
	}
	if _, err := Listen("unix://"+path+"2", ListenOptions{Group: "no-such-group"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown group: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}

	// A socket that a killed process left is replaced, another file is not.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err = Listen("unix://"+path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// A successor's socket is not removed with ours.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	next, err := Listen("unix://"+path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
	next.Close()
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix://"+path, ListenOptions{}); !fault.Is(err, fault.Conflict) {
		t.Errorf("a file was replaced: %v", err)
	}
}

func TestListenRefuses(t *testing.T) {
	for addr, o := range map[string]ListenOptions{
		"tcp://127.0.0.1:0": {},
		"tcp://0.0.0.0:0":   {InsecureTCP: true},
		"tcp://:0":          {InsecureTCP: true},
		"tcp://[::]:0":      {InsecureTCP: true},
		"tcp://127.0.0.2:0": {CA: "x"},
		"http://x":          {},
		"unix://relative/x": {},
		"unix://":           {},
	} {
		if l, err := Listen(addr, o); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", addr, err)
			if err == nil {
				l.Close()
			}
		}
	}
}

// serveOn serves a fake on the listener until the test ends.
func serveOn(t *testing.T, l net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, []net.Listener{l}, handlerOf(&fake{})) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestPlainTCPGuard(t *testing.T) {
	l, err := Listen("tcp://127.0.0.1:0", ListenOptions{InsecureTCP: true})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l)
	for _, c := range []struct {
		host, origin, path string
		status             int
	}{
		{l.Addr().String(), "", "/_ping", 200},
		{"localhost:1", "", "/_ping", 200},
		{"[::1]:1", "", "/_ping", 200},
		{"evil.example", "", "/_ping", 403},
		{"127.0.0.1.evil.example", "", "/containers/json", 403},
		{"10.0.0.1", "", "/_ping", 403},
		{"localhost", "http://localhost", "/_ping", 403},
		{"localhost", "null", "/_ping", 403},
		{"localhost", "", "/metrics", 403},
	} {
		req, _ := http.NewRequest("GET", "http://"+l.Addr().String()+c.path, nil)
		req.Host = c.host
		if c.origin != "" {
			req.Header.Set("Origin", c.origin)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("host %q, origin %q, %s: %d, want %d", c.host, c.origin, c.path, resp.StatusCode, c.status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	// No host at all, as buildx asks.
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /_ping HTTP/1.1\r\nHost: \r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
		t.Errorf("no host: %q %v", b, err)
	}
}

// authority makes certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.sign(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.Subject = pkix.Name{CommonName: "test"}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := c, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) pair(c *x509.Certificate, key *ecdsa.PrivateKey) tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key}
}

func writePEM(t *testing.T, path, kind string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMutualTLS(t *testing.T) {
	a, other, dir := newAuthority(t), newAuthority(t), t.TempDir()
	sc, sk := a.sign(&x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	der, err := x509.MarshalECPrivateKey(sk)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen("tcp://127.0.0.1:0", ListenOptions{
		CA:   writePEM(t, filepath.Join(dir, "ca"), "CERTIFICATE", a.cert.Raw),
		Cert: writePEM(t, filepath.Join(dir, "cert"), "CERTIFICATE", sc.Raw),
		Key:  writePEM(t, filepath.Join(dir, "key"), "EC PRIVATE KEY", der),
	})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l)
	usage := &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	try := func(conf *tls.Config, origin, path string) (int, error) {
		conf.RootCAs = pool
		tr := &http.Transport{TLSClientConfig: conf}
		defer tr.CloseIdleConnections()
		req, _ := http.NewRequest("GET", "https://"+l.Addr().String()+path, nil)
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		resp, err := (&http.Client{Transport: tr}).Do(req)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	good := func() *tls.Config {
		u := *usage
		return &tls.Config{Certificates: []tls.Certificate{a.pair(a.sign(&u))}}
	}
	if n, err := try(good(), "", "/metrics"); n != 200 {
		t.Errorf("a good client: %d %v", n, err)
	}
	if n, err := try(good(), "https://"+l.Addr().String(), "/_ping"); n != 200 {
		t.Errorf("our own origin: %d %v", n, err)
	}
	if n, err := try(good(), "https://evil.example", "/_ping"); n != 403 {
		t.Errorf("a foreign origin: %d %v", n, err)
	}
	if n, err := try(&tls.Config{}, "", "/_ping"); err == nil {
		t.Errorf("a client without certificate: %d", n)
	}
	if n, err := try(&tls.Config{Certificates: []tls.Certificate{other.pair(other.sign(usage))}}, "", "/_ping"); err == nil {
		t.Errorf("a client of another authority: %d", n)
	}
	old := good()
	old.MaxVersion = tls.VersionTLS11
	old.MinVersion = tls.VersionTLS10
	if n, err := try(old, "", "/_ping"); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.1: %d %v", n, err)
	}
}

// TestServeEnds: streams taken over from HTTP and long requests end with Serve,
// and Serve waits for them.
func TestServeEnds(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }, wait: make(chan container.WaitResponse)}
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen("unix://"+path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := Serve(ctx, []net.Listener{l}, handlerOf(f)); err != nil {
			t.Error(err)
		}
	}()
	_, br, _ := rawRequest(t, path, "POST", "/containers/x/attach?stream=1&stdin=1&stdout=1", "", true)
	_, _, resp := rawRequest(t, path, "POST", "/containers/x/wait", "", false)
	cancel()
	wait(t, p.closed, "the attached stream goes on")
	wait(t, done, "Serve goes on")
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("the attached client got %v, want EOF", err)
	}
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the waiting client got a complete answer: %q", b)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}
