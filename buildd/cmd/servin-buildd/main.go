// Command servin-buildd builds images for servind, which starts it when a build
// needs it and ends it when it is idle. It is of no use by itself.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/log"
	"github.com/moby/sys/reexec"

	"github.com/cloudos-io/cloudos/buildd/internal/engine"
	"github.com/cloudos-io/cloudos/buildd/internal/process"
	"github.com/cloudos-io/cloudos/buildd/internal/server"
	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/tracing"
)

func main() {
	if reexec.Init() {
		return
	}
	if len(os.Args) < 2 || os.Args[1] != "serve" {
		fmt.Fprintln(os.Stderr, "servin-buildd is started by servind")
		os.Exit(2)
	}
	logger := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	if err := run(logger); err != nil {
		logger.Error("the builder ends", "cause", err)
		os.Exit(1)
	}
}

func run(logger *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// What BuildKit's packages say to nobody (a client's session that ended, say) is
	// of no use; what concerns a build goes to its client.
	if err := log.SetLevel("panic"); err != nil {
		return err
	}
	if err := process.Settle(ctx); err != nil {
		return err
	}
	e, err := engine.Dial()
	if err != nil {
		return err
	}
	set, err := e.Settings(ctx)
	if err != nil {
		return fmt.Errorf("cannot ask the engine for settings: %w", err)
	}
	t := set.Tracing
	traces, err := tracing.Start(ctx, tracing.Config{Endpoint: t.Endpoint, Headers: t.Headers, Ratio: t.Ratio, Service: "servin-buildd", Version: set.Version, Instance: set.Instance, Logger: logger})
	if err != nil {
		return err
	}
	defer traces.Close()
	go func() {
		// Without an engine there is nothing to build with; being the first process
		// of its namespace, this one takes every step along.
		<-e.Gone
		os.Exit(3)
	}()
	f := os.NewFile(contract.FDListen, "listen")
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return err
	}
	handed, err := server.NewHanded()
	if err != nil {
		return err
	}
	s, err := server.New(ctx, e, set, logger)
	if err != nil {
		return err
	}
	return s.Serve(ctx, l, handed)
}
