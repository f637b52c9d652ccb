package container

import (
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestCheckName(t *testing.T) {
	for name, want := range map[string]string{
		"web": "web", "/web": "web", "a1": "a1", "A.b-c_9": "A.b-c_9", "0x": "0x",
		"": "", "a": "", "/": "", "-a": "", "_a": "", ".a": "", "a/b": "", "a b": "", "ä1": "", "a\x00b": "", "//ab": "", "..": "",
		strings.Repeat("n", 255): strings.Repeat("n", 255), strings.Repeat("n", 256): "",
	} {
		got, err := CheckName(name)
		if got != want || (want == "") != fault.Is(err, fault.Invalid) {
			t.Errorf("CheckName(%q) = %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestRandomNameIsValid(t *testing.T) {
	seen := map[string]bool{}
	for i := range 2000 {
		n := RandomName(i % 2)
		if _, err := CheckName(n); err != nil {
			t.Fatal(err)
		}
		seen[n] = true
	}
	if len(seen) < 1500 {
		t.Errorf("only %d of 2000 names differ", len(seen))
	}
}
