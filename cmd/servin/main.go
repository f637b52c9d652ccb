// Command servin is the command line of the Servin container engine.
//
// It asks for no cgroup limits at its start, as Go programs do to choose their
// threads: that reads a mount table which grows with each container.
//
//go:debug containermaxprocs=0
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli"
)

func main() {
	// A command lives for milliseconds: collecting is seldom worth its time.
	debug.SetGCPercent(400)
	os.Exit(cli.Main(context.Background(), cli.Config{
		Args: os.Args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, LookupEnv: os.LookupEnv, Environ: os.Environ,
		Version: api.Version, Commit: commit,
	}))
}

// commit is what the toolchain recorded of the source.
func commit() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) > 12 {
				return s.Value[:12]
			}
		}
	}
	return "unknown"
}
