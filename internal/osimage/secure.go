package osimage

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/ovmf"
	"github.com/cloudos-io/cloudos/internal/osimage/pe"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osimage/verity"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// Owner is who signs what machines start: firmware that knows the certificate starts nothing else.
type Owner struct {
	Key  crypto.Signer
	Cert *x509.Certificate
}

// The files of an owner's keys.
const (
	OwnerKey  = "secure-boot.key" // PEM, PKCS #8
	OwnerCert = "secure-boot.crt" // PEM
	ownerDER  = "secure-boot.cer" // for the setup programs of firmware
	ownerList = "secure-boot.esl" // for efitools and for clouds
)

// NewOwner makes keys in a folder; files that are there already are not touched.
func NewOwner(dir, name string) error {
	fail := func(err error) error { return fmt.Errorf("cannot make keys for Secure Boot: %w", err) }
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048) // firmware is only sure to know this length
	if err != nil {
		return fail(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return fail(err)
	}
	// Firmware does not look at dates; machines are meant to start for longer than any certificate lasts.
	cert := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-24 * time.Hour).UTC().Truncate(time.Second),
		NotAfter: time.Now().AddDate(30, 0, 0).UTC().Truncate(time.Second), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return fail(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return fail(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	for _, f := range []struct {
		name string
		perm os.FileMode
		data []byte
	}{
		{OwnerKey, 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})},
		{OwnerCert, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})},
		{ownerDER, 0o644, der}, {ownerList, 0o644, ovmf.SignatureList(cert)},
	} {
		w, err := os.OpenFile(filepath.Join(dir, f.name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.perm)
		if err != nil {
			return fail(err)
		}
		_, err = w.Write(f.data)
		if err == nil {
			err = w.Sync()
		}
		if cerr := w.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fail(err)
		}
	}
	return nil
}

// LoadOwner reads an owner's key and certificate.
func LoadOwner(keyFile, certFile string) (*Owner, error) {
	cert, err := LoadCertificate(certFile)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(fault.Invalid, "cannot read %s: it is no key in PEM", keyFile)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		if k, err = x509.ParsePKCS1PrivateKey(block.Bytes); err != nil {
			return nil, fault.New(fault.Invalid, "cannot read %s: it is no RSA key of PKCS #8 or #1 without a passphrase", keyFile)
		}
	}
	key, ok := k.(*rsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fault.New(fault.Invalid, "%s is no RSA key, or not that of %s", keyFile, certFile)
	}
	return &Owner{Key: key, Cert: cert}, nil
}

// LoadCertificate reads a certificate in PEM.
func LoadCertificate(file string) (*x509.Certificate, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fault.New(fault.Invalid, "cannot read %s: it is no certificate in PEM", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read %s: %w", file, err)
	}
	return cert, nil
}

// EnrollOVMF writes variables for OVMF that trust the certificate alone; from are
// the empty ones.
func EnrollOVMF(from, to string, cert *x509.Certificate) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if b, err = ovmf.Enroll(b, cert); err != nil {
		return fmt.Errorf("cannot use %s: %w", from, err)
	}
	return durable.WriteFile(to, b, 0o644, durable.Content)
}

// stubs are what starts a kernel inside a unified image, of the package systemd-boot-efi.
var stubs = map[string]string{
	"amd64": "usr/lib/systemd/boot/efi/linuxx64.efi.stub",
	"arm64": "usr/lib/systemd/boot/efi/linuxaa64.efi.stub",
}

// unified makes one signed program for UEFI of kernel, initial file system and command line.
func unified(ctx context.Context, o Options, apt *kernel.Apt, s *system, line string) ([]byte, error) {
	stub, err := fromPackage(ctx, apt, "systemd-boot-efi", stubs[o.Arch])
	if err != nil {
		return nil, err
	}
	release := fmt.Sprintf("ID=cloudos\nVERSION_ID=%q\nPRETTY_NAME=%q\n", o.Version, "CloudOS "+o.Version)
	b, err := pe.WithSections(stub,
		pe.Section{Name: ".osrel", Data: []byte(release)}, pe.Section{Name: ".cmdline", Data: []byte(line)},
		pe.Section{Name: ".uname", Data: []byte(s.kernel.Version)},
		pe.Section{Name: ".initrd", Data: s.initrd}, pe.Section{Name: ".linux", Data: s.kernel.Image})
	if err != nil {
		return nil, fmt.Errorf("cannot make the unified kernel image: %w", err)
	}
	return pe.Sign(b, o.Owner.Key, o.Owner.Cert)
}

// ownersUnified is the unified image of a system that its owner signs.
func ownersUnified(ctx context.Context, o Options, apt *kernel.Apt, s *system) ([]byte, error) {
	// The same words for both slots: the system finds its root by the hash.
	return unified(ctx, o, apt, s, join(diskCommandLine(o.Arch)+inVM(o.Arch), "cloudos.boot=unified cloudos.root=verity", s.words(), o.Words))
}

// ownersPartition is the tree of the boot partition of a disk that its owner signed: the system in its slot, for
// upgrades, and the same as what firmware starts that knows of no entry. There is no loader with choices.
func ownersPartition(ctx context.Context, o Options, apt *kernel.Apt, s *system) (*tree.Tree, error) {
	p, err := s.payload(ctx, o, apt, false, nil)
	if err != nil {
		return nil, err
	}
	t := tree.New()
	b := p.content[slots.UnifiedFile]
	t.Bytes("EFI/BOOT/"+loaders[o.Arch].bootName, 0o644, partKernel, b)
	t.Bytes(slots.Folder("a")+"/"+slots.UnifiedFile, 0o644, partKernel, b)
	t.Bytes(slots.Folder("a")+"/"+slots.SealedFile, 0o644, partSettings, p.sealed)
	t.Dir(slots.Folder("b"), 0o755)
	block, err := slots.State{Good: "a"}.Block()
	if err != nil {
		return nil, err
	}
	t.Bytes(slots.BlockFile, 0o644, partSettings, block)
	return t, nil
}

// appendTree puts the tree of hashes behind the root.
func (s *system) appendTree(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, err := os.Open(f.Name())
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	s.verity, err = verity.Append(f, io.LimitReader(r, n), identity("verity", s.kernel.Package, digest(s.initrd)))
	return err
}

// words say on the command line how the root is checked.
func (s *system) words() string {
	if s.verity.Blocks == 0 {
		return ""
	}
	return "cloudos.verity=" + s.verity.String()
}

// join puts words of command lines together.
func join(words ...string) string {
	out := ""
	for _, w := range words {
		if w != "" && out != "" {
			out += " "
		}
		out += w
	}
	return out
}
