package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestTLS takes a certificate with its key and an authority, and shows the key to nobody.
func TestTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	secret := string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}))
	document := func(cert, key, ca string, more map[string]any) []byte {
		d := map[string]any{"version": 1, "tls": map[string]any{"cert": cert, "key": key, "ca": ca}}
		for k, v := range more {
			d[k] = v
		}
		b, err := yaml.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	whole := document(cert, secret, cert, nil)
	d, err := Parse(whole)
	if err != nil || d.TLS.Key != secret {
		t.Fatalf("%+v, %v", d, err)
	}
	if shown := string(Redacted(whole)); strings.Contains(shown, "PRIVATE") || !strings.Contains(shown, "BEGIN CERTIFICATE") {
		t.Fatalf("it is shown as %s", shown)
	}
	if kept, err := Installed(whole); err != nil || !strings.Contains(string(kept), "PRIVATE") {
		t.Fatalf("the installed machine has %s, %v", kept, err)
	}
	// What was shown, changed and given back has its secret again, from the first document that has one.
	other := document(cert, "another", cert, nil)
	back, err := Filled([]byte(strings.Replace(string(Redacted(whole)), "version: 1", "version: 1\nhostname: box", 1)), nil, []byte("version: 1\n"), whole, other)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := Parse(back); err != nil || d.TLS.Key != secret || d.Hostname != "box" {
		t.Fatalf("%+v, %v", d, err)
	}
	if _, err := Filled(Redacted(whole), nil, []byte("version: 1\n")); err == nil || !strings.Contains(err.Error(), "tls.key") {
		t.Fatalf("a secret that nobody has: %v", err)
	}
	if same, err := Filled(whole, other); err != nil || string(same) != string(whole) {
		t.Fatalf("a document in full: %v", err)
	}
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"no key":        {document(cert, "", cert, nil), "cert and key"},
		"no authority":  {document(cert, secret, "", nil), "ca is no"},
		"not to be put": {Redacted(whole), "cert and key"},
		"files besides": {document(cert, secret, cert, map[string]any{"engine": map[string]any{"tls": map[string]any{"cert": "/a", "key": "/b"}}}), "names files already"},
	} {
		if _, err := Parse(c.b); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
