// Package signature decides whether an image is signed by one who is accepted, with
// sigstore-go. It is given what a registry holds (cosign's signatures under tags,
// Sigstore bundles, attestations) and the signers; it uses no network and believes
// none of what it is given but the signers. Stages use it inside the sandbox.
package signature

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	ssignature "github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/cloudos-io/cloudos/api"
)

// Request is what to verify.
type Request = api.SignatureRequest

const (
	maxItems   = 200
	maxSigners = 50
)

// SignPredicate is the type of the statement that cosign 3 signs an image with.
const SignPredicate = "https://sigstore.dev/cosign/sign/v1"

// Verify looks for good signatures. Any that counts makes the image signed; all that
// do are named.
func Verify(r Request) api.SignatureVerdict {
	var out api.SignatureVerdict
	complain := func(format string, args ...any) {
		if len(out.Problems) < 50 {
			out.Problems = append(out.Problems, printable(fmt.Sprintf(format, args...)))
		}
	}
	var signers []*signer
	if len(r.Signers) > maxSigners {
		r.Signers = r.Signers[:maxSigners]
		complain("more than %d signers are given: the others are not looked at", maxSigners)
	}
	for i, s := range r.Signers {
		k, err := newSigner(s)
		if err != nil {
			complain("signer %d cannot be used: %v", i+1, err)
			continue
		}
		signers = append(signers, k)
	}
	if len(r.Signatures.Items) == 0 {
		complain("the registry has no signature of this image")
	}
	if len(r.Signatures.Items) > maxItems {
		r.Signatures.Items = r.Signatures.Items[:maxItems]
		complain("the registry has more than %d signatures: the others are not looked at", maxItems)
	}
	for _, it := range r.Signatures.Items {
		c, err := read(it)
		if err != nil {
			complain("%s: %v", it.Found, err)
			continue
		}
		if c == nil {
			continue // nothing that could be a signature
		}
		for _, s := range signers {
			v, err := check(c, s, r.Signatures.Digests, r.Attestation)
			if err != nil {
				complain("%s: %v", it.Found, err)
				continue
			}
			v.Found = it.Found
			out.Verified = append(out.Verified, *v)
		}
	}
	return out
}

func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
	if len(s) > 500 {
		s = s[:500] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}

// signer is one whose signatures are accepted.
type signer struct {
	key      string // SHA-256 of the public key
	verifier *verify.Verifier
	policy   verify.PolicyOption
}

func newSigner(s api.SignatureSigner) (*signer, error) {
	var trusted *root.TrustedRoot
	if len(s.TrustedRoot) > 0 {
		var err error
		if trusted, err = root.NewTrustedRootFromJSON(s.TrustedRoot); err != nil {
			return nil, fmt.Errorf("its trusted root cannot be read: %w", err)
		}
	}
	if len(s.Key) > 0 {
		return keySigner(s.Key, trusted)
	}
	if s.Identity == "" || s.Issuer == "" {
		return nil, errors.New("it has neither a key nor an identity with its issuer")
	}
	if trusted == nil {
		return nil, errors.New("an identity needs a trusted root (trusted_root.json) to be checked with")
	}
	id, err := verify.NewShortCertificateIdentity(exact(s.Issuer), pattern(s.Issuer), exact(s.Identity), pattern(s.Identity))
	if err != nil {
		return nil, err
	}
	// What the trusted root has is required: with a log, signatures must be in it; with
	// logs of certificates, the certificate must; and somebody must vouch for the time.
	opts := []verify.VerifierOption{verify.WithObserverTimestamps(1)}
	if len(trusted.RekorLogs()) > 0 {
		opts = append(opts, verify.WithTransparencyLog(1))
	}
	if len(trusted.CTLogs()) > 0 {
		opts = append(opts, verify.WithSignedCertificateTimestamps(1))
	}
	v, err := verify.NewVerifier(trusted, opts...)
	if err != nil {
		return nil, err
	}
	return &signer{verifier: v, policy: verify.WithCertificateIdentity(id)}, nil
}

func keySigner(pem []byte, trusted *root.TrustedRoot) (*signer, error) {
	pub, err := cryptoutils.UnmarshalPEMToPublicKey(pem)
	if err != nil {
		return nil, fmt.Errorf("its public key cannot be read: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	sv, err := ssignature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("its public key cannot be used: %w", err)
	}
	// Whatever hint a signature has, this is the key.
	material := root.TrustedMaterialCollection{root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) {
		return root.NewExpiringKey(sv, time.Time{}, time.Time{}), nil
	})}
	opts := []verify.VerifierOption{verify.WithNoObserverTimestamps()}
	if trusted != nil {
		material = append(material, trusted)
		opts = []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1)}
	}
	v, err := verify.NewVerifier(material, opts...)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return &signer{key: "sha256:" + hex.EncodeToString(sum[:]), verifier: v, policy: verify.WithKey()}, nil
}

