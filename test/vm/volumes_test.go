package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestVolumesOnSecondKernel runs the tests of volumes on a kernel and a disk that
// have project quotas.
func TestVolumesOnSecondKernel(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the tests of volumes in a virtual machine are part of make test-long")
	}
	dir := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "suite.test"), "../../internal/volume")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Mkdir(filepath.Join(dir, "testdata"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SMOKE_TIMEOUT", "600")
	text := boot(t, filepath.Join(dir, "suite.test"))
	t.Log(text)
	if strings.Contains(text, "SUITE FAILED") || !strings.Contains(text, "SUITE passed") || !strings.Contains(text, "--- PASS: TestSizeLimit") {
		t.Errorf("the tests of volumes failed:\n%s", text)
	}
}
