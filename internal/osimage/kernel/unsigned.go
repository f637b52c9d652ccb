package kernel

import (
	"bytes"
	"encoding/binary"
)

// What the kernel's scripts/sign-file puts behind a module: a signature, then this
// struct module_signature, then the mark.
const (
	signatureMark = "~Module signature appended~\n"
	signatureTail = 12
)

// unsigned returns a module without the signature behind it, or as it is.
func unsigned(data []byte) []byte {
	body, ok := bytes.CutSuffix(data, []byte(signatureMark))
	if !ok || len(body) < signatureTail {
		return data
	}
	tail := body[len(body)-signatureTail:]
	body = body[:len(body)-signatureTail]
	// The lengths of the signer's name and of the key's are bytes, that of the signature is 32 bits.
	n := int64(tail[3]) + int64(tail[4]) + int64(binary.BigEndian.Uint32(tail[8:]))
	if n > int64(len(body)) {
		return data
	}
	return body[:int64(len(body))-n]
}

// DropSignatures removes the modules' signatures: a kernel that does not insist on
// them hashes each module nevertheless, a fifth of what it does of a start.
func (k *Kernel) DropSignatures() {
	for _, m := range k.Modules {
		m.Data = unsigned(m.Data)
	}
}
