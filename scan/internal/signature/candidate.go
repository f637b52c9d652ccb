package signature

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	protorekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"google.golang.org/protobuf/proto"

	"github.com/cloudos-io/cloudos/api"
)

// What cosign writes.
const (
	mediaSimple = "application/vnd.dev.cosign.simplesigning.v1+json"
	mediaDSSE   = "application/vnd.dsse.envelope.v1+json"
	mediaBundle = "application/vnd.dev.sigstore.bundle"

	noteSignature = "dev.cosignproject.cosign/signature"
	noteCert      = "dev.sigstore.cosign/certificate"
	noteChain     = "dev.sigstore.cosign/chain"
	noteRekor     = "dev.sigstore.cosign/bundle"
	noteTimestamp = "dev.sigstore.cosign/rfc3161timestamp"
)

// candidate is what may be a signature. payload is set where the signature is of
// bytes that name the image, instead of a statement about it.
type candidate struct {
	bundle  *protobundle.Bundle
	payload []byte
	cert    bool // it was made with a certificate
}

// read makes a candidate of what a registry holds; nil for what is of another kind.
func read(it api.SignatureItem) (*candidate, error) {
	switch {
	case strings.HasPrefix(it.MediaType, mediaBundle):
		b := new(bundle.Bundle)
		if err := b.UnmarshalJSON(it.Data); err != nil {
			return nil, fmt.Errorf("the bundle cannot be read: %w", err)
		}
		return &candidate{bundle: b.Bundle, cert: b.VerificationMaterial.GetPublicKey() == nil}, nil
	case it.MediaType == mediaSimple:
		sig, err := base64.StdEncoding.DecodeString(it.Annotations[noteSignature])
		if err != nil || len(sig) == 0 {
			return nil, errors.New("there is no signature in its annotations")
		}
		sum := sha256.Sum256(it.Data)
		c := &candidate{payload: it.Data, bundle: &protobundle.Bundle{Content: &protobundle.Bundle_MessageSignature{MessageSignature: &protocommon.MessageSignature{
			MessageDigest: &protocommon.HashOutput{Algorithm: protocommon.HashAlgorithm_SHA2_256, Digest: sum[:]}, Signature: sig,
		}}}}
		return c, c.material(it.Annotations)
	case it.MediaType == mediaDSSE:
		var e struct {
			PayloadType string `json:"payloadType"`
			Payload     []byte `json:"payload"`
			Signatures  []struct {
				KeyID string `json:"keyid"`
				Sig   []byte `json:"sig"`
			} `json:"signatures"`
		}
		if err := json.Unmarshal(it.Data, &e); err != nil {
			return nil, fmt.Errorf("the envelope cannot be read: %w", err)
		}
		env := &protodsse.Envelope{PayloadType: e.PayloadType, Payload: e.Payload}
		for _, s := range e.Signatures {
			env.Signatures = append(env.Signatures, &protodsse.Signature{Sig: s.Sig, Keyid: s.KeyID})
		}
		c := &candidate{bundle: &protobundle.Bundle{Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: env}}}
		return c, c.material(it.Annotations)
	}
	return nil, nil
}

// material reads what cosign keeps beside a signature: certificates, the log's
// promise, a timestamp.
func (c *candidate) material(notes map[string]string) error {
	m := &protobundle.VerificationMaterial{Content: &protobundle.VerificationMaterial_PublicKey{PublicKey: &protocommon.PublicKeyIdentifier{}}}
	c.bundle.MediaType, c.bundle.VerificationMaterial = mediaBundle+"+json;version=0.1", m
	if text := notes[noteCert]; text != "" {
		chain := &protocommon.X509CertificateChain{}
		for rest := []byte(text + "\n" + notes[noteChain]); len(chain.Certificates) < 10; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			chain.Certificates = append(chain.Certificates, &protocommon.X509Certificate{RawBytes: block.Bytes})
		}
		if len(chain.Certificates) == 0 {
			return errors.New("its certificate cannot be read")
		}
		c.cert = true
		m.Content = &protobundle.VerificationMaterial_X509CertificateChain{X509CertificateChain: chain}
	}
	if text := notes[noteRekor]; text != "" {
		e, err := logEntry([]byte(text))
		if err != nil {
			return fmt.Errorf("the log's promise cannot be read: %w", err)
		}
		m.TlogEntries = []*protorekor.TransparencyLogEntry{e}
	}
	if text := notes[noteTimestamp]; text != "" {
		var t struct{ SignedRFC3161Timestamp []byte }
		if err := json.Unmarshal([]byte(text), &t); err != nil {
			return fmt.Errorf("its timestamp cannot be read: %w", err)
		}
		m.TimestampVerificationData = &protobundle.TimestampVerificationData{Rfc3161Timestamps: []*protocommon.RFC3161SignedTimestamp{{SignedTimestamp: t.SignedRFC3161Timestamp}}}
	}
	return nil
}

// logEntry reads cosign's form of an entry of Rekor.
func logEntry(text []byte) (*protorekor.TransparencyLogEntry, error) {
	var b struct {
		SignedEntryTimestamp []byte
		Payload              struct {
			Body           []byte `json:"body"`
			IntegratedTime int64  `json:"integratedTime"`
			LogIndex       int64  `json:"logIndex"`
			LogID          string `json:"logID"`
		}
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, err
	}
	id, err := hex.DecodeString(b.Payload.LogID)
	if err != nil {
		return nil, err
	}
	var kind struct{ Kind, APIVersion string }
	if err := json.Unmarshal(b.Payload.Body, &kind); err != nil {
		return nil, err
	}
	return &protorekor.TransparencyLogEntry{
		LogIndex: b.Payload.LogIndex, LogId: &protocommon.LogId{KeyId: id}, KindVersion: &protorekor.KindVersion{Kind: kind.Kind, Version: kind.APIVersion},
		IntegratedTime: b.Payload.IntegratedTime, InclusionPromise: &protorekor.InclusionPromise{SignedEntryTimestamp: b.SignedEntryTimestamp}, CanonicalizedBody: b.Payload.Body,
	}, nil
}

// entity is the candidate as a signer looks at it.
func (c *candidate) entity(s *signer) (*bundle.Bundle, error) {
	if s.key == "" && !c.cert {
		return nil, errors.New("it was made with a key, not with a certificate")
	}
	b := proto.CloneOf(c.bundle)
	if s.key != "" && c.cert {
		return nil, errors.New("it was made with a certificate, not with this key")
	}
	return bundle.NewBundle(b)
}
