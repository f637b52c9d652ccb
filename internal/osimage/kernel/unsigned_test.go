package kernel

import (
	"strings"
	"testing"
)

func TestUnsigned(t *testing.T) {
	tail := func(signer, key byte, sig string) string {
		return "\x00\x01\x02" + string([]byte{signer, key}) + "\x00\x00\x00" + sig
	}
	for name, c := range map[string]struct{ in, want string }{
		"signed":             {"\x7fELF body" + "SIGNATURE" + tail(0, 0, "\x00\x00\x00\x09") + signatureMark, "\x7fELF body"},
		"with names":         {"\x7fELF body" + "whoidSIG" + tail(3, 2, "\x00\x00\x00\x03") + signatureMark, "\x7fELF body"},
		"not signed":         {"\x7fELF body", "\x7fELF body"},
		"empty":              {"", ""},
		"the mark alone":     {signatureMark, signatureMark},
		"longer than all":    {"body" + tail(0, 0, "\xff\xff\xff\xff") + signatureMark, "body" + tail(0, 0, "\xff\xff\xff\xff") + signatureMark},
		"the mark in front":  {signatureMark + "body", signatureMark + "body"},
		"nothing but a sign": {strings.Repeat("S", 4) + tail(0, 0, "\x00\x00\x00\x04") + signatureMark, ""},
	} {
		if got := string(unsigned([]byte(c.in))); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
