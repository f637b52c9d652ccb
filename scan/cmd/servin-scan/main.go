// Servin-scan finds out what is in an image, what is known against it, and who
// signed it. The command line and the engine run it when they need it; see package
// command.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/cloudos-io/cloudos/scan/internal/command"
	"github.com/cloudos-io/cloudos/scan/internal/sandbox"
	"github.com/cloudos-io/cloudos/scan/internal/stage"
)

var version = "dev"

func main() {
	if name := sandbox.Stage(); name != "" {
		sandbox.Exit(stage.Run(context.Background(), name, version, os.Args[1:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := command.Run(ctx, version, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if err != nil && err.Error() != "" {
		fmt.Fprintln(os.Stderr, "servin-scan:", err)
	}
	os.Exit(command.ExitCode(err))
}
