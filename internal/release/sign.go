package release

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// What an envelope holds: a release's manifest, or the description of an image's folder.
const (
	releaseType = "application/vnd.cloudos.release.v1+json"
	imageType   = "application/vnd.cloudos.image.v1+json"
)

// envelope is DSSE's.
type envelope struct {
	PayloadType string      `json:"payloadType"`
	Payload     string      `json:"payload"`
	Signatures  []signature `json:"signatures"`
}

type signature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// signed is what a signature is over (DSSE's pre-authentication encoding).
func signed(kind string, payload []byte) []byte {
	return fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload)
}

// Key is a public key that releases are signed for.
type Key struct {
	Public ed25519.PublicKey
	// Name is where it was read.
	Name string
}

// ID is the digest of the public key.
func (k Key) ID() string { return keyID(k.Public) }

func keyID(public ed25519.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// Seal makes the envelope of a manifest, signed by each of the keys: one without
// signatures is an unsigned release.
func Seal(m *Manifest, keys ...ed25519.PrivateKey) ([]byte, error) {
	payload, err := m.Encode()
	if err != nil {
		return nil, err
	}
	return seal(releaseType, payload, keys)
}

// SealImage makes the envelope of an image's description, image.json.
func SealImage(description []byte, keys ...ed25519.PrivateKey) ([]byte, error) {
	return seal(imageType, description, keys)
}

func seal(kind string, payload []byte, keys []ed25519.PrivateKey) ([]byte, error) {
	e := envelope{PayloadType: kind, Payload: base64.StdEncoding.EncodeToString(payload), Signatures: []signature{}}
	for _, k := range keys {
		e.Signatures = append(e.Signatures, signature{
			KeyID: keyID(k.Public().(ed25519.PublicKey)),
			Sig:   base64.StdEncoding.EncodeToString(ed25519.Sign(k, signed(kind, payload))),
		})
	}
	b, err := json.Marshal(e)
	return append(b, '\n'), err
}

// Open reads a release's envelope. signer is the id of the trusted key that signed it, empty
// if none did: whether that will do is the caller's to decide, see Signed.
func Open(b []byte, trusted []Key) (m *Manifest, signer string, err error) {
	payload, signer, _, err := open(releaseType, b, trusted)
	if err != nil {
		return nil, "", err
	}
	m, err = parse(payload)
	return m, signer, err
}

// open returns what an envelope holds, and how many signatures it has.
func open(kind string, b []byte, trusted []Key) (payload []byte, signer string, signatures int, err error) {
	bad := func(format string, args ...any) ([]byte, string, int, error) {
		return nil, "", 0, fault.New(fault.Invalid, format, args...)
	}
	if len(b) > MaxEnvelope {
		return bad("the envelope is larger than %d bytes", MaxEnvelope)
	}
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return bad("cannot read the envelope: %w", err)
	}
	if e.PayloadType != kind {
		return bad("the envelope holds %.100q instead of %s", e.PayloadType, kind)
	}
	if payload, err = base64.StdEncoding.DecodeString(e.Payload); err != nil {
		return bad("cannot read the envelope: %w", err)
	}
	text := signed(kind, payload)
	for _, s := range e.Signatures[:min(len(e.Signatures), 16)] {
		sig, err := base64.StdEncoding.DecodeString(s.Sig)
		if err != nil || len(sig) != ed25519.SignatureSize {
			continue
		}
		// The id in the envelope is not signed: it is no reason to believe or not.
		for _, k := range trusted {
			if signer == "" && ed25519.Verify(k.Public, text, sig) {
				signer = k.ID()
			}
		}
	}
	return payload, signer, len(e.Signatures), nil
}

// untrusted says why nobody's word stands for what was read.
func untrusted(what string, signatures int, trusted []Key) error {
	switch {
	case signatures == 0:
		return fault.New(fault.Forbidden, "cannot trust %s: it is not signed", what)
	case len(trusted) == 0:
		return fault.New(fault.Forbidden, "cannot trust %s: no key is trusted here (cloudos image build --sign or --trust puts one into an image)", what)
	}
	return fault.New(fault.Forbidden, "cannot trust %s: its signature is by none of the keys that are trusted here", what)
}

// Signed is Open that refuses what none of the trusted keys signed.
func Signed(b []byte, trusted []Key) (*Manifest, string, error) {
	payload, signer, signatures, err := open(releaseType, b, trusted)
	if err != nil {
		return nil, "", err
	}
	m, err := parse(payload)
	if err != nil {
		return nil, "", err
	}
	if signer == "" {
		return nil, "", untrusted("the release "+m.Version, signatures, trusted)
	}
	return m, signer, nil
}

// SignedImage returns an image's description if one of the keys signed it, and which.
func SignedImage(b []byte, trusted []Key) (description []byte, signer string, err error) {
	description, signer, signatures, err := open(imageType, b, trusted)
	if err == nil && signer == "" {
		err = untrusted("the image", signatures, trusted)
	}
	if err != nil {
		return nil, "", err
	}
	return description, signer, nil
}

// ImageIn returns the description in an envelope, whoever signed it.
func ImageIn(b []byte) ([]byte, error) {
	description, _, _, err := open(imageType, b, nil)
	return description, err
}

// Generate makes a key pair: the private half in file (mode 0600, never over one that
// is there), the public half in file.pub.
func Generate(file string) (Key, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Key{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return Key{}, err
	}
	pub, err := EncodePublic(public)
	if err != nil {
		return Key{}, err
	}
	for _, f := range []struct {
		name string
		perm fs.FileMode
		b    []byte
	}{{file, 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}, {file + ".pub", 0o644, pub}} {
		if err := create(f.name, f.perm, f.b); err != nil {
			return Key{}, fmt.Errorf("cannot write the key: %w", err)
		}
	}
	return Key{Public: public, Name: file + ".pub"}, nil
}

func create(name string, perm fs.FileMode, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// EncodePublic is a public key in PEM.
func EncodePublic(public ed25519.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// ReadPrivate reads a private key: PEM, PKCS #8, ed25519.
func ReadPrivate(file string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read the signing key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New(fault.Invalid, "cannot read the signing key %s: it is no PEM private key (cloudos image keygen makes one)", file)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the signing key %s: %w", file, err)
	}
	private, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Invalid, "cannot sign with %s: it is no ed25519 key", file)
	}
	return private, nil
}

// ParsePublic reads public keys: PEM, one after the other.
func ParsePublic(b []byte, name string) ([]Key, error) {
	var out []Key
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		public, ok := k.(ed25519.PublicKey)
		if err != nil || !ok || block.Type != "PUBLIC KEY" {
			return nil, fault.New(fault.Invalid, "cannot use the key in %s: it is no ed25519 public key", name)
		}
		out = append(out, Key{Public: public, Name: name})
	}
	if len(out) == 0 || strings.TrimSpace(string(b)) != "" {
		return nil, fault.New(fault.Invalid, "cannot read the key in %s: it is no PEM public key", name)
	}
	return out, nil
}

// ReadPublic reads files with public keys.
func ReadPublic(files ...string) ([]Key, error) {
	var out []Key
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("cannot read the key: %w", err)
		}
		keys, err := ParsePublic(b, f)
		if err != nil {
			return nil, err
		}
		out = append(out, keys...)
	}
	return out, nil
}

// KeysIn reads all keys of a folder, which may be missing.
func KeysIn(dir string) ([]Key, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.pub"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	return ReadPublic(files...)
}
