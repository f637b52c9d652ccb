// Command servin-runtime runs containers from OCI bundles behind the command
// line that engines expect of an OCI runtime.
package main

import (
	"os"
	"runtime"
	"runtime/debug"

	"github.com/cloudos-io/cloudos/internal/ociruntime"
)

// version is the release, set at link time.
var version = "dev"

func main() {
	// It is over in a few milliseconds: further threads and collections of
	// garbage would cost more than they save.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(64 << 20)
	os.Exit(ociruntime.Main(os.Args, version))
}
