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
	text := boot(t)
	t.Log(text)
	if strings.Contains(text, "SMOKE FAILED") || strings.Count(text, "SMOKE ok") < 27 || !strings.Contains(text, "SMOKE done") {
		t.Errorf("the smoke boot failed:\n%s", text)
	}
}

// TestScriptsOnSecondKernel runs the command line's whole script suite there.
func TestScriptsOnSecondKernel(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the whole script suite in a virtual machine is part of make test-long")
	}
	dir := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "suite.test"), "../script")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.CopyFS(filepath.Join(dir, "testdata"), os.DirFS("../script/testdata")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SMOKE_TIMEOUT", "2700")
	text := boot(t, filepath.Join(dir, "suite.test"))
	t.Log(text)
	if strings.Contains(text, "SUITE FAILED") || !strings.Contains(text, "SUITE passed") {
		t.Errorf("the script suite failed:\n%s", text)
	}
}

// boot returns what the machine said.
func boot(t *testing.T, suite ...string) string {
	t.Helper()
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
	cmd := exec.Command("./smoke.sh", append([]string{bin, filepath.Join(cache, "servin-test", "kernel")}, suite...)...)
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() == 77 {
		t.Skip(strings.TrimSpace(string(out)))
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}
