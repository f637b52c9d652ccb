// Package vm boots real kernels under QEMU with the shipped programs in them.
package vm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestSmokeBoot boots Debian's cloud kernel, where cgroup v2 is the only
// hierarchy and AppArmor is on, starts the engine and runs containers there.
func TestSmokeBoot(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("SKIP: the smoke boot is of an amd64 kernel")
	}
	for _, tool := range []string{"qemu-system-x86_64", "dpkg-deb", "apt-get", "/usr/bin/busybox"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: %s is not installed", tool)
		}
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servind")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = t.TempDir()
	}
	cmd := exec.Command("./smoke.sh", bin, filepath.Join(cache, "servin-test", "kernel"))
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() == 77 {
		t.Skip(strings.TrimSpace(string(out)))
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text := string(out)
	t.Log(text)
	if strings.Contains(text, "SMOKE FAILED") || strings.Count(text, "SMOKE ok") < 27 || !strings.Contains(text, "SMOKE done") {
		t.Errorf("the smoke boot failed:\n%s", text)
	}
}
