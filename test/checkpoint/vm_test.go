package checkpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSecondKernel runs this suite on Debian's kernel under QEMU, which CRIU knows,
// with cgroup v2 alone.
func TestSecondKernel(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the tests with CRIU in a virtual machine are part of make test-long")
	}
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "suite.test"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Mkdir(filepath.Join(dir, "testdata"), 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = dir
	}
	cmd := exec.Command("../vm/smoke.sh", bin, filepath.Join(cache, "servin-test", "kernel"), filepath.Join(dir, "suite.test"))
	// What iptables loads by itself, for CRIU to lock the network with.
	libs, _ := filepath.Glob("/usr/lib/*/xtables/lib*t_*.so")
	cmd.Env = append(os.Environ(), "SMOKE_TIMEOUT=2700", "SMOKE_FILES="+strings.Join(libs, " "),
		"SMOKE_EXTRA=criu iptables-restore ip6tables-restore iptables-save ip6tables-save nft unshare tar gzip",
		"SMOKE_MODULES=xt_mark|xt_conntrack|nft_compat|x_tables|inet_diag|tcp_diag|udp_diag|raw_diag|unix_diag|af_packet_diag|netlink_diag")
	b, err := cmd.CombinedOutput()
	out := string(b)
	if cmd.ProcessState.ExitCode() == 77 {
		t.Skip(out)
	}
	t.Log(out)
	if err != nil || !strings.Contains(out, "SUITE passed") || !strings.Contains(out, "--- PASS: TestMigrate") {
		t.Errorf("the suite failed there: %v", err)
	}
}
