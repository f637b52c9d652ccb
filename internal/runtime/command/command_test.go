package command

import (
	"fmt"
	"os"
	osexec "os/exec"
	"sync/atomic"
	"testing"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
)

var instances atomic.Int64

func TestConformanceRunc(t *testing.T) {
	path, err := osexec.LookPath("runc")
	if err != nil {
		t.Skip("SKIP: there is no runc")
	}
	instance := fmt.Sprintf("c%d-%d", os.Getpid(), instances.Add(1))
	runtimetest.Run(t, runtimetest.Driver{
		New: func(t testing.TB, runRoot string) contract.Driver {
			d, err := New(Config{Name: "runc", Path: path, RunRoot: runRoot, Instance: instance})
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		// Debian's runc joins a user namespace only where it is told its mappings.
		Lacks: map[string]bool{"errno": true, "speed": true, "hooks": true, "userns-join": true},
	})
}
