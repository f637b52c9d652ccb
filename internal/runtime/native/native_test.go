package native

import (
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
)

var instances atomic.Int64

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) { l.t.Logf("%s", p); return len(p), nil }

func maker(pool int) func(t testing.TB, runRoot string) contract.Driver {
	instance := fmt.Sprintf("t%d-%d", os.Getpid(), instances.Add(1))
	return func(t testing.TB, runRoot string) contract.Driver {
		d, err := New(Config{Root: runRoot, RunRoot: runRoot, Instance: instance, PoolSize: pool, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
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
