package dockerapi

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// TestCheckpointStream: the container is only given up once the client has taken
// everything and has said so.
func TestCheckpointStream(t *testing.T) {
	f := &fake{}
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: New(Config{Checkpoints: f, Version: "test"})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	c, err := client.New(client.Config{Host: "unix://" + sock})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	seen := func(want string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); f.last() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the engine saw %q, not %q", f.last(), want)
			}
		}
	}

	var got, stages string
	err = c.Checkpoint(ctx, "web", api.CheckpointStart{Cold: true}, func(e api.CheckpointEvent) { stages += e.Stage + "." }, func(r io.Reader) error {
		b, err := io.ReadAll(r)
		got = string(b)
		return err
	})
	if err != nil || got != "tar" || stages != "files.." {
		t.Fatalf("%v, %q, %q", err, got, stages)
	}
	seen("confirmed true")

	full := errors.New("the disk is full")
	if err := c.Checkpoint(ctx, "web", api.CheckpointStart{}, nil, func(io.Reader) error { return full }); !errors.Is(err, full) {
		t.Errorf("who takes it failed: %v", err)
	}
	seen("confirmed false")
	if err := c.Checkpoint(ctx, "web", api.CheckpointStart{}, nil, func(r io.Reader) error {
		if _, err := io.ReadAll(r); err != nil {
			return err
		}
		return full // after all of it came
	}); !errors.Is(err, full) {
		t.Errorf("who takes it failed in the end: %v", err)
	}
	seen("confirmed false")

	f.err = fault.New(fault.Conflict, "it is paused")
	err = c.Checkpoint(ctx, "web", api.CheckpointStart{}, nil, func(io.Reader) error { t.Error("there is nothing to take"); return nil })
	if client.Status(err) != http.StatusConflict || !strings.Contains(err.Error(), "it is paused") {
		t.Errorf("refused at once: %v", err)
	}
}
