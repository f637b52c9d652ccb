package pe

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const stub = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"

func pair(t testing.TB) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "owner"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return key, c
}

// TestSign has sbverify judge what was signed, and what was changed afterwards.
func TestSign(t *testing.T) {
	for _, tool := range []string{"sbverify", "objdump"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: %s is not installed", tool)
		}
	}
	b, err := os.ReadFile(stub)
	if err != nil {
		t.Skip("SKIP: systemd-boot-efi is not installed")
	}
	key, cert := pair(t)
	dir := t.TempDir()
	pemFile := filepath.Join(dir, "cert.pem")
	if err := os.WriteFile(pemFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	uki, err := WithSections(b, Section{".osrel", []byte("ID=test\n")}, Section{".cmdline", []byte("quiet")}, Section{".initrd", make([]byte, 5000)}, Section{".linux", b})
	if err != nil {
		t.Fatal(err)
	}
	out, err := Sign(uki, key, cert)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Sign(uki, key, cert)
	if err != nil || !bytes.Equal(out, again) {
		t.Fatalf("two signatures differ: %v", err)
	}
	verify := func(b []byte) (string, error) {
		p := filepath.Join(dir, "x.efi")
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		msg, err := exec.Command("sbverify", "--cert", pemFile, p).CombinedOutput()
		return string(msg), err
	}
	if msg, err := verify(out); err != nil {
		t.Fatalf("sbverify: %v\n%s", err, msg)
	}
	bad := bytes.Clone(out)
	bad[bytes.Index(bad, []byte("quiet"))] = 'Q'
	if msg, err := verify(bad); err == nil {
		t.Fatalf("a changed command line passed: %s", msg)
	}
	d1, err := Digest(uki)
	if err != nil {
		t.Fatal(err)
	}
	if d2, err := Digest(out); err != nil || d1 != d2 {
		t.Fatalf("the digest changed with the signature: %v", err)
	}
	if _, err := WithSections(out, Section{".x", []byte("x")}); err == nil {
		t.Fatal("a section was added to a signed program")
	}
	if msg, err := exec.Command("objdump", "-h", filepath.Join(dir, "x.efi")).CombinedOutput(); err != nil || !bytes.Contains(msg, []byte(".initrd")) {
		t.Fatalf("objdump: %v\n%s", err, msg)
	}
	other, _ := pair(t)
	if _, err := Sign(uki, other, cert); err == nil {
		t.Fatal("a certificate of another key was taken")
	}
}

func FuzzParse(f *testing.F) {
	if b, err := os.ReadFile(stub); err == nil {
		f.Add(b[:4096])
	}
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, b []byte) {
		Digest(b)
		if out, err := WithSections(b, Section{".x", []byte("x")}); err == nil {
			if _, err := parse(out); err != nil {
				t.Fatal(err)
			}
		}
	})
}
