// Command servin-runtime runs containers from OCI bundles behind the command
// line that engines expect of an OCI runtime.
package main

import (
	"os"

	"github.com/cloudos-io/cloudos/internal/ociruntime"
)

func main() { os.Exit(ociruntime.Main(os.Args)) }
