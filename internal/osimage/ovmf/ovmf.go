// Package ovmf puts an owner's certificate into the variables of OVMF, the UEFI
// firmware of virtual machines, as PK, KEK and db, and switches Secure Boot on: a
// machine with these variables starts nothing but what the owner signed. Real firmware takes
// the certificate in its setup program. The builder of images imports it.
//
// The store is EDK2's, of authenticated variables (MdeModulePkg's VariableFormat.h);
// lists of signatures are those of the UEFI specification, 32.4.1.
package ovmf

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"unicode/utf16"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// guid is an id as firmware stores it.
type guid [16]byte

var (
	volumeID   = guid{0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50}
	storeID    = guid{0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92}
	globalID   = guid{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	databaseID = guid{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
	enableID   = guid{0xc7, 0x0b, 0xa3, 0xf0, 0x08, 0xaf, 0x56, 0x45, 0x99, 0xc4, 0x00, 0x10, 0x09, 0xc9, 0x3a, 0x44}
	customID   = guid{0x0c, 0xec, 0x76, 0xc0, 0x28, 0x70, 0x99, 0x43, 0xa0, 0x72, 0x71, 0xee, 0x5c, 0x44, 0x8b, 0x9f}
	x509ID     = guid{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
	// ownerID tells who enrolled a signature; it means nothing to firmware.
	ownerID = guid{0x63, 0x6c, 0x6f, 0x75, 0x64, 0x6f, 0x73, 0x40, 0x80, 0x6f, 0x77, 0x6e, 0x65, 0x72, 0x00, 0x01}
)

const (
	variableMagic = 0x55aa
	variableSize  = 60 // of the header
	stateAdded    = 0x3f

	atBoot        = 0x03 // non-volatile, while booting
	authenticated = 0x27 // also at run time, and changed by signed updates alone
)

// SignatureList is a certificate as an EFI_SIGNATURE_LIST, which tools for firmware take.
func SignatureList(cert *x509.Certificate) []byte {
	b := append([]byte(nil), x509ID[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(28+16+len(cert.Raw)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(16+len(cert.Raw)))
	b = append(b, ownerID[:]...)
	return append(b, cert.Raw...)
}

// Enroll returns empty variables (Debian's OVMF_VARS_4M.fd) with the certificate in
// them. Variables with keys already are refused.
func Enroll(vars []byte, cert *x509.Certificate) ([]byte, error) {
	bad := fault.New(fault.Invalid, "this is no file of OVMF's variables (Debian: /usr/share/OVMF/OVMF_VARS_4M.fd)")
	if len(vars) < 0x48 || !bytes.Equal(vars[16:32], volumeID[:]) || string(vars[40:44]) != "_FVH" {
		return nil, bad
	}
	store := int(binary.LittleEndian.Uint16(vars[48:]))
	if store+28 > len(vars) || !bytes.Equal(vars[store:store+16], storeID[:]) {
		return nil, bad
	}
	end := store + int(binary.LittleEndian.Uint32(vars[store+16:]))
	if end < store+28 || end > len(vars) {
		return nil, bad
	}
	at := store + 28
	for at+variableSize <= end && binary.LittleEndian.Uint16(vars[at:]) == variableMagic {
		name, data := int(binary.LittleEndian.Uint32(vars[at+36:])), int(binary.LittleEndian.Uint32(vars[at+40:]))
		if name < 0 || data < 0 || name > end || data > end || at+variableSize+name+data > end {
			return nil, bad
		}
		if vars[at+2] == stateAdded && bytes.Equal(vars[at+variableSize:at+variableSize+name], wide("PK")) {
			return nil, fault.New(fault.Conflict, "these variables have keys already: take the empty ones (OVMF_VARS_4M.fd)")
		}
		at = (at + variableSize + name + data + 3) &^ 3
	}
	out := append([]byte(nil), vars...)
	list := SignatureList(cert)
	for _, v := range []struct {
		name  string
		of    guid
		attrs uint32
		data  []byte
	}{
		{"db", databaseID, authenticated, list}, {"KEK", globalID, authenticated, list}, {"PK", globalID, authenticated, list},
		{"SecureBootEnable", enableID, atBoot, []byte{1}}, {"CustomMode", customID, atBoot, []byte{0}},
	} {
		b := variable(v.name, v.of, v.attrs, v.data)
		if at+len(b) > end {
			return nil, fault.New(fault.Exhausted, "the file of variables is full")
		}
		copy(out[at:], b)
		at = (at + len(b) + 3) &^ 3
	}
	return out, nil
}

func wide(s string) []byte {
	var b []byte
	for _, c := range utf16.Encode([]rune(s + "\x00")) {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return b
}

func variable(name string, of guid, attrs uint32, data []byte) []byte {
	b := make([]byte, variableSize)
	binary.LittleEndian.PutUint16(b, variableMagic)
	b[2] = stateAdded
	binary.LittleEndian.PutUint32(b[4:], attrs)
	if attrs == authenticated { // an update must be later: 2024-01-01
		binary.LittleEndian.PutUint16(b[16:], 2024)
		b[18], b[19] = 1, 1
	}
	n := wide(name)
	binary.LittleEndian.PutUint32(b[36:], uint32(len(n)))
	binary.LittleEndian.PutUint32(b[40:], uint32(len(data)))
	copy(b[44:], of[:])
	return append(append(b, n...), data...)
}
