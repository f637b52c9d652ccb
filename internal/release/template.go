package release

import "strings"

// Fill puts the slot into a template.
func Fill(text, slot string) []byte {
	return []byte(strings.ReplaceAll(text, SlotMark, slot))
}

// RawName is the file beside a filled template with the template itself, whose digest is
// the one that was signed.
func RawName(name string) string {
	base, _, _ := strings.Cut(name, ".")
	return base + ".tpl"
}
