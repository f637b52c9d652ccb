// Package adopt brings what a real Docker and a real Podman have to the engine.
package adopt

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestAdopt(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: adopting from other engines is part of make test-long")
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	for who, needs := range map[string]string{"docker": "/usr/sbin/dockerd", "podman": "podman"} {
		t.Run(who, func(t *testing.T) {
			if _, err := exec.LookPath(needs); err != nil {
				t.Skipf("SKIP: %s is not installed", needs)
			}
			// Both change the rules of the network namespace they run in.
			cmd := exec.Command("unshare", "-m", "-n", "--propagation", "private", "./adopt.sh", who, bin)
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			if err != nil || !strings.Contains(string(out), "ADOPT ok") {
				t.Errorf("adopting from %s failed: %v", who, err)
			}
		})
	}
}
