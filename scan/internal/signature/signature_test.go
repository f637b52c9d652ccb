package signature

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	protorekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/cloudos-io/cloudos/api"
)

const (
	who    = "https://github.com/acme/app/.github/workflows/release.yml@refs/tags/v1"
	issuer = "https://token.actions.githubusercontent.com"
)

var (
	ours   = digestOf("the image")
	theirs = digestOf("another image")
)

func digestOf(s string) string {
	h := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(h[:])
}

func payload(digest string) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":"r"},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, digest)
}

func publicPEM(t *testing.T, k crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func signBytes(t *testing.T, k crypto.Signer, b []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(b)
	var sig []byte
	var err error
	if _, ok := k.(ed25519.PrivateKey); ok {
		sig, err = k.Sign(rand.Reader, b, crypto.Hash(0))
	} else {
		sig, err = k.Sign(rand.Reader, sum[:], crypto.SHA256)
	}
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// simple is a signature as cosign keeps under a tag.
func simple(data, sig []byte, notes map[string]string) api.SignatureItem {
	all := map[string]string{noteSignature: base64.StdEncoding.EncodeToString(sig)}
	for k, v := range notes {
		all[k] = v
	}
	return api.SignatureItem{Found: "tag t", MediaType: mediaSimple, Annotations: all, Data: data}
}

func statement(predicate, digest string) []byte {
	return fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"r","digest":{"sha256":%q}}],"predicateType":%q,"predicate":{}}`, strings.TrimPrefix(digest, "sha256:"), predicate)
}

// envelope is an attestation as cosign keeps under a tag, signed with a key.
func envelope(t *testing.T, k crypto.Signer, body []byte) api.SignatureItem {
	t.Helper()
	const kind = "application/vnd.in-toto+json"
	pae := fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(body), body)
	b, err := json.Marshal(map[string]any{"payloadType": kind, "payload": body, "signatures": []any{map[string]any{"sig": signBytes(t, k, pae)}}})
	if err != nil {
		t.Fatal(err)
	}
	return api.SignatureItem{Found: "tag a", MediaType: mediaDSSE, Data: b}
}

// TestKeys is about signatures with keys.
func TestKeys(t *testing.T) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rs, _ := rsa.GenerateKey(rand.Reader, 2048)
	ok := simple(payload(ours), signBytes(t, key, payload(ours)), nil)
	for _, c := range []struct {
		name        string
		item        api.SignatureItem
		key         crypto.Signer
		attestation string
		problem     string // "" is verified
	}{
		{"good", ok, key, "", ""},
		{"good, Ed25519", simple(payload(ours), signBytes(t, ed, payload(ours)), nil), ed, "", ""},
		{"good, RSA", simple(payload(ours), signBytes(t, rs, payload(ours)), nil), rs, "", ""},
		{"wrong key", ok, other, "", "signature"},
		{"of another kind of key", ok, rs, "", "signature"},
		{"tampered", simple(bytes.Replace(payload(ours), []byte("null"), []byte("{ }"), 1), signBytes(t, key, payload(ours)), nil), key, "", "signature"},
		{"replayed from another image", simple(payload(theirs), signBytes(t, key, payload(theirs)), nil), key, "", "signature of another image"},
		{"of something else", simple([]byte(`{"critical":{"type":"lunch"}}`), signBytes(t, key, []byte(`{"critical":{"type":"lunch"}}`)), nil), key, "", `of type "lunch"`},
		{"no signature in it", simple(payload(ours), nil, nil), key, "", "no signature"},
		{"with a certificate that nobody asked for", simple(payload(ours), signBytes(t, key, payload(ours)), map[string]string{noteCert: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}), key, "", "certificate"},
		{"attestation", envelope(t, key, statement("https://slsa.dev/provenance/v1", ours)), key, "https://slsa.dev/provenance/v1", ""},
		{"attestation of another kind", envelope(t, key, statement("https://slsa.dev/provenance/v1", ours)), key, "https://spdx.dev/Document", "not the attestation"},
		{"attestation of another image", envelope(t, key, statement("https://slsa.dev/provenance/v1", theirs)), key, "https://slsa.dev/provenance/v1", "digest"},
		{"an attestation is no signature", envelope(t, key, statement("https://slsa.dev/provenance/v1", ours)), key, "", "is an attestation"},
		{"but what cosign 3 signs with is", envelope(t, key, statement(SignPredicate, ours)), key, "", ""},
		{"a signature is no attestation", ok, key, "https://slsa.dev/provenance/v1", "no attestation"},
		{"broken bundle", api.SignatureItem{Found: "r", MediaType: mediaBundle + ".v0.3+json", Data: []byte("{")}, key, "", "cannot be read"},
		{"an escape", api.SignatureItem{Found: "r\x1b[31m", MediaType: mediaDSSE, Data: []byte("\x1b")}, key, "", "cannot be read"},
	} {
		v := Verify(Request{Signatures: api.Signatures{Digests: []string{theirs + "0", ours}, Items: []api.SignatureItem{c.item}}, Signers: []api.SignatureSigner{{Key: publicPEM(t, c.key)}}, Attestation: c.attestation})
		if c.problem == "" {
			if len(v.Verified) != 1 || v.Verified[0].Digest != ours || !strings.HasPrefix(v.Verified[0].Key, "sha256:") {
				t.Errorf("%s: %+v", c.name, v)
			}
			continue
		}
		text := strings.Join(v.Problems, "; ")
		if len(v.Verified) != 0 || !strings.Contains(text, c.problem) || strings.ContainsRune(text, 0x1b) {
			t.Errorf("%s: %+v, want %q", c.name, v, c.problem)
		}
	}
	if v := Verify(Request{Signatures: api.Signatures{Digests: []string{ours}}, Signers: []api.SignatureSigner{{Key: publicPEM(t, key)}}}); len(v.Verified) != 0 || len(v.Problems) != 1 {
		t.Errorf("nothing there: %+v", v)
	}
	for name, s := range map[string]api.SignatureSigner{
		"nothing": {}, "no key": {Key: []byte("x")}, "a private key": {Key: []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")},
		"an identity alone": {Identity: who}, "no root": {Identity: who, Issuer: issuer}, "a broken root": {Identity: who, Issuer: issuer, TrustedRoot: []byte("{")},
	} {
		if v := Verify(Request{Signatures: api.Signatures{Digests: []string{ours}, Items: []api.SignatureItem{ok}}, Signers: []api.SignatureSigner{s}}); len(v.Verified) != 0 || len(v.Problems) == 0 {
			t.Errorf("signer %s: %+v", name, v)
		}
	}
}

// trusted is the trusted root of a Sigstore of the test's own.
func trusted(t *testing.T, s *ca.VirtualSigstore) []byte {
	t.Helper()
	logs := s.RekorLogs()
	for id, l := range logs {
		raw, err := hex.DecodeString(id)
		if err != nil {
			t.Fatal(err)
		}
		l.ID = raw
	}
	// Its certificates are in no log of certificates.
	r, err := root.NewTrustedRoot(root.TrustedRootMediaType01, s.FulcioCertificateAuthorities(), nil, s.TimestampingAuthorities(), logs)
	if err != nil {
		t.Fatal(err)
	}
	b, err := r.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// complete adds what the entries of the test's Sigstore keep to themselves: their kind
// and the log's promise.
func complete(t *testing.T, s *ca.VirtualSigstore, x *protorekor.TransparencyLogEntry) *protorekor.TransparencyLogEntry {
	t.Helper()
	var kind struct{ Kind, APIVersion string }
	if err := json.Unmarshal(x.CanonicalizedBody, &kind); err != nil {
		t.Fatal(err)
	}
	promise, err := s.RekorSignPayload(tlog.RekorPayload{
		Body: base64.StdEncoding.EncodeToString(x.CanonicalizedBody), IntegratedTime: x.IntegratedTime, LogIndex: x.LogIndex, LogID: hex.EncodeToString(x.LogId.KeyId),
	})
	if err != nil {
		t.Fatal(err)
	}
	x.KindVersion = &protorekor.KindVersion{Kind: kind.Kind, Version: kind.APIVersion}
	x.InclusionPromise = &protorekor.InclusionPromise{SignedEntryTimestamp: promise}
	return x
}

// bundled makes a Sigstore bundle as cosign 3 attaches to images.
func bundled(t *testing.T, s *ca.VirtualSigstore, e *ca.TestEntity) api.SignatureItem {
	t.Helper()
	vc, err := e.VerificationContent()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := e.SignatureContent()
	if err != nil {
		t.Fatal(err)
	}
	env := sc.EnvelopeContent().RawEnvelope()
	body, err := env.DecodeB64Payload()
	if err != nil {
		t.Fatal(err)
	}
	b := &protobundle.Bundle{MediaType: mediaBundle + ".v0.3+json", VerificationMaterial: &protobundle.VerificationMaterial{
		Content:                   &protobundle.VerificationMaterial_Certificate{Certificate: &protocommon.X509Certificate{RawBytes: vc.Certificate().Raw}},
		TimestampVerificationData: &protobundle.TimestampVerificationData{},
	}, Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &protodsse.Envelope{PayloadType: env.PayloadType, Payload: body, Signatures: []*protodsse.Signature{{Sig: sc.Signature()}}}}}
	stamps, _ := e.Timestamps()
	for _, stamp := range stamps {
		b.VerificationMaterial.TimestampVerificationData.Rfc3161Timestamps = append(b.VerificationMaterial.TimestampVerificationData.Rfc3161Timestamps, &protocommon.RFC3161SignedTimestamp{SignedTimestamp: stamp})
	}
	entries, err := e.TlogEntries()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range entries {
		b.VerificationMaterial.TlogEntries = append(b.VerificationMaterial.TlogEntries, complete(t, s, x.TransparencyLogEntry()))
	}
	raw, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return api.SignatureItem{Found: "referrer r", MediaType: mediaBundle + ".v0.3+json", Data: raw}
}

// classic makes what cosign 2 keeps under a tag for a signature with a certificate.
func classic(t *testing.T, s *ca.VirtualSigstore, e *ca.TestEntity, data []byte) api.SignatureItem {
	t.Helper()
	vc, err := e.VerificationContent()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := e.SignatureContent()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := e.TlogEntries()
	if err != nil {
		t.Fatal(err)
	}
	x := complete(t, s, entries[0].TransparencyLogEntry())
	rekor, err := json.Marshal(map[string]any{"SignedEntryTimestamp": x.GetInclusionPromise().GetSignedEntryTimestamp(), "Payload": map[string]any{
		"body": x.GetCanonicalizedBody(), "integratedTime": x.GetIntegratedTime(), "logIndex": x.GetLogIndex(), "logID": hex.EncodeToString(x.GetLogId().GetKeyId()),
	}})
	if err != nil {
		t.Fatal(err)
	}
	return simple(data, sc.Signature(), map[string]string{
		noteCert: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vc.Certificate().Raw})), noteRekor: string(rekor),
	})
}

// TestIdentities is about signatures with certificates, offline.
func TestIdentities(t *testing.T) {
	mine, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	attest := func(s *ca.VirtualSigstore, body []byte) api.SignatureItem {
		vc, err := s.AttestAtTime(who, issuer, body, time.Now().Add(5*time.Minute), true)
		if err != nil {
			t.Fatal(err)
		}
		return bundled(t, s, vc)
	}
	sign := func(s *ca.VirtualSigstore, data []byte) api.SignatureItem {
		e, err := s.SignWithVersion(who, issuer, data, "v0.1")
		if err != nil {
			t.Fatal(err)
		}
		return classic(t, s, e, data)
	}
	withoutLog := sign(mine, payload(ours))
	delete(withoutLog.Annotations, noteRekor)
	good := api.SignatureSigner{Identity: who, Issuer: issuer, TrustedRoot: trusted(t, mine)}
	with := func(change func(s *api.SignatureSigner)) api.SignatureSigner {
		s := good
		change(&s)
		return s
	}
	for _, c := range []struct {
		name    string
		item    api.SignatureItem
		signer  api.SignatureSigner
		verdict bool
	}{
		{"bundle", attest(mine, statement(SignPredicate, ours)), good, true},
		{"bundle of another image", attest(mine, statement(SignPredicate, theirs)), good, false},
		{"bundle that attests", attest(mine, statement("https://slsa.dev/provenance/v1", ours)), good, false},
		{"bundle of another Sigstore", attest(foreign, statement(SignPredicate, ours)), good, false},
		{"tag", sign(mine, payload(ours)), good, true},
		{"tag of another image", sign(mine, payload(theirs)), good, false},
		{"tag of another Sigstore", sign(foreign, payload(ours)), good, false},
		{"tag that is in no log", withoutLog, good, false},
		{"pattern", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.Identity = "https://github.com/acme/**" }), true},
		{"pattern that ends too early", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.Identity = "https://github.com/acme/*" }), false},
		{"pattern is no expression", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.Identity = "https://githubXcom/**" }), false},
		{"another identity", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.Identity = "mallory@example.com" }), false},
		{"another issuer", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.Issuer = "https://accounts.example.com" }), false},
		{"the wrong root", sign(mine, payload(ours)), with(func(s *api.SignatureSigner) { s.TrustedRoot = trusted(t, foreign) }), false},
	} {
		v := Verify(Request{Signatures: api.Signatures{Digests: []string{ours}, Items: []api.SignatureItem{c.item}}, Signers: []api.SignatureSigner{c.signer}})
		if (len(v.Verified) > 0) != c.verdict {
			t.Errorf("%s: %+v", c.name, v)
			continue
		}
		if c.verdict && (v.Verified[0].Identity != who || v.Verified[0].Issuer != issuer || v.Verified[0].Time == nil) {
			t.Errorf("%s: %+v", c.name, v.Verified[0])
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(mediaSimple, payload(ours), "AAAA", "", `{"SignedEntryTimestamp":"AAAA","Payload":{"body":"e30=","logID":"00"}}`)
	f.Add(mediaDSSE, []byte(`{"payloadType":"t","payload":"AAAA","signatures":[{"sig":"AAAA"}]}`), "", "", "")
	f.Add(mediaBundle+".v0.3+json", []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`), "", "", "")
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, _ := x509.MarshalPKIXPublicKey(key.Public())
	pub := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	f.Fuzz(func(t *testing.T, kind string, data []byte, sig, cert, rekor string) {
		it := api.SignatureItem{MediaType: kind, Data: data, Annotations: map[string]string{noteSignature: sig, noteCert: cert, noteRekor: rekor, noteTimestamp: rekor}}
		v := Verify(Request{Signatures: api.Signatures{Digests: []string{ours}, Items: []api.SignatureItem{it}}, Signers: []api.SignatureSigner{{Key: pub}}})
		if len(v.Verified) > 0 {
			t.Error("verified")
		}
	})
}
