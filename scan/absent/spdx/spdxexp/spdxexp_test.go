package spdxexp

import (
	"strings"
	"testing"
)

func TestValidateLicenses(t *testing.T) {
	for s, want := range map[string]bool{
		"MIT": true, "mit": true, "GPL-2.0-or-later": true, "GPL-2.0+": true, "MIT AND (Apache-2.0 OR BSD-3-Clause)": true,
		"GPL-2.0-only WITH Classpath-exception-2.0": true, "LicenseRef-mine": true, "DocumentRef-a:LicenseRef-b": true,
		"": false, "MIT AND": false, "(MIT": false, "MIT)": false, "MIT MIT": false, "no such": false, "MIT WITH": false, "OR": false,
		strings.Repeat("(", 60) + "MIT" + strings.Repeat(")", 60): false,
		strings.Repeat("x", maxLength+1):                          false,
	} {
		if got, _ := ValidateLicenses([]string{s}); got != want {
			t.Errorf("%.40q: %v", s, got)
		}
	}
}

func FuzzValidateLicenses(f *testing.F) {
	f.Add("MIT AND (Apache-2.0 OR BSD-3-Clause)")
	f.Fuzz(func(_ *testing.T, s string) { ValidateLicenses([]string{s}) })
}
