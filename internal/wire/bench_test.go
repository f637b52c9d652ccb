package wire_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/rootless"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/cloudos-io/cloudos/internal/wire"
)

// inProcess runs fn with an engine in this process.
func inProcess(b *testing.B, pool int, fn func(s *wire.System)) {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("SKIP: needs root for namespaces and mounts")
	}
	if x, err := shim.NewExecutable(); err != nil {
		b.Skip("SKIP: this build carries no servin-shim (make shim): ", err)
	} else {
		_ = x.Close()
	}
	dir, err := os.MkdirTemp("", "servin-bench-")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	c := &config.Config{Root: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), Pool: &pool}
	c.Defaults(false)
	s, err := wire.New(b.Context(), c, rootless.State{}, nil, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		b.Fatal(err)
	}
	err = s.Run(b.Context(), func(ctx context.Context) error {
		if _, err := s.Images.Import(ctx, busyboxTar(b), "busybox:latest", "", "", nil); err != nil {
			return err
		}
		fn(s)
		return s.Engine.SystemService().Shutdown(ctx, true)
	})
	if err != nil {
		b.Fatal(err)
	}
}

func run(b *testing.B, s *wire.System, network container.NetworkMode) {
	rc, err := s.Engine.ContainerRun(b.Context(), engine.CreateRequest{
		Config: &container.Config{Image: "busybox", Cmd: []string{"true"}}, HostConfig: &container.HostConfig{NetworkMode: network, AutoRemove: true},
	}, engine.AttachRequest{Stdout: true, Stderr: true, Stream: true})
	if err != nil {
		b.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, rc.Streams.Stdout)
	if res := <-rc.Wait; res.StatusCode != 0 {
		b.Fatal(res)
	}
	_ = rc.Streams.Close()
}

// BenchmarkRun is run --rm from the engine's door on, the backlog included.
func BenchmarkRun(b *testing.B) {
	for _, network := range []container.NetworkMode{"none", "bridge"} {
		for _, pool := range []int{0, 8} {
			b.Run(string(network)+map[int]string{0: "/cold", 8: "/parked"}[pool], func(b *testing.B) {
				inProcess(b, pool, func(s *wire.System) {
					run(b, s, network)
					for b.Loop() {
						run(b, s, network)
					}
					if err := s.Engine.SystemService().PoolDrained(b.Context(), false); err != nil {
						b.Error(err)
					}
				})
			})
		}
	}
}

// BenchmarkList is ps with 50 containers.
func BenchmarkList(b *testing.B) {
	inProcess(b, 0, func(s *wire.System) {
		for range 50 {
			if _, err := s.Engine.ContainerCreate(b.Context(), engine.CreateRequest{Config: &container.Config{Image: "busybox", Cmd: []string{"true"}}}); err != nil {
				b.Fatal(err)
			}
		}
		for b.Loop() {
			l, err := s.Engine.ContainerList(b.Context(), engine.ListOptions{All: true})
			if err != nil || len(l) != 50 {
				b.Fatal(len(l), err)
			}
		}
	})
}
