package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSELinux runs containers under an enforced policy, made for it.
func TestSELinux(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the boot with SELinux is part of make test-long")
	}
	secilc, err := exec.LookPath("secilc")
	if err != nil {
		t.Skip("SKIP: secilc is not installed")
	}
	dir := t.TempDir()
	source, err := os.ReadFile("testdata/selinux/policy.cil")
	if err != nil {
		t.Fatal(err)
	}
	var all, order strings.Builder
	for i := range 1024 {
		fmt.Fprintf(&all, "(category c%d)\n", i)
		fmt.Fprintf(&order, " c%d", i)
	}
	text := strings.Replace(string(source), "@CATEGORIES@", all.String()+"(categoryorder ("+order.String()+"))", 1)
	script, err := os.ReadFile("testdata/selinux/run")
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"policy.cil": text, "run": string(script)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(secilc, "-c", "33", "-o", filepath.Join(dir, "policy"), "-f", os.DevNull, filepath.Join(dir, "policy.cil")).CombinedOutput(); err != nil {
		t.Fatalf("secilc: %v: %s", err, out)
	}
	t.Setenv("SMOKE_CHECKS", dir)
	t.Setenv("SMOKE_APPEND", "security=selinux selinux=1")
	said := boot(t)
	t.Log(said)
	if strings.Contains(said, "SMOKE FAILED") || strings.Count(said, "SMOKE ok") < 27 || !strings.Contains(said, "SMOKE done") {
		t.Error("the boot with SELinux failed")
	}
}
