package native

import (
	"fmt"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
)

var instances atomic.Int64

func maker(pool int) func(t testing.TB, runRoot string) contract.Driver {
	return makerOn(pool, false)
}

func makerOn(pool int, unified bool) func(t testing.TB, runRoot string) contract.Driver {
	instance := fmt.Sprintf("t%d-%d", os.Getpid(), instances.Add(1))
	return func(t testing.TB, runRoot string) contract.Driver {
		d, err := New(Config{Root: runRoot, RunRoot: runRoot, Instance: instance, PoolSize: pool, Unified: unified, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
}

func TestConformanceParked(t *testing.T) {
	runtimetest.Run(t, runtimetest.Driver{New: maker(4)})
}

func TestConformanceCold(t *testing.T) {
	runtimetest.Run(t, runtimetest.Driver{New: maker(0)})
}

// TestConformanceSanitized runs the suite with a shim that traps on undefined
// behaviour.
func TestConformanceSanitized(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: -short")
	}
	bin := filepath.Join(t.TempDir(), "servin-shim")
	if out, err := osexec.Command("make", "-C", "../../../shim", "SAN=1", "OUT="+bin).CombinedOutput(); err != nil {
		t.Skipf("SKIP: cannot build the sanitized shim: %v\n%s", err, out)
	}
	t.Setenv("SERVIN_SHIM", bin)
	runtimetest.Run(t, runtimetest.Driver{New: maker(0)})
}

// TestConformanceUnified runs the suite on the cgroup v2 tree of a hybrid host,
// which may lack the controllers for limits.
func TestConformanceUnified(t *testing.T) {
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode == cgroup.V2 || !h.Unified() {
		t.Skip("SKIP: the host has no cgroup v2 tree beside v1")
	}
	for _, pool := range []int{0, 3} {
		runtimetest.Run(t, runtimetest.Driver{New: makerOn(pool, true), Lacks: map[string]bool{"limits": true}})
	}
}
