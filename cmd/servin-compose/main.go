// Command servin-compose runs the services of Compose files on a Servin engine.
// `servin compose` runs it.
package main

import (
	"context"
	"os"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli"
	"github.com/cloudos-io/cloudos/internal/compose"
)

func main() {
	os.Exit(compose.Main(context.Background(), cli.Config{
		Args: os.Args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, LookupEnv: os.LookupEnv, Environ: os.Environ,
		Version: api.Version, Commit: func() string { return "unknown" },
	}))
}
