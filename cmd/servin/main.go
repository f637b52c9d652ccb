// Command servin is the command line of the Servin container engine.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/cloudos-io/cloudos/internal/cli"
)

// Set by the linker.
var (
	version = "0.1.0-dev"
	commit  = "unknown"
)

func main() {
	// A command lives for milliseconds: collecting before 64 MB is wasted time.
	debug.SetGCPercent(400)
	os.Exit(cli.Main(context.Background(), cli.Config{
		Args: os.Args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, LookupEnv: os.LookupEnv, Environ: os.Environ,
		Version: version, Commit: commit,
	}))
}
