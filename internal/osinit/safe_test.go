package osinit

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// authority makes certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key, a.pem, _ = a.make(&x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) make(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

// client is a client's certificate.
func (a *authority) client() []tls.Certificate {
	_, _, cert, key := a.make(&x509.Certificate{Subject: pkix.Name{CommonName: "operator"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		a.t.Fatal(err)
	}
	return []tls.Certificate{pair}
}

// section is a document's section tls.
func (a *authority) section() string {
	_, _, cert, key := a.make(&x509.Certificate{Subject: pkix.Name{CommonName: "box"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	block := func(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n    ") }
	return "tls:\n  ca: |\n    " + block(a.pem) + "\n  cert: |\n    " + block(cert) + "\n  key: |\n    " + block(key) + "\n"
}

// TestRescue decides from the last good document whether, where and with what a machine in safe mode is reached.
func TestRescue(t *testing.T) {
	ca := newAuthority(t)
	section := ca.section()
	files := func(p string) ([]byte, error) {
		doc, _, err := config.LastGood([]byte("version: 1\n" + section))
		if err != nil {
			t.Fatal(err)
		}
		if b, ok := map[string]string{"/c": doc.TLS.Cert, "/k": doc.TLS.Key, "/a": doc.TLS.CA, "/empty": ""}[p]; ok {
			return []byte(b), nil
		}
		return nil, fs.ErrNotExist
	}
	const listen = "engine: {listen: [\"tcp://0.0.0.0:2376\"]}\n"
	for name, c := range map[string]struct {
		document string
		listen   string // "" is none
		fails    string
		judged   bool
	}{
		"none":                    {},
		"no network":              {document: "version: 1\n"},
		"certificates alone":      {document: "version: 1\n" + section},
		"both":                    {document: "version: 1\n" + listen + section, listen: "0.0.0.0:2376"},
		"files":                   {document: "version: 1\nengine: {listen: [\"tcp://[::]:1\"], tls: {cert: /c, key: /k, ca: /a}}\n", listen: "[::]:1"},
		"files that went":         {document: "version: 1\nengine: {listen: [\"tcp://[::]:1\"], tls: {cert: /c, key: /gone, ca: /a}}\n", fails: "not exist"},
		"no authority":            {document: "version: 1\nengine: {listen: [\"tcp://[::]:1\"], tls: {cert: /c, key: /k, ca: /empty}}\n", fails: "no authority"},
		"an authority that lacks": {document: "version: 1\nengine: {listen: [\"tcp://[::]:1\"], tls: {cert: /c, key: /k}}\n", fails: "not exist"},
		"without TLS":             {document: "version: 1\nengine: {insecureTCP: true, listen: [\"tcp://127.0.0.1:2375\"]}\n"},
		"sockets alone":           {document: "version: 1\nengine: {listen: [\"unix:///x\"]}\n" + section},
		"a policy":                {document: "version: 1\nengine: {policy: /p, listen: [\"tcp://:2376\"]}\n" + section, listen: ":2376", judged: true},
		"a record of everything":  {document: "version: 1\nengine: {audit: {required: true}, listen: [\"tcp://:2376\"]}\n" + section, listen: ":2376", judged: true},
		"of a later system":       {document: "version: 1\nnovelty: 7\nengine: {newer: {x: 1}, listen: [\"tcp://:2376\"]}\n" + section, listen: ":2376"},
		"of another version":      {document: "version: 2\n" + listen + section, fails: "version is 2"},
		"damaged":                 {document: "version: 1\n" + listen + section[:len(section)/2], fails: "cannot use"},
		"no document":             {document: "\x00\x00\x00", fails: "cannot use"},
		"a link's name":           {document: "version: 1\nnetwork: {links: [{name: ../../x}]}\n" + listen + section, fails: "no link's name"},
		"a host's name":           {document: "version: 1\nhostname: \"a b\"\n" + listen + section, fails: "hostname"},
	} {
		r, err := newRescue([]byte(c.document), files)
		if (err != nil) != (c.fails != "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if (r != nil) != (c.listen != "") {
			t.Errorf("%s: it is reached: %v", name, r != nil)
		}
		if r == nil {
			continue
		}
		if len(r.listen) != 1 || r.listen[0] != c.listen || r.judged != c.judged {
			t.Errorf("%s: %v, judged: %v", name, r.listen, r.judged)
		}
		if r.tls.ClientAuth != tls.RequireAndVerifyClientCert || r.tls.ClientCAs == nil || len(r.tls.Certificates) != 1 {
			t.Errorf("%s: clients need no certificate", name)
		}
		if r.applied.TLS != (config.TLS{}) || !r.applied.Engine.IsZero() {
			t.Errorf("%s: more of it is used than is needed", name)
		}
	}
}

// TestKeepGood keeps what lets operators in, and nothing once nobody is let in.
func TestKeepGood(t *testing.T) {
	ca := newAuthority(t)
	file := filepath.Join(t.TempDir(), "good.yaml")
	document := "version: 1\nhostname: box\nengine: {listen: [\"tcp://:2376\"]}\nencryption: {passphrase: open-sesame-123}\ninstall: {disk: {pick: smallest}}\n" + ca.section()
	keep := func(document string, want bool) {
		t.Helper()
		if written, err := keepGood(file, []byte(document), smallFile); err != nil || written != want {
			t.Fatalf("written: %v, %v", written, err)
		}
	}
	keep(document, true)
	b, err := os.ReadFile(file)
	if err != nil || strings.Contains(string(b), "sesame") || strings.Contains(string(b), "install") || !strings.Contains(string(b), "hostname: box") {
		t.Fatalf("kept is %s, %v", b, err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("its mode is %v, %v", st.Mode(), err)
	}
	keep(document, false)
	keep(strings.Replace(document, "box", "box-2", 1), true)
	keep("version: 1\n", false)
	if _, err := os.Stat(file); err == nil {
		t.Error("it is still there")
	}
	keep("", false)
}

// TestServeSafe asks a machine in safe mode over TLS.
func TestServeSafe(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(r.Method)) })
	for name, policy := range map[string]string{"free": "", "judged": "policy: /p, "} {
		t.Run(name, func(t *testing.T) {
			r, err := newRescue([]byte("version: 1\nengine: {"+policy+"listen: [\"tcp://127.0.0.1:0\"]}\n"+ca.section()), smallFile)
			if err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			at := l.Addr().String()
			r.listen = []string{at}
			m := newMachine("test")
			m.problems, m.state = []string{"cannot use the configuration: line 3"}, vmwire.StateSafe
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan struct{})
			go func() { defer close(served); m.serveSafe(ctx, r, api) }()
			defer func() { cancel(); <-served }()
			time.Sleep(20 * time.Millisecond) // the address is another's for a moment: it is tried again
			l.Close()
			trust := x509.NewCertPool()
			trust.AppendCertsFromPEM([]byte(ca.pem))
			ask := func(certs []tls.Certificate, method, path, origin string) (int, string, error) {
				c := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trust, Certificates: certs}, DisableKeepAlives: true}}
				req, err := http.NewRequestWithContext(ctx, method, "https://"+at+path, nil)
				if err != nil {
					t.Fatal(err)
				}
				if origin != "" {
					req.Header.Set("Origin", origin)
				}
				res, err := c.Do(req)
				if err != nil {
					return 0, "", err
				}
				defer res.Body.Close()
				var answer vmwire.Problem
				_ = json.NewDecoder(res.Body).Decode(&answer)
				return res.StatusCode, answer.Message, nil
			}
			us := ca.client()
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				if _, _, err := ask(us, "GET", "/servin/os/status", ""); err == nil {
					break
				} else if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			change := http.StatusOK
			if policy != "" {
				change = http.StatusForbidden
			}
			for _, c := range []struct {
				method, path, origin string
				status               int
				says                 string
			}{
				{"GET", "/servin/os/status", "", http.StatusOK, ""},
				{"PUT", "/servin/os/config", "", change, ""},
				{"GET", "/servin/os/log", "", change, ""},
				{"GET", "/servin/os/status", "https://evil", http.StatusForbidden, "programs"},
				{"GET", "/containers/json", "", http.StatusServiceUnavailable, "runs no engine: cannot use the configuration: line 3"},
				{"POST", "/servin/os/../../containers/create", "", http.StatusServiceUnavailable, "runs no engine"},
			} {
				status, says, err := ask(us, c.method, c.path, c.origin)
				if err != nil || status != c.status || c.status != http.StatusOK && !strings.Contains(says, c.says) {
					t.Errorf("%s %s: %d %q, %v", c.method, c.path, status, says, err)
				}
			}
			for who, certs := range map[string][]tls.Certificate{"nobody": nil, "a stranger": stranger.client()} {
				if status, _, err := ask(certs, "GET", "/servin/os/status", ""); err == nil {
					t.Errorf("%s was answered: %d", who, status)
				}
			}
			res, err := http.Get("http://" + at + "/servin/os/status")
			if err == nil {
				res.Body.Close()
				if res.StatusCode != http.StatusBadRequest { // what TLS's server says to it
					t.Errorf("without TLS: %s", res.Status)
				}
			}
		})
	}
}
