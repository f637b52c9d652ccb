package pe

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
)

var (
	oidSignedData   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidIndirectData = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
	oidImageData    = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 15}
	oidContentType  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidDigest       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSHA256       = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidRSA          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
)

// Digest is what a signature of the program is over: everything but the check sum, the place of the
// signatures and the signatures themselves.
func Digest(program []byte) ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	p, err := parse(program)
	if err != nil {
		return sum, err
	}
	end := int64(len(program))
	off, n := p.certificates()
	if off != 0 || n != 0 {
		if off < int64(p.table) || n < 0 || off+n != end {
			return sum, errors.New("the program's signatures are not at its end")
		}
		end = off
	}
	h := sha256.New()
	check, dir := p.opt+optCheckSum, p.opt+optDirs+8*certDirectory
	h.Write(program[:check])
	h.Write(program[check+4 : dir])
	h.Write(program[dir+8 : end])
	if pad := (8 - end%8) % 8; off == 0 && pad > 0 {
		h.Write(make([]byte, pad)) // as it will be when it is signed
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Sign returns the program with a signature, behind those that it has.
func Sign(program []byte, key crypto.Signer, cert *x509.Certificate) ([]byte, error) {
	pub, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("the key is no RSA key: firmware knows no other")
	}
	if !pub.Equal(cert.PublicKey) {
		return nil, errors.New("the certificate is of another key")
	}
	sum, err := Digest(program)
	if err != nil {
		return nil, err
	}
	blob, err := signedData(sum[:], key, cert)
	if err != nil {
		return nil, fmt.Errorf("cannot sign: %w", err)
	}
	b := append([]byte(nil), program...)
	b = append(b, make([]byte, (8-len(b)%8)%8)...)
	p, err := parse(b)
	if err != nil {
		return nil, err
	}
	off, n := p.certificates()
	if off == 0 {
		off = int64(len(b))
	}
	entry := make([]byte, 8, 8+len(blob)+8)
	binary.LittleEndian.PutUint32(entry, uint32(8+len(blob)))
	binary.LittleEndian.PutUint16(entry[4:], 0x0200)
	binary.LittleEndian.PutUint16(entry[6:], 0x0002) // PKCS #7
	entry = append(entry, blob...)
	entry = append(entry, make([]byte, (8-len(entry)%8)%8)...)
	p.put(p.opt+optDirs+8*certDirectory, uint32(off))
	p.put(p.opt+optDirs+8*certDirectory+4, uint32(n+int64(len(entry))))
	return append(b, entry...), nil
}

// DER of the content, in the words of the two specifications.
type (
	attributeTypeAndValue struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	digestInfo struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	indirectData struct {
		Data   attributeTypeAndValue
		Digest digestInfo
	}
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"optional"`
	}
	issuerAndSerial struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}
	signerInfo struct {
		Version    int
		Signer     issuerAndSerial
		DigestAlg  pkix.AlgorithmIdentifier
		Attributes asn1.RawValue
		SigAlg     pkix.AlgorithmIdentifier
		Signature  []byte
	}
	signed struct {
		Version      int
		DigestAlgs   []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue
		Signers      []signerInfo `asn1:"set"`
	}
)

// explicit wraps DER in a context's tag.
func explicit(tag int, der []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: der}
}

func signedData(sum []byte, key crypto.Signer, cert *x509.Certificate) ([]byte, error) {
	sha := pkix.AlgorithmIdentifier{Algorithm: oidSHA256, Parameters: asn1.NullRawValue}
	// SpcPeImageData: no flags, and a file of no name.
	imageData := []byte{0x30, 0x09, 0x03, 0x01, 0x00, 0xa0, 0x04, 0xa2, 0x02, 0x80, 0x00}
	content, err := asn1.Marshal(indirectData{
		Data:   attributeTypeAndValue{oidImageData, asn1.RawValue{FullBytes: imageData}},
		Digest: digestInfo{sha, sum},
	})
	if err != nil {
		return nil, err
	}
	var inner asn1.RawValue // what is signed is without tag and length
	if _, err := asn1.Unmarshal(content, &inner); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(inner.Bytes)
	kind, err := asn1.Marshal(oidIndirectData)
	if err != nil {
		return nil, err
	}
	octets, err := asn1.Marshal(digest[:])
	if err != nil {
		return nil, err
	}
	attrs, err := asn1.MarshalWithParams([]attribute{
		{oidContentType, []asn1.RawValue{{FullBytes: kind}}},
		{oidDigest, []asn1.RawValue{{FullBytes: octets}}},
	}, "set")
	if err != nil {
		return nil, err
	}
	over := sha256.Sum256(attrs)
	sig, err := key.Sign(rand.Reader, over[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	var set asn1.RawValue
	if _, err := asn1.Unmarshal(attrs, &set); err != nil {
		return nil, err
	}
	body, err := asn1.Marshal(signed{
		Version:      1,
		DigestAlgs:   []pkix.AlgorithmIdentifier{sha},
		Content:      contentInfo{oidIndirectData, explicit(0, content)},
		Certificates: explicit(0, cert.Raw),
		Signers: []signerInfo{{
			Version: 1, Signer: issuerAndSerial{asn1.RawValue{FullBytes: cert.RawIssuer}, cert.SerialNumber}, DigestAlg: sha,
			Attributes: explicit(0, set.Bytes), SigAlg: pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue}, Signature: sig,
		}},
	})
	if err != nil {
		return nil, err
	}
	// Firmware takes SignedData with or without its envelope; tools want it.
	return asn1.Marshal(contentInfo{oidSignedData, explicit(0, body)})
}
