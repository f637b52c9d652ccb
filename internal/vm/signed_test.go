package vm

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// TestSignedImage opens images with and without signatures, where keys are configured and where none are.
func TestSignedImage(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	ours := []release.Key{{Public: public}}
	dir, _ := imageIn(t)
	raw, err := os.ReadFile(filepath.Join(dir, vmwire.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	seal := func(description string, keys ...ed25519.PrivateKey) string {
		t.Helper()
		b, err := release.SealImage([]byte(description), keys...)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const any, need = "", "with keys"
	for name, c := range map[string]struct{ envelope, keys, nokeys string }{
		"by us":            {seal(string(raw), private), "", ""},
		"by another":       {seal(string(raw), other), "none of the keys", ""},
		"by nobody":        {seal(string(raw)), "not signed", ""},
		"of another image": {seal(string(raw)+" ", private), "is not what", "is not what"},
		"damaged":          {"{", "cannot read", "cannot read"},
		"none":             {"", "has no image.sig.json", ""},
	} {
		p := filepath.Join(dir, SignatureFile)
		os.Remove(p)
		if c.envelope != "" {
			if err := os.WriteFile(p, []byte(c.envelope), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for keys, want := range map[string]string{need: c.keys, any: c.nokeys} {
			trusted := ours
			if keys == any {
				trusted = nil
			}
			_, err := OpenImage(dir, trusted, nil)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%s %s: %v, want %q", name, keys, err, want)
			}
		}
	}
}
