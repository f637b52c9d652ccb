package osinit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/slots"
)

func TestSeries(t *testing.T) {
	for kernel, want := range map[string]string{"6.1.0-56-cloud-amd64": "6.1", "6.12.9": "6.12", "6.1": "6.1", "": ""} {
		if got := series(kernel); got != want {
			t.Errorf("%q is of %q", kernel, got)
		}
	}
	if series("6.1.0") == series("6.12.0") {
		t.Error("two series are one")
	}
}

// TestSystemIn tells nothing of a slot without a whole system.
func TestSystemIn(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, slots.Folder("b"))
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := systemIn(dir, "b"); err == nil || !strings.Contains(err.Error(), "no whole system") {
		t.Errorf("an empty slot: %v", err)
	}
	if err := os.WriteFile(filepath.Join(folder, slots.SealedFile), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := systemIn(dir, "b"); err == nil {
		t.Error("a slot with a broken envelope is a system")
	}
}
