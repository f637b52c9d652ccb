package api

import "time"

// Signatures is what a registry holds in signatures of an image, as it is: nothing
// of it is checked. Who wants to know whether an image is signed gives it to a
// verifier.
type Signatures struct {
	// Image is the name that was asked for.
	Image string `json:"image"`
	// Digests are those of the image here that a signature may be of: its index,
	// its manifest.
	Digests []string `json:"digests"`
	// Items are the layers of what was found; an image without any has none.
	Items []SignatureItem `json:"items"`
}

// SignatureItem is one signature or attestation.
type SignatureItem struct {
	// Found says where: "tag sha256-….sig", "referrer sha256:…".
	Found       string            `json:"found"`
	MediaType   string            `json:"mediaType"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Data        []byte            `json:"data"`
}

// SignatureSigner is one whose signature is accepted: a public key, or the identity
// in a certificate and who vouches for it, by a trusted root.
type SignatureSigner struct {
	// Key is a public key, PEM.
	Key []byte `json:"key,omitempty"`
	// Identity and Issuer are patterns: "*" is anything but a slash, "**" anything.
	Identity string `json:"identity,omitempty"`
	Issuer   string `json:"issuer,omitempty"`
	// TrustedRoot is Sigstore's trusted_root.json. With a key it is not needed; given,
	// the signature must be in its transparency log too.
	TrustedRoot []byte `json:"trustedRoot,omitempty"`
}

// SignatureRequest asks a verifier.
type SignatureRequest struct {
	Signatures Signatures        `json:"signatures"`
	Signers    []SignatureSigner `json:"signers"`
	// Attestation is the predicate type of the attestation that is wanted; "" wants a
	// signature of the image itself.
	Attestation string `json:"attestation,omitempty"`
}

// SignatureVerdict is the answer.
type SignatureVerdict struct {
	// Verified are the good ones: empty means that the image is not signed as wanted.
	Verified []VerifiedSignature `json:"verified,omitempty"`
	// Problems say why each of the others does not count.
	Problems []string `json:"problems,omitempty"`
}

// VerifiedSignature is a signature that was found good.
type VerifiedSignature struct {
	Digest string `json:"digest"`
	Found  string `json:"found"`
	// Key is the SHA-256 of the public key that made it, or Identity and Issuer are
	// those of the certificate.
	Key           string     `json:"key,omitempty"`
	Identity      string     `json:"identity,omitempty"`
	Issuer        string     `json:"issuer,omitempty"`
	Time          *time.Time `json:"time,omitempty"`
	PredicateType string     `json:"predicateType,omitempty"`
	// Statement is the attestation's in-toto statement.
	Statement []byte `json:"statement,omitempty"`
}
