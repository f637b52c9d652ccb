package ovmf

import (
	"bytes"
	"crypto/x509"
	"os"
	"testing"
)

const empty = "/usr/share/OVMF/OVMF_VARS_4M.fd"

// TestEnroll is about what can be seen without a machine; test/osimage boots with it.
func TestEnroll(t *testing.T) {
	vars, err := os.ReadFile(empty)
	if err != nil {
		t.Skip("SKIP: ovmf is not installed")
	}
	cert := &x509.Certificate{Raw: []byte("der")}
	out, err := Enroll(vars, cert)
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != len(vars) || bytes.Count(out, SignatureList(cert)) != 3 {
		t.Fatal("the certificate is not there three times")
	}
	if _, err := Enroll(out, cert); err == nil {
		t.Fatal("keys were enrolled twice")
	}
	if _, err := Enroll(vars[:1000], cert); err == nil {
		t.Fatal("a part of a file was taken")
	}
}

func FuzzEnroll(f *testing.F) {
	if b, err := os.ReadFile(empty); err == nil {
		f.Add(b[:2048])
	}
	f.Fuzz(func(t *testing.T, b []byte) { Enroll(b, &x509.Certificate{Raw: []byte("der")}) })
}
