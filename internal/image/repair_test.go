package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
)

func TestTornLayersAreUnpackedAgain(t *testing.T) {
	root := t.TempDir()
	s := newService(t, root)
	ctx := context.Background()
	l1 := layerTar(t, file{name: "d/a", body: "one"}, file{name: "h", body: "linked"})
	l2 := layerTar(t, file{name: "d/b", body: "two"}, file{name: "h2", typ: '1', link: "h"})
	if _, err := s.Load(ctx, bytes.NewReader(dockerTar(t, configFor(t, nil, l1, l2), []string{"x:1"}, l1, l2)), nil, nil); err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve(ctx, "x:1", "")
	if err != nil {
		t.Fatal(err)
	}
	// The machine stopped before the files were written.
	for _, f := range []string{r.Chain.Dirs[1] + "/d/a", r.Chain.Dirs[0] + "/d/b"} {
		if err := os.Truncate(f, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(r.Chain.Dirs[0], "h2")); err != nil {
		t.Fatal(err)
	}
	sctx := s.ctx(ctx)
	if err := s.snaps.Walk(sctx, func(_ context.Context, i snapshots.Info) error {
		if i.Labels[bootLabel] != s.boot {
			t.Errorf("%s says %q before it is on disk", i.Name, i.Labels[bootLabel])
		}
		_, err := s.snaps.Update(sctx, snapshots.Info{Name: i.Name, Labels: map[string]string{bootLabel: "an earlier boot"}}, "labels."+bootLabel)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = newService(t, root)
	r2, err := s.Resolve(ctx, "x:1", "")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(r2.Chain.Dirs, ":") != strings.Join(r.Chain.Dirs, ":") {
		t.Errorf("the layers moved: %v, were %v", r2.Chain.Dirs, r.Chain.Dirs)
	}
	for f, want := range map[string]string{r.Chain.Dirs[1] + "/d/a": "one", r.Chain.Dirs[0] + "/d/b": "two", r.Chain.Dirs[0] + "/h2": "linked"} {
		if b, err := os.ReadFile(f); string(b) != want {
			t.Errorf("%s = %q, %v; want %q", f, b, err, want)
		}
	}
	if err := s.snaps.Walk(s.ctx(ctx), func(_ context.Context, i snapshots.Info) error {
		if i.Labels[bootLabel] != "" {
			t.Errorf("%s still says %q", i.Name, i.Labels[bootLabel])
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// pullChild makes this test binary pull and remove until it is killed.
const pullChild = "SERVIN_TEST_PULL"

func pullUntilKilled() {
	root, ref, _ := strings.Cut(os.Getenv(pullChild), ";")
	ctx := context.Background()
	s, err := New(ctx, Config{Root: root})
	if err != nil {
		fmt.Println("open:", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	for {
		if err := s.Pull(ctx, PullOptions{Ref: ref}); err != nil {
			fmt.Println("pull:", err)
			os.Exit(1)
		}
		fmt.Println("pulled")
		if _, err := s.Remove(ctx, ref, RemoveOptions{}); err != nil {
			fmt.Println("remove:", err)
			os.Exit(1)
		}
	}
}

// TestKilledAnywhere kills a process that pulls and removes, at random moments,
// and looks that the next one finds a store that works, and nothing left over.
func TestKilledAnywhere(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: unpacking needs root")
	}
	reg := startRegistry(t, nil)
	img := randomImage(t, 1<<20, 3)
	seed(t, reg+"/x:1", img)
	ref := reg + "/x:1"
	root := t.TempDir()
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	for range rounds {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), pullChild+"="+root+";"+ref)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		_ = cmd.Process.Signal(unix.SIGKILL)
		said, _ := io.ReadAll(out)
		_ = cmd.Wait()
		if strings.Contains(string(said), ":") {
			t.Fatalf("the process failed: %s", said)
		}
	}
	s := newService(t, root)
	ctx := context.Background()
	if err := s.Pull(ctx, PullOptions{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve(ctx, ref, "")
	if err != nil || r.ID != configID(t, img) || len(r.Chain.Dirs) != 3 {
		t.Fatalf("%+v %v", r, err)
	}
	for _, d := range r.Chain.Dirs {
		if ents, err := os.ReadDir(d); err != nil || len(ents) == 0 {
			t.Errorf("layer %s is empty, %v", d, err)
		}
	}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if ents, err := os.ReadDir(filepath.Join(root, "layers", "snapshots")); err != nil || len(ents) != 3 {
		t.Errorf("%d layer directories, %v; want 3", len(ents), err)
	}
	if _, err := s.Remove(ctx, ref, RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	s.ready = readyCache{}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	left := 0
	_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && d.Type().IsRegular() && filepath.Ext(p) != ".db" && !strings.Contains(p, "/ingest/") {
			left++
			t.Logf("left over: %s", p)
		}
		return nil
	})
	if left > 0 {
		t.Errorf("%d files left over", left)
	}
}