// exact and pattern split what a name must be: one of the two is empty.
func exact(s string) string {
	if strings.Contains(s, "*") {
		return ""
	}
	return s
}

func pattern(s string) string {
	if !strings.Contains(s, "*") {
		return ""
	}
	var b strings.Builder
	for i, part := range strings.Split(s, "**") {
		if i > 0 {
			b.WriteString(".*")
		}
		for j, p := range strings.Split(part, "*") {
			if j > 0 {
				b.WriteString("[^/]*")
			}
			b.WriteString(regexp.QuoteMeta(p))
		}
	}
	return "^(?:" + b.String() + ")$"
}

// check tells whether a candidate is a signer's, and of one of the digests.
func check(c *candidate, s *signer, digests []string, attestation string) (*api.VerifiedSignature, error) {
	entity, err := c.entity(s)
	if err != nil {
		return nil, err
	}
	if c.payload != nil {
		if attestation != "" {
			return nil, errors.New("it is a signature, no attestation")
		}
		res, err := s.verifier.Verify(entity, verify.NewPolicy(verify.WithArtifact(bytes.NewReader(c.payload)), s.policy))
		if err != nil {
			return nil, err
		}
		d, err := signedDigest(c.payload, digests)
		if err != nil {
			return nil, err
		}
		return verified(d, s, res), nil
	}
	err = errors.New("the image has no digest that a signature could be of")
	for _, d := range digests {
		algo, sum, ok := strings.Cut(d, ":")
		raw, e := hex.DecodeString(sum)
		if !ok || e != nil || algo != "sha256" {
			continue
		}
		var res *verify.VerificationResult
		if res, err = s.verifier.Verify(entity, verify.NewPolicy(verify.WithArtifactDigest(algo, raw), s.policy)); err != nil {
			continue
		}
		v := verified(d, s, res)
		if res.Statement != nil {
			v.PredicateType = res.Statement.GetPredicateType()
		}
		// An attestation says something about an image, which may be that it is bad.
		switch {
		case attestation == "" && v.PredicateType != "" && v.PredicateType != SignPredicate:
			return nil, fmt.Errorf("it is an attestation (%s), no signature", v.PredicateType)
		case attestation != "" && v.PredicateType != attestation:
			return nil, fmt.Errorf("it is not the attestation that is wanted but %q", v.PredicateType)
		}
		if attestation != "" {
			if v.Statement, err = protojson.Marshal(res.Statement); err != nil {
				return nil, err
			}
		}
		return v, nil
	}
	return nil, err
}

func verified(digest string, s *signer, res *verify.VerificationResult) *api.VerifiedSignature {
	v := &api.VerifiedSignature{Digest: digest, Key: s.key}
	if s.key == "" && res.Signature != nil && res.Signature.Certificate != nil {
		v.Identity, v.Issuer = printable(res.Signature.Certificate.SubjectAlternativeName), printable(res.Signature.Certificate.Issuer)
	}
	if len(res.VerifiedTimestamps) > 0 {
		t := res.VerifiedTimestamps[0].Timestamp.UTC()
		v.Time = &t
	}
	return v
}

// signedDigest reads a payload of cosign's (containers' "simple signing") and tells
// which of the digests it names: a signature of another image is none of this.
func signedDigest(payload []byte, digests []string) (string, error) {
	var p struct {
		Critical struct {
			Type  string `json:"type"`
			Image struct {
				Digest string `json:"docker-manifest-digest"`
			} `json:"image"`
		} `json:"critical"`
	}
	if err := json.Unmarshal(payload, &p); err != nil {
		return "", fmt.Errorf("what was signed cannot be read: %w", err)
	}
	if p.Critical.Type != "cosign container image signature" && p.Critical.Type != "atomic container signature" {
		return "", fmt.Errorf("what was signed is of type %q, no image", p.Critical.Type)
	}
	for _, d := range digests {
		if d != "" && d == p.Critical.Image.Digest {
			return d, nil
		}
	}
	return "", fmt.Errorf("it is a signature of another image, %s", p.Critical.Image.Digest)
}
