package native

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

func TestFirst(t *testing.T) {
	dir := t.TempDir()
	d, err := New(Config{Root: dir, RunRoot: filepath.Join(dir, "run"), Instance: fmt.Sprintf("t%d", os.Getpid()), PoolSize: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	rctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); d.Run(rctx) }()
	defer func() { stop(); <-done }()
	root := runtimetest.NewRoot(t)
	for i := range 4 {
		if i == 2 {
			if err := d.Drained(ctx, true); err != nil {
				t.Fatal(err)
			}
		}
		key := contract.SandboxKey{Network: "none"}
		id := d.Reserve(key)
		log := filepath.Join(dir, id+".log")
		begin := time.Now()
		task, err := d.Start(ctx, contract.StartRequest{
			ID: id, Key: key, Spec: runtimetest.Spec("/bin/sh", "-c", "echo hello; echo bad >&2; exit 7"), RootFS: root.Mount(t), Ephemeral: true,
			Log: contract.Log{Format: "json-file", Path: log},
		})
		if err != nil {
			t.Fatal(err)
		}
		started := time.Since(begin)
		<-task.Exited()
		t.Log(i, started, time.Since(begin), task.Exit())
		b, _ := os.ReadFile(log)
		if task.Exit().Code != 7 || !strings.Contains(string(b), `{"log":"hello\n","stream":"stdout","time":"`) {
			t.Fatalf("%+v\n%s", task.Exit(), b)
		}
		if err := task.Delete(ctx); err != nil {
			t.Fatal(err)
		}
	}
}
