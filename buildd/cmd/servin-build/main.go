// Command servin-build is `servin build`: it reads Docker's flags, opens a session
// with the engine's builder and shows what it does. The command line runs it, so
// that the command line itself links no gRPC.
package main

import (
	"context"
	"os"
	"os/signal"

	"github.com/cloudos-io/cloudos/buildd/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv)
	stop()
	os.Exit(code)
}
